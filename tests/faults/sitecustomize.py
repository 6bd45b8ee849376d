"""Loaded by every Python started with this folder on PYTHONPATH: a fault at a chosen moment.

    DEMETAR_FAULT=process:phase:step:action

when process `process` enters a phase whose name starts with `phase` at `step` or later (once, in
this start): `raise`, `sleep` for ever, hold the interpreter's lock for ever (`hold`), restore no
checkpoint from then on (`unreadable`), or a signal's name, sent to itself. A test double for bugs
and broken machines; the processes are real.
"""

import errno
import os
import signal
import sys
import time

_SPEC = os.environ.get("DEMETAR_FAULT")
_process, _phase, _step, _action = (_SPEC or ":::").split(":")


def _cannot_read(self, step, abstract_state):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(step))


def _strike():
    if _action == "raise":
        raise RuntimeError("a bug in the loader")
    if _action == "sleep":
        time.sleep(3600)
    if _action == "hold":
        sys.setswitchinterval(1e9)
        while True:
            pass
    if _action == "unreadable":
        from demetar.training.checkpoints import Checkpoints

        Checkpoints.restore = _cannot_read
        return
    os.kill(os.getpid(), signal.Signals[_action])


if _SPEC and any("--config" in word for word in sys.orig_argv):
    from demetar.job.watch import Watch

    _of_watch = Watch.phase
    _struck = []

    def _phase_with_fault(self, name, step=None):
        _of_watch(self, name, step)
        if (
            not _struck
            and self._process == int(_process)
            and name.startswith(_phase)
            and self.step >= int(_step)
        ):
            _struck.append(name)
            _strike()

    Watch.phase = _phase_with_fault
