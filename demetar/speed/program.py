"""A compiled program as XLA prints it: computations of instructions, what they read and write.

Only what prediction and the gate ask for is read: shapes, operands, called computations and how
often a loop runs.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re

# `%name = shape operation(operands), attributes`; a shape may be a tuple, with layouts in it.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# Type, sizes, layout; `S(1)` in a layout is the fast memory of a TPU's core.
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|select|scatter|comparator)=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: of its result.
      operation: such as `fusion` or `all-reduce-start`.
      arrays: type and sizes of the results, more than one if it is a tuple.
      operands: names.
      moved: bytes of the results that lie in main memory.
      argument: the text between the parentheses.
      attributes: the text after them.
    """

    name: str
    operation: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    moved: float
    argument: str
    attributes: str

    @property
    def elements(self) -> int:
        """Numbers in all results."""
        return sum(math.prod(sizes) for _, sizes in self.arrays)

    @property
    def called(self) -> list[str]:
        """Computations that are part of it."""
        return _CALLED.findall(self.attributes)

    @property
    def source(self) -> str:
        """The path in the traced function that it comes from."""
        return (re.search(r'op_name="([^"]*)"', self.attributes) or ["", ""])[1]

    @property
    def target(self) -> str:
        """Of a custom call: which."""
        return (re.search(r'custom_call_target="([^"]*)"', self.attributes) or ["", ""])[1]

    def dimensions(self, key: str) -> list[int]:
        """Of an attribute such as `lhs_contracting_dims={1}`, here or in a backend's config."""
        plain = re.search(rf"{key}=\{{([\d,]*)\}}", self.attributes)
        quoted = re.search(rf'"{key.replace("dims", "dimensions")}":\[([^\]]*)\]', self.attributes)
        found = plain or quoted
        return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


class Program:
    """A program's text, read.

    Attributes:
      computations: name -> its instructions, the root last.
      entry: name of the one that the host starts.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, inside = "", []
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                inside = self.computations[start[2]] = []
                self.entry = start[2] if start[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                inside.append(_read(*found.groups()))

    @functools.cached_property
    def named(self) -> dict[str, dict[str, Instruction]]:
        """Computation -> name -> its instruction."""
        return {name: {x.name: x for x in lines} for name, lines in self.computations.items()}

    @functools.cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """Computation -> name -> the instructions that read it."""
        found = {}
        for name, instructions in self.computations.items():
            found[name] = collections.defaultdict(list)
            for instruction in instructions:
                for operand in instruction.operands:
                    found[name][operand].append(instruction)
        return found

    @property
    def sources(self) -> dict[str, str]:
        """Instruction -> the path in the traced function that it comes from, where there is one."""
        lines = (line for part in self.computations.values() for line in part)
        return {line.name: line.source for line in lines if line.source}

    def scheduled(self, name: str = "", times: int = 1):
        """(instruction, its computation, how often) in order; loops and calls gone through."""
        name = name or self.entry
        for instruction in self.computations[name]:
            if instruction.operation == "while":
                turns = times * trip_count(instruction)
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)[1]
                yield from self.scheduled(body, turns)
            elif instruction.operation == "call":
                yield from self.scheduled(instruction.called[0], times)
            elif instruction.operation == "conditional":
                # `true_computation=%a`, or `branch_computations={%a, %b}`.
                listed = re.findall(
                    r"branch_computations=\{[^}]*|(?:true|false)_computation=%[\w.\-]+",
                    instruction.attributes,
                )
                names = _OPERAND.findall(" ".join(listed))
                longest = max(names, key=lambda name: len(self.computations[name]))
                yield from self.scheduled(longest, times)
            else:
                yield instruction, name, times


def trip_count(loop: Instruction) -> int:
    """How often a loop's body runs; 1 if the compiler does not say."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    return int(known[1]) if known else 1


def _read(name: str, shape: str, operation: str, rest: str) -> Instruction:
    # To the parenthesis that closes the operands: there may be others in them.
    depths = itertools.accumulate((x in "([{") - (x in ")]}") for x in rest)
    end = next((k for k, depth in enumerate(depths) if depth < 0), len(rest))
    written = [
        (kind, tuple(int(size) for size in sizes.split(",") if size), layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]
    arrays = tuple((kind, sizes) for kind, sizes, _ in written)
    far = [(kind, sizes) for kind, sizes, layout in written if "S(" not in layout]
    operands = tuple(_OPERAND.findall(rest[:end])) if operation != "constant" else ()
    return Instruction(
        name, operation, arrays, operands, bytes_of(far), rest[:end], rest[end + 1 :]
    )


def bytes_of(arrays) -> float:
    """Of arrays, each as (type, sizes)."""
    return sum(math.prod(sizes) * _bits(kind) / 8 for kind, sizes in arrays)


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(_BITS.search(kind)[0])
