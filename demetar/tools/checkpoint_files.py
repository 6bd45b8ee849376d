"""What `demetar checkpoints` says of the checkpoints of a run, and which of them it deletes."""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax

from data_pipelines.errors import UserError
from demetar.config import stored
from demetar.job.watch import at_work
from demetar.records.log import size_text
from demetar.training.checkpoints import Saved, read_arrays, read_meta, saved, size_of
from demetar.training.progress import Progress

_UNFINISHED = "*.orbax-checkpoint-tmp*"  # what Orbax calls a folder until the save is committed
_DELETING = 1.0  # seconds in which a run that is under way has deleted what it was deleting
_UNDER_WAY = "the run is saving it, or was cut off"


def _look(workdir: pathlib.Path) -> tuple[list[Saved], list[Saved]]:
    """(all checkpoints, the whole ones), the oldest first; an error if there is none at all."""
    found = saved(workdir)
    if any(one.wrong for one in found) and at_work(workdir):
        time.sleep(_DELETING)
        found = [one for one in found if one.folder.exists()]
        if found and found[-1].wrong:
            found[-1] = dataclasses.replace(found[-1], wrong=_UNDER_WAY)
    if not found:
        raise UserError(
            f"{workdir} holds no checkpoint that can be seen: it is not the workdir of a run, the "
            "run has not saved yet, or you may not look into it."
        )
    return found, [one for one in found if one.wrong is None]


def _best(whole: list[Saved]) -> tuple[int, float]:
    """(step, validation score) of the best, as the newest whole checkpoint says; step 0: none."""
    if not whole:
        return 0, math.inf
    _, progress = read_meta(whole[-1].folder)
    return progress.best_step, progress.best_score


# --- ls, verify ----------------------------------------------------------------------------------


def table(workdir: pathlib.Path) -> list[str]:
    """A line for each checkpoint, and what a run keeps."""
    found, whole = _look(workdir)
    best, score = _best(whole)
    lines = []
    for one in found:
        remarks = [f"not whole: {one.wrong}" if one.wrong else "whole"]
        if whole and one is whole[-1]:
            remarks.append("latest")
        if one.step == best:
            remarks.append(f"best, validation score {score:.5g}")
        lines.append(f"{one.step:>10}  {size_text(one.size):>10}  {', '.join(remarks)}")
    aside = sorted(folder.name for folder in (workdir / "damaged").glob("*"))
    if aside:
        lines.append(f"set aside in {workdir / 'damaged'}: {', '.join(aside)}")
    if whole:
        keep = _keep_last(whole)
        lines.append(f"The run keeps the newest {keep} (config.checkpoint.keep_last) and the best.")
    return lines


def verify(workdir: pathlib.Path) -> Iterator[str]:
    """A line for each checkpoint, whose files are compared with its manifest and read.

    Raises:
      UserError: after the last line, if one is not whole or cannot be read.
    """
    found, _ = _look(workdir)
    good, bad = [], []
    for one in found:
        reason, facts = one.wrong, ""
        if reason is None:
            try:
                read_meta(one.folder)
                leaves = jax.tree.leaves(read_arrays(one.folder))
                facts = f"{sum(leaf.size for leaf in leaves):,} numbers in {len(leaves)} arrays"
            except Exception as error:  # whatever the store raises: it is what we came to know
                if not one.folder.exists():
                    continue  # the run has deleted it meanwhile
                # Hashes that fit, and yet not to be read: by the store, on this path, in this
                # version.
                reason = f"it cannot be read: {type(error).__name__}: {error}".splitlines()[0]
        if reason != _UNDER_WAY:
            (bad if reason else good).append(one.step)
        verdict = f"not whole: {reason}" if reason else f"whole: {facts}"
        yield f"{one.step:>10}  {size_text(one.size):>10}  {verdict}"
    if bad:
        what_then = f"will go on from step {max(good)}" if good else "cannot go on"
        raise UserError(
            f"{len(bad)} of {len(found)} checkpoints of {workdir} cannot be relied upon: "
            f"{', '.join(map(str, bad))}. The run {what_then}."
        )


# --- diff ----------------------------------------------------------------------------------------


def compare(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """What differs between two runs or two checkpoints: config, data, how far they are."""
    sides = [_read(folder) for folder in (first, second)]
    names = (f"in {first}", f"in {second}")
    lines = stored.differences(*(identity for identity, _ in sides), names)
    other = [line for key, line in lines.items() if stored.changes_numbers(key)]
    same = [line for key, line in lines.items() if not stored.changes_numbers(key)]
    text = []
    if other:
        text += ["These make them different runs; neither goes on with the other's config:", *other]
    if same:
        text += ["These change no number; a run may go on with either:", *same]
    if not lines:
        text.append("Config and data are the same.")
    for folder, (_, progress) in zip((first, second), sides, strict=True):
        if progress is not None:
            text.append(
                f"{folder}: best validation score {progress.best_score:.5g} at step "
                f"{progress.best_step}, {progress.train_seconds:.0f} s of training"
            )
    return text


def _read(folder: pathlib.Path) -> tuple[dict, Progress | None]:
    """Identity of a run or a checkpoint; its progress, where it has saved one."""
    try:
        progress = None
        if (folder / "meta").is_dir():
            identity, progress = read_meta(folder)
        else:
            identity = stored.read_identity(folder / "config.json")
            whole = [one for one in saved(folder) if one.wrong is None]
            if whole:
                _, progress = read_meta(whole[-1].folder)
        return {key: identity[key] for key in ("config", "passport")}, progress
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is neither the workdir of a run nor a checkpoint: {error}."
        ) from error


# --- prune ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What stays and what goes.

    Attributes:
      keep: checkpoint, why.
      remove: folder, bytes, why.
    """

    keep: list[tuple[Saved, str]]
    remove: list[tuple[pathlib.Path, int, str]]

    def lines(self) -> list[str]:
        """For a person who is to say yes."""
        text = [f"keeps    {one.folder}: {why}" for one, why in self.keep]
        text += [f"deletes  {f}, {size_text(size)}: {why}" for f, size, why in self.remove]
        total = sum(size for _, size, _ in self.remove)
        return [*text, f"{size_text(total)} to delete." if self.remove else "Nothing to delete."]

    def delete(self) -> None:
        """Deletes what is to be removed."""
        for folder, _, _ in self.remove:
            try:
                folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
            except OSError as error:
                raise UserError(f"{folder} cannot be deleted: {error}.") from error


def plan_pruning(workdir: pathlib.Path, keep_last: int | None) -> Pruning:
    """The newest whole checkpoints and the best stay; all others, and what is damaged, go.

    Args:
      workdir: of a run that is not under way.
      keep_last: how many of the newest; None: as the run's config says.
    """
    if holder := at_work(workdir):
        raise UserError(
            f"A job works in {workdir}: process {holder.get('pid')} on host {holder.get('host')}. "
            "Wait for it or stop it."
        )
    found, whole = _look(workdir)
    if not whole:
        raise UserError(
            f"No checkpoint in {workdir} is whole, so none is deleted: what is left may be all "
            "there is. Delete the folder yourself if you do not need it."
        )
    newest = whole[-(keep_last or _keep_last(whole)) :]
    best, _ = _best(whole)
    keep, remove = [], []
    for one in found:
        if one.wrong:
            remove.append((one.folder, one.size, f"not whole: {one.wrong}"))
        elif one in newest or one.step == best:
            why = ["among the newest"] * (one in newest) + ["best"] * (one.step == best)
            keep.append((one, ", ".join(why)))
        else:
            remove.append((one.folder, one.size, "neither among the newest nor the best"))
    for folder in sorted((workdir / "checkpoints").glob(_UNFINISHED)):
        remove.append((folder, size_of(folder), "a save that was cut off"))
    for folder in sorted((workdir / "damaged").glob("*")):
        remove.append((folder, size_of(folder), "was set aside"))
    return Pruning(keep, remove)


def _keep_last(whole: list[Saved]) -> int:
    identity, _ = read_meta(whole[-1].folder)
    return stored.from_json(identity["config"]).checkpoint.keep_last
