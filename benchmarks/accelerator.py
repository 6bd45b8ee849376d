"""The first day on a machine with GPUs or TPUs: is it right, is it exact, how fast is it?

    python benchmarks/accelerator.py                    about eight minutes; JSON and a page
    python benchmarks/accelerator.py --seconds=120      less of everything

Parts, each in a process of its own, so that one that fails or hangs loses nothing of the others:

    machine    devices, versions, what is missing
    numbers    a few training steps on one device against the same on a CPU, in both types
    symmetry   predictions of molecules that are turned, moved, padded and in other batches
    attention  our one kernel against the plain form, values and gradients (GPUs alone)
    resume     `demetar verify_resume`: SIGKILL, resume, bit by bit
    speed      configs, types and batches: seconds a step, share of the peak, memory, compiling;
               beside it what `demetar.speed.timeline` predicts of the same program
    training   `qm9:quick` for as long as is left

Nothing is fetched. Without QM9 in the cache the sample of 500 molecules takes its place. Writes
benchmarks/results/accelerator-NAME.json and docs/results/accelerator.md, and exits 1 if any part
failed. On a machine without an accelerator all of it runs on the CPU, and says so.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from data_pipelines.json_text import json_text
from demetar.training.runtime import COMPILER_FLAGS

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "accelerator.md"
PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax",
    "orbax-checkpoint", "grain", "clu", "ml_collections", "tensorflow-datasets", "rdkit",
)  # fmt: skip

# Of losses of the first steps, relative: in the type of the device, and with products exact.
BOUNDS = {"float32": 2e-2, "float32, exact products": 1e-4, "bfloat16": 1e-1}
SYMMETRY = 2e-2  # of the spread of predictions; a product of float32 may run as TF32
# Config, type, graphs of a batch on a chip.
SPEED = [
    (config, dtype, batch)
    for config in ("qm9:quick", "qm9", "qm9:wide", "nbody")
    for dtype in ("float32", "bfloat16")
    for batch in (16, 128)
]


# --- parts ---------------------------------------------------------------------------------------


def machine(options) -> dict:
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": devices[0].platform,
        "cores": os.cpu_count(),
        "memory": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "versions": versions,
        "qm9": "in the cache" if _has_qm9() else "not in the cache: the sample takes its place",
    }


def numbers(options) -> dict:
    """Losses of the first steps, relative to a CPU's."""
    import jax
    import numpy as np

    found = {}
    cpu = _losses("float32", jax.devices("cpu")[:1])
    device = jax.devices()[:1]
    for name, bound in BOUNDS.items():
        exact = "exact" in name
        with jax.default_matmul_precision("highest" if exact else "default"):
            losses = _losses(name.partition(",")[0], device)
        difference = float(np.abs(losses / cpu - 1).max())
        found[name] = {"difference": difference, "bound": bound, "good": difference <= bound}
    return {"steps": len(cpu), "cases": found, "good": all(x["good"] for x in found.values())}


def symmetry(options) -> dict:
    """The same molecules otherwise: largest change, in spreads of the predictions."""
    import jax
    import numpy as np

    from data_pipelines import batching
    from data_pipelines.batch_plan import Bucket
    from demetar.models import predict
    from demetar.training.experiment import build_experiment

    experiment = build_experiment(_config("qm9:smoke", "float32", 32), jax.devices()[:1])
    params = experiment.create_state().params
    largest = experiment.dataset.buckets[-1]
    wider = Bucket(largest.num_nodes + 11, largest.num_edges + 37)
    graphs = np.arange(32)
    batch = batching.gather(experiment.arrays, graphs, largest)
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation[0] *= -np.sign(np.linalg.det(rotation))  # a reflection, too
    program = jax.jit(lambda batch: predict(experiment.model, params, batch)["homo"])
    of = lambda batch: np.asarray(program(batch))
    before = of(batch)
    turned = batch.replace(position=(batch.position @ rotation + 5.0).astype(np.float32))
    changes = {
        "turned, reflected and moved": of(turned) - before,
        "more padding": of(batching.gather(experiment.arrays, graphs, wider)) - before,
        "in another order": of(jax.tree.map(lambda x: x[::-1], batch))[::-1] - before,
        "again": of(batch) - before,
    }
    spread = before.std()
    found = {name: float(np.abs(change).max() / spread) for name, change in changes.items()}
    good = max(found.values()) <= SYMMETRY and found["again"] == 0
    return {"cases": found, "bound": SYMMETRY, "good": good}


def attention(options) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from demetar.models import fused_attention, ops

    if jax.devices()[0].platform != "gpu":
        return {"skipped": "our kernel is for GPUs", "good": True}
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(8, 29, 8, 32)), rng.normal(size=(8, 173, 8, 2, 32))

    def value_and_gradients(attend, dtype: str, bias, of_bias: bool):
        def loss(q, kv, bias):
            return jnp.square(jax.vmap(attend, (0, 0, 0, None))(q, kv, bias, 5.0)).sum()

        arguments = (jnp.asarray(q, dtype), jnp.asarray(kv, dtype), jnp.asarray(bias, jnp.float32))
        learned = (0, 1, 2) if of_bias else (0, 1)
        return jax.jit(jax.value_and_grad(loss, argnums=learned))(*arguments)

    found = {}
    for dtype, bound in (("float32", 1e-2), ("bfloat16", 5e-2)):
        for shape in ((8, 29), (8, 1), (1, 29), (1, 1)):
            bias = rng.normal(size=(8, *shape, 173))
            bias[..., 150:] = -1e30  # padding
            bias[:, :, :1] = -1e30 if shape[1] > 1 else bias[:, :, :1]  # may attend to nothing
            for of_bias in (True, False):
                ours, plain = (
                    jax.tree.leaves(value_and_gradients(attend, dtype, bias, of_bias))
                    for attend in (fused_attention.attend_heads, ops.plain_attend_heads)
                )
                pairs = zip(ours, plain, strict=True)
                apart = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
                name = f"{dtype}, bias {shape}{', learned' * of_bias}"
                found[name] = {"difference": apart, "bound": bound, "good": apart <= bound}
    return {"cases": found, "good": all(x["good"] for x in found.values())}


def resume(options) -> dict:
    command = ["-m", "demetar.verify_resume", "--config=qm9:smoke", "--steps=10"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": "python " + " ".join(command),
        "said": done.stdout.strip().splitlines(),
        "good": done.returncode == 0,
    }


def speed(options) -> dict:
    """As many of `SPEED` as the time allows."""
    rows, start = [], time.perf_counter()
    for config, dtype, batch in SPEED:
        if rows and time.perf_counter() - start > options.seconds:
            break
        rows.append(_speed_of(config, dtype, batch))
        print(json_text({"rows": rows, "good": True}), flush=True)  # what there is, if it hangs
    return {"rows": rows, "good": True}


def training(options) -> dict:
    """`qm9:quick`, stopped by SIGTERM, which ends it after a save."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = ["-m", "demetar.main", "--config=qm9:quick", *_qm9_flags()]
        job = subprocess.Popen(
            [sys.executable, *command, f"--workdir={folder}/run", "--config.train.eval_every=250"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for patience, signal_number in ((options.seconds, signal.SIGTERM), (90, signal.SIGKILL)):
            try:
                _, said = job.communicate(timeout=patience)
                break
            except subprocess.TimeoutExpired:
                job.send_signal(signal_number)
        else:
            _, said = job.communicate()
        found = re.findall(r"^step (\d+)  validation .*?([\d.]+) meV", said, re.MULTILINE)
    rates = [int(rate) for rate in re.findall(r"(\d+) molecules/s", said)]
    return {
        "command": "python " + " ".join(command),
        "seconds": options.seconds,
        "validation_mev": [(int(step), float(error)) for step, error in found],
        "molecules_per_second": statistics.median(rates) if rates else None,
        "exit_code": job.returncode,
        "good": job.returncode in (0, 75),
        **({} if job.returncode in (0, 75) else {"said": said.splitlines()[-20:]}),
    }


# Part -> what it does, its share of the time.
PARTS = {
    "machine": (machine, 0.02),
    "numbers": (numbers, 0.08),
    "symmetry": (symmetry, 0.05),
    "attention": (attention, 0.05),
    "resume": (resume, 0.10),
    "speed": (speed, 0.30),
    "training": (training, 0.40),
}


# --- what parts share ----------------------------------------------------------------------------


def _has_qm9() -> bool:
    from data_pipelines.prepared import default_cache_dir

    return any(x.is_dir() for x in (default_cache_dir() / "qm9").glob("qm9pack-*"))


def _qm9_flags() -> list[str]:
    if _has_qm9():
        return []
    return ["--config.data.source=sample", "--config.data.split=random"]


def _config(name: str, dtype: str, batch: int):
    import jax

    from demetar.config.command_line import load_config
    from demetar.training import runtime

    changes = {"model.dtype": dtype, "mesh.cpu_devices": 0}
    if name.startswith("qm9") and not _has_qm9():
        changes |= {"data.source": "sample", "data.split": "random"}
    config = load_config(name, changes)
    config.data.update({"batch_size": batch, "eval_batch_size": batch})
    config.train.accumulation = 1
    runtime.configure(config)
    jax.config.update("jax_enable_compilation_cache", False)
    return config


def _losses(dtype: str, devices, steps: int = 5):
    import numpy as np

    from demetar.training.experiment import build_experiment
    from demetar.training.trainer import Trainer

    trainer = Trainer(build_experiment(_config("qm9:smoke", dtype, 16), devices))
    state, losses = trainer.experiment.create_state(), []
    for step in range(steps):
        bucket, graphs = trainer.gather(step)
        state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
        losses.append(float(sums.loss))
    return np.array(losses)


def _speed_of(name: str, dtype: str, batch: int) -> dict:
    """A config on all devices: the largest bucket, measured and predicted."""
    import jax
    from ours import Run

    from demetar.speed.kernels import kernels_of
    from demetar.speed.machine import measured_machine
    from demetar.speed.program import Program
    from demetar.speed.timeline import Rates, predict
    from demetar.speed.topology import COLLECTIVES
    from demetar.training import runtime

    devices = len(jax.devices())
    config = _config(name, dtype, batch * devices)
    run = Run(config)
    bucket = len(run.plan.buckets) - 1
    start = time.perf_counter()
    compiled = run.trainer.program(bucket)
    compiling = time.perf_counter() - start
    seconds = run.steps_of(bucket, 3.0)
    peak = measured_machine(runtime.cache_dir(config), dtype)
    kernels = kernels_of(Program(compiled.as_text()))
    collectives_of = [k.name for k in kernels if k.operation.removesuffix("-start") in COLLECTIVES]
    # Rates of this very machine; a launch is guessed.
    rates = Rates(devices / peak.flops, 0.0, devices / peak.bytes_per_s, 2e-6)
    product = sum(k.times * k.product for k in kernels)
    memory = compiled.memory_analysis()
    return {
        "config": name,
        "type": dtype,
        "graphs_a_chip": batch,
        "seconds": seconds,
        "graphs_per_second": batch * devices / seconds,
        "share_of_peak": product * devices / seconds / peak.flops,
        "peak_flops": peak.flops,
        "launches": sum(k.times for k in kernels if not k.operation.endswith("-done")),
        # Of one device: collectives take no time here.
        "predicted_seconds": predict(kernels, rates, dict.fromkeys(collectives_of, 0.0)).total,
        "compile_seconds": compiling,
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


# --- all parts -----------------------------------------------------------------------------------


def run_part(name: str, seconds: float) -> dict:
    """A part in a process of its own; what it could not do is in what it returns."""
    command = [sys.executable, __file__, f"--part={name}", f"--seconds={seconds}"]
    start = time.perf_counter()
    job = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, error = job.communicate(timeout=2 * seconds + 120)
        code = job.returncode
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)  # whatever it has started, too: the device is free
        said, error = job.communicate()
        error, code = f"{error}\nhung", 1
    lines = [line for line in said.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    if code:
        found |= {"good": False, "error": error.splitlines()[-20:]}
    return found | {"took": time.perf_counter() - start}


def write_page(result: dict) -> None:
    """docs/results/accelerator.md."""
    facts = result["parts"]["machine"]
    lines = [
        "# The first day on an accelerator",
        "",
        f"Written by `{result['command']}`, commit {result['git_commit']}, on "
        f"{facts.get('devices', 'a machine that did not say')}.",
        "",
        "| part | good | seconds | what |",
        "| --- | --- | --- | --- |",
    ]
    for name, part in result["parts"].items():
        good = "yes" if part.get("good", True) else "**no**"
        lines.append(f"| {name} | {good} | {part['took']:.0f} | {_summary(name, part)} |")
    rows = result["parts"].get("speed", {}).get("rows", [])
    heads = (
        "config", "type", "graphs a chip", "ms a step", "predicted, ms", "graphs/s",
        "share of peak", "launches", "compiling, s", "memory, MiB",
    )  # fmt: skip
    lines += ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [
            f"`{row['config']}`", row["type"], row["graphs_a_chip"], f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['predicted_seconds']:.2f}", f"{row['graphs_per_second']:,.0f}",
            f"{row['share_of_peak']:.1%}", row["launches"], f"{row['compile_seconds']:.0f}",
            f"{row['memory'] / 2**20:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def _summary(name: str, part: dict) -> str:
    if "error" in part:
        return " ".join(part["error"][-1:])
    if name == "machine":
        missing = [key for key, version in part["versions"].items() if version == "missing"]
        return f"jax {part['versions']['jax']}; QM9 {part['qm9']}; missing: {', '.join(missing)}"
    if name == "training":
        curve = ", ".join(f"{error} meV at {step}" for step, error in part["validation_mev"][-1:])
        return f"{part['molecules_per_second']} molecules/s; {curve}"
    if "skipped" in part:
        return part["skipped"]
    cases = part.get("cases", {})
    value = lambda x: x["difference"] if isinstance(x, dict) else x
    return "; ".join(f"{key} {value(x):.1e}" for key, x in cases.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts, about")
    parser.add_argument("--part", choices=PARTS, help="one alone; its JSON is printed")
    options = parser.parse_args()
    if options.part:
        # Before JAX looks for them, as in a run.
        flags = (f"--{key}={value}" for key, value in COMPILER_FLAGS.items())
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
        found = PARTS[options.part][0](options)
        print(json_text(found))
        return 0
    from demetar.training.provenance import git_commit

    result = {
        "command": "python " + " ".join(["benchmarks/accelerator.py", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "parts": {},
    }
    for name, (_, share) in PARTS.items():
        result["parts"][name] = part = run_part(name, share * options.seconds)
        good = "good" if part.get("good", True) else "NOT GOOD"
        print(f"{name}: {good}, {part['took']:.0f} s; {_summary(name, part)}", flush=True)
    device = result["parts"]["machine"].get("devices", "unknown")
    name = re.sub(r"\W+", "-", device.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"accelerator-{name}.json").write_text(json_text(result, indent=1) + "\n")
    write_page(result)
    return 0 if all(part.get("good", True) for part in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
