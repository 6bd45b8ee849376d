"""Faults 58 to 67: files of data that are not what they should be."""

import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import tarfile

import numpy as np

from data_pipelines.prepared import write
from data_pipelines.qm9 import preparation
from data_pipelines.qm9.sources import characterized_indices, parse_raw_xyz, read_raw
from data_pipelines.qm9.splits import get_split
from demetar.exits import EXIT_USER_ERROR
from demetar.tools.faults.bench import Case
from demetar.tools.faults.scene import Scene
from demetar.tools.faults.storage import flip

_ARCHIVE = "dsgdb9nsd.xyz.tar.bz2"


def prepared_of(cache: pathlib.Path) -> pathlib.Path:
    """The folder of the prepared systems of the tiny config."""
    (passport,) = cache.glob("nbody/*/passport.json")
    return passport.parent


def other_data(cache: pathlib.Path, change) -> None:
    """Changes the arrays of a cache as another preparation would, hashes included."""
    folder = prepared_of(cache)
    passport = json.loads((folder / "passport.json").read_text())
    names = passport.pop("files")
    arrays = {name: np.load(folder / "arrays" / f"{name}.npy") for name in names}
    change(arrays)
    passport["content_sha256"] = hashlib.sha256(arrays["target"].tobytes()).hexdigest()
    shutil.rmtree(folder)
    folder.mkdir()
    write(folder, arrays, passport)


def _published() -> str:
    """The first molecule of the sample, as published."""
    with tarfile.open(preparation.SAMPLE_FILE) as archive:
        member = min((m for m in archive if m.isfile()), key=lambda m: m.name)
        return archive.extractfile(member).read().decode()


def _load(scene: Scene, name: str, text: str):
    """Prepares a folder with this one file."""
    folder = scene.folder / name
    folder.mkdir()
    (folder / f"{name}.xyz").write_text(text)
    return preparation.load("raw", str(folder), str(scene.folder / "cache"))


def not_the_archive(scene: Scene) -> None:
    file = scene.folder / _ARCHIVE
    whole = preparation.SAMPLE_FILE.read_bytes()
    for content in (b"<!DOCTYPE html><html>202 Accepted</html>", b"", whole[: len(whole) // 2]):
        file.write_bytes(content)
        scene.command(
            *("main", "--config=qm9:smoke", f"--workdir={scene.run}", "--config.data.source=raw"),
            *(f"--config.data.path={file}", f"--config.data.cache_dir={scene.folder / 'cache'}"),
            code=EXIT_USER_ERROR,
            says="not the published archive; fetch it again",
        )


def hostile_archive(scene: Scene) -> None:
    file, text = scene.folder / "a.tar.gz", _published().encode()
    with tarfile.open(file, "w:gz") as archive:
        for name, kind in (("l.xyz", tarfile.SYMTYPE), ("h.xyz", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("../outside.xyz", f"{scene.folder}/outside.xyz"):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    scene.check("files", len(list(read_raw(str(file)))) == 2, "read as streams")
    bomb = scene.folder / "bomb.tar.gz"
    with tarfile.open(bomb, "w:gz") as archive:
        member = tarfile.TarInfo("bomb.xyz")
        member.size = 64 << 20
        archive.addfile(member, io.BufferedReader(_Zeros(member.size)))
    scene.refuses(lambda: list(read_raw(str(bomb))), says="bomb.xyz has 67108864 bytes")
    left = sorted(f.name for f in scene.folder.rglob("*"))
    scene.check("files", left == ["a.tar.gz", "bomb.tar.gz"], f"{left}")


class _Zeros(io.RawIOBase):
    """So many zeros."""

    def __init__(self, size: int):
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self._left)
        buffer[:count] = bytes(count)
        self._left -= count
        return count


def two_prepare(scene: Scene) -> None:
    for number in (signal.SIGCONT, signal.SIGKILL):
        scene.another_run()
        second = scene.folder / f"second-{number}"
        flag = f"--config.data.cache_dir={scene.run}-cache"
        job = scene.start(1, flag, fault="0:open:passport.json:SIGSTOP")
        pid = scene.frozen(job)
        other = scene.start(1, flag, workdir=second)
        scene.wait_until(other, lambda other=other: "waiting for it" in other.tail(0))
        os.kill(pid, number)
        scene.end(job, 0 if number == signal.SIGCONT else -signal.SIGKILL)
        scene.end(other, 0)
        scene.run = second
        scene.ends_the_same()
        left = [f.name for f in pathlib.Path(f"{flag.partition('=')[2]}/nbody").glob(".*")]
        scene.check("files", not left, f"left behind: {left}")


def odd_xyz(scene: Scene) -> None:
    text = _published()
    wanted = parse_raw_xyz(text, "x")
    first = text.split("\n", 1)[0]
    place = text.split("\n")[2].split("\t")[1]
    exponent = text.replace(place, f"{place}*^0", 1)
    for variant in (text.replace("\n", "\r\n"), exponent, text + "\n\n"):
        found = parse_raw_xyz(variant, "x")
        same = found.positions.tolist() == wanted.positions.tolist()
        scene.check("data", same and found.smiles == wanted.smiles, "read all the same")
    lines = text.rstrip("\n").split("\n")
    for broken in (
        "\n".join(lines[:3] + lines[4:]),  # a line is missing
        text.replace(first, f"{int(first) + 1}", 1),
        text.replace(first, f"{int(first) - 1}", 1),
        text + "junk\n",
        text[: len(text) // 2],
        text.replace("\t", " junk ", 1),
    ):
        scene.refuses(parse_raw_xyz, broken, "here.xyz", says="here.xyz")


def bad_numbers(scene: Scene) -> None:
    text = _published()
    lines = text.split("\n")
    label, place = lines[1].split("\t")[3], lines[2].split("\t")[1]
    for name, old, new in (("nan", place, "nan"), ("inf", place, "inf"), ("label", label, "inf")):
        bad = text.replace(old, new, 1)
        scene.refuses(_load, scene, name, bad, says="that is not a finite number")
    file = scene.folder / "mine.csv"
    file.write_text("smiles,homo\nCCO,-6.5\nCCN,inf\nCCC,high\n")
    text = scene.command("check", file, "--target=homo:eV", code=0, says="row 2")
    scene.say(text, "row 3")


def odd_molecules(scene: Scene) -> None:
    file, model = scene.folder / "odd.extxyz", "--model=qm9-homo"
    frames = {
        "methane": "5\n\nC 0 0 0\nH 0.63 0.63 0.63\nH -0.63 -0.63 0.63\nH 0.63 -0.63 -0.63\n"
        "H -0.63 0.63 -0.63\n",
        "unknown element": "1\n\nQq 0 0 0\n",
        "empty": "0\n\n",
        "one atom": "1\n\nC 0 0 0\n",
        "two atoms at one place": "2\n\nC 0 0 0\nO 0 0 0\n",
        "an element never learned": "2\n\nCl 0 0 0\nCl 0 0 2.0\n",
        "300 atoms": "300\n\n" + "".join(f"C {1.5 * k} 0 0\n" for k in range(300)),
        "methane again": "",
    }
    frames["methane again"] = frames["methane"]
    file.write_text("".join(frames.values()))
    out = scene.folder / "out.csv"
    scene.command("predict", file, model, f"--out={out}", code=0)
    rows = out.read_text().splitlines()
    names = rows[0].split(",")
    table = [dict(zip(names, row.split(","), strict=False)) for row in rows[1:]]
    status = {name: row["status"] for name, row in zip(frames, table, strict=False)}
    scene.saw("; ".join(f"{name}: {value}" for name, value in status.items()))
    scene.check("files", len(table) == len(frames), f"{len(table)} rows for {len(frames)}")
    scene.check("sentence", status["unknown element"] != "ok" != status["empty"], f"{status}")
    values = [float(row["homo_pred"]) for row in table if row["status"] == "ok"]
    scene.check("finite", bool(values) and np.isfinite(values).all(), f"{values}")
    scene.check("finite", values[0] == values[-1], "bad rows change no neighbour")


def wrong_split(scene: Scene) -> None:
    index = characterized_indices()
    scene.check("data", (len(index), index[57]) == (130_831, 59), "58 is the first left out")
    parts = get_split("dimenet", index)
    together = np.concatenate(list(parts.values()))
    scene.check("data", len(np.unique(together)) == len(together) == len(index), "no overlap")
    scene.refuses(get_split, "dimenet", index[:-1], says="hold 130830")
    scene.refuses(get_split, "dimenet", np.append(index[:-1], 133_886), says="others")
    text = _published()
    folder = scene.folder / "twice"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.xyz").write_text(text)
    load = lambda: preparation.load("raw", str(folder), str(scene.folder / "cache"))
    scene.refuses(load, says="each molecule once")


def wrong_target(scene: Scene) -> None:
    flags = ["--config=qm9:smoke", f"--workdir={scene.run}"]
    flags += [f"--config.data.cache_dir={scene.bench.cache}"]
    targets = "--config.data.targets="
    bad = {"code": EXIT_USER_ERROR}
    scene.command("main", *flags, f"{targets}('hommo',)", **bad, says="Did you mean 'homo'")
    file = scene.folder / "mine.csv"
    rows = "".join(f"{'C' * k}O,{-40.5 * k}\n" for k in range(1, 30))
    file.write_text(f"smiles,U0\n{rows}")
    own = ["--config=molecules:smoke", f"--workdir={scene.run}", f"--config.data.path={file}"]
    scene.command("main", *own, f"{targets}('U0',)", **bad, says="unit")
    scene.command("main", *own, f"{targets}('U0:hartre',)", **bad, says="hartre")
    extensive = "--config.data.extensive=('homo',)"
    scene.command("main", *own, f"{targets}('U0:hartree',)", extensive, **bad, says="no target")
    scene.command("check", file, "--target=U0:eV", code=0, says="U0")


def too_large(scene: Scene) -> None:
    flag = "--config.data.buckets=(3,)"
    scene.train(1, flag, code=EXIT_USER_ERROR, says="the largest bucket holds 3", within=30)
    scene.check("files", not list(scene.run.glob("checkpoints/*")), "before training")


def data_changed(scene: Scene) -> None:
    cache = scene.folder / "cache"
    shutil.copytree(scene.bench.undisturbed().parent / "cache" / "nbody", cache / "nbody")
    file = prepared_of(cache) / "arrays" / "target.npy"
    flag = f"--config.data.cache_dir={cache}"
    scene.half()
    before = scene.listing()
    flip(file, 1000, 3)
    scene.train(1, flag, code=EXIT_USER_ERROR, says="target.npy is damaged")
    flip(file, 1000, 3)
    other_data(cache, lambda arrays: arrays["target"].__imul__(1.5))
    scene.train(1, flag, code=EXIT_USER_ERROR, says="passport.content_sha256")
    scene.unchanged(before)


CASES = [
    Case(58, "HTML, an empty file or half of it instead of the archive", "as "
         "`dsgdb9nsd.xyz.tar.bz2`; demetar itself downloads nothing",
         "names file and size, code 2", not_the_archive),
    Case(59, "archive with `..`, links, absolute paths, a bomb", "a tar of each; a member of 64 MB",
         "read as streams, nothing written; the bomb refused unread", hostile_archive),
    Case(60, "two jobs prepare the same data", "the first stopped while it writes; then continued, "
         "or SIGKILL", "one builds, the other waits or takes over; nothing left behind",
         two_prepare),
    Case(61, "raw xyz with `*^`, CRLF, missing line, wrong count, junk", "the first molecule of "
         "the sample, altered", "read the same, or refused with the file", odd_xyz),
    Case(62, "NaN or infinite label or coordinate", "in a raw file; in a CSV",
         "refused with the molecule or row", bad_numbers),
    Case(63, "unknown element, empty, one atom, coincident atoms, 300 atoms", "frames of an "
         "extxyz, predicted by the model that ships", "a status for each; numbers finite; "
         "neighbours unchanged", odd_molecules),
    Case(64, "wrong counts, ids that repeat, an exclusion off by one", "ids of QM9, altered",
         "refused with both counts", wrong_split),
    Case(65, "misspelt target, missing or wrong unit, references for HOMO", "real commands",
         "code 2, suggests; suspicious units are told", wrong_target),
    Case(66, "a graph larger than the largest bucket", "`data.buckets=(3,)`",
         "named before training", too_large),
    Case(67, "prepared data changed between two starts", "one bit; other numbers with fitting "
         "hashes", "refused with file, or with the hash that differs", data_changed),
]  # fmt: skip
