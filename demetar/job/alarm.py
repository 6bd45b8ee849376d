"""An alarm that ends this process where no Python can run: another thread holds the lock for ever.

SIGALRM ends a process by default, and its clock goes on while the process is stopped (Ctrl-Z, a
machine that sleeps): one that is let go on after longer than that would end at once. So the first
alarm only sets the next one, in C: time enough for a thread that was stopped, not stuck, to run.
"""

import ctypes
import signal


def set_alarm(seconds: float) -> None:
    """Ends this process with SIGALRM after `seconds` and a few more, unless it is set again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sysv_signal"):  # glibc: the handler holds for one signal, then the default
        handler = ctypes.cast(libc.alarm, ctypes.c_void_p)
        # It is called with the signal's number: alarm(14), in 14 seconds.
        libc.sysv_signal.argtypes, libc.sysv_signal.restype = (ctypes.c_int, ctypes.c_void_p), None
        libc.sysv_signal(signal.SIGALRM, handler)
        signal.siginterrupt(signal.SIGALRM, False)  # of others' system calls
    signal.setitimer(signal.ITIMER_REAL, seconds)


def cancel_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
