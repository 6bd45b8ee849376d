"""One fault under way, and the oracles that say what comes of it."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from data_pipelines.errors import UserError
from demetar.records.graph_log import read_graph_log
from demetar.tools import checkpoint_files, resume_check
from demetar.tools.faults.bench import (
    LOST,
    NOT_MADE,
    REFUSED,
    STEPS,
    SURVIVED,
    Bench,
    Case,
    Check,
    NotMade,
    mount,
)
from demetar.tools.local_job import LocalJob
from demetar.training.checkpoints import read_arrays, saved
from demetar.training.manifest import MANIFEST, write_manifest

_PATIENCE = 90.0  # seconds that any command here may take
_OF_A_RUN = {
    *("checkpoints", "config.json", "damaged", "events", "failures.jsonl", "graph_log", "logs"),
    *("learning_curves.png", "metrics.jsonl", "processes", "result.json", "trajectories.png"),
}


class Scene:
    """One case under way: what it starts, and what the oracles said of it.

    Attributes:
      bench: shared with the other cases.
      folder: its own.
      run: the workdir of its run.
      checks: what the oracles said, in order.
      codes: exit codes of the commands that met the fault.
      seen: what there was to see, for a person.
    """

    def __init__(self, bench: Bench, folder: pathlib.Path):
        self.bench, self.folder, self.run = bench, folder, folder / "run"
        self.checks: list[Check] = []
        self.codes: list[int] = []
        self.seen: list[str] = []
        self._jobs: list[LocalJob] = []
        self._runs = 0
        self._mounts = contextlib.ExitStack()
        folder.mkdir(parents=True)

    # --- making it ------------------------------------------------------------------------------

    def start(
        self,
        count: int = 1,
        *flags: str,
        fault: str = "",
        workdir: pathlib.Path | None = None,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> LocalJob:
        """Starts `demetar train` in `count` processes; `fault` is for the hook."""
        job = LocalJob(
            [*self.bench.flags(workdir or self.run), *flags],
            count,
            quiet=True,
            prefix=prefix,
            environment=self.bench.environment(fault) | dict(environment or {}),
        )
        self._jobs.append(job)
        return job

    def train(self, count: int = 1, *flags: str, code: int = 0, says=(), within=_PATIENCE, **more):
        """Starts `demetar train` and waits for its end, which is looked at."""
        self.end(self.start(count, *flags, **more), code, says=says, within=within)

    def command(self, module: str, *arguments: str, code: int = 0, says=(), **variables) -> str:
        """Runs another command to its end, which is looked at; returns what it said."""
        began = self.bench.clock.now()
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"demetar.{module}", *map(str, arguments)],
            env=os.environ | self.bench.environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.folder,
            timeout=600,
        )
        self._judge_end(
            [done.returncode], code, done.stdout, says, self.bench.clock.now() - began, 60.0
        )
        return done.stdout

    def another_run(self) -> None:
        """From now on `run` is a new folder."""
        self._runs += 1
        self.run = self.folder / f"run-{self._runs}"

    def half(self, count: int = 1, *flags: str) -> pathlib.Path:
        """Puts the undisturbed run into `run` as it was just before its end; returns `run`."""
        shutil.copytree(self.bench.undisturbed(count, *flags), self.run)
        (self.run / "result.json").unlink()
        return self.run

    def sign(self, step: str) -> None:
        """Gives an altered checkpoint of `run` a manifest that fits, as a stranger could."""
        folder = self.run / "checkpoints" / step
        (folder / MANIFEST).unlink()
        write_manifest(folder)

    def frozen(self, job: LocalJob, process: int = 0) -> int:
        """Waits until a process has stopped itself (SIGSTOP); returns its id."""
        pid = job.processes[process].pid
        state = lambda: pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        self.wait_until(job, lambda: state() == "T")
        return pid

    def wait_until(
        self, job: LocalJob, condition: Callable[[], bool], ended: int | None = None
    ) -> None:
        """Until `condition()`, while all processes of the job run, but for the one that may end."""
        deadline = self.bench.clock.now() + _PATIENCE
        others = [p for n, p in enumerate(job.processes) if n != ended]
        while not condition():
            if self.bench.clock.now() > deadline or any(p.poll() is not None for p in others):
                raise RuntimeError(f"the moment did not come: {said(job, self.run)[-500:]}")
            time.sleep(0.01)

    def tmpfs(self, name: str, size: str, mode: str = "rw") -> pathlib.Path:
        """A filesystem of its own, of that size, unmounted at the end."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        mount(["mount", "-t", "tmpfs", "-o", f"size={size},{mode}", "tmpfs", str(folder)])
        self._mounts.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
        return folder

    def close(self) -> None:
        """Ends what is left of the case."""
        for job in self._jobs:
            for child in job.processes:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # of its own session; a tracer's, too
                    child.wait()
        self._mounts.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- looking --------------------------------------------------------------------------------

    def check(self, oracle: str, good: bool, text: str) -> None:
        """Takes note of what an oracle said."""
        self.checks.append(Check(oracle, bool(good), text))

    def saw(self, text: str) -> None:
        """Takes note of something for the table."""
        self.seen.append(text)

    def end(
        self, job: LocalJob, code: int, *, says=(), within: float = _PATIENCE, process=None
    ) -> str:
        """Waits for the end of a job, or of one process of it, and looks at it.

        Args:
          job: that was started here.
          code: the exit code that is wanted.
          says: what must be said, of the processes together.
          within: seconds from now.
          process: that must end so; None: all must.
        """
        began = self.bench.clock.now()
        awaited = job.processes if process is None else [job.processes[process]]
        while any(p.poll() is None for p in awaited) and self.bench.clock.now() - began < within:
            time.sleep(0.02)
        seconds = self.bench.clock.now() - began
        for child in job.processes:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        job.wait()
        text = said(job, self.run)
        self._judge_end([p.returncode for p in awaited], code, text, says, seconds, within)
        return text

    def _judge_end(self, codes, code: int, text: str, says, seconds, within) -> None:
        says = [says] if isinstance(says, str) else says
        self.check("exit code", set(codes) == {code}, f"{sorted(set(codes))}, wanted {code}")
        self.check("time", seconds < within, f"{seconds:.1f} s of {within:.0f}")
        for words in says:
            self.say(text, words)
        if code == 2:
            self.check("sentence", "Traceback" not in text, f"no traceback: {text[-1500:]}")
        self.codes += codes if says or code else []

    def say(self, text: str, words: str) -> None:
        """Oracle: a line of `text` has these words."""
        line = next((x for x in reversed(text.splitlines()) if words in x), None)
        self.check("sentence", line is not None, words if line else f"no {words!r}: {text[-400:]}")
        if line is not None:
            self.saw(_plain(line, self.folder))

    def refuses(self, function: Callable, *arguments, says: str) -> None:
        """A call that must end in one sentence."""
        try:
            function(*arguments)
            self.check("sentence", False, f"nothing was refused; wanted {says!r}")
        except UserError as error:
            self.codes.append(error.exit_code)
            self.check("exit code", error.exit_code == 2, f"{error.exit_code}, wanted 2")
            self.check("sentence", says in str(error), f"{error}; wanted {says!r}")
            self.saw(_plain(str(error), self.folder))

    def listing(self) -> dict[str, bytes]:
        """Content of the files of the run, but for logs and signs of life."""
        return {
            str(file.relative_to(self.run)): file.read_bytes()
            for file in sorted(self.run.rglob("*"))
            if file.is_file() and file.parent.name not in ("logs", "processes")
        }

    def unchanged(self, before: Mapping[str, bytes]) -> None:
        """Oracle: the files of the run are those of before."""
        now = self.listing()
        odd = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
        self.check("files", not odd, f"changed: {odd}")

    def ends_the_same(self, count: int = 1, *flags: str, besides: Sequence[str] = ()) -> None:
        """Oracles: graphs, state and metrics of the undisturbed run; no damaged or foreign file.

        Args:
          count: processes of the run that nobody disturbed.
          flags: of it.
          besides: names of files that may lie there, because the case put them there.
        """
        whole = self.bench.undisturbed(count, *flags)
        self.no_damage(besides)
        found = resume_check.compare(whole, self.run, STEPS)
        self.check("graphs", found.same_graphs, found.first_difference or "the same in every step")
        self.check("state", found.same_state, f"SHA-256 {found.sha256[:12]}")
        metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (whole, self.run)]
        self.check("metrics", metrics[0] == metrics[1], "metrics.jsonl, byte for byte")
        self.saw("ends as if undisturbed")

    def ends_alike(self, whole: pathlib.Path) -> None:
        """Oracles for another topology, in float64: the same graphs, losses and norm to 1e-10."""
        self.no_damage()
        with jax.enable_x64(True):
            found = resume_check.compare(whole, self.run, STEPS)
        self.check("graphs", read_graph_log(whole) == read_graph_log(self.run), "in every step")
        good = found.is_good(same_topology=False)
        self.check("state", good, f"losses to {found.loss:.0e}, norm to {found.norm:.0e}")
        self.saw(f"the same graphs, losses to {found.loss:.0e}")

    def no_damage(self, besides: Sequence[str] = ()) -> None:
        """Oracle: every checkpoint is whole and nothing lies there that does not belong there."""
        try:
            list(checkpoint_files.verify(self.run))
            self.check("files", True, "checkpoints verify")
        except UserError as error:
            self.check("files", False, f"checkpoints verify: {error}")
        found = {f.name for f in self.run.iterdir() if f.name not in _OF_A_RUN}
        found |= {f.name for f in (self.run / "checkpoints").iterdir() if not f.name.isdecimal()}
        aside = self.run / "damaged"
        found |= {f.name for f in self.run.rglob("*tmp*") if aside not in f.parents}
        self.check("files", found <= set(besides), f"foreign: {sorted(found - set(besides))}")

    def check_finite(self) -> None:
        """Oracle: no number of a whole checkpoint is NaN or infinite."""
        for one in saved(self.run):
            if one.wrong:  # a save that the end cut off: set aside by the next start
                continue
            leaves = jax.tree.leaves(read_arrays(one.folder))
            good = all(np.isfinite(leaf).all() for leaf in leaves)
            self.check("files", good, f"checkpoint {one.step} is finite")


def said(job: LocalJob, workdir: pathlib.Path) -> str:
    """What the processes of a job printed at last, with their logs in the workdir before it."""
    logs = "".join(f.read_text(errors="replace") for f in sorted(workdir.glob("logs/*.log")))
    return logs + "".join(job.tail(n) for n in range(len(job.processes)))


def _plain(line: str, folder: pathlib.Path) -> str:
    """A line without the scratch folder and the time of the log."""
    line = line.replace(f"{folder}/", "").replace(str(folder), ".").replace(str(folder.parent), ".")
    words = line.split()
    if len(words) > 2 and words[0][:2] == "20" and words[0].count("-") == 2:
        words = words[2:]
    return " ".join(words).removeprefix("error: ")


def verdict_of(scene: Scene) -> str:
    """`survived`, `refused`, or `lost` if any oracle is not content, or none was asked."""
    if not scene.checks or not all(check.good for check in scene.checks):
        return LOST
    went_on = any(check.oracle in ("state", "finite") for check in scene.checks)
    return SURVIVED if went_on or not any(scene.codes) else REFUSED


def perform(case: Case, bench: Bench) -> dict:
    """Makes the fault of a case; returns its row, as JSON."""
    scene, began = Scene(bench, bench.folder / f"case-{case.number}"), bench.clock.now()
    try:
        case.make(scene)
        verdict = verdict_of(scene)
    except NotMade as reason:
        verdict = NOT_MADE
        scene.saw(f"{reason}")
    except Exception as error:  # of a case or of an oracle: nothing is known to be well
        verdict = LOST
        scene.check("the case itself", False, f"{type(error).__name__}: {error}")
    finally:
        scene.close()
    failed = [f"{check.oracle}: {check.text}" for check in scene.checks if not check.good]
    return {
        "number": case.number,
        "fault": case.fault,
        "how": case.how,
        "wanted": case.wanted,
        "seen": list(dict.fromkeys(scene.seen)),
        "exit_codes": sorted(set(scene.codes)),
        "seconds": round(bench.clock.now() - began, 1),
        "oracles": list(dict.fromkeys(check.oracle for check in scene.checks)),
        "verdict": verdict,
        "failed": failed,
    }
