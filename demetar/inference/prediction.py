"""Predictions for a whole file: chunk by chunk, resumable, in the order of the input.

    rows --made into molecules, on all cores--> Model --> OUT.parts/000012.npz
    rows again + parts, in order -----------------------> OUT

A chunk is 8,192 rows; its part holds what was predicted, and is whole or absent. After a kill the
same command goes on with the chunks that are missing, and the output has the same bytes. Several
processes share the chunks by number; process 0 writes the output.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from data_pipelines.molecules import readers, writers
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.parallel import map_rows
from data_pipelines.molecules.record import Molecule, Refusal, Row
from demetar.inference import inputs
from demetar.inference.model import Model, batch_size_for
from demetar.inference.parts import Part
from demetar.job.place import Place

ROWS_OF_A_CHUNK = 8_192
_ROWS_OF_A_BLOCK = 64  # that a worker gets at once
_BLOCKS_AHEAD = ROWS_OF_A_CHUNK // _ROWS_OF_A_BLOCK  # made while the devices compute
_LOST_SECONDS = 300  # without a new part, after which process 0 predicts what is missing
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
        with self.path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        return {
            "input_sha256": content,
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
    counts = _predict(request, lambda chunk: chunk % place.count == place.process)
    if place.process:
        return counts
    if place.count > 1:
        _wait_for_others(request)
        _predict(request, lambda chunk: True)  # what a lost process has left
    counts = _write(request, output)
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


def _predict(request: Prediction, wanted: Callable[[int], bool]) -> Counter:
    """Writes the parts of the wanted chunks that are missing; their statuses."""
    model, seen = request.model, set()
    blocks = _blocks(request, lambda chunk: wanted(chunk) and not request.part(chunk).exists())
    make = functools.partial(
        _make, readers.parser(request.path, "atoms"), request.geometry, model.geometry
    )
    counts = Counter()
    with tqdm(desc="Predicting", total=readers.count_rows(request.path), unit=" rows") as bar:
        made = map_rows(make, blocks, chunk=1, ahead=_BLOCKS_AHEAD)
        for chunk, group in itertools.groupby(made, key=lambda block: block[0]):
            rows = [row for _, block in group for row in block]
            part = _predicted(request, rows)
            part.save(request.part(chunk))
            counts += Counter(part.columns["status"].tolist())
            geometries = set(part.columns["geometry"].tolist()) - {""} - seen
            model.warn_of_geometry(geometries)
            seen |= geometries
            bar.update(len(rows))
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
    """In a worker: (chunk, [(row number, molecule or refusal)])."""
    chunk, rows = block
    rows = [parse(row) for row in rows]  # all, then all are made: the code stays in the caches
    made = (make_molecule(r, geometry or inputs.geometry_for(r, trained_on)) for r in rows)
    return chunk, [(row.number, found) for row, found in zip(rows, made, strict=True)]


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
        for k, value in zip(good, column, strict=True):
            if not np.isfinite(value).all():
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
    kept = [m if isinstance(m, Molecule) and request.keeps_atoms else None for m in made]
    return Part(columns, kept)


def _spread(values, places: list[int], number: int, as_list: bool = False):
    """Values of some rows as one of each: NaN, or None in a list, where there is none."""
    spread = [None] * number if as_list else np.full(number, np.nan)
    for place, value in zip(places, [] if values is None else values, strict=True):
        spread[place] = value
    return spread


# --- writing -------------------------------------------------------------------------------------


def _wait_for_others(request: Prediction) -> None:
    """Until all parts are there, or none came for too long."""
    number = 1 + max(chunk for chunk, _ in _chunks(request))
    found, since = -1, time.monotonic()
    while (there := len(list(request.parts.glob("[0-9]*.npz")))) < number:
        if there > found:
            found, since = there, time.monotonic()
        if time.monotonic() - since > _LOST_SECONDS:
            print(f"{number - there} chunks of other processes do not come: predicting them here.")
            return
        time.sleep(0.5)


def _write(request: Prediction, output: writers.Output) -> Counter:
    """Writes the output; the statuses of all rows."""
    counts, path = Counter(), request.path
    parse = readers.parser(path, "all" if request.keeps_atoms else "columns")
    with output.open() as out:
        for chunk, rows in tqdm(_chunks(request), "Writing", unit=" chunks"):
            part = Part.load(request.part(chunk))
            out.write([parse(row) for row in rows], part.columns, part.molecules)
            counts += Counter(part.columns["status"].tolist())
    return counts
