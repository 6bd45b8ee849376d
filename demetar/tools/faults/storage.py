"""Faults 21 to 42: disks that are full, slow or broken, and what lies in a run's folder."""

import hashlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess

from data_pipelines.json_text import json_text
from demetar.exits import EXIT_PREEMPTED, EXIT_USER_ERROR
from demetar.records.files import read_jsonl
from demetar.tools.faults.bench import Case, injecting
from demetar.tools.faults.scene import Scene
from demetar.tools.resume_check import logged_step
from demetar.training.checkpoints import saved
from demetar.training.progress import Progress


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The largest file of a checkpoint, but for its manifest."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return max(files, key=lambda file: file.stat().st_size)


def flip(file: pathlib.Path, byte: int, bit: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


# --- disks ---------------------------------------------------------------------------------------


def _full_at(scene: Scene, step: int) -> None:
    """A disk of 4 MB that others fill while the process is about to save."""
    disk = scene.tmpfs("disk", "4m")
    scene.run = disk / "run"
    job = scene.start(fault=f"0:save:{step}:SIGSTOP")
    pid = scene.frozen(job)
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 4096)
        except OSError:
            pass
    os.kill(pid, signal.SIGCONT)
    scene.end(job, EXIT_USER_ERROR, says=("No space left", "bytes free. Free some space"))
    scene.check("files", not (scene.run / "result.json").exists(), "no result")
    ballast.unlink()
    scene.train()
    scene.ends_the_same()


def full_disk(scene: Scene) -> None:
    _full_at(scene, 20)


def full_disk_at_the_last_save(scene: Scene) -> None:
    _full_at(scene, 40)


def _cannot_write(scene: Scene, error: str, says: str) -> None:
    """A run goes on from a checkpoint and cannot write the next one; then it can."""
    scene.train(1, "--config.checkpoint.stop_at=10", code=EXIT_PREEMPTED)
    scene.train(prefix=injecting("fsync", f"error={error}"), code=EXIT_USER_ERROR, says=says)
    scene.train()
    scene.ends_the_same()


def no_quota(scene: Scene) -> None:
    _cannot_write(scene, "EDQUOT", "Free some of your quota")


def broken_disk(scene: Scene) -> None:
    _cannot_write(scene, "EIO", "Input/output error")
    scene.another_run()
    # One whose name is drawn: the next checkpoint 40 has others, which can be read.
    file = largest(scene.half() / "checkpoints" / "40" / "state" / "d")
    prefix = injecting("read,pread64", "error=EIO", "-P", str(file))
    scene.train(prefix=prefix, says=("Checkpoint 40 is not whole", "Going back"))
    scene.ends_the_same()


def read_only_disk(scene: Scene) -> None:
    scene.run = scene.tmpfs("disk", "1m", "ro") / "run"
    scene.train(code=EXIT_USER_ERROR, says="cannot be written", within=20)


def slow_disk(scene: Scene) -> None:
    scene.train(prefix=injecting("fsync", "delay_enter=50000"), within=60)
    scene.ends_the_same()


def other_disks_full(scene: Scene) -> None:
    disk = scene.tmpfs("disk", "64k")
    scene.run.mkdir()
    for name in ("logs", "events"):
        (disk / name).mkdir()
        (scene.run / name).symlink_to(disk / name)
    with (disk / "ballast").open("wb", buffering=0) as stream:
        stream.write(b"\0" * (1 << 20))
    scene.train()
    scene.check("files", not any(f.stat().st_size for f in disk.rglob("*/*")), "nothing was logged")
    scene.ends_the_same()


# --- what became of a checkpoint -----------------------------------------------------------------


def _goes_back(scene: Scene, *says: str) -> None:
    """The newest checkpoint is not whole: the run goes on from the one before."""
    scene.train(says=("Checkpoint 40 is not whole", *says))
    scene.check("files", (scene.run / "damaged" / "40").is_dir(), "set aside")
    scene.ends_the_same()


def cut_files(scene: Scene) -> None:
    file = largest(scene.half() / "checkpoints" / "40")
    os.truncate(file, file.stat().st_size // 2)
    _goes_back(scene)
    scene.another_run()
    largest(scene.half() / "checkpoints" / "40").unlink()
    _goes_back(scene)


def flipped_bits(scene: Scene) -> None:
    folder, rng = scene.half() / "checkpoints" / "40", random.Random(28)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    silent = []
    for number in range(400):
        file = files[number % len(files)]
        byte, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, byte, bit)
        if next(one for one in saved(scene.run) if one.step == 40).wrong is None:
            silent.append(f"{file.name} {byte}:{bit}")
        flip(file, byte, bit)
    scene.check("files", not silent, f"400 flipped bits; not noticed: {silent}")
    scene.saw("400 of 400 flipped bits are noticed")
    flip(files[0], 0, 0)
    _goes_back(scene)


def parts_missing(scene: Scene) -> None:
    for name in ("meta/metadata", "commit_success.txt", "manifest.json"):
        scene.another_run()
        (scene.half() / "checkpoints" / "40" / name).unlink()
        (scene.run / "checkpoints" / "45").mkdir()  # empty, and newer
        _goes_back(scene)


def item_missing(scene: Scene) -> None:
    shutil.rmtree(scene.half() / "checkpoints" / "40" / "state")
    _goes_back(scene, "missing file state/")


def stray_names(scene: Scene) -> None:
    folder = scene.half() / "checkpoints"
    names = ("tmp", "foo", "-5", "0012", "99999999999999999999", "²")
    for name in names:
        (folder / name).mkdir()
    (folder / ".DS_Store").write_text("")
    largest(folder / "40").unlink()  # so that some steps are left
    _goes_back_besides(scene, (*names, ".DS_Store"))


def stale_pointers(scene: Scene) -> None:
    folder = scene.half() / "checkpoints"
    (folder / "latest").symlink_to(folder / "38")
    (folder / "checkpoint").write_text("38")
    largest(folder / "40").unlink()
    _goes_back_besides(scene, ("latest", "checkpoint"))


def _goes_back_besides(scene: Scene, names: tuple[str, ...]) -> None:
    scene.train(says="Checkpoint 40 is not whole")
    scene.ends_the_same(besides=names)


def copied(scene: Scene) -> None:
    first = scene.half()
    scene.another_run()
    subprocess.run(["cp", "-r", str(first), str(scene.run)], check=True)
    scene.train(says="resumed at step 40")
    scene.ends_the_same()
    scene.another_run()
    shutil.copytree(
        first, scene.run, ignore=lambda at, names: ["d"] if at.endswith("/40/state") else []
    )
    _goes_back(scene)


def renamed_in_pieces(scene: Scene) -> None:
    folder = scene.half() / "checkpoints" / "40"
    whole = folder.rename(scene.folder / "whole")
    for name in ("_CHECKPOINT_METADATA", "meta"):  # what has arrived under the final name
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        (folder.mkdir(exist_ok=True), copy(whole / name, folder / name))
    _goes_back(scene, "the save was cut off")


def linked(scene: Scene) -> None:
    file = largest(scene.half() / "checkpoints" / "40")
    outside = scene.folder / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    before = outside.read_bytes()
    _goes_back(scene, "is a link")
    scene.check("files", outside.read_bytes() == before, "what it points to is as it was")
    scene.another_run()
    manifest = scene.half() / "checkpoints" / "40" / "manifest.json"
    content = json.loads(manifest.read_text())
    digest = hashlib.sha256(before).hexdigest()
    content["files"]["../../../outside"] = {"bytes": len(before), "sha256": digest}
    manifest.write_text(json_text(content))
    _goes_back(scene)
    scene.check("files", outside.read_bytes() == before, "so is what a manifest names outside")


def other_release(scene: Scene) -> None:
    for group, key in (("model", "number_of_moons"), ("log", "identity")):  # newer; older
        scene.another_run()
        file = scene.half() / "config.json"
        identity = json.loads(file.read_text())
        identity["config"][group][key] = True
        file.write_text(json_text(identity))
        before = scene.listing()
        scene.train(code=EXIT_USER_ERROR, says="saved by another version of demetar")
        scene.unchanged(before)


# --- which checkpoint, whose folder ---------------------------------------------------------------


def best_and_latest(scene: Scene) -> None:
    early = ("--config.train.eval_every=5", "--config.optim.learning_rate=1.0")
    scene.train(1, *early, fault="0:batch:33:SIGKILL", code=-signal.SIGKILL)
    scene.train(1, *early)
    scores = {
        x["step"]: x["score"]
        for x in read_jsonl(scene.run / "metrics.jsonl")
        if x["split"] == "validation"
    }
    best = min(scores, key=scores.get)
    kept = sorted(int(f.name) for f in (scene.run / "checkpoints").iterdir())
    scene.check("files", kept == sorted({best, 35, 40}) and best < 35, f"kept {kept}, best {best}")
    scene.saw(f"kept {kept}; the best is {best}")
    progress = Progress.new(1)
    progress.record_evaluation(5, 1.0, "")
    scene.check("state", not progress.record_evaluation(10, math.nan, ""), "NaN is never the best")
    scene.ends_the_same(1, *early)


def clock_goes_back(scene: Scene) -> None:
    folder = scene.half() / "checkpoints"
    for step, moment in (("35", 4e9), ("40", 1.0)):
        for file in (folder / step, *(folder / step).rglob("*")):
            os.utime(file, (moment, moment))
    scene.train(says="resumed at step 40")
    scene.ends_the_same()


def two_jobs(scene: Scene) -> None:
    job = scene.start(fault="0:batch:12:sleep")
    scene.wait_until(job, lambda: logged_step(scene.run) >= 11)
    scene.train(code=EXIT_USER_ERROR, says=f"process {job.processes[0].pid} on host", within=30)
    scene.check("exit code", job.processes[0].poll() is None, "the first goes on")
    job.signal(signal.SIGKILL)  # it leaves its file, without a last word
    scene.end(job, -signal.SIGKILL)
    scene.train()
    scene.ends_the_same()


def bad_cache_of_programs(scene: Scene) -> None:
    scene.bench.undisturbed()
    programs = scene.folder / "programs"
    shutil.copytree(scene.bench.cache / "xla", programs)
    rng = random.Random(40)
    for number, file in enumerate(sorted(f for f in programs.rglob("*") if f.is_file())):
        size = file.stat().st_size
        if number % 2 and size:
            flip(file, rng.randrange(size), rng.randrange(8))
        else:
            os.truncate(file, size // 2)
    scene.train(environment={"JAX_COMPILATION_CACHE_DIR": str(programs)})
    scene.ends_the_same()
    scene.another_run()
    closed = scene.tmpfs("closed", "1m", "ro")
    scene.train(environment={"JAX_COMPILATION_CACHE_DIR": str(closed)})
    scene.ends_the_same()
    scene.another_run()  # one folder for two jobs at once
    second, shared = scene.folder / "second", {"JAX_COMPILATION_CACHE_DIR": f"{programs}-new"}
    jobs = [scene.start(environment=shared), scene.start(workdir=second, environment=shared)]
    for job in jobs:
        scene.end(job, 0)
    scene.ends_the_same()


def logs_after_resuming(scene: Scene) -> None:
    for step in (13, 27):
        scene.train(fault=f"0:batch:{step}:SIGKILL", code=-signal.SIGKILL)
    scene.train()
    lines = read_jsonl(scene.run / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["split"] == "train"]
    scene.check("metrics", steps == list(range(1, 41)), "each step once, in order")
    scene.ends_the_same()


_AGAIN = "the same command goes on; the end is the same"
_BACK = "set aside with the reason; goes on from the one before; the end is the same"
CASES = [
    Case(21, "full disk during a save", "a tmpfs of 4 MB, filled while the process is about to "
         "save", f"names it, code 2, the old checkpoint stays; with room {_AGAIN}", full_disk),
    Case(22, "quota exceeded during a save", "resumed at step 10 under strace: fsync gives "
         "EDQUOT", f"as a full disk; {_AGAIN}", no_quota),
    Case(23, "EIO when writing, when reading", "resumed at step 10 under strace: fsync gives "
         "EIO; then reading a file of the newest checkpoint gives EIO",
         f"code 2, {_AGAIN}; reading: {_BACK}", broken_disk),
    Case(24, "read-only workdir", "a tmpfs mounted read-only", "refused before compiling",
         read_only_disk),
    Case(25, "very slow disk", "strace makes each fsync wait 50 ms: a save takes longer than the "
         "steps to the next", "one save at a time; the end is the same", slow_disk),
    Case(26, "full disk at the very last save", "as 21, at step 40", "code 2, no result; "
         f"with room {_AGAIN}", full_disk_at_the_last_save),
    Case(27, "truncated file, deleted file", "the largest of the newest checkpoint", _BACK,
         cut_files),
    Case(28, "a flipped bit anywhere in a checkpoint", "400 bits, over all of its files (seed 28)",
         f"each is noticed; {_BACK}", flipped_bits),
    Case(29, "metadata, marker or manifest missing; an empty folder", "each deleted, and an empty "
         "checkpoint 45", _BACK, parts_missing),
    Case(30, "marker there, item missing", "the folder of the state deleted", _BACK, item_missing),
    Case(31, "stray names among the checkpoints", "`tmp`, `.DS_Store`, `foo`, `0012`, `-5`, `²`, a "
         "huge number", "ignored or set aside; the end is the same", stray_names),
    Case(32, "a copied checkpoint", "`cp -r` of all; a copy that lacks files",
         f"whole: accepted; else {_BACK}", copied),
    Case(33, "a stale pointer to the latest", "a dangling link `latest` and a file `checkpoint`",
         "there are no pointers: ignored", stale_pointers),
    Case(34, "the best would push out the latest; NaN as best", "a rate at which an early step is "
         "best; SIGKILL after step 33", "best and newest two are kept; NaN is never best",
         best_and_latest),
    Case(35, "rename that is not atomic, as on NFS or FUSE", "emulated: half of the files under "
         "the final name", _BACK, renamed_in_pieces),
    Case(36, "the clock goes backwards", "files of step 40 dated 1970, of step 35 dated 2096",
         "the step decides: resumed at 40", clock_goes_back),
    Case(37, "two jobs on one workdir; a stale lock", "a second one while the first hangs; then "
         "SIGKILL of the first", f"code 2, names host and process; {_AGAIN}", two_jobs),
    Case(38, "a link out of a checkpoint, `..` in a name", "the largest file replaced by a link to "
         "its own content outside; a name in the manifest", _BACK, linked),
    Case(39, "a checkpoint of a newer or older release", "keys in `config.json` that this release "
         "does not know", "names version and key, code 2, changes nothing", other_release),
    Case(40, "the cache of programs is corrupt, read-only, shared", "half of its files cut, half "
         "with a flipped bit; a read-only tmpfs; two jobs at once", "the end is the same",
         bad_cache_of_programs),
    Case(41, "the disk of logs and events is full", "both folders on a full tmpfs",
         "training goes on, metrics are kept", other_disks_full),
    Case(42, "logs after a resume", "SIGKILL after steps 13 and 27", "each step once, in order",
         logs_after_resuming),
]  # fmt: skip
