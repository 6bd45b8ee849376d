"""Predictions for a whole file: chunk by chunk, resumable, in the order of the input.

    rows --made into molecules, on all cores--> Model --> OUT.parts/000012.npz
    rows again + parts, in order, as they come ---------> OUT

A chunk is 8,192 rows; its part holds what was predicted, and is whole or absent. After a kill the
same command goes on with the chunks that are missing, and the output has the same bytes. Several
processes share the chunks by number; process 0 writes the output.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from data_pipelines.molecules import readers, writers
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.packing import pack_molecules, unpack_molecules
from data_pipelines.molecules.parallel import map_rows
from data_pipelines.molecules.record import Molecule, Refusal, Row
from demetar.inference import inputs
from demetar.inference.model import Model, batch_size_for
from demetar.inference.parts import Part
from demetar.job.place import Place

ROWS_OF_A_CHUNK = 8_192
_ROWS_OF_A_BLOCK = 64  # that a worker gets at once
_BLOCKS_AHEAD = 2 * ROWS_OF_A_CHUNK // _ROWS_OF_A_BLOCK  # made while accelerators compute
# A CPU that computes has no core to spare: both at once take the caches from each other. As many as
# are made while the part before is written.
_BLOCKS_AHEAD_ON_CPU = 24
# Without a new part for so long, process 0 predicts what is missing; or for so many times as long
# as its own chunks took, if that is longer.
_LOST_SECONDS, _LOST_CHUNKS = 300, 3
# Outputs that are tables: they hold no atoms, so the parts need none.
_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is asked for.

    Attributes:
      model: that predicts.
      path: file of molecules.
      out: file to write.
      smiles: column of SMILES; "": found by its name.
      geometry: of `geometry.GEOMETRIES`; "": as in training, see `inputs.geometry_for`.
      batch_size: of the model; 0: `batch_size_for` a chunk. It changes no number by more than
        rounding.
      stop: whether the first row without a prediction ends it with an error.
      embeddings: whether the last features of the model are written in the place of its targets.
    """

    model: Model
    path: pathlib.Path
    out: pathlib.Path
    smiles: str = ""
    geometry: str = ""
    batch_size: int = 0
    stop: bool = False
    embeddings: bool = False

    @property
    def parts(self) -> pathlib.Path:
        """Folder of what is predicted so far."""
        return self.out.with_name(f"{self.out.name}.parts")

    def part(self, chunk: int) -> pathlib.Path:
        """File of what is predicted of a chunk."""
        return self.parts / f"{chunk:06}.npz"

    @property
    def columns(self) -> dict[str, str]:
        """New column -> its kind, as `writers` call them."""
        kinds = {
            f"{target.name}_pred": "atoms" if target.per_node else "number"
            for target in self.model.targets
        }
        numbers = {"embedding": "vector"} if self.embeddings else kinds
        texts = dict.fromkeys(("geometry", "status", "message"), "text")
        return numbers | {"ood": "number"} | texts

    def identity(self) -> dict[str, Any]:
        """What the parts depend on."""
        return {
            "input_sha256": readers.content_sha256(self.path),
            "weights_sha256": self.model.package.card["weights_sha256"],
            "smiles": self.smiles,
            "geometry": self.geometry,
            "columns": self.columns,
            "atoms": self.keeps_atoms,
            "rows_of_a_chunk": ROWS_OF_A_CHUNK,
        }

    @property
    def keeps_atoms(self) -> bool:
        """Whether the output holds atoms."""
        return readers.suffix_of(self.out, writers.WRITERS) not in _TABLES


def predict_file(request: Prediction, place: Place) -> Counter:
    """Predicts all rows of this process and, as process 0, writes the output.

    Returns:
      How many rows have each status; of this process's rows unless it is process 0.
    """
    output = writers.Output(request.out, request.path, request.columns)
    _begin(request, place)
    if place.process:
        return _predict(request, lambda chunk: chunk % place.count == place.process, iter(()))
    counts = Counter()
    with output.open(request.parts) as out:
        writing, start = _write(request, out, counts), time.monotonic()
        rows = _predict(request, lambda chunk: chunk % place.count == 0, writing).total()
        of_a_chunk = (time.monotonic() - start) * ROWS_OF_A_CHUNK / max(rows, 1)
        patience = max(_LOST_SECONDS, _LOST_CHUNKS * of_a_chunk if rows else 0)
        if place.count > 1 and not _others_come(request, writing, patience):
            _predict(request, lambda chunk: True, writing)  # what a lost process has left
    shutil.rmtree(request.parts)
    return counts


def _begin(request: Prediction, place: Place) -> None:
    """Makes the folder of the parts; one that holds other parts is refused."""
    identity, file = request.identity(), request.parts / "identity.json"
    if place.process == 0 and not file.exists():
        request.parts.mkdir(parents=True, exist_ok=True)
        building = file.with_suffix(".building")
        building.write_text(json_text(identity))
        building.rename(file)
    deadline = time.monotonic() + _LOST_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(f"Process 0 has not made {request.parts} in {_LOST_SECONDS} s.")
        time.sleep(0.2)
    if json.loads(file.read_text()) != identity:
        raise UserError(
            f"{request.parts} holds parts of another prediction: of another input, model or "
            "geometry. Delete it, or choose another --out."
        )


# --- predicting ----------------------------------------------------------------------------------


def _predict(
    request: Prediction, wanted: Callable[[int], bool], writing: Iterator[None]
) -> Counter:
    """Writes the parts of the wanted chunks that are missing; their statuses.

    `writing` of `_write` goes on after each: while this core writes, the others make molecules.
    """
    model, seen = request.model, set()
    blocks = _blocks(request, lambda chunk: wanted(chunk) and not request.part(chunk).exists())
    make = functools.partial(
        _make, readers.parser(request.path, "atoms"), request.geometry, model.geometry
    )
    counts = Counter()
    with tqdm(desc="Predicting", total=readers.count_rows(request.path), unit=" rows") as bar:
        on_cpu = jax.local_devices()[0].platform == "cpu"
        ahead = _BLOCKS_AHEAD_ON_CPU if on_cpu else _BLOCKS_AHEAD
        made = map_rows(make, blocks, chunk=1, ahead=ahead)
        for chunk, group in itertools.groupby(made, key=lambda block: block[0]):
            rows = [row for _, *block in group for row in _unpacked(*block)]
            part = _predicted(request, rows)
            try:
                part.save(request.part(chunk))
            except FileNotFoundError:
                if request.parts.exists():
                    raise
                return counts  # process 0 took this one for lost, has predicted all, and is done
            counts += Counter(part.columns["status"].tolist())
            geometries = set(part.columns["geometry"].tolist()) - {""} - seen
            model.warn_of_geometry(geometries)
            seen |= geometries
            next(writing, None)
            bar.update(len(rows))
    next(writing, None)
    return counts


def _blocks(request: Prediction, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
    """Rows of these chunks with the number of their chunk, parsed as little as can be."""
    for chunk, rows in _chunks(request):
        if wanted(chunk):
            while block := list(itertools.islice(rows, _ROWS_OF_A_BLOCK)):
                yield chunk, block


def _chunks(request: Prediction) -> Iterator[tuple[int, Iterator[Row]]]:
    rows = readers.read_rows(request.path, smiles_column=request.smiles, parse=False)
    numbered = itertools.groupby(enumerate(rows), key=lambda pair: pair[0] // ROWS_OF_A_CHUNK)
    for chunk, group in numbered:
        yield chunk, (row for _, row in group)


def _make(parse, geometry: str, trained_on: str, block: tuple[int, list[Row]]):
    """In a worker: (chunk, numbers of its rows, packed molecules, the others' refusals)."""
    chunk, rows = block
    rows = [parse(row) for row in rows]  # all, then all are made: the code stays in the caches
    made = [make_molecule(r, geometry or inputs.geometry_for(r, trained_on)) for r in rows]
    packed = pack_molecules([m if isinstance(m, Molecule) else None for m in made])
    return chunk, [row.number for row in rows], packed, [m for m in made if isinstance(m, Refusal)]


def _unpacked(numbers: list[int], packed: dict, refusals: list[Refusal]):
    """[(row number, molecule or refusal)] of what `_make` returns."""
    others = iter(refusals)
    made = (next(others) if m is None else m for m in unpack_molecules(packed))
    return zip(numbers, made, strict=True)


def _predicted(request: Prediction, rows: list[tuple[int, Molecule | Refusal]]) -> Part:
    model = request.model
    made = [item for _, item in rows]
    said = [item if isinstance(item, Refusal) else model.refusal(item) for item in made]
    good = [k for k, refusal in enumerate(said) if refusal is None]
    molecules = [made[k] for k in good]
    size = request.batch_size or batch_size_for(ROWS_OF_A_CHUNK)
    values, embedding = model.predict_and_embed(molecules, size)
    columns = {}
    for target in model.targets:
        column = values[target.name]
        if target.per_node:
            ends = np.cumsum([len(m.atomic_numbers) for m in molecules])[:-1]
            column = np.split(column, ends) if molecules else []
            finite = np.array([np.isfinite(value).all() for value in column], bool)
        else:
            finite = np.isfinite(column)
        for k in np.array(good, int)[~finite]:
            said[k] = Refusal("nonfinite", f"{model.name} gives no finite {target.name}.")
        columns[f"{target.name}_pred"] = _spread(column, good, len(rows), target.per_node)
    if request.embeddings:
        if embedding is None and good:
            embedding = model.embed_molecules(molecules)  # says why there is none
        columns = {"embedding": _spread(embedding, good, len(rows), as_list=True)}
    if request.stop:
        for (number, _), refusal in zip(rows, said, strict=True):
            if refusal:
                raise UserError(f"Row {number} of {request.path}: {refusal.message}")
    columns["ood"] = _spread(model.ood(embedding, len(good)), good, len(rows))
    columns["geometry"] = np.array(
        [m.geometry if isinstance(m, Molecule) else "" for m in made], np.str_
    )
    columns["status"] = np.array([r.status if r else "ok" for r in said], np.str_)
    columns["message"] = np.array([r.message if r else "" for r in said], np.str_)
    if request.keeps_atoms:
        return Part(columns, [m if isinstance(m, Molecule) else None for m in made])
    return Part(columns, [])


def _spread(values, places: list[int], number: int, as_list: bool = False):
    """Values of some rows as one of each: NaN, or None in a list, where there is none."""
    values = [] if values is None else values
    if not as_list:
        spread = np.full(number, np.nan)
        spread[places] = values
        return spread
    spread = [None] * number
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


# --- writing -------------------------------------------------------------------------------------


def _write(request: Prediction, out: writers.Writer, counts: Counter) -> Iterator[None]:
    """Writes the output, chunk by chunk; yields while the next is not predicted yet.

    The statuses of what is written are added to `counts`.
    """
    parse = readers.parser(request.path, "all" if request.keeps_atoms else "columns")
    for chunk, rows in _chunks(request):
        while not request.part(chunk).exists():
            yield
        part = Part.load(request.part(chunk))
        out.write([parse(row) for row in rows], part.columns, part.molecules)
        counts.update(part.columns["status"].tolist())


def _others_come(request: Prediction, writing: Iterator[None], patience: float) -> bool:
    """Writes until all is written; False if no new part came for so many seconds."""
    found, since, nothing = -1, time.monotonic(), object()
    while next(writing, nothing) is not nothing:
        if (there := len(list(request.parts.glob("[0-9]*.npz")))) > found:
            found, since = there, time.monotonic()
        if time.monotonic() - since > patience:
            print("Chunks of other processes do not come: predicting them here.")
            return False
        time.sleep(0.5)
    return True
