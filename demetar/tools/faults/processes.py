"""Faults 1 to 20: processes that are killed, stopped, hang or are asked to stop."""

import os
import shutil
import signal
import time

from demetar.exits import EXIT_FAILED, EXIT_LOST, EXIT_NO_PROGRESS, EXIT_PREEMPTED
from demetar.tools.faults.bench import WATCHFUL, Case, injecting
from demetar.tools.faults.scene import Scene
from demetar.tools.resume_check import logged_step

_KILLED = -signal.SIGKILL
_BOUND = 20.0  # seconds in which the others must end; `lost_seconds` is 5, `stuck_seconds` 8


def _killed_and_resumed(scene: Scene, *faults: str, count: int = 1) -> None:
    """Kills a run at each moment, in a folder of its own each time, and gives the command again."""
    for fault in faults:
        scene.another_run()
        scene.train(count, fault=fault, code=_KILLED)
        scene.train(count)
        scene.ends_the_same(count)


def between_steps(scene: Scene) -> None:
    _killed_and_resumed(scene, "all:batch:12:SIGKILL")
    _killed_and_resumed(scene, "all:batch:12:SIGKILL", count=2)


def in_a_save(scene: Scene) -> None:
    _killed_and_resumed(
        scene,
        "0:open:15.orbax-checkpoint-tmp/state:SIGKILL",
        "0:open:15.orbax-checkpoint-tmp/commit_success:SIGKILL",
    )


def between_the_parts_of_a_save(scene: Scene) -> None:
    _killed_and_resumed(
        scene,
        "0:os.rename:15.orbax-checkpoint-tmp/state:SIGKILL",
        "0:open:15/.manifest.json.tmp:SIGKILL",
        "0:os.rename:15/.manifest.json.tmp:SIGKILL",
    )


def in_a_deletion(scene: Scene) -> None:
    _killed_and_resumed(scene, "0:os.rmdir:ocdbt.process_0:SIGKILL", "0:os.rmdir:/5:SIGKILL")


def in_an_evaluation(scene: Scene) -> None:
    _killed_and_resumed(scene, "0:evaluation of validation:20:SIGKILL")
    _killed_and_resumed(scene, "all:evaluation of test:40:SIGKILL", count=2)


def in_a_compilation(scene: Scene) -> None:
    for moment in ("compile:0", "open:programs-of-case"):
        scene.another_run()
        programs = {"JAX_COMPILATION_CACHE_DIR": f"{scene.run}-programs-of-case"}
        scene.train(fault=f"0:{moment}:SIGKILL", code=_KILLED, environment=programs)
        scene.train(environment=programs)
        scene.ends_the_same()


def _one_of_two(scene: Scene, victim: int, action: str, says: str) -> None:
    """One process is gone or hangs: the other says which, and ends; the same command goes on."""
    scene.another_run()
    job = scene.start(2, *WATCHFUL, fault=f"{victim}:batch:7:{action}")
    scene.wait_until(job, lambda: logged_step(scene.run) >= 5, ended=victim)
    text = scene.end(job, EXIT_LOST, process=1 - victim, says=says, within=_BOUND)
    scene.check("sentence", "Thread 0x" in text, "stacks in the log")
    scene.train(2)
    scene.ends_the_same(2)


def one_is_killed(scene: Scene) -> None:
    _one_of_two(scene, 1, "SIGKILL", "Process 1 of 2")


def coordinator_is_killed(scene: Scene) -> None:
    _one_of_two(scene, 0, "SIGKILL", "Process 0 of 2")


def one_is_stopped(scene: Scene) -> None:
    _one_of_two(scene, 1, "SIGSTOP", "Process 1 of 2")


def one_hangs(scene: Scene) -> None:
    _one_of_two(scene, 1, "hold", "Process 1 of 2")
    _one_of_two(scene, 1, "sleep", "process 1 is stuck")


def asked_to_stop_in_each_phase(scene: Scene) -> None:
    for phase, step in (
        *(("data", 0), ("compile", 0), ("step", 8), ("evaluation of validation", 20)),
        *(("save", 30), ("evaluation of test", 40)),
    ):
        fault, again = f"0:{phase}:{step}:SIGTERM", "The same command goes on from there"
        scene.train(fault=fault, code=EXIT_PREEMPTED, says=again, within=30)
    scene.train(fault="0:end:40:SIGTERM", code=0)  # all was done
    scene.ends_the_same()


def _one_is_asked(scene: Scene, name: str) -> None:
    for victim in (0, 1):
        scene.another_run()
        scene.train(
            2, fault=f"{victim}:step:8:{name}", code=EXIT_PREEMPTED, says="Stopped by", within=30
        )
        scene.train(2)
        scene.ends_the_same(2)


def one_is_asked_to_stop(scene: Scene) -> None:
    _one_is_asked(scene, "SIGTERM")


def one_is_asked_with_usr1(scene: Scene) -> None:
    _one_is_asked(scene, "SIGUSR1")


def asked_twice(scene: Scene) -> None:
    job = scene.start(fault="0:batch:12:sleep")
    scene.wait_until(job, lambda: logged_step(scene.run) >= 11)
    job.signal(signal.SIGTERM)
    time.sleep(2.5)  # two at once count as one
    job.signal(signal.SIGINT)
    scene.end(job, EXIT_PREEMPTED, says="exiting at once", within=5)
    scene.train()
    scene.ends_the_same()


def too_little_grace(scene: Scene) -> None:
    scene.train(1, "--config.checkpoint.stop_at=10", code=EXIT_PREEMPTED)
    slow = injecting("fsync", "delay_enter=1000000")
    job = scene.start(fault="0:batch:13:SIGTERM", prefix=slow)
    tmp = scene.run / "checkpoints"
    scene.wait_until(job, lambda: any(tmp.glob("1[1-9].orbax-checkpoint-tmp")))
    time.sleep(1)
    os.killpg(job.processes[0].pid, signal.SIGKILL)
    scene.end(job, _KILLED, says="finishing the step and saving")
    scene.train()
    scene.ends_the_same()


def interrupted(scene: Scene) -> None:
    text = scene.end(
        scene.start(fault="0:step:8:SIGINT"), EXIT_PREEMPTED, says="The same command goes on"
    )
    scene.check("sentence", "Traceback" not in text, "no traceback")
    scene.train()
    scene.ends_the_same()


def started_again(scene: Scene) -> None:
    shutil.copytree(scene.bench.undisturbed(), scene.run)
    before = scene.listing()
    scene.train(says="is finished")
    scene.unchanged(before)


def one_ends_late(scene: Scene) -> None:
    job = scene.start(2, *WATCHFUL, fault="1:end:40:SIGSTOP")
    pid = scene.frozen(job, 1)
    time.sleep(3)  # `lost_seconds` is 5
    scene.check("exit code", job.processes[0].poll() is None, "the fast process waits")
    os.kill(pid, signal.SIGCONT)
    scene.end(job, 0)
    scene.ends_the_same(2)


def crashes(scene: Scene) -> None:
    scene.train(
        fault="0:batch:12:crash", code=-signal.SIGSEGV, says="Fatal Python error: Segmentation"
    )
    scene.train()
    scene.ends_the_same()


def fails_again_and_again(scene: Scene) -> None:
    for code in (EXIT_FAILED, EXIT_FAILED, EXIT_NO_PROGRESS):
        scene.train(fault="0:batch:7:raise", code=code)
    scene.train(code=EXIT_NO_PROGRESS, says="failed 3 times at step 7")
    (scene.run / "failures.jsonl").unlink()
    scene.train()
    scene.ends_the_same()


_AGAIN = "the same command goes on; the end is the same"
_OTHERS = "the others name it and end with 76 in bound; the same command goes on"
CASES = [
    Case(1, "SIGKILL of all processes between steps", "1 and 2 processes, before step 13", _AGAIN,
         between_steps),
    Case(2, "SIGKILL during an asynchronous save", "as it opens its first file, and its commit "
         "marker", f"the cut save is never chosen; {_AGAIN}", in_a_save),
    Case(3, "SIGKILL between the parts of a save", "before an item gets its name, before the "
         "manifest is written, before it gets its name", f"not committed; {_AGAIN}",
         between_the_parts_of_a_save),
    Case(4, "SIGKILL while an old checkpoint is deleted", "half of its files gone; all gone but "
         "the folder", f"never chosen; {_AGAIN}", in_a_deletion),
    Case(5, "SIGKILL during an evaluation", "validation, 1 process; test, 2 processes",
         f"evaluated again, counted once; {_AGAIN}", in_an_evaluation),
    Case(6, "SIGKILL while compiling", "as it begins, and as a compiled program is written",
         f"the cache is not poisoned; {_AGAIN}", in_a_compilation),
    Case(7, "SIGKILL of one process", "number 1 of 2", _OTHERS, one_is_killed),
    Case(8, "SIGKILL of the coordinator", "number 0 of 2", _OTHERS, coordinator_is_killed),
    Case(9, "one process stopped, not dead", "SIGSTOP of number 1 of 2", _OTHERS, one_is_stopped),
    Case(10, "endless loop with the interpreter's lock; endless wait", "number 1 of 2",
         f"stacks in its log; {_OTHERS}", one_hangs),
    Case(11, "SIGTERM in each phase", "data, compile, step, validation, save, test, end, in turn",
         "one save, code 75, in 30 s", asked_to_stop_in_each_phase),
    Case(12, "SIGTERM to one process only", "to either of 2", "both stop at one step and save",
         one_is_asked_to_stop),
    Case(13, "SIGTERM, then SIGINT", "to a process that hangs", "ends at once; nothing half",
         asked_twice),
    Case(14, "SIGUSR1, a scheduler's warning", "to either of 2", "as SIGTERM",
         one_is_asked_with_usr1),
    Case(15, "less grace than a save takes", "strace makes each fsync wait 1 s; SIGTERM, then "
         "SIGKILL in the save", f"the last whole checkpoint stays; {_AGAIN}", too_little_grace),
    Case(16, "Ctrl-C", "SIGINT in a step", "no traceback; says how to go on", interrupted),
    Case(17, "a finished run started again", "the same command", "says so, code 0, changes nothing",
         started_again),
    Case(18, "a process that comes late to the end", "SIGSTOP of number 1 of 2 for 3 s, at its end",
         "the other waits; both end with 0", one_ends_late),
    Case(19, "a crash in native code", "reading address 0", f"stacks in the log; {_AGAIN}",
         crashes),
    Case(20, "the same failure again and again", "an exception at step 7, three times",
         "code 78, before anything runs; goes on when told to", fails_again_and_again),
]  # fmt: skip
