"""Machines that need not exist: chips by their published peaks, devices to compile for, and the
collectives of a program compiled for them.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re

import numpy as np
from jax.experimental import topologies

from data_pipelines.errors import UserError, suggest
from demetar.speed.program import Program, bytes_of

FOLDER = pathlib.Path(__file__).parent / "accelerators"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_TABLE = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # of numbers of chips: sizes, order of the axes


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A chip, by its published peaks; a file of demetar/speed/accelerators.

    Attributes:
      kind: `tpu` or `cuda`, the compiler.
      memory_bytes: of one chip.
      peak_flops: matrix products, by compute type, operations/s.
      memory_bytes_per_s: of its memory.
      near_bytes_per_s: to the chips of its node, one direction.
      far_bytes_per_s: to others.
      chips_near: how many are near.
      launch_seconds: from the start of one kernel to that of the next, at least; a guess.
      functions_per_s: exponentials and the like; 0: not known, and taken for free.
      source: of these numbers, for a person.
      target_config: file beside this one that describes a GPU to the compiler.
    """

    kind: str
    memory_bytes: int
    peak_flops: dict[str, float]
    memory_bytes_per_s: float
    near_bytes_per_s: float
    far_bytes_per_s: float
    chips_near: int
    launch_seconds: float
    source: str
    functions_per_s: float = 0.0
    target_config: str = ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the compiled step.

    Attributes:
      name: of the operation.
      group: how many chips take part.
      near: how many of a group share a node.
      payload: bytes of the whole array, summed or gathered.
      over_data: whether a group crosses copies of the state.
    """

    name: str
    group: int
    near: int
    payload: float
    over_data: bool = False

    def seconds(self, chip: Accelerator) -> float:
        """Rings within the nodes, then between them, each chip with its part; twice to sum.

        (k - 1) / k of the payload over the near links for k chips of a node; (m - 1) / m of a
        k-th over the far ones for m nodes.
        """
        nodes = self.group // self.near
        near = (self.near - 1) / self.near * self.payload / chip.near_bytes_per_s
        far = (nodes - 1) / nodes * self.payload / self.near / chip.far_bytes_per_s
        return (2 if self.name == "all-reduce" else 1) * (near + far)


def read_topology(text: str) -> tuple[str, Accelerator, tuple[int, ...]]:
    """`h100:4x8` -> name, chip, sizes."""
    name, _, sizes = text.rpartition(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or not name:
        raise UserError(
            f"--topology is {text!r}; write it as h100:4x8 (nodes x GPUs) or v5e:16x16."
        )
    known = sorted(file.stem for file in FOLDER.glob("*.json"))
    file = pathlib.Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not file.exists():
        raise UserError(
            f"No accelerator {name!r}.{suggest(name, known)} Known: {', '.join(known)}; or "
            "the path of a .json file like theirs."
        )
    try:
        fields = json.loads(file.read_text())
        if fields.get("target_config"):
            fields["target_config"] = str(file.parent / fields["target_config"])
        return name, Accelerator(**fields), tuple(int(n) for n in sizes.split("x"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} does not describe an accelerator: {error}") from error


def planned_devices(text: str):
    """Chip and devices of a topology that need not exist."""
    name, chip, sizes = read_topology(text)
    extra, module = {
        "tpu": ("plan-tpu", "libtpu"),
        "cuda": ("plan-gpu", "jax_cuda12_plugin"),
    }[chip.kind]
    if importlib.util.find_spec(module) is None:
        raise UserError(f'The compiler for {name} is missing: pip install -e ".[{extra}]".')
    try:
        if chip.kind == "tpu":
            more = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
            found = topologies.get_topology_desc(text, platform="tpu", **more)
        else:
            if len(sizes) != 2:
                raise UserError(f"--topology={text}: GPUs are written as nodes x GPUs, {name}:4x8.")
            found = topologies.get_topology_desc(
                platform="cuda",
                target_config=pathlib.Path(chip.target_config).read_text(),
                topology="x".join(map(str, (1, *sizes))),
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"The compiler does not know --topology={text}: {error}") from error
    return chip, found.devices


def collectives(program: Program, chips: int, chips_near: int, unit: int) -> dict[str, Collective]:
    """Those of a program, by the names of their instructions.

    Args:
      program: compiled.
      chips: that run it.
      chips_near: see `Accelerator`.
      unit: chips that hold one copy of the state.
    """
    found = {}
    for instruction in (x for lines in program.computations.values() for x in lines):
        name = instruction.operation.removesuffix("-start")
        if name not in COLLECTIVES:
            continue
        arrays = instruction.arrays
        if len(arrays) == 2 * len(instruction.operands):  # (operands, results)
            arrays = arrays[len(instruction.operands) :]
        members = first_group(instruction.attributes, chips)
        payload = bytes_of(arrays) * (len(members) if name == "reduce-scatter" else 1)
        near = int(np.bincount(members // chips_near).max())
        over_data = len(set(members // unit)) > 1
        found[instruction.name] = Collective(name, len(members), near, payload, over_data)
    return found


def first_group(text: str, chips: int) -> np.ndarray:
    """Numbers of the chips of one group of a collective, in any of the ways XLA writes groups.

    `{}` all chips; `{{0,1},{2,3}}` each group; `[groups,size]<=[dims]T(order)` rows of a table;
    `mesh['a'=2,'b'=4] {'b'}` axes of a mesh, since jax 0.11 the usual way.

    Raises:
      ValueError: groups are written in another way.
    """
    written = text.partition("replica_groups=")[2]
    if not written or written.startswith("{}"):
        return np.arange(chips)
    if listed := re.match(r"\{\{([\d,]+)\}", written):
        return np.array(_numbers(listed[1]))
    if table := re.match(rf"\[\d+,(\d+)\]<={_TABLE}", written):
        return _table(*table.groups()[1:])[: int(table[1])]
    if mesh := re.match(r"mesh\[([^]]+)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", written):
        return _mesh_group(*mesh.groups())
    raise ValueError(f"Groups of a collective that this version cannot read: {written[:200]}")


def _mesh_group(axes: str, order: str | None, grouped: str) -> np.ndarray:
    """The first group of `mesh['a'=2,'b'=4], device_ids=(order) {'a','b':(2)2}`.

    `'b':(2)2` is a part of an axis: its second factor of 2, after a first one of 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    if order is None:
        numbers = np.arange(math.prod(sizes.values()))
    elif table := re.fullmatch(_TABLE, order):
        numbers = _table(*table.groups())
    else:
        numbers = np.array(_numbers(order))
    taken = {name: np.zeros(1, int) for name in sizes}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        before, size = int(before or 1), int(size or sizes[name])
        stride = sizes[name] // (before * size)
        taken[name] = np.add.outer(taken[name], stride * np.arange(size)).ravel()
    return numbers.reshape(tuple(sizes.values()))[np.ix_(*taken.values())].ravel()


def _table(sizes: str, order: str | None) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2 ... as an array of these sizes, transposed, in one row."""
    numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (numbers.transpose(_numbers(order)) if order else numbers).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
