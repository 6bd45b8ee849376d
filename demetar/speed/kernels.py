"""What a compiled program launches, what a launch does, and what could differ between two runs."""

import collections
import dataclasses
import math
import re

from demetar.speed.program import Instruction, Program, bytes_of

# What the host or another instruction does, or nobody.
_NO_LAUNCH = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "opt-barrier async-update partition-id replica-id".split()
)
_PRODUCT_CALLS = ("__cublas$gemm", "__cublas$lt$matmul")
_OURS = "__gpu$xla.gpu.triton"  # a kernel of demetar/models/fused_attention.py
# Whose results, with `xla_gpu_deterministic_ops`, are the same each time.
_DETERMINISTIC_CALLS = (*_PRODUCT_CALLS, "__cub$DeviceRadixSort", _OURS)
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")  # of a TPU
# Functions that take longer than an addition -> how many exponentials long, on a CPU.
_FUNCTIONS = {
    **dict.fromkeys(("exponential", "exponential-minus-one", "log", "tanh", "logistic", "sqrt"), 1),
    "log-plus-one": 2,
    "rsqrt": 4,
    **dict.fromkeys(("cosine", "sine", "cbrt", "erf"), 5),
    "power": 9,
}
_PARTS = frozenset("slice dynamic-slice gather".split())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or as many as a loop makes of it.

    Attributes:
      name: in the program.
      operation: of XLA.
      source: path in the traced function.
      times: how often a step launches it.
      product: floating-point operations in matrix products, each time.
      functions: evaluations of exponentials and the like, in units of one, each time.
      bytes: read and written, each time; of an operand only the part that is read.
      waits_for: name of the kernel whose end it is, if it is the end of one.
    """

    name: str
    operation: str
    source: str
    times: int
    product: float
    functions: float
    bytes: float
    waits_for: str = ""


def kernels_of(program: Program) -> list[Kernel]:
    """All launches in the order of the schedule, waits for what was started among them."""
    return [
        Kernel(
            name=instruction.name,
            operation=instruction.operation,
            source=instruction.source,
            times=times,
            product=_product_flops(program, instruction, computation),
            functions=_functions(program, instruction),
            bytes=_bytes(program, instruction, computation),
            waits_for=instruction.operands[0] if instruction.operation.endswith("-done") else "",
        )
        for instruction, computation, times in program.scheduled()
        if _is_launched(instruction) or instruction.operation.endswith("-done")
    ]


def launches(program: Program) -> collections.Counter:
    """How many launches of each kind, those of a loop's body once."""
    return collections.Counter(
        instruction.operation
        for instruction, _, _ in program.scheduled()
        if _is_launched(instruction)
    )


def _is_launched(instruction: Instruction) -> bool:
    operation = instruction.operation
    return not (
        operation in _NO_LAUNCH or operation.endswith("-done") or instruction.target in _FREE_CALLS
    )


def may_differ(program: Program) -> list[str]:
    """Instructions whose result could depend on which thread comes first; none is expected.

    A scatter that adds to one place twice does, and so does what selects and scatters; the largest
    or least of some numbers is the same in any order. A call of a library is trusted if its name is
    known here. Autotuning leaves no trace: the flags of a run forbid it.
    """
    found = []
    for instruction in (x for lines in program.computations.values() for x in lines):
        if instruction.operation == "custom-call":
            fine = instruction.target in _DETERMINISTIC_CALLS
        elif instruction.operation == "scatter":
            applied = program.computations[instruction.called[0]][-1]
            fine = "unique_indices=true" in instruction.attributes
            fine |= applied.operation in ("maximum", "minimum")
        else:
            fine = instruction.operation not in ("select-and-scatter", "rng")
        if not fine:
            words = (instruction.operation, instruction.target, instruction.name)
            found.append(f"{' '.join(filter(None, words))} of {instruction.source}")
    return found


# --- costs ---------------------------------------------------------------------------------------


def _inside(program: Program, instruction: Instruction) -> list[tuple[Instruction, str]]:
    """What a fusion does, with the computations of fusions in it; else the instruction itself."""
    if instruction.operation != "fusion":
        return []
    name = instruction.called[0]
    found = []
    for part in program.computations[name]:
        found += _inside(program, part) or [(part, name)]
    return found


def _product_flops(program: Program, instruction: Instruction, computation: str) -> float:
    if instruction.target == _OURS:
        return _flops_of_attention(program, instruction, computation)
    parts = _inside(program, instruction) or [(instruction, computation)]
    return sum(
        _flops_of_product(program, part, name)
        for part, name in parts
        if part.operation in ("dot", "convolution") or part.target in _PRODUCT_CALLS
    )


def _flops_of_attention(program: Program, attention: Instruction, computation: str) -> float:
    """Two products forward, five backward, where the weights are computed again."""
    named = program.named[computation]
    # [..., N, H, d] and [..., M, H, 2, d].
    queries, keys = (named[name].arrays[0][1] for name in attention.operands[:2])
    products = 2 if len(attention.arrays) == 1 else 5
    return 2.0 * products * math.prod(queries) * keys[-4]


def _flops_of_product(program: Program, product: Instruction, computation: str) -> float:
    """2 M N K of each matrix of a batch."""
    named = program.named[computation]
    ((_, left),) = named[product.operands[0]].arrays
    result = math.prod(product.arrays[0][1])
    if product.operation == "convolution":
        ((_, right),) = named[product.operands[1]].arrays
        depth = _depth_of_convolution(product, left, right)
    else:
        depth = math.prod(left[d] for d in product.dimensions("lhs_contracting_dims"))
    return 2.0 * result * depth


def _depth_of_convolution(product: Instruction, left, right) -> float:
    """Numbers that are added up for one of the result: a TPU's products are convolutions.

    `dim_labels=0bf_0io->0bf`: of the left side, the right side and the result. An axis of numbers
    is one of a batch if the result has all of it, else it is added up.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes).groups()
    sides = zip(labels, (left, right, product.arrays[0][1]), strict=True)
    of_left, of_right, of_result = (dict(zip(*side, strict=True)) for side in sides)
    added = [of_left[axis] / of_result[axis] for axis in of_left if axis.isdigit()]
    return of_right["i"] * math.prod(max(1.0, ratio) for ratio in added)


def _functions(program: Program, instruction: Instruction) -> float:
    parts = _inside(program, instruction) or [(instruction, "")]
    return sum(_FUNCTIONS.get(part.operation, 0) * part.elements for part, _ in parts)


def _bytes(program: Program, instruction: Instruction, computation: str) -> float:
    if instruction.operation.endswith("-done"):
        return 0.0
    if instruction.operation.endswith("-start"):
        # A copy: what it reads is among its results, whole even if a part is taken.
        return min(bytes_of([array]) for array in instruction.arrays[:2])
    named = program.named[computation]
    if instruction.target == _OURS:  # which is given keys and values twice
        return sum(named[name].moved for name in set(instruction.operands)) + instruction.moved
    read = [named[name].moved if name in named else 0.0 for name in instruction.operands]
    written = instruction.moved
    if instruction.target in _PRODUCT_CALLS:  # whose second result is room to work in
        written = bytes_of(instruction.arrays[:1])
    if instruction.operation == "fusion":
        name = instruction.called[0]
        inside = program.computations[name]
        for x in inside:
            if x.operation == "parameter":
                k = int(x.argument)
                read[k] = min(read[k], _bytes_read(program, x, name))
        if inside[-1].operation == "dynamic-update-slice":
            written = 2 * program.named[name][inside[-1].operands[1]].moved
    elif instruction.operation in _PARTS:
        read = [instruction.moved]
    return sum(read) + written


def _bytes_read(program: Program, value: Instruction, computation: str) -> float:
    """Of a value inside a fusion: all of it, or the parts that are taken from it."""
    users = program.users[computation][value.name]
    total = 0.0
    for user in users:
        if user.operation in _PARTS and user.operands[0] == value.name:
            total += user.moved
        elif user.operation == "bitcast":
            total += _bytes_read(program, user, computation)
        elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # written in place
        else:
            return value.moved
    return min(total, value.moved)
