"""Where QM9 comes from: three readers that yield the same molecules in the same numbers.

Each reader is a generator of `SourceMolecule` in ascending index, with the source's own
float64 values (hartree, debye, bohr, ...) and without the 3,054 molecules whose relaxed
geometry no longer matches their SMILES ("uncharacterized" in the publication; the file
that lists them counts from 1, and so do we).
"""

import csv
import dataclasses
import importlib.util
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np

from data_pipelines.elements import atomic_number
from data_pipelines.errors import UserError
from data_pipelines.qm9.properties import COLUMNS, ELEMENTS, atom_reference_sum

NUM_PUBLISHED = 133_885
NUM_CHARACTERIZED = 130_831
_LARGEST_FILE = 1 << 20  # bytes of one molecule; the published ones have about 2,000
_EXCLUDED_FILE = pathlib.Path(__file__).parent / "uncharacterized.txt"


@dataclasses.dataclass(frozen=True)
class SourceMolecule:
    """One molecule as published.

    Attributes:
      index: number in the publication, counting from 1.
      atomic_numbers: [n] uint8.
      positions: [n, 3] float64, angstrom.
      smiles: the GDB-9 SMILES; its heavy atoms stand in file order.
      properties: [15] float64 in the order of `COLUMNS`, source units.
    """

    index: int
    atomic_numbers: np.ndarray
    positions: np.ndarray
    smiles: str
    properties: np.ndarray


def excluded_indices() -> frozenset[int]:
    """The 3,054 published numbers (from 1) that every QM9 benchmark leaves out."""
    return frozenset(int(line) for line in _EXCLUDED_FILE.read_text().split())


def characterized_indices() -> np.ndarray:
    """The 130,831 published numbers that are used, ascending, int64."""
    return np.array(sorted(set(range(1, NUM_PUBLISHED + 1)) - excluded_indices()))


# --- qm9pack: the PyPI package, so that a fresh machine needs no download site -----------------

# Columns of its CSV files in the order of COLUMNS.
_QM9PACK_COLUMNS = (
    "RotA_GHz",
    "RotB_GHz",
    "RotC_GHz",
    "Dipole_debye",
    "Polarizability_bohr3",
    "HOMO_au",
    "LUMO_au",
    "HOMO_LUMO_gap_au",
    "R2_bohr2",
    "ZPVE_au",
    "InternalEnergy_0K_au",
    "InternalEnergy_298K_au",
    "Enthalphy_298K_au",
    "GibbsFreeEnergy_298K_au",
    "Heatcapacity_Cv_cal_mol_K",
)


def _qm9pack_files(path: str) -> list[pathlib.Path]:
    if path:
        folder = pathlib.Path(path)
    else:
        # Found, never imported: its code needs pkg_resources, which setuptools no longer has.
        spec = importlib.util.find_spec("qm9pack")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "config.data.source is 'qm9pack', but the package qm9pack is not installed. "
                "Install it (pip install 'demetar[qm9]'), or set config.data.source to 'raw' or "
                "'tfds' and config.data.path to the files."
            )
        folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    files = sorted(folder.glob("qm9_part*.csv"))
    if not files:
        raise UserError(f"No qm9_part*.csv in {folder}: reinstall the package qm9pack.")
    return files


def read_qm9pack(path: str = "") -> Iterator[SourceMolecule]:
    """Reads the CSV files of the PyPI package `qm9pack` (or of the folder `path`)."""
    for file in _qm9pack_files(path):
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            for row in rows:
                try:
                    yield _qm9pack_molecule(row)
                except UserError as error:
                    raise UserError(f"{file}, line {rows.line_num}: {error}") from error
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{file}, line {rows.line_num}: not a molecule of qm9pack ({error!r}). "
                        "The file is truncated or altered; reinstall the package qm9pack."
                    ) from error


def _qm9pack_molecule(row: dict[str, str]) -> SourceMolecule:
    # Cells are lists as text in which numbers may read `0.`: not JSON, and never evaluated.
    elements = row["Elements"].strip("[]").replace("'", "").split(",")
    numbers = row["XYZ_Ang"].replace("[", "").replace("]", "").split(",")
    positions = np.array([float(x) for x in numbers]).reshape(len(elements), 3)
    return SourceMolecule(
        index=int(row["Index"]),
        atomic_numbers=np.array([atomic_number(e.strip()) for e in elements], np.uint8),
        positions=positions,
        smiles=row["SMILES"],
        properties=np.array([float(row[name]) for name in _QM9PACK_COLUMNS]),
    )


# --- raw: the published xyz files --------------------------------------------------------------


def _number(text: str) -> float:
    """A number of the published files, whose exponents read `6.8*^-6`."""
    return float(text.replace("*^", "e"))


def parse_raw_xyz(text: str, name: str) -> SourceMolecule:
    """Parses one published file, `dsgdb9nsd_000001.xyz`; `name` is for the error."""
    lines = text.rstrip().splitlines()
    try:
        num_atoms = int(lines[0])
        # Not more either: with a count that is too small the lines that follow would be misread.
        if num_atoms < 1 or len(lines) != num_atoms + 5:
            raise ValueError(f"{num_atoms} atoms need {num_atoms + 5} lines, found {len(lines)}")
        properties = lines[1].split()
        atoms = [line.split() for line in lines[2 : 2 + num_atoms]]
        if len(properties) != 2 + len(COLUMNS):
            raise ValueError(f"line 2 has {len(properties)} columns, not {2 + len(COLUMNS)}")
        return SourceMolecule(
            index=int(properties[1]),
            atomic_numbers=np.array([atomic_number(a[0]) for a in atoms], np.uint8),
            positions=np.array([[_number(x) for x in a[1:4]] for a in atoms]),
            smiles=lines[num_atoms + 3].split()[0],
            properties=np.array([_number(x) for x in properties[2:]]),
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{name}: not a QM9 xyz file ({error!r}). It is truncated or altered; fetch it again."
        ) from error


def read_raw(path: str) -> Iterator[SourceMolecule]:
    """Reads `dsgdb9nsd.xyz.tar.bz2` (or .tar, .tar.gz) or the folder it unpacks to."""
    location = pathlib.Path(path)
    if not path or not location.exists():
        raise UserError(
            f"config.data.source is 'raw', but config.data.path ({path!r}) does not exist. "
            "Set it to dsgdb9nsd.xyz.tar.bz2 or to the folder it unpacks to."
        )
    excluded = excluded_indices()
    files = _raw_folder(location) if location.is_dir() else _raw_archive(location)
    molecules = (parse_raw_xyz(text, name) for name, text in files)
    if not location.is_dir():  # an archive may hold its files in any order
        molecules = sorted(molecules, key=lambda molecule: molecule.index)
    yield from (molecule for molecule in molecules if molecule.index not in excluded)


def _raw_folder(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    files = sorted(folder.glob("*.xyz"))
    if not files:
        raise UserError(f"No *.xyz in {folder}: set config.data.path to QM9's unpacked folder.")
    for file in files:
        try:
            _check_size(str(file), file.stat().st_size)
            yield str(file), file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({error!r}). Fetch it again.") from error


def _check_size(name: str, size: int) -> None:
    """Before it is read: a few bytes of an archive can claim any number."""
    if size > _LARGEST_FILE:
        raise UserError(
            f"{name} has {size} bytes; a molecule of QM9 has at most {_LARGEST_FILE}. "
            "It is not the published file; fetch it again."
        )


class _Member(tarfile.TarInfo):
    """Member of an archive. Long names and other remarks, which tarfile reads whole, are short."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        found = super().frombuf(buf, encoding, errors)
        if not found.isreg():
            _check_size(f"A header of the archive ({found.name})", found.size)
        return found


def _raw_archive(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    # Members are read as streams and never extracted: no path of the archive touches the disk.
    try:
        with tarfile.open(file, tarinfo=_Member) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".xyz"):
                    _check_size(f"{file}:{member.name}", member.size)
                    yield f"{file}:{member.name}", archive.extractfile(member).read().decode()
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} ({file.stat().st_size} bytes) cannot be read ({error!r}). "
            "It is truncated or not the published archive; fetch it again."
        ) from error


# --- tfds: a folder prepared by the public TFDS builder `qm9` ----------------------------------


def read_tfds(path: str) -> Iterator[SourceMolecule]:
    """Reads a folder that the public TFDS builder `qm9` prepared as ArrayRecord.

    All its splits are read: together they are the whole of QM9, in whichever config. TFDS
    stores float32; the total energies are rebuilt in float64 from its `_atomization`
    columns, which it subtracts in float64 before the cast.
    """
    import tensorflow_datasets as tfds

    folder = pathlib.Path(path)
    if not path or not (folder / "dataset_info.json").exists():
        raise UserError(
            f"config.data.source is 'tfds', but config.data.path ({path!r}) has no "
            "dataset_info.json. Set it to the version folder, e.g. "
            "~/tensorflow_datasets/qm9/original/1.0.0."
        )
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{folder} is in format {builder.info.file_format.value!r}, which needs TensorFlow. "
            "Prepare it with: tfds build qm9 --file_format=array_record"
        )
    records = {}
    for split in builder.info.splits:
        for record in builder.as_data_source(split):
            records[int(record["index"])] = _tfds_molecule(record)
    yield from (records[index] for index in sorted(records))


def _tfds_molecule(record: dict) -> SourceMolecule:
    num_atoms = int(record["num_atoms"])
    atomic_numbers = np.asarray(record["charges"][:num_atoms], np.uint8)
    composition_1xZ = np.array([[np.sum(atomic_numbers == z) for z in ELEMENTS]])
    properties = np.array([np.float64(record[name]) for name in COLUMNS])
    for name in ("U0", "U", "H", "G"):
        total = np.float64(record[f"{name}_atomization"]) + atom_reference_sum(
            name, composition_1xZ
        )
        properties[COLUMNS.index(name)] = total[0]
    smiles = record["SMILES"]
    return SourceMolecule(
        index=int(record["index"]),
        atomic_numbers=atomic_numbers,
        positions=np.asarray(record["positions"][:num_atoms], np.float64),
        smiles=smiles.decode() if isinstance(smiles, bytes) else str(smiles),
        properties=properties,
    )


SOURCES = {"qm9pack": read_qm9pack, "raw": read_raw, "tfds": read_tfds}


def source_files(source: str, path: str) -> list[pathlib.Path]:
    """The files that a source reads, in a fixed order; none where `path` does not exist."""
    if source == "qm9pack":
        return _qm9pack_files(path)
    location = pathlib.Path(path)
    if not path or not location.is_dir():
        return [location] if path and location.exists() else []
    return sorted(file for file in location.rglob("*") if file.is_file())
