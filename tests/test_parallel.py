"""Rows on all cores: order, bounded memory, dead workers, the end of all workers."""

import importlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from data_pipelines.errors import UserError
from data_pipelines.molecules.parallel import map_rows


def double(x):
    return 2 * x


def die_once(flag: pathlib.Path, x):
    """The worker with item 50 is killed, the first time."""
    if x == 50 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die(at, x):
    if x == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def refuse(x):
    if x == 7:
        raise UserError("item 7")
    return x


def modules_of_worker(_):
    importlib.import_module("data_pipelines.molecules.preparation")  # whose function is mapped
    return sorted(name for name in sys.modules if name in ("jax", "flax", "tensorflow", "rdkit"))


def slow(x):
    time.sleep(60 if x else 0)
    return os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_order_and_bounded_memory(processes):
    read = []

    def items():
        for k in range(1_000):
            read.append(k)
            yield k

    made = map_rows(double, items(), processes, chunk=4)
    assert [next(made) for _ in range(10)] == list(range(0, 20, 2))
    assert len(read) <= 10 + 4 * 3 * 2 + 4
    assert list(made) == list(range(20, 2_000, 2))
    assert not multiprocessing.active_children()


def test_nothing_to_do():
    assert list(map_rows(double, [], 2)) == []


def test_a_worker_that_is_killed_changes_nothing(tmp_path):
    assert list(map_rows(partial(die_once, tmp_path / "flag"), range(200), 2, 8)) == list(
        range(200)
    )


def test_an_item_that_kills_every_worker_is_an_error():
    made = map_rows(partial(die, 50), range(200), 2, chunk=8)
    with pytest.raises(UserError, match="items 49 to"):
        list(made)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_function_comes_in_its_turn(processes):
    made = map_rows(refuse, range(100), processes, chunk=7)
    assert [next(made) for _ in range(7)] == list(range(7))
    with pytest.raises(UserError, match="item 7"):
        next(made)
    assert not multiprocessing.active_children()


def test_closing_ends_workers_in_the_middle_of_a_chunk():
    """As KeyboardInterrupt at the consumer does."""
    made = map_rows(slow, range(100), 2, chunk=1)
    pid = next(made)
    start = time.monotonic()
    made.close()
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_import_no_jax_and_not_the_main_script():
    (found,) = map_rows(modules_of_worker, [0], 2)
    assert found == []


def test_workers_of_a_script_without_guard_die_with_it(tmp_path):
    tests = pathlib.Path(__file__).parent
    script = tmp_path / "script.py"  # no `if __name__ == "__main__"`
    script.write_text(
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
        "from test_parallel import map_rows, slow\n"
        "print(next(made := map_rows(slow, range(100), 2, chunk=1)), flush=True)\nnext(made)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    for _ in range(300):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if pathlib.Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return  # dead, and not collected by whoever inherited it
        time.sleep(0.1)
    raise AssertionError("the worker lives on")
