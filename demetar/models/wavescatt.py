"""WaveScatt: regression on solid-harmonic scattering coefficients (Eickenberg et al. 2018).

The coefficients phi of a molecule are `graph.graph_feature`, computed once before training,
standardised and decorrelated (`data_pipelines/scattering`). The paper fits sums of products of
them, chosen one by one; here all products have weights, of low rank, and are learned:

    y = b + w . phi                                   linear
        + sum_r c_r (u_r . phi) (v_r . phi)           bilinear, `order` 2
        + sum_r d_r (p_r . phi) (q_r . phi) (s_r . phi)         trilinear, `order` 3

The closed formula for the linear one is `benchmarks/scattering.py`.

The coefficients stay the same when the molecule shifts or its atoms are numbered anew. They stay
only about the same when it turns: the grid does not turn.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from data_pipelines.errors import UserError
from data_pipelines.graph import Array, Graph
from demetar.models.base import GraphModel
from demetar.models.layers import Dense


class WaveScatt(GraphModel):
    """Predicts graph targets from features of the graph; it reads no atom.

    Attributes:
      order: most factors of a product, 1 to 3.
      rank: products of each order above 1.
      dtype: of products and activations.
    """

    # A feature belongs to the whole graph: the read-outs are the same to this model.
    READOUTS: ClassVar = ("cls", "sum", "mean")
    CHOICES: ClassVar = {"order": (1, 2, 3)}
    symmetries: ClassVar = frozenset({"translation", "permutation"})
    READS: ClassVar = frozenset({"graph_feature"})

    order: int = 3
    rank: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        if graph.graph_feature is None:
            raise UserError(
                "Model 'wavescatt' needs features of graphs, which these data do not have: set "
                "config.data.graph_features to 'scattering'."
            )
        feature_1xP = jnp.where(graph.graph_mask, graph.graph_feature, 0)[None]
        names = [target.name for target in self.targets]
        dense = lambda features, name, **more: Dense(features, dtype=self.dtype, name=name, **more)
        # Products begin at 0: the model is linear at first.
        zeros = nn.initializers.zeros
        values_1xT = dense(len(names), "linear", kernel_init=zeros)(feature_1xP)
        for order in range(2, self.order + 1):
            factors_1xR = 1.0
            for number in range(order):
                factor = dense(self.rank, f"order_{order}_factor_{number}", use_bias=False)
                factors_1xR = factors_1xR * factor(feature_1xP)
            last = dense(len(names), f"order_{order}", use_bias=False, kernel_init=zeros)
            values_1xT = values_1xT + last(factors_1xR)
        values_T = values_1xT[0].astype(graph.position.dtype)
        return dict(zip(names, values_T, strict=True))
