"""Launch scripts against stand-ins for clusters; the processes they start are real or recorded."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import REPOSITORY

from demetar.tools.resume_check import latest_step, logged_step

LAUNCH = REPOSITORY / "launch"
# Steps of a model that takes next to no time: enough for a signal to come between them.
LONG = ["--config.train.num_steps=800", "--config.train.eval_every=800"]
LONG += ["--config.checkpoint.every_steps=100"]
BIN = pathlib.Path(sys.executable).parent


def stand_in(folder, name, script):
    """A program `name` that records its arguments in `name.json`, one line a call."""
    record = "python - \"$@\" <<'EOF'\nimport json, sys\n"
    record += f"open('{folder}/{name}.json', 'a').write(json.dumps(sys.argv[1:]) + '\\n')\nEOF\n"
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{record}{script}\n")
    file.chmod(0o755)


def calls(folder, name):
    file = folder / f"{name}.json"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def cluster(runner, tmp_path):
    """A folder of stand-ins that comes first on PATH, and the environment with it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    environment = runner.environment()
    environment["PATH"] = f"{folder}:{BIN}:{environment['PATH']}"
    return folder, environment


def run(command, environment, code=0):
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_shellcheck():
    scripts = sorted(str(file.relative_to(REPOSITORY)) for file in LAUNCH.glob("*.sh"))
    assert len(scripts) == 5
    done = subprocess.run(
        [BIN / "shellcheck", *scripts], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_script_ends_in_the_one_command_and_the_readme_knows_it():
    readme = (LAUNCH / "README.md").read_text()
    for file in LAUNCH.iterdir():
        assert file.name in readme or file.name == "README.md", file.name
        if file.name not in ("README.md", "gpu_flags.sh", "Dockerfile", "jobset.yaml"):
            assert "python -m demetar.main" in file.read_text(), file.name


# --- SLURM --------------------------------------------------------------------------------------

# Starts every task for real, as SLURM's own srun would on one node, and forwards signals.
SRUN = """
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < TASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=$TASKS SLURM_STEP_NODELIST=localhost "$@" &
  pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
highest=0
for pid in "${pids[@]}"; do
  while :; do wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null || break; done
  ((code > highest)) && highest=$code
done
exit $highest
"""


@pytest.fixture
def slurm(cluster):
    folder, environment = cluster
    stand_in(folder, "srun", SRUN)
    stand_in(folder, "scontrol", "")
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    return folder, environment | {"TASKS": "1"}


@pytest.mark.slow
def test_slurm_requeues_after_its_warning_and_the_run_goes_on(slurm, runner, tmp_path):
    """sbatch's USR1 to the script; requeue; the same script again: real processes throughout."""
    folder, environment = slurm
    environment["TASKS"] = "2"
    flags = [f"--workdir={tmp_path}/run", *runner.flags("nbody.py:smoke,linear"), *LONG]
    flags += ["--config.mesh.cpu_devices=1", "--config.cluster.lost_seconds=10"]
    command = ["bash", LAUNCH / "slurm.sh", *flags]
    job = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while logged_step(tmp_path / "run") < 8:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=60)[0].decode()
    assert job.returncode == 75, said
    assert calls(folder, "scontrol") == [["requeue", environment["SLURM_JOB_ID"]]]
    assert latest_step(tmp_path / "run") >= 8
    srun = calls(folder, "srun")[0]
    assert srun[srun.index("python") :] == ["python", "-m", "demetar.main", *flags]
    assert "--gpu-bind=none" in srun
    done = run(command, environment | {"SLURM_RESTART_COUNT": "1"})
    assert "placed by SLURM job" in done.stderr and "resumed at" in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["processes"] == 2
    assert len(calls(folder, "scontrol")) == 1


@pytest.mark.parametrize("code, requeued", [(0, 0), (1, 0), (2, 0), (75, 1), (76, 0), (78, 0)])
def test_slurm_requeues_only_what_was_preempted(slurm, code, requeued):
    folder, environment = slurm
    stand_in(folder, "srun", f"exit {code}")
    run(["bash", LAUNCH / "slurm.sh", "--config=x"], environment, code)
    assert len(calls(folder, "scontrol")) == requeued


def test_slurm_stops_after_enough_restarts(slurm):
    folder, environment = slurm
    stand_in(folder, "srun", "exit 75")
    more = {"SLURM_RESTART_COUNT": "100"}
    assert "not again" in run(["bash", LAUNCH / "slurm.sh"], environment | more, 75).stderr
    assert not calls(folder, "scontrol")


def test_slurm_starts_nothing_where_the_doctor_finds_a_problem(slurm):
    folder, environment = slurm
    stand_in(folder, "srun", "[[ $* != *demetar.doctor* ]] || exit ${FOUND:-0}")
    command = ["bash", LAUNCH / "slurm.sh", "--config=x", "--workdir=y"]
    run(command, environment | {"DOCTOR": "1", "FOUND": "2"}, 2)
    [doctor] = calls(folder, "srun")
    assert doctor[doctor.index("python") :] == ["python", "-m", "demetar.doctor", *command[2:]]
    run(command, environment | {"DOCTOR": "1"})
    assert ["demetar.doctor", "demetar.main"] == [
        call[call.index("-m") + 1] for call in calls(folder, "srun")[1:]
    ]


# --- Kubernetes ---------------------------------------------------------------------------------

FLAGS = ["--config=configs/qm9.py:quick", "--config.data.targets=('homo','lumo')"]


@pytest.fixture
def manifest(cluster):
    folder, environment = cluster
    stand_in(folder, "kubectl", f"cat >{folder}/applied.yaml")
    environment |= {"IMAGE": "registry/demetar:1", "NODES": "4", "GPUS": "8", "CLAIM": "disk"}
    run([LAUNCH / "kubernetes.sh", "first-run", *FLAGS], environment)
    assert calls(folder, "kubectl") == [["apply", "-f", "-"]]
    return yaml.safe_load((folder / "applied.yaml").read_text())


def test_jobset_satisfies_the_public_schema(manifest):
    """The API's own types, generated from its OpenAPI schema; unknown fields are lost by them."""
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    known = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    assert known == manifest
    typo = json.loads(json.dumps(manifest).replace("completionMode", "completionsMode"))
    assert JobsetV1alpha2JobSet.from_dict(typo).to_dict() != typo


def test_jobset_says_what_it_should(manifest):
    assert manifest["metadata"]["name"] == "first-run"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (4, 4)
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 78]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"] == ["python", "-m", "demetar.main"]
    assert container["args"] == ["--workdir=/runs/first-run", *FLAGS]
    values = {e["name"]: e.get("value") for e in container["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"] == "first-run-workers-0-0.first-run:29400"
    assert values["JAX_NUM_PROCESSES"] == "4"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def test_the_doctor_looks_at_a_pod_first(cluster, tmp_path):
    """The manifest's own command, with a python that records what it is asked to run."""
    folder, environment = cluster
    environment |= {"IMAGE": "i", "NODES": "4", "GPUS": "8", "CLAIM": "disk", "DRY_RUN": "1"}
    said = run([LAUNCH / "kubernetes.sh", "a", *FLAGS], environment | {"DOCTOR": "1"}).stdout
    job = yaml.safe_load(said)["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    check_that_the_doctor_is_first([*container["command"], *container["args"]], environment, folder)


def check_that_the_doctor_is_first(command, environment, folder, cwd=REPOSITORY):
    """A problem ends `command` with 2 before anything else is started."""
    (folder / "python").write_text(
        f'#!/bin/bash\necho "$2" >>{folder}/started\n[ "$2" = demetar.doctor ] && exit $FOUND\n:\n'
    )
    (folder / "python").chmod(0o755)
    for found, wanted in (("2", ["demetar.doctor"]), ("0", ["demetar.doctor", "demetar."])):
        (folder / "started").write_text("")
        more = {"FOUND": found, "JAX_PROCESS_ID": "0", "SKYPILOT_NODE_RANK": "0"}
        done = subprocess.run(command, env=environment | more, cwd=cwd)
        started = (folder / "started").read_text().split()
        assert done.returncode == int(found) and len(started) == len(wanted)
        assert all(map(str.startswith, started, wanted))


def test_jobset_liveness_is_the_heartbeat(manifest, tmp_path):
    """The probe, run on a workdir whose process writes, and on one where it has stopped."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    probe = container["livenessProbe"]["exec"]["command"]
    assert probe == container["startupProbe"]["exec"]["command"]
    command = [word.replace("/runs/first-run", str(tmp_path)) for word in probe]
    file = tmp_path / "processes" / "3.json"
    file.parent.mkdir()
    file.touch()
    environment = os.environ | {"JAX_PROCESS_ID": "3"}
    assert subprocess.run(command, env=environment).returncode == 0
    os.utime(file, (time.time() - 300,) * 2)
    assert subprocess.run(command, env=environment).returncode != 0


# --- TPU, SkyPilot, one host, image --------------------------------------------------------------


@pytest.mark.parametrize("codes, tries", [("0", 1), ("75", 1), ("1", 1), ("76 76 0", 3)])
def test_tpu_vm(cluster, tmp_path, codes, tries):
    folder, environment = cluster
    stand_in(folder, "gcloud", "")
    run([LAUNCH / "tpu_vm.sh", "pod", "us-east5-b", *FLAGS], environment)
    [arguments] = calls(folder, "gcloud")
    assert arguments[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-b"]
    assert arguments[6] == "--worker=all"
    # What each host would run, with a python that ends with one code after the other.
    remote = arguments[7].removeprefix("--command=")
    home = tmp_path / "home"
    (home / "demetar" / ".venv" / "bin").mkdir(parents=True)
    (home / "demetar" / ".venv" / "bin" / "activate").touch()
    (home / "codes").write_text(codes.replace(" ", "\n") + "\n")
    stand_in(folder, "sleep", "")
    real = shutil.which("python", path=str(BIN))
    (folder / "python").write_text(
        f'#!/bin/bash\nif [ "$1" = - ]; then exec {real} "$@"; fi\n'
        f"{real} -c 'import json,sys; print(json.dumps(sys.argv[1:]))' \"$@\" >>{home}/tried\n"
        f"code=$(head -n1 {home}/codes); sed -i 1d {home}/codes; exit $code\n"
    )
    (folder / "python").chmod(0o755)
    done = subprocess.run(["bash", "-c", remote], env=environment, cwd=home)
    assert done.returncode == int(codes.split()[-1])
    tried = [json.loads(line) for line in (home / "tried").read_text().splitlines()]
    assert tried == [["-m", "demetar.main", *FLAGS]] * tries


def test_the_doctor_looks_at_a_tpu_host_first(cluster, tmp_path):
    folder, environment = cluster
    stand_in(folder, "gcloud", "")
    run([LAUNCH / "tpu_vm.sh", "pod", "zone", *FLAGS], environment | {"DOCTOR": "1"})
    first, second = (call[7] for call in calls(folder, "gcloud"))
    assert f"python -m demetar.doctor {' '.join(FLAGS[:1])}" in first and "demetar.main" in second
    stand_in(folder, "gcloud", "exit 2")
    run([LAUNCH / "tpu_vm.sh", "pod", "zone", *FLAGS], environment | {"DOCTOR": "1"}, 2)
    assert len(calls(folder, "gcloud")) == 3


def test_the_doctor_looks_at_one_host_first(cluster):
    folder, environment = cluster
    command = [LAUNCH / "local.sh", "--cpu=2", "--restarts=1", *FLAGS]
    check_that_the_doctor_is_first(command, environment | {"DOCTOR": "1"}, folder)


def test_skypilot(cluster, tmp_path):
    folder, environment = cluster
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [
        75, 76, 134, 137, 139, 142
    ]  # fmt: skip
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    stand_in(folder, "recorder", f"env >{folder}/env")
    (folder / "python").symlink_to(folder / "recorder")
    real = shutil.which("python", path=str(BIN))
    text = (folder / "recorder").read_text().replace("python - ", f"{real} - ")
    (folder / "recorder").write_text(text)
    environment |= {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "RUN": "a",
        "ARGUMENTS": "--config=configs/qm9.py --config.data.targets=\"('homo',)\"",
    }
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, cwd=tmp_path)
    assert done.returncode == 0
    [arguments] = calls(folder, "recorder")
    assert arguments[:3] == ["-m", "demetar.main", "--workdir=/runs/a"]
    assert arguments[3:] == ["--config=configs/qm9.py", "--config.data.targets=('homo',)"]
    said = (folder / "env").read_text().splitlines()
    assert "JAX_COORDINATOR_ADDRESS=10.0.0.1:29400" in said
    assert {"JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"} <= set(said)
    (folder / "python").unlink()
    check_that_the_doctor_is_first(
        ["bash", "-c", task["run"]], environment | {"DOCTOR": "1"}, folder, tmp_path
    )


@pytest.mark.slow
def test_local_starts_again_after_losing_a_process(cluster, runner, tmp_path):
    _, environment = cluster
    flags = [f"--workdir={tmp_path}/run", *runner.flags("nbody.py:smoke,linear"), *LONG]
    command = [LAUNCH / "local.sh", "--cpu=1", "--restarts=1", *flags]
    job = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    heartbeat = tmp_path / "run" / "processes" / "0.json"
    while latest_step(tmp_path / "run") < 100:
        assert job.poll() is None
        time.sleep(0.05)
    os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
    said = job.communicate(timeout=100)[1]
    assert job.returncode == 0, said
    assert "Ended with code 76; starting again" in said
    assert "resumed at step" in said
    assert (tmp_path / "run" / "result.json").exists()


def test_image_copies_what_exists_and_takes_signals():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((REPOSITORY / path).exists() for path in copied)
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "demetar.main"]'
