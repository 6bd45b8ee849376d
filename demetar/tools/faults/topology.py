"""Faults 43 to 57: other devices, processes, settings and code; jobs that cannot start."""

import contextlib
import json
import os
import shutil
import signal
import socket
import time

from data_pipelines.json_text import json_text
from demetar.exits import EXIT_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR
from demetar.job.place import find_place
from demetar.tools.faults.bench import ROOT, Case, NotMade
from demetar.tools.faults.scene import Scene, said

_FLOAT64 = ("--config.model.dtype=float64", "--config.data.eval_batch_size=8")


def _moved(scene: Scene, parts: list[tuple[int, int]]) -> None:
    """One run on several topologies, in turn.

    Args:
      scene: of the case.
      parts: processes, devices of each; the last one goes to the end.
    """
    whole = scene.bench.undisturbed(1, *_FLOAT64)
    for number, (count, devices) in enumerate(parts, 1):
        last = number == len(parts)
        stop_at = 0 if last else 40 * number // len(parts)
        flags = [*_FLOAT64, f"--config.mesh.cpu_devices={devices}"]
        flags.append(f"--config.checkpoint.stop_at={stop_at}")
        scene.train(count, *flags, code=0 if last else EXIT_PREEMPTED)
    scene.ends_alike(whole)


def other_devices(scene: Scene) -> None:
    _moved(scene, [(1, 1), (1, 2), (1, 4), (1, 8), (1, 1)])


def other_processes(scene: Scene) -> None:
    _moved(scene, [(1, 1), (2, 1), (4, 1), (2, 2), (1, 1)])


def other_threads(scene: Scene) -> None:
    scene.train(fault="0:batch:13:SIGKILL", code=-signal.SIGKILL)
    scene.train(1, "--config.data.prefetch_threads=4", "--config.data.prefetch_batches=1")
    scene.ends_the_same()


def in_an_epoch(scene: Scene) -> None:
    for step in (7, 14, 33):  # an epoch has four steps
        scene.train(fault=f"0:batch:{step}:SIGKILL", code=-signal.SIGKILL)
    scene.train()
    scene.ends_the_same()


def _refused(scene: Scene, flag: str, says: str) -> None:
    before = scene.listing()
    scene.train(1, flag, code=EXIT_USER_ERROR, says=says)
    scene.unchanged(before)


def other_batch(scene: Scene) -> None:
    scene.half()
    _refused(scene, "--config.data.batch_size=32", "config.data.batch_size: 16 in the run, 32")


def other_settings(scene: Scene) -> None:
    scene.half()
    for key, values in (
        ("seed", "0 in the run, 1"),
        ("optim.name", "'adamw' in the run, 'adam'"),
        ("model.name", "'linear' in the run, 'deep_set'"),
        ("data.protocol", "'general' in the run, 'egnn'"),
        ("train.loss", "'mse' in the run, 'mae'"),
    ):
        value = values.rpartition(" ")[2].strip("'")
        if key != "data.protocol":  # its data would be simulated first
            _refused(scene, f"--config.{key}={value}", f"config.{key}: {values}")
    shutil.rmtree(scene.run / "checkpoints" / "40")
    scene.train(1, "--config.log.every_steps=1", "--config.checkpoint.every_steps=4")
    scene.ends_the_same()


def other_shapes(scene: Scene) -> None:
    flags = [f"--config.model.{x}" for x in ("name=deep_set", "num_layers=1", "width=8")]
    scene.half(1, *flags)
    for file in (scene.run / "config.json", scene.run / "checkpoints" / "40" / "meta" / "metadata"):
        identity = json.loads(file.read_text())
        identity["config"]["model"]["width"] = 16  # as if it had been
        file.write_text(json_text(identity))
    scene.sign("40")
    before = scene.listing()
    flags[-1] = "--config.model.width=16"
    scene.train(1, *flags, code=EXIT_USER_ERROR, says="(8,) in the checkpoint, (16,) today")
    scene.unchanged(before)


def other_average(scene: Scene) -> None:
    scene.half()
    _refused(scene, "--config.optim.ema_decay=0", "config.optim.ema_decay: 0.999 in the run, 0.0")


# --- processes that do not fit together -----------------------------------------------------------


def free_port() -> int:
    """Of this machine, at this moment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _two(scene: Scene, says: str, *others: str, **environment: str) -> None:
    """Two processes of one job, of which number 1 has other flags or another environment."""
    address = f"localhost:{free_port()}"
    places = [_place(address, 2, number) for number in (0, 1)]
    jobs = [
        scene.start(1, *places[0]),
        scene.start(1, *places[1], *others, environment=environment),
    ]
    for job in jobs:
        scene.end(job, EXIT_USER_ERROR, within=60)
    text = "".join(said(job, scene.run) for job in jobs)
    scene.say(text, says)
    scene.check("files", not list(scene.run.glob("checkpoints/*")), "nothing was saved")


def other_hosts(scene: Scene) -> None:
    _two(scene, "Process 1 of 2 differs from the others in its config", "--config.seed=1")
    scene.another_run()
    code = scene.folder / "code"
    for package in ("demetar", "data_pipelines", "configs"):
        shutil.copytree(
            ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__", "weights")
        )
    with (code / "demetar" / "exits.py").open("a") as stream:
        stream.write("# another version\n")
    _two(scene, "Process 1 of 2 differs from the others in its code", PYTHONPATH=str(code))


def uneven(scene: Scene) -> None:
    _two(scene, "must be a positive multiple of 3", "--config.mesh.cpu_devices=2")
    scene.another_run()
    flag = "--config.data.batch_size=15"
    scene.train(2, flag, code=EXIT_USER_ERROR, says="must be a positive multiple of 2")


def other_plans(scene: Scene) -> None:
    _two(scene, "Process 1 of 2 differs from the others in its config: data.buckets",
         "--config.data.buckets=(6,)")  # fmt: skip


def other_schedulers(scene: Scene) -> None:
    for environ, source in (
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "one process"),  # a shell, not a step
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1",
          "SLURM_STEP_NODELIST": "n1"}, "SLURM job 7, one task"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "one process"),  # any pod has it
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "one process"),
    ):  # fmt: skip
        scene.another_run()
        flags = scene.bench.flags(scene.run)
        scene.command("main", *flags, says=f"placed by {source}", **environ)
        scene.ends_the_same()
    step = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "8"}
    here = find_place("host:1", 4, 2, step | {"SLURM_STEP_NODELIST": "n[1-8]"})
    scene.check("exit code", (here.source, here.process) == ("flags", 2), "explicit flags win")
    scene.refuses(find_place, None, 4, None, {}, says="without --coordinator_address")


def cannot_meet(scene: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        flags = _place(f"localhost:{taken.getsockname()[1]}", 2, 0)
        scene.train(1, *flags, code=EXIT_USER_ERROR, says="cannot be used here", within=30)
    wait = "--config.cluster.start_seconds=5"
    for place in (
        _place(f"localhost:{free_port()}", 3, 0),  # the others never come
        _place("no-such-host.invalid:29400", 2, 1),
        _place(f"localhost:{free_port()}", 2, 1),  # the coordinator never comes
    ):
        scene.another_run()
        scene.train(1, *place, wait, code=EXIT_LOST, says="Waited 5 s", within=40)


def _place(address: str, count: int, number: int) -> tuple[str, ...]:
    return (
        f"--coordinator_address={address}",
        f"--num_processes={count}",
        f"--process_id={number}",
    )


def busy_accelerator(scene: Scene) -> None:
    raise NotMade("the lock file of libtpu and a busy device need a TPU")


def late_for_a_collective(scene: Scene) -> None:
    """gloo gives up after 30 s: a process that is 3 s late is waited for, one that stays is not."""
    job = scene.start(2, fault="1:evaluation of validation:20:SIGSTOP")
    pid = scene.frozen(job, 1)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    scene.end(job, 0)
    scene.ends_the_same(2)
    scene.another_run()
    job = scene.start(2, fault="1:evaluation of validation:20:SIGSTOP")
    pid = scene.frozen(job, 1)
    time.sleep(33)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    began = scene.bench.clock.now()
    while any(p.poll() is None for p in job.processes) and scene.bench.clock.now() - began < 60:
        time.sleep(0.1)
    codes = [p.returncode for p in job.processes]
    scene.saw(f"33 s late, bounds of 300 s: codes {codes}")
    if codes != [0, 0]:
        scene.train(2)
    scene.ends_the_same(2)


_REFUSED = "refused with the key and both values; nothing changes"
CASES = [
    Case(43, "saved on N devices, resumed on M", "1, 2, 4, 8, 1 devices in turn, float64",
         "the same graphs; only the order of sums differs", other_devices),
    Case(44, "another number of processes", "1, 2, 4, 2 x 2 devices, 1 in turn, float64",
         "as 43", other_processes),
    Case(45, "other threads that prefetch", "SIGKILL, then 4 threads of one batch each",
         "the same order; the end is the same", other_threads),
    Case(46, "SIGKILL in the middle of an epoch", "after steps 7, 14 and 33 of epochs of 4",
         "no graph twice, none left out", in_an_epoch),
    Case(47, "another batch size on resume", "32 instead of 16", _REFUSED, other_batch),
    Case(48, "another config on resume", "seed, optimizer, model, loss; then intervals of saving",
         f"{_REFUSED}; what changes no number is accepted", other_settings),
    Case(49, "shapes of another model", "config and checkpoint altered to a width that the arrays "
         "do not have, with new hashes", "names the array and both shapes", other_shapes),
    Case(50, "average of the weights taken away", "`optim.ema_decay=0` on resume", _REFUSED,
         other_average),
    Case(51, "another config or version on one host", "2 processes: another seed; a changed copy "
         "of the code", "names the odd process and what differs, before a step", other_hosts),
    Case(52, "uneven hosts; a batch that does not divide", "1 and 2 devices; a batch of 15 on 2",
         "refused with the nearest that do", uneven),
    Case(53, "hosts that choose other shapes", "2 processes, other buckets", "named before a step",
         other_plans),
    Case(54, "half of SLURM's variables, a pod, a lone address", "environments of real commands",
         "says what it was placed by; flags win", other_schedulers),
    Case(55, "port in use, host that never comes, name that does not resolve",
         "a real listener; processes 1 and 2 of 3 absent; `no-such-host.invalid`; no coordinator",
         "ends in bound and says who is missing", cannot_meet),
    Case(56, "stale lock of libtpu, busy device", "", "names the process", busy_accelerator),
    Case(57, "gloo gives up after 30 s (jax issue 40831)", "SIGSTOP of number 1 of 2 at an "
         "evaluation, for 3 s and for 33 s", "waited for, or the command goes on; never wrong",
         late_for_a_collective),
]  # fmt: skip
