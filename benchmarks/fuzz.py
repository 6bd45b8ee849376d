"""Damaged and hostile files: every reader of a file from outside, fed by a fuzzer.

    pip install -e ".[test,parquet,hdf5]" atheris
    python benchmarks/fuzz.py --inputs=100000 --json=benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --only sdf npz --inputs=1000

atheris (libFuzzer) changes small valid files byte by byte and keeps what reaches new branches. A
reader may give rows, refuse a row, or raise `UserError`. Anything else is a fault: another
exception, a crash, more than 10 s for one input, more than 2 GiB. A reader ends at its first fault;
the input is kept in `--keep` (runs/fuzz), and `--replay=FILE --only READER` shows it again. Numbers
of a reader that is not named stay as they are in the JSON.
"""

import argparse
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable

from data_pipelines.json_text import json_text

ROOT = pathlib.Path(__file__).parents[1]
_ROWS = 200  # of one input
_SECONDS, _MEGABYTES = 10, 2048
_SEED = 0


def _rows(path: pathlib.Path) -> None:
    """A file of molecules, as `predict` and `check` read it."""
    from data_pipelines.molecules import readers

    for number, _ in enumerate(readers.read_rows(path)):
        if number == _ROWS:
            return
    readers.count_rows(path)
    readers.columns(path)


def _package(path: pathlib.Path) -> None:
    from demetar.inference import package

    package.read(path)


def _config(path: pathlib.Path) -> None:
    from demetar.config import stored

    stored.from_json(stored.read_identity(path)["config"])


def _qm9(path: pathlib.Path) -> None:
    from data_pipelines.qm9.sources import read_raw

    for _ in zip(range(_ROWS), read_raw(str(path)), strict=False):
        pass


def _seeds_of_rows(suffix: str) -> list[bytes]:
    """Two molecules with a number each, in the format of a suffix."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    from data_pipelines.molecules import readers
    from data_pipelines.molecules.making.make import make_molecule
    from data_pipelines.molecules.writers import Output

    if suffix in (".csv", ".parquet"):
        source, molecules = "smiles,homo,part\nCCO,-6.5,train\nc1ccccc1O,,test\n", [None, None]
    else:
        molecules = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in ("CO", "C[NH3+]")]
        for molecule in molecules:
            AllChem.EmbedMolecule(molecule, randomSeed=1)
        named = "> <homo>\n-6.5\n\n$$$$\n"
        source = "".join(Chem.MolToMolBlock(molecule) + named for molecule in molecules)
    with tempfile.TemporaryDirectory() as folder:
        given = pathlib.Path(folder) / ("in.csv" if molecules == [None, None] else "in.sdf")
        given.write_text(source)
        if given.suffix == suffix:
            return [source.encode()]
        rows = list(readers.read_rows(given))
        if given.suffix == ".sdf":
            molecules = [make_molecule(row, "file") for row in rows]
        out = pathlib.Path(folder) / f"out{suffix}"
        with Output(out, given, {"p": "number"}).open(out.parent) as writer:
            writer.write(rows, {"p": [1.5, None]}, molecules)
        return [out.read_bytes()]


def _seeds_of_hdf5() -> list[bytes]:
    import h5py
    import numpy as np

    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        group = file.create_group("CH4")
        group["numbers"] = np.array([6, 1, 1, 1, 1])
        group["coord"] = np.arange(30.0).reshape(2, 5, 3)
        group["energy"] = np.array([1.0, 2.0])
    return [stream.getvalue()]


def _seeds_of_package() -> list[bytes]:
    """A zip whose weights are few: the checks before they are read are what is fed."""
    from demetar.inference import package
    from demetar.inference.card import CARD

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in (CARD, package.WEIGHTS):
            archive.writestr(name, (package.SHIPPED / "qm9-homo" / name).read_bytes()[:20_000])
    return [stream.getvalue()]


def _seeds_of_config() -> list[bytes]:
    from demetar.config import stored
    from demetar.config.command_line import load_config

    config = stored.to_json(load_config("nbody:smoke"))
    return [json_text({"config": config, "passport": {"dataset": "nbody"}}).encode()]


def _seeds_of_qm9() -> list[bytes]:
    """A folder's file in QM9's own format, as the sample that ships."""
    import tarfile

    from data_pipelines.qm9.preparation import SAMPLE_FILE

    with tarfile.open(SAMPLE_FILE) as archive:
        members = [member for member in archive if member.isfile()][:2]
        small = io.BytesIO()
        with tarfile.open(fileobj=small, mode="w") as copy:
            for member in members:
                copy.addfile(member, archive.extractfile(member))
    return [small.getvalue()]


# Name -> suffix, what makes valid files, what reads one.
READERS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[pathlib.Path], None]]] = {
    "csv": (".csv", lambda: _seeds_of_rows(".csv"), _rows),
    "sdf": (".sdf", lambda: _seeds_of_rows(".sdf"), _rows),
    "xyz": (".extxyz", lambda: _seeds_of_rows(".extxyz"), _rows),
    "npz": (".npz", lambda: _seeds_of_rows(".npz"), _rows),
    "parquet": (".parquet", lambda: _seeds_of_rows(".parquet"), _rows),
    "hdf5": (".h5", _seeds_of_hdf5, _rows),
    "model": (".zip", _seeds_of_package, _package),
    "config": (".json", _seeds_of_config, _config),
    "qm9": (".tar", _seeds_of_qm9, _qm9),
}


def _fuzz_here(name: str, inputs: int, corpus: str) -> None:
    """In a process of its own, which libFuzzer ends."""
    import atheris

    suffix, _, read = READERS[name]
    with atheris.instrument_imports(include=["data_pipelines", "demetar"]):
        import data_pipelines.molecules.readers  # noqa: F401
        import data_pipelines.qm9.sources  # noqa: F401
        import demetar.config.stored  # noqa: F401
        import demetar.inference.package  # noqa: F401
    from data_pipelines.errors import UserError

    path = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm")) / f"input{suffix}"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except UserError:
            pass

    flags = [f"-runs={inputs}", f"-seed={_SEED}", f"-timeout={_SECONDS}", "-max_len=40000"]
    flags += [
        f"-rss_limit_mb={_MEGABYTES}",
        f"-artifact_prefix={corpus}.fault-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, corpus], one)
    atheris.Fuzz()


def _fuzz(name: str, inputs: int, keep: pathlib.Path) -> dict:
    corpus = keep / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(READERS[name][1]()):
        (corpus / f"seed-{number}").write_bytes(seed)
    start = time.monotonic()
    command = [sys.executable, __file__, f"--here={name}", f"--inputs={inputs}", f"--keep={corpus}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    said = done.stderr.splitlines()
    tried = [line.split()[-1] for line in said if line.startswith("stat::number_of_executed_units")]
    faults = sorted(file.name for file in keep.glob(f"{name}.fault-*"))
    last = [line for line in said if "Error" in line or "ERROR" in line]
    return {
        "inputs": int(tried[0]) if tried else None,
        "seconds": round(time.monotonic() - start, 1),
        "faults": faults,
        "said": last[:3] if faults or done.returncode else [],
        "exit_code": done.returncode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--keep", type=pathlib.Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--replay", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        _fuzz_here(options.here, options.inputs, str(options.keep))
        return
    if options.replay:
        suffix, _, read = READERS[options.only[0]]
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"input{suffix}"
            path.write_bytes(options.replay.read_bytes())
            read(path)
        return
    from demetar.training.provenance import git_commit

    file = options.json
    found = json.loads(file.read_text()) if file and file.exists() else {}
    for name in options.only:
        found[name] = _fuzz(name, options.inputs, options.keep) | {"commit": git_commit()}
        print(name, found[name], flush=True)
        if file:
            file.write_text(json_text(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
