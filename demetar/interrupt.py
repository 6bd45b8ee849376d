"""SIGINT and SIGTERM: finish the step, save once, say how to resume, exit with 75.

While there is nothing to save (reading data, say) a signal ends the program at once. In
the training loop it only sets a flag, which the loop looks at between steps and between
evaluation batches. A second signal exits immediately; the last checkpoint stays whole.
"""

import os
import signal

from demetar.errors import EXIT_INTERRUPTED, Interrupted


class Interruption:
    """The state of the handler: `requested` is the name of the signal, or an empty string."""

    def __init__(self):
        self.requested = ""
        self._deferred = False

    def defer(self) -> None:
        """From now on a signal only sets `requested`; whoever calls this must look at it."""
        self._deferred = True

    def handle(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self.requested:
            os.write(2, f"\n{name} again: exiting at once.\n".encode())
            os._exit(EXIT_INTERRUPTED)
        self.requested = name
        if not self._deferred:
            raise Interrupted(f"{name} before the first step: there was nothing to save.")
        os.write(2, f"\n{name}: finishing the step and saving; once more exits at once.\n".encode())


def install() -> Interruption:
    """Handles SIGINT and SIGTERM of this process from now on."""
    interruption = Interruption()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interruption.handle)
    return interruption
