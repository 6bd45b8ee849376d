"""Counts the floating-point operations of a function from its jaxpr, without running it.

Exact for matrix products, 2 M N K each; everything else counts one operation for each element
of its result. Over all devices of a mesh. The compiler's own count differs a little: it fuses,
drops dead code and counts a transcendental function as it likes.

`GraphCost` says what the model itself asks for, graph by graph, padding left out: the numerator
of a share of the peak that padding, recomputation and one-hot tricks cannot raise.
"""

import dataclasses
import math

import jax
import numpy as np

from demetar.models.ops import SELECTS


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program does.

    Attributes:
      matmul: floating-point operations in matrix products.
      other: elements computed by everything else.
      matmul_bytes: read and written by the matrix products, each by itself.
    """

    matmul: float = 0.0
    other: float = 0.0
    matmul_bytes: float = 0.0

    def __add__(self, more: "Count") -> "Count":
        return Count(
            self.matmul + more.matmul,
            self.other + more.other,
            self.matmul_bytes + more.matmul_bytes,
        )

    def __mul__(self, times: float) -> "Count":
        return Count(self.matmul * times, self.other * times, self.matmul_bytes * times)

    @property
    def total(self) -> float:
        return self.matmul + self.other


def count(function, *args) -> Count:
    """The count of `function(*args)`; arguments may be `ShapeDtypeStruct`s."""
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr) -> Count:
    total = Count()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [_of_jaxpr(j) for j in _inner_jaxprs(params)]
        if name == "dot_general":
            total += _of_dot(equation)
        elif params.get("name") in SELECTS:
            pass  # a gather or scatter, as a product with ones and zeros: nothing of the model
        elif name == "cond":
            total += max(inner, key=lambda c: c.total)
        elif name == "scan":
            total += inner[0] * params["length"]
        elif name == "shard_map":
            # Written for one device; the axes left to the compiler are divided by it.
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += inner[0] * devices
        elif inner:  # jit, custom derivatives, remat: called once
            total += inner[0]
        else:
            total += Count(other=_elements(equation))
    return total


def _inner_jaxprs(params) -> list:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                found.append(item)
            elif hasattr(item, "jaxpr"):
                found.append(item.jaxpr)
    return found


def _of_dot(equation) -> Count:
    left, right = (v.aval for v in equation.invars)
    result = equation.outvars[0].aval
    (contract, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(left.shape[d] for d in contract)
    size = lambda aval: math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
    return Count(
        matmul=2.0 * math.prod(result.shape) * depth,
        matmul_bytes=float(size(left) + size(right) + size(result)),
    )


# Moves data, or is free once fused.
_MOVES = frozenset(
    "all_gather axis_index broadcast_in_dim concatenate convert_element_type copy dynamic_slice "
    "expand_dims gather iota pad psum reduce_scatter reshape rev sharding_constraint slice split "
    "squeeze stop_gradient transpose".split()
)


def _elements(equation) -> float:
    if equation.primitive.name in _MOVES:
        return 0.0
    shapes = [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
    return float(sum(math.prod(shape) for shape in shapes))


@dataclasses.dataclass(frozen=True)
class GraphCost:
    """Operations of the model in one training step, forward and backward, of single graphs.

    A count of a traced model is a polynomial of the nodes n and edges e of a graph, of second
    degree; it is found from counts at a few sizes that the data have.

    Attributes:
      matmul: coefficients of (1, n, e, n^2, n e, e^2), operations of matrix products.
      memory: the same of bytes: products read and write, everything else is written once.
      deviation: largest difference to a count, one of them left out of the fit, over the largest.
    """

    matmul: np.ndarray
    memory: np.ndarray
    deviation: float

    def flops(self, num_nodes, num_edges) -> np.ndarray:
        """Of graphs with these numbers of nodes and edges."""
        return _powers(num_nodes, num_edges) @ self.matmul

    def bytes(self, num_nodes, num_edges) -> np.ndarray:
        """Of graphs with these numbers of nodes and edges, each computed by itself."""
        return _powers(num_nodes, num_edges) @ self.memory


def _powers(num_nodes, num_edges) -> np.ndarray:
    n, e = np.asarray(num_nodes, float), np.asarray(num_edges, float)
    return np.stack([np.ones_like(n), n, e, n * n, n * e, e * e], axis=-1)


def graph_cost(gradient, example, sizes_Gx2: np.ndarray) -> GraphCost:
    """Counts `gradient` at up to seven of the sizes and interpolates.

    Args:
      gradient: of a batch, what is counted.
      example: (nodes, edges) -> the arguments of `gradient` for a batch of one such graph, as
        `ShapeDtypeStruct`s.
      sizes_Gx2: nodes and edges of the graphs of a data set.
    """
    known = np.unique(sizes_Gx2, axis=0)
    known = known[known[:, 1] > 0] if known[:, 1].any() else known
    picked = known[np.unique(np.linspace(0, len(known) - 1, 7).round().astype(int))]
    counts = [count(gradient, *example(int(n), int(e))) for n, e in picked]
    matmul = np.array([c.matmul for c in counts])
    memory = np.array([c.matmul_bytes + 4 * c.other for c in counts])
    powers = _powers(*picked.T)
    # In units of the largest: the least squares of what is nearly a line stay well conditioned.
    scale = np.maximum(powers.max(axis=0), 1.0)
    held_out = np.zeros(len(picked), bool)
    held_out[len(picked) // 2] = len(picked) == 7
    fit = lambda y: np.linalg.lstsq(powers[~held_out] / scale, y[~held_out], rcond=None)[0] / scale
    coefficients = fit(matmul)
    deviation = np.abs(powers @ coefficients - matmul).max() / max(matmul.max(), 1.0)
    return GraphCost(coefficients, fit(memory), float(deviation))
