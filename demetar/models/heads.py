"""Read-outs with the form of their quantity: a dipole moment, and the extent of the electrons.

Both are those of SchNetPack 2.0 (Schütt et al. 2023) in idea, for tokens that are invariant. Labels
are standardised, so neither quantity starts at 0 there: one head learns a constant, the other one
for each atom.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from demetar.models.layers import Array, Dense, Mlp, safe_norm


class Dipole(nn.Module):
    """| Σ_i q_i r_i + Σ_i Σ_c g_ic v_ic | + b: partial charges, and a dipole of each atom.

    Of neutral molecules: charges q are read from the tokens, less their mean, so that their sum is
    0 and the dipole does not depend on the origin of r. Vectors v turn with the molecule; g is read
    from the tokens.

    Attributes:
      width: of the hidden layer.
      dtype: of all of it.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, relative_Nx3: Array, mask_N: Array, token_NxD: Array, vector_Nx3xC: Array
    ) -> Array:
        mask_Nx1 = mask_N[:, None]
        hidden_NxD = nn.silu(Dense(self.width, dtype=self.dtype, name="hidden")(token_NxD))
        charge = Dense(1, use_bias=False, dtype=self.dtype, name="charge")
        charge_Nx1 = jnp.where(mask_Nx1, charge(hidden_NxD), 0)
        mean = charge_Nx1.sum() / jnp.maximum(mask_N.sum(), 1)
        charge_Nx1 = jnp.where(mask_Nx1, charge_Nx1 - mean, 0)
        gate = Dense(vector_Nx3xC.shape[-1], dtype=self.dtype, name="gate")
        gate_NxC = jnp.where(mask_Nx1, gate(hidden_NxD), 0)
        own_Nx3 = jnp.einsum("nc,nxc->nx", gate_NxC, vector_Nx3xC.astype(self.dtype))
        dipole_3 = (charge_Nx1 * relative_Nx3 + own_Nx3).sum(axis=0)
        return safe_norm(dipole_3) + self.param("constant", nn.initializers.zeros, ())


class Extent(nn.Module):
    """Σ_i (q_i |r_i|² / l² + a_i): electrons about the centre of mass, and about each atom.

    Attributes:
      width: of the hidden layer.
      length: l, angstrom, that makes the squares numbers near 1.
      dtype: of all of it.
    """

    width: int
    length: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, relative_Nx3: Array, mask_N: Array, token_NxD: Array) -> Array:
        of_atom_Nx2 = Mlp(self.width, 2, self.dtype, name="electrons")(token_NxD)
        square_N = jnp.square(relative_Nx3 / self.length).sum(axis=-1)
        extent_N = of_atom_Nx2[:, 0] * square_N + of_atom_Nx2[:, 1]
        return jnp.where(mask_N, extent_N, 0).sum()
