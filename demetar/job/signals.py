"""SIGINT, SIGTERM and SIGUSR1: finish the step, save once, exit with *preempted* (75).

Until all processes have started there is nothing to save, and a signal ends this one at
once; the others see that it said goodbye and follow. Afterwards a signal only sets a flag,
which every step adds up over all processes (`sharding.stop_flags`), so that they all stop at the
same step. A second signal, two seconds later or more, exits immediately; the last checkpoint
stays whole.

A thread reacts, not Python's handler: that one would wait for the main thread, which may sit
in a collective that never ends.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

from demetar.exits import EXIT_PREEMPTED

# Schedulers say one thing twice: SIGTERM to the processes, and to a script that forwards it.
_ONE_REQUEST_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether this process was asked to stop: `requested` is a signal's name, or empty.

    Args:
      leave: called with a message to end the process at once, while nothing need be saved.
    """

    def __init__(self, leave: Callable[[str], None]):
        self.requested, self._since = "", 0.0
        self._leave = leave
        self._deferred = False

    def install(self) -> None:
        """Handles the signals of this process from now on. Call it from the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        # The C handler writes the number at once, whatever the main thread is doing.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._react, args=(reader,), daemon=True, name="signals").start()

    def defer(self) -> None:
        """From now on a signal only sets `requested`; whoever calls this must look at it."""
        self._deferred = True
        if self.requested:  # it came just before
            self._leave(f"{self.requested} before the first step: there was nothing to save.")

    def _react(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 16):
                if number in _SIGNALS:
                    self._handle(signal.Signals(number).name)

    def _handle(self, name: str) -> None:
        if self.requested:
            if time.monotonic() - self._since < _ONE_REQUEST_SECONDS:
                return
            os.write(2, f"\n{name} again: exiting at once.\n".encode())
            os._exit(EXIT_PREEMPTED)
        self.requested, self._since = name, time.monotonic()
        if not self._deferred:
            self._leave(f"{name} before the first step: there was nothing to save.")
        os.write(2, f"\n{name}: finishing the step and saving; once more exits at once.\n".encode())
