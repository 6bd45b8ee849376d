"""A function over many items on all cores, in order, in bounded memory, and never hanging."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipelines.cores import usable_cores
from data_pipelines.errors import UserError

Item = TypeVar("Item")
Made = TypeVar("Made")

_AT_LEAST = 3  # chunks for each process
_DEATHS = 3  # of workers while no chunk gets done; then something is wrong with the items


def map_rows(
    function: Callable[[Item], Made],
    items: Iterable[Item],
    processes: int = 0,
    chunk: int = 64,
    ahead: int = 0,
) -> Iterator[Made]:
    """`function` of each item, in the order of the items.

    When a worker dies (killed, out of memory), the chunks that were not done are done again by
    new workers. Closing the iterator, or any exception at its consumer, ends all workers; they
    also end when this process dies.

    Args:
      function: pure, and importable by its name (or a `functools.partial` of such).
      items: read lazily: at most `ahead` chunks are in memory.
      processes: 0 for one on each core that this process may use; 1 for none beside this.
      chunk: items that go to a worker at once.
      ahead: at least three for each process: one at work, the others so that none waits. More
        where the consumer takes its time, and then many at once.

    Raises:
      UserError: workers died again and again at the same chunks.
      Exception: whatever `function` raises, in the order of the items.
    """
    processes = processes or len(usable_cores())
    stream = iter(items)
    chunks = iter(lambda: list(itertools.islice(stream, chunk)), [])
    if processes == 1:
        for rows in chunks:
            yield from map(function, rows)
        return
    waiting: collections.deque[tuple[int, list, Future]] = collections.deque()
    deaths = number = 0
    ahead = max(ahead, _AT_LEAST * processes)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(_pool(processes))
        while True:
            while len(waiting) < ahead and (rows := next(chunks, None)):
                waiting.append((number, rows, _submit(pool, function, rows)))
                number += len(rows)
            if not waiting:
                return
            first, rows, future = waiting[0]
            try:
                made = future.result()
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == _DEATHS:
                    raise UserError(
                        f"A worker process died {_DEATHS} times at items {first + 1} to "
                        f"{number} (killed, or out of memory; each worker needs about 300 MB). "
                        "Free memory, or use fewer processes."
                    ) from error
                stack.close()
                pool = stack.enter_context(_pool(processes))
                waiting = collections.deque(
                    (first, rows, future if _is_done(future) else _submit(pool, function, rows))
                    for first, rows, future in waiting
                )
                continue
            deaths = 0
            waiting.popleft()
            yield from made


def _is_done(future: Future) -> bool:
    return future.done() and not isinstance(future.exception(), BrokenProcessPool)


def _submit(pool: ProcessPoolExecutor, function, rows: list) -> Future:
    try:
        with _no_main():
            return pool.submit(_all, function, rows)
    except BrokenProcessPool as error:  # a worker has died since; found out at its turn
        future = Future()
        future.set_exception(error)
        return future


@contextlib.contextmanager
def _no_main():
    """Workers that start now do not run the main script again.

    A spawned process does so, for functions that the script defines. Ours are importable, the
    script may import JAX, and one without `if __name__ == "__main__"` would start workers itself.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _all(function: Callable[[Item], Made], rows: list[Item]) -> list[Made]:
    return [function(row) for row in rows]


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, because JAX has threads here, which a fork would lose. A pipe whose other end only
    # this process holds tells workers when to end, in the middle of a chunk too.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(theirs,)
    )
    try:
        yield pool
    finally:
        ours.close()
        pool.shutdown(wait=True, cancel_futures=True)
        theirs.close()


def _start_worker(pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def watch():
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()  # nothing is ever sent: this ends when the parent's end closes
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
