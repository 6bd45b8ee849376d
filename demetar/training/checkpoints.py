"""Checkpoints: saved asynchronously by Orbax, verified by SHA-256 before they are trusted.

The only module that imports Orbax. A checkpoint is the folder `checkpoints/<step>` with the
state (`TrainState`), a `meta` JSON and, last of all, `manifest.json` with the size and hash
of every file. A folder without a manifest is a save that was cut off; one that differs from
its manifest is damaged. Both are set aside, and the one before is used.
"""

import concurrent.futures
import dataclasses
import glob
import json
import os
import pathlib
import shutil
import sys
import threading
import time

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from data_pipelines.errors import UserError
from demetar.exits import NotRestorable
from demetar.job.job import Job
from demetar.records import log
from demetar.records.files import read_json
from demetar.training import sharding
from demetar.training.manifest import MANIFEST, what_is_wrong, write_manifest
from demetar.training.progress import Progress
from demetar.training.state import TrainState, state_sha256


def check_name(workdir: pathlib.Path) -> None:
    """Refuses a folder in which checkpoints could be saved, but not restored."""
    if (absolute := str(workdir.absolute())) != glob.escape(absolute):
        raise UserError(
            f"The run's folder {absolute} has one of *, ? and [ in its name, which Orbax takes for "
            "a pattern: its checkpoints could not be restored. Choose another --workdir."
        )


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by validation.

    Args:
      workdir: of the run.
      keep_last: how many of the newest to keep, at least 2, so that there is always one
        before the one being written.
      job: whose processes save and restore together; None for a reader of its own.
    """

    def __init__(self, workdir: pathlib.Path, keep_last: int, job: Job | None = None):
        check_name(workdir)
        self._folder = workdir / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        damaged = False
        job = job or Job.alone()
        if job.is_main:
            damaged = self._set_damaged_aside(workdir / "damaged")
        job.barrier("checkpoints")
        self._best = _KeepBest()
        self._failed: BaseException | None = None  # of this process's part of the save under way
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(),
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
                cleanup_tmp_directories=True,
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [preservation_policy.LatestN(keep_last), self._best]
                ),
            ),
        )
        if damaged and self._manager.latest_step() is None:
            raise UserError(
                f"No checkpoint in {self._folder} is whole; {workdir / 'damaged'} holds what is "
                "left. Start again with another --workdir, or delete this one."
            )
        self._without_manifest: int | None = None
        self._hashing = concurrent.futures.ThreadPoolExecutor(1, "manifest")
        self._hashed: concurrent.futures.Future | None = None

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier of a save, which first looks whether this process's part has failed.

        Orbax goes to a barrier on its way out of a failure too, and the processes that did not
        fail are at another, so both would wait for their whole time. The one that fails says so
        here, whatever it was doing: writing, giving the folder its name, deleting an old one.
        """
        in_background = threading.current_thread() is not threading.main_thread()
        if in_background and (error := sys.exception()) is not None:
            self._failed = error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    # --- reading -------------------------------------------------------------------------------

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Of the checkpoints that are there, whole."""
        return sorted(self._manager.all_steps())

    def meta(self, step: int) -> tuple[dict, Progress]:
        """Identity (config and passport) and progress of the run at `step`."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        try:
            meta = self._manager.restore(step, args=args).meta
            return meta, Progress.from_json(meta.pop("progress"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"Checkpoint {step} in {self._folder} is as its manifest says, but does not hold "
                f"the settings of a run ({error!r}). Copy the folder again, or start anew in "
                "another --workdir."
            ) from error

    def restore(self, step: int, abstract_state):
        """The state of `step`, in the shapes, types and shardings of `abstract_state`."""
        if step not in self.all_steps():
            raise UserError(
                f"{self._folder} has no whole checkpoint of step {step}, which had the best "
                f"validation score; it has {self.all_steps()}."
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        self._check_parameters(step, abstract_state.params)
        return self._manager.restore(step, args=args).state

    def _check_parameters(self, step: int, params) -> None:
        """Refuses those of another model, of which Orbax would tell one, deep in a traceback."""
        state = (self._folder / str(step) / "state").absolute()
        saved = ocp.PyTreeCheckpointHandler().metadata(state).tree["params"]
        lines = _other_shapes(saved, params)
        if lines:
            raise UserError(
                f"Checkpoint {step} in {self._folder} holds the parameters of another model:\n"
                + "\n".join(lines)
                + "\nRestore it with the config and the version of demetar that trained it."
            )

    def _set_damaged_aside(self, aside: pathlib.Path) -> bool:
        """Moves folders that are not whole to `aside`; true if one was damaged, not cut off."""
        damaged = False
        for folder in sorted(self._folder.iterdir()):
            if not (folder.name.isdigit() and folder.is_dir()):
                continue
            try:
                reason = what_is_wrong(folder)
            except OSError as error:  # of the disk: what is set aside may be read another day
                reason = f"it cannot be read: {error}"
            if reason is None:
                continue
            damaged |= (folder / MANIFEST).exists()
            log.complain(
                f"Checkpoint {folder.name} is not whole ({reason}); moved to {aside}. "
                "Going back to the one before."
            )
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / folder.name, ignore_errors=True)
            folder.rename(aside / folder.name)
        return damaged

    # --- writing -------------------------------------------------------------------------------

    def check_space(self, abstract_state) -> None:
        """Refuses a disk without room for two checkpoints, those that are there included.

        With one and room for another a run can go on: an old one goes when a new one is whole.
        """
        size = state_bytes(abstract_state)
        wanted = size * max(1, 2 - len(self._manager.all_steps()))
        free = shutil.disk_usage(self._folder).free
        if free < wanted:
            raise UserError(
                f"{self._folder} has {free / 1e6:.1f} MB free, but the next checkpoints need "
                f"{wanted / 1e6:.1f} MB ({size / 1e6:.1f} MB each): free some, or choose another "
                "--workdir."
            )

    def save(self, state: TrainState, identity: dict, progress: Progress) -> None:
        """Starts saving; blocks only while arrays are copied.

        A step saved before (then without its evaluation) is replaced, unless it is all there is:
        a resume evaluates it again, and finds the same.

        Args:
          state: on the devices.
          identity: config and passport of the run.
          progress: of the run. The checkpoint of its `best_step` is kept.
        """
        step = int(state.step)
        self.wait()
        saved = self._manager.all_steps()
        if step in saved:
            if len(saved) == 1:
                return  # a kill before the new one is whole would leave nothing
            self._manager.delete(step)
        self._best.step = progress.best_step
        meta = identity | {"progress": progress.to_json()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
            force=True,
        )
        self._without_manifest = step

    def prove(self, state: TrainState, progress: Progress) -> TrainState:
        """Reads the save that was just begun as a resume would, and compares it with what it is of.

        Before its manifest is written: until then no start of the run relies on it.

        Args:
          state: that is being saved; is given away, so that the devices have room for another.
          progress: that is being saved.

        Returns:
          The state that was read, the same bit for bit, to go on with.

        Raises:
          NotRestorable: it cannot be read, or is another one.
        """
        step = self._without_manifest
        self._wait_for_orbax()
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        abstract_state = jax.tree.map(place, state)
        wanted = state_sha256(sharding.to_host(state), progress.to_json())
        jax.tree.map(lambda x: x.delete(), state)
        what = f"The first checkpoint of this run, {self._folder / str(step)}, "
        remedy = (
            "A resume would fail, so the run stops here. Look at the disk, and at the versions of "
            "orbax-checkpoint and tensorstore; `demetar verify_resume` tries it on another disk."
        )
        try:
            _, read = self.meta(step)
            state = self.restore(step, abstract_state)
        except Exception as error:  # whatever the store raises; a lost process is found by its name
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # of memory: the disk is not to blame
            raise NotRestorable(
                f"{what}cannot be restored: {type(error).__name__}: {error} {remedy}"
            ) from error
        found = state_sha256(sharding.to_host(state), read.to_json())
        if found != wanted:
            raise NotRestorable(
                f"{what}is restored as another state (SHA-256 {found[:12]}…) than was saved "
                f"({wanted[:12]}…). {remedy}"
            )
        return state

    def poll(self) -> None:
        """Writes the manifest, in a thread, once the save under way is committed."""
        if self._without_manifest is None or self._is_saving():
            return
        self._manager.wait_until_finished()  # raises what went wrong in the background
        folder = self._folder / str(self._without_manifest)
        self._without_manifest = None
        if jax.process_index() == 0:
            self._hashed = self._hashing.submit(write_manifest, folder)

    def wait(self) -> None:
        """Returns when everything saved so far is on disk with its manifest."""
        self._wait_for_orbax()
        self.poll()
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None

    def _wait_for_orbax(self) -> None:
        while self._is_saving():
            time.sleep(0.005)
        self._manager.wait_until_finished()  # raises what went wrong in the background

    def _is_saving(self) -> bool:
        """Whether a save is under way; raises why this process's part of it has failed."""
        if self._failed is not None and self._manager.is_saving_in_progress():
            raise self._failed
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        self.wait()
        self._manager.close()
        self._hashing.shutdown()


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint as it lies on the disk.

    Attributes:
      step: of it.
      folder: of it.
      size: bytes of its files.
      wrong: why it is not whole; None if it is.
    """

    step: int
    folder: pathlib.Path
    size: int
    wrong: str | None


def state_bytes(abstract_state) -> int:
    """Of a whole state; Orbax compresses it, by an unknown part."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))


def size_of(folder: pathlib.Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def saved(workdir: pathlib.Path) -> list[Saved]:
    """The checkpoints of a run, the oldest first, compared with their manifests.

    Reads only. The run may be under way: what it deletes meanwhile is left out.
    """
    found = []
    if not os.path.isdir(workdir / "checkpoints"):  # not there, or we may not look
        return found
    for folder in (workdir / "checkpoints").iterdir():
        if not (folder.name.isdecimal() and folder.is_dir()):
            continue
        try:
            size = size_of(folder)
            wrong = what_is_wrong(folder)
        except OSError as error:
            if not folder.exists():
                continue
            size, wrong = 0, f"it cannot be read, or changes meanwhile: {error}"
        found.append(Saved(int(folder.name), folder, size, wrong))
    return sorted(found, key=lambda one: one.step)


def read_meta(folder: pathlib.Path) -> tuple[dict, Progress]:
    """Identity (config and passport) and progress of the run when it saved `folder`."""
    meta = json.loads((folder / "meta" / "metadata").read_text())
    progress = Progress.from_json(meta.pop("progress"))
    return meta, progress


def read_arrays(folder: pathlib.Path, part: str | None = None) -> dict:
    """The state of a checkpoint as NumPy arrays, whatever mesh it was trained on.

    Args:
      folder: of the checkpoint.
      part: one field of `TrainState`; None: all of them.
    """
    handler = ocp.PyTreeCheckpointHandler()
    state = (folder / "state").absolute()
    tree = handler.metadata(state).tree
    wanted = {name: tree[name] for name in ([part] if part else tree)}
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    return handler.restore(state, args=args)


def read_best(workdir: pathlib.Path) -> tuple[int, dict, dict]:
    """The best weights by validation of a run, which may be under way: nothing is changed.

    Returns:
      The step, the averaged weights as NumPy arrays, and the identity of the run (config and
      passport).
    """
    whole = {one.step: one.folder for one in saved(workdir) if one.wrong is None}
    if not whole:
        raise UserError(f"{workdir} has no whole checkpoint yet: train for longer first.")
    identity, progress = read_meta(whole[max(whole)])
    best = progress.best_step
    if (result := workdir / "result.json").exists():
        best = read_json(result)["step"]  # the last save may have been before the last evaluation
    if best not in whole:
        raise UserError(
            f"{workdir} has no whole checkpoint with an evaluation yet, only those of steps "
            f"{sorted(whole)}: train for longer first."
        )
    return best, read_arrays(whole[best], "ema")["ema"], identity


class _KeepBest:
    """An Orbax preservation policy: keeps the one checkpoint of `step`.

    Orbax's own BestN wants a metric with every save, and ours between evaluations have none.
    """

    step = 0

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _other_shapes(saved: dict, today: dict) -> list[str]:
    """A line for each parameter whose shape differs between a checkpoint and a model."""
    there, here = (
        {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree).items()}
        for tree in (saved, today)
    )
    return [
        f"  {name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} today"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
