"""Counts the floating-point operations of a function from its jaxpr, without running it.

Exact for matrix products, 2 M N K each; everything else counts one operation for each element
of its result. Over all devices of a mesh. The compiler's own count differs a little: it fuses,
drops dead code and counts a transcendental function as it likes.
"""

import dataclasses
import math

import jax
import numpy as np


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
