"""A last word before abort(), which is how JAX ends a process whose coordinator is gone.

JAX's C++ code calls abort() in a thread of its own. Python's `signal.signal` is no plain form of
this: its handler waits for the main thread to come back to Python, and the process has ended by
then. A handler in C, made by ctypes, runs at once.
"""

import ctypes
import signal
from collections.abc import Callable

_handlers = []  # ctypes does not hold them


def on_abort(handler: Callable[[], None]) -> None:
    """Calls `handler` where a library calls abort(), in the thread that does.

    Where `handler` returns, abort() takes its course.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number):
        handler()

    _handlers.append(handle)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handle, ctypes.c_void_p))
