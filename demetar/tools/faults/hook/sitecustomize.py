"""Loaded by every Python started with this folder on PYTHONPATH: a fault at a chosen moment.

    DEMETAR_FAULT=process:phase:step:action
    DEMETAR_FAULT=process:event:path:action

when process `process` (a number, or `all`) enters a phase whose name starts with `phase` at `step`
or later; or just before it does what Python's audit event says (`os.rename`, `open`, ...) to a file
whose path contains `path`. Once in this start. `action` is `raise`, `sleep` for ever, hold the
interpreter's lock for ever (`hold`), read address 0 (`crash`), find the disk full now (`full`) or
when it saves (`unwritable`), restore no checkpoint from then on (`unreadable`), or a signal's name,
sent to itself.
The moment is arranged; the processes, their signals and what is left of them are real.
"""

import ctypes
import errno
import os
import signal
import sys
import time

_SPEC = os.environ.get("DEMETAR_FAULT")
_process, _moment, _where, _action = (_SPEC or ":::").split(":")
_struck = []


def _cannot_read(self, step, abstract_state):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(step))


class _NoSpace:
    """A future of Orbax: what one that writes raises on a full disk."""

    def result(self, timeout=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file of the checkpoint")


def _refuse_to_write():
    import orbax.checkpoint as ocp

    save = ocp.PyTreeCheckpointHandler.async_save

    async def async_save(self, *args, **options):
        return [*(await save(self, *args, **options)), _NoSpace()]

    ocp.PyTreeCheckpointHandler.async_save = async_save


def _strike(moment):
    if _struck:
        return
    _struck.append(moment)
    if _action == "raise":
        raise RuntimeError("a bug in the loader")
    if _action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), moment)
    if _action == "sleep":
        time.sleep(3600)
    if _action == "hold":
        sys.setswitchinterval(1e9)
        while True:
            pass
    if _action == "crash":
        ctypes.string_at(0)
    if _action == "unreadable":
        from demetar.training.checkpoints import Checkpoints

        Checkpoints.restore = _cannot_read
        return
    if _action == "unwritable":
        _refuse_to_write()
        return
    os.kill(os.getpid(), signal.Signals[_action])


def _is_hit(number) -> bool:
    return _process in ("all", str(number))


if _SPEC and any("--config" in word for word in sys.orig_argv):
    from demetar.job.watch import Watch

    _of_watch = Watch.phase
    _numbers = []  # of this process, once it has one

    def _phase_with_fault(self, name, step=None):
        _of_watch(self, name, step)
        _numbers.append(self._process)
        if _where.isdigit() and _is_hit(self._process):
            if name.startswith(_moment) and self.step >= int(_where):
                _strike(name)

    def _audit(event, arguments):
        if event == _moment and not _struck and _numbers and _is_hit(_numbers[-1]):
            if any(_where in os.fspath(x) for x in arguments if isinstance(x, str | os.PathLike)):
                _strike(event)

    Watch.phase = _phase_with_fault
    if not _where.isdigit():
        sys.addaudithook(_audit)
