"""Cormorant: complex weights are (real, imaginary); its components are those of complex harmonics,
ours of real ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from demetar.models.cormorant import Cormorant, invariants, solid_harmonics

from .common import ELEMENTS, TARGET, System, intermediate


def model(golden, meta):
    options = meta["options"]
    (width,), (order,), (gain,) = options["num_channels"], options["maxl"], options["level_gain"]
    assert options["max_sh"] == [order]
    trigonometric, powers = options["basis_set"]
    return Cormorant(
        targets=(TARGET,),
        elements=ELEMENTS,
        width=width,
        max_order=order,
        num_levels=options["num_cg_levels"],
        num_trigonometric=trigonometric,
        num_powers=powers,
        hard_cutoff=options["hard_cut_rad"],
        soft_cutoff=options["soft_cut_rad"],
        cutoff_width=options["soft_cut_width"],
        gain=gain,
        dtype=jnp.float64,
    )


def official(params, golden, meta):
    out = {}

    def linear(name, ours):
        out[f"{name}.weight"], out[f"{name}.bias"] = ours["kernel"].T, ours["bias"]

    def mlp(name, ours):
        linear(f"{name}.linear.0", ours["hidden"])
        linear(f"{name}.linear.1", ours["out"])

    def basis(name, ours):
        out[f"{name}.scales"] = ours["scale"].reshape(1, 1, 1, -1)
        out[f"{name}.phases"] = ours["phase"].reshape(1, 1, 1, -1)

    options = meta["options"]
    mlp("input_func_atom.mlps.0", params["input"]["mlp"])
    basis("input_func_atom.rad_filts.0", params["input_basis"])
    linear("input_func_atom.rad_filts.0.linear.0", params["input"]["radial"])
    mlp("output_layer_atom.mlp1", params["atom"])
    mlp("output_layer_atom.mlp2", params["graph"])
    for k in range(options["num_cg_levels"]):
        basis(f"rad_funcs.rad_funcs.{k}", params[f"basis_{k}"])
        edges, atoms = params[f"edges_{k}"], params[f"atoms_{k}"]
        name = f"cormorant_cg.edge_levels.{k}"
        out[f"{name}.mask_layer.soft_cut_rad"] = edges["radius"].reshape(1, 1, 1, -1)
        out[f"{name}.mask_layer.soft_cut_width"] = edges["decay"].reshape(1, 1, 1, -1)
        for order in range(options["maxl"][0] + 1):
            inputs = [edges[name] for name in ("edges", "dots", "basis") if name in edges]
            kernel = np.concatenate([x[:, order] for x in inputs if order < x.shape[1]])
            out[f"{name}.cat_mix.mix_reps.weights.{order}"] = kernel.swapaxes(0, 1)
            kernel = atoms[f"order_{order}"].swapaxes(0, 1)
            out[f"cormorant_cg.atom_levels.{k}.cat_mix.mix_reps.weights.{order}"] = kernel
    return out


def to_complex(order):
    """[2 l + 1 complex, 2 l + 1 ours]: the conjugate harmonics of the paper about z are this
    matrix times (-i)^l times ours, which are about y."""
    size = 2 * order + 1
    matrix = np.zeros((size, size), complex)
    matrix[order, order] = 1
    for m in range(1, order + 1):
        matrix[order - m, [order + m, order - m]] = np.array([1, 1j]) / math.sqrt(2)
        matrix[order + m, [order + m, order - m]] = (-1) ** m * np.array([1, -1j]) / math.sqrt(2)
    d = np.random.default_rng(0).normal(size=(4 * size, 3))
    with jax.ensure_compile_time_eval():
        about_y, about_z = (np.asarray(solid_harmonics(order, x)) for x in (d, d[:, [1, 2, 0]]))
    turn = np.linalg.lstsq(about_y, about_z)[0].T
    return 1j**order * matrix @ turn


def layers(captured, predictions, batch, golden, meta):
    batch_size, num_nodes = batch.node_mask.shape
    orders = range(meta["options"]["maxl"][0] + 1)
    num_levels = meta["options"]["num_cg_levels"]
    parts = lambda x: jnp.stack([x.real, x.imag], axis=-1)
    out = {"input_l0": parts(intermediate(captured, "input"))}

    def vectors(order, ours):
        return parts(jnp.einsum("...m,km->...k", ours, to_complex(order)))

    levels = [intermediate(captured, f"atoms_{k}") for k in range(num_levels)]
    for k, features in enumerate(levels):
        for order in orders:
            out[f"atom_{k}_l{order}"] = vectors(order, features[order])
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    scalars = invariants([[flat(x) for x in level] for level in levels])
    out["scalars"] = scalars.reshape(batch_size, num_nodes, -1, 1, 2)
    edges, n = intermediate(captured, "edges_0")[0], len(golden["harmonics_of_first_graph_l0"])
    d = batch.position[0, :n, None] - batch.position[0, None, :n]
    for order in orders:
        ours = (-1j) ** order * solid_harmonics(order, d)
        out[f"harmonics_of_first_graph_l{order}"] = vectors(order, ours)[:, :, None]
        out[f"edge_0_of_first_graph_l{order}"] = parts(edges[:n, :n, order])
    return out


SYSTEMS = {"cormorant": System(model, official, layers=layers)}
