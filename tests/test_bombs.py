"""Small files that unpack to gigabytes: each reader refuses them, in bounded memory.

They are real. Gzip is a chain of members, so one that unpacks to 64 MB is repeated. A process of
its own reads, and gets no more memory than it is allowed (`resource.setrlimit`).
"""

import functools
import gzip
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import REPOSITORY

from demetar.inference.card import CARD
from demetar.inference.package import WEIGHTS

MEMORY = 5 << 29  # of addresses, with all libraries
_READ = """
import pathlib, resource, sys
from data_pipelines.errors import UserError
from data_pipelines.molecules.readers import read_rows
from data_pipelines.qm9.sources import read_raw
from demetar.inference import package
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
path = pathlib.Path(sys.argv[1])
try:
    if ".tar" in path.name:
        list(read_raw(path))
    elif path.suffix == ".zip":
        package.read(str(path))
    else:
        refusals = {row.refusal.message for row in read_rows(path) if row.refusal}
        print(len(refusals), *refusals)
except UserError as error:
    print(error)
"""


def read(path):
    """What a process of little memory says of a file."""
    command = [sys.executable, "-c", _READ, path, str(MEMORY)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write_gzip(path, start, endless):
    """`start`, then 10 GB of `endless`."""
    piece = gzip.compress(endless * ((1 << 26) // len(endless)), compresslevel=9)
    with path.open("wb") as file:
        file.write(gzip.compress(start))
        file.write(piece * 160)
    assert path.stat().st_size < 30e6


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, start, endless",
    [
        ("line.csv.gz", b"smiles,homo\n", b"C"),
        slow("header.csv.gz", b"", b"C"),
        slow("quotes.csv.gz", b'smiles,homo\nC,"', b'1\n","'),
        slow("line.sdf.gz", b"", b"C"),
        slow("lines.sdf.gz", b"", b"C\n"),
        slow("line.xyz.gz", b"", b"1"),
        slow("comment.xyz.gz", b"1\n", b"C"),
        slow("lines.extxyz.gz", b"999999999999\n", b"C 0 0 0\n"),
    ],
)
def test_text_without_an_end(tmp_path, name, start, endless):
    write_gzip(tmp_path / name, start, endless)
    assert "goes on for more than 16,776,960 characters" in read(tmp_path / name)


@pytest.mark.slow
def test_an_array_that_would_be_read_whole(tmp_path):
    """In the order of Fortran, 2.8 GB: its rows do not lie together."""
    file = tmp_path / "arrays.npz"
    atoms = 115_000_000
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape, order in (("R", (atoms, 3), True), ("z", (atoms,), False)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"shape": shape, "fortran_order": order, "descr": "<f8"}
                np.lib.format.write_array_header_1_0(stream, header)
                for _ in range(int(np.prod(shape)) * 8 // 10_000_000):
                    stream.write(bytes(10_000_000))
        np.save(archive.open("N.npy", "w"), np.full(atoms // 23, 23))
    assert file.stat().st_size < 60e6
    assert "would take 2,760,000,000 bytes at once" in read(file)


@pytest.mark.slow
def test_a_header_of_an_array_that_has_no_end(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("R.npy", "w", force_zip64=True) as stream:
            stream.write(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
            for _ in range(280):
                stream.write(b" " * 10_000_000)
    assert "expected 4294967295 bytes got 65" in read(tmp_path / "a.npz")  # not: no memory


@pytest.mark.slow
def test_a_name_in_an_archive_that_has_no_end(tmp_path):
    name = tarfile.TarInfo("long")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 9 << 30
    write_gzip(tmp_path / "qm9.tar.gz", name.tobuf(tarfile.GNU_FORMAT), b"C")
    assert "header of the archive (long) has 9663676416 bytes" in read(tmp_path / "qm9.tar.gz")


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [CARD, WEIGHTS])
def test_a_model_that_unpacks_to_gigabytes(tmp_path, bomb):
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(bomb, "w", force_zip64=True) as stream:
            for _ in range(280):
                stream.write(bytes(10_000_000))
        archive.writestr(WEIGHTS if bomb == CARD else CARD, json.dumps({}))
    assert f"{bomb} has 2800000000 bytes" in read(tmp_path / "m.zip")
