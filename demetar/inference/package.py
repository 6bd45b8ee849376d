"""A model as a file: one folder, or one zip of two files that anyone can read.

    weights.safetensors   the weights, and the embeddings that `domain.py` compares with
    model.json            the card: all that is needed to build the model again and to use it

The card has the SHA-256 of the weights, which is checked at every reading. Data only: nothing here
is executed or unpickled, and a zip is read in memory, never unpacked.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipelines.errors import UserError, suggest
from data_pipelines.json_text import json_text
from data_pipelines.targets import Target
from demetar.config import stored
from demetar.inference.card import CARD, FORMAT, check_card
from demetar.models import create_model
from demetar.models.base import GraphModel
from demetar.training.objective import Normalization

WEIGHTS = "weights.safetensors"
SHIPPED = pathlib.Path(__file__).parents[1] / "weights"
_LARGEST = {WEIGHTS: 4 << 30, CARD: 64 << 20}  # bytes: more is no model of ours
_RATIO = 20  # of a member of a zip to its compressed size
_DOMAIN = "domain."  # before the names of arrays that are no weights


@dataclasses.dataclass(frozen=True)
class Package:
    """A trained model, and what is known about it.

    Attributes:
      name: what to call it: that it ships with, or of its folder or file.
      params: the averaged weights, nested.
      card: `model.json`. Its keys: see docs/reference/files.md.
      domain: arrays of `demetar.inference.domain`; empty if none were kept.
    """

    name: str
    params: dict
    card: dict
    domain: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ml_collections.ConfigDict:
        """It was trained with."""
        return stored.from_json(self.card["config"])

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(Target(**fields) for fields in self.card["targets"])

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that it has learned."""
        return tuple(self.card["elements"])

    @property
    def facts(self) -> dict[str, Any]:
        """What its data give a model: `elements`, and what they know besides."""
        return self.card["facts"] | {"elements": self.elements}

    @property
    def normalizations(self) -> dict[str, Normalization]:
        """Name of a target -> between reported units and what the network predicts."""
        rows = self.card["normalizations"]
        return {name: Normalization(**fields) for name, fields in rows.items()}

    @property
    def references(self) -> dict[str, dict[int, float]]:
        """As `Dataset.references`."""
        rows = self.card["references"]
        return {name: {int(z): x for z, x in row.items()} for name, row in rows.items()}

    def network(self) -> GraphModel:
        """The flax module of the weights, for one graph."""
        return create_model(targets=self.targets, facts=self.facts, **self.config.model)


def pretrained_names() -> list[str]:
    """The models that ship, in alphabetical order."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{CARD}"))


# --- reading -------------------------------------------------------------------------------------


def read(where: str | pathlib.Path) -> Package:
    """The model `where`: a name that ships, a folder, or a zip; its weights checked."""
    path, name = pathlib.Path(where), str(where)
    if name in pretrained_names():
        return _opened(name, SHIPPED / name, _of_folder(SHIPPED / name))
    if path.is_dir():
        if not (path / CARD).exists():
            run = (path / "checkpoints").is_dir()
            how = (
                f" It is a run: `demetar models save --workdir={path} --out=FOLDER`." if run else ""
            )
            raise UserError(f"{path} is not the folder of a model: it has no {CARD}.{how}")
        return _opened(path.name, path, _of_folder(path))
    if path.is_file():
        return _opened(path.stem, path, _of_zip(path))
    raise UserError(
        f"There is no model {name!r}, neither by this name nor as a folder or file."
        f"{suggest(name, pretrained_names())} Models that ship: {', '.join(pretrained_names())}."
    )


def _of_folder(folder: pathlib.Path) -> dict[str, bytes]:
    try:
        for file, largest in _LARGEST.items():
            _check_size(folder, file, (folder / file).stat().st_size, largest)
        return {file: (folder / file).read_bytes() for file in _LARGEST}
    except OSError as error:
        raise UserError(f"The model in {folder} cannot be read: {error}.") from error


def _of_zip(path: pathlib.Path) -> dict[str, bytes]:
    """In memory: what the archive calls its members decides nothing on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted(info.filename for info in archive.infolist())
            if found != sorted(_LARGEST):
                raise UserError(
                    f"{path} holds {', '.join(found) or 'nothing'}; a model is a zip of "
                    f"{' and '.join(sorted(_LARGEST))}."
                )
            for file, largest in _LARGEST.items():
                info = archive.getinfo(file)
                # Weights hardly compress: what grows more than this when read is no model.
                largest = min(largest, _RATIO * info.compress_size + (1 << 20))
                _check_size(path, file, info.file_size, largest)
            return {file: archive.read(file) for file in _LARGEST}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # of damaged bytes zipfile raises almost anything
        raise UserError(f"{path} is no model: no zip that can be read ({error}).") from error


def _check_size(where: pathlib.Path, file: str, size: int, largest: int) -> None:
    if size > largest:
        raise UserError(f"{where}: {file} has {size} bytes; a model there has at most {largest}.")


def _opened(name: str, where: pathlib.Path, files: dict[str, bytes]) -> Package:
    try:
        card = json.loads(files[CARD])
        version, expected = card["format"], str(card["weights_sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: {CARD} is no card of a model ({error!r}).") from error
    if version != FORMAT:
        versions = card.get("versions")
        writer = versions.get("demetar") if isinstance(versions, dict) else None
        raise UserError(
            f"{where} has format {version}, and this demetar reads format {FORMAT}: use the "
            f"version that wrote it, {writer or 'unknown'}."
        )
    found = hashlib.sha256(files[WEIGHTS]).hexdigest()
    if found != expected:
        raise UserError(
            f"{where}: {WEIGHTS} is damaged: SHA-256 {found[:12]}…, but its {CARD} says "
            f"{expected[:12]}…. Get the model again."
        )
    check_card(card, where)
    try:
        arrays = load(files[WEIGHTS])
    except SafetensorError as error:
        raise UserError(f"{where}: {WEIGHTS} is no file of safetensors ({error}).") from error
    domain = {
        key.removeprefix(_DOMAIN): value for key, value in arrays.items() if key.startswith(_DOMAIN)
    }
    weights = {key: value for key, value in arrays.items() if not key.startswith(_DOMAIN)}
    return Package(name, traverse_util.unflatten_dict(weights, sep="/"), card, domain)


# --- writing -------------------------------------------------------------------------------------


def with_hash(package: Package) -> Package:
    """The same, its card with the SHA-256 of the weights as they would be written."""
    digest = hashlib.sha256(_weights(package)).hexdigest()
    return dataclasses.replace(package, card=package.card | {"weights_sha256": digest})


def _weights(package: Package) -> bytes:
    arrays = traverse_util.flatten_dict(package.params, sep="/")
    arrays |= {f"{_DOMAIN}{name}": value for name, value in package.domain.items()}
    return save({key: np.asarray(value, order="C") for key, value in arrays.items()})


def write(package: Package, destination: pathlib.Path) -> Package:
    """Writes a model into a folder or, where the name ends in `.zip`, into one file.

    Args:
      package: what to write.
      destination: must not exist. It appears under this name when it is whole.

    Returns:
      The same, as it is read back.
    """
    if destination.exists():
        raise UserError(f"{destination} exists already: choose another name, or delete it.")
    card = with_hash(package).card
    files = {WEIGHTS: _weights(package), CARD: (json_text(card, indent=1) + "\n").encode()}
    building = destination.with_name(f".{destination.name}.building")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.suffix == ".zip":
            building.write_bytes(_zipped(files))
        else:
            building.mkdir(exist_ok=True)
            for file, content in files.items():
                (building / file).write_bytes(content)
        building.rename(destination)
    except OSError as error:
        raise UserError(f"Cannot write a model to {destination}: {error}.") from error
    return read(destination)


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """The same bytes for the same files: no time of writing."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file, content in files.items():
            archive.writestr(zipfile.ZipInfo(file), content)
    return stream.getvalue()
