"""What makes steps fast changes nothing but the speed; and what is told of it is right."""

import concurrent.futures
import dataclasses
import io
import logging
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, load_module
from test_models import VARIANTS, build, graph_for, loss_and_gradients
from test_plan import trainer_on

from data_pipelines.batch_plan import Bucket
from data_pipelines.errors import UserError
from demetar.config.command_line import load_config
from demetar.exits import NonFiniteLoss
from demetar.job.job import Job
from demetar.job.place import Place
from demetar.models import ops
from demetar.speed import flops, machine, trace
from demetar.speed.pace import Pace
from demetar.tools import profiler
from demetar.train import train_and_evaluate
from demetar.training.progress import Progress
from demetar.training.reporter import Reporter
from demetar.training.trainer import Trainer

# --- counting ----------------------------------------------------------------------------------


def gradient_and_example(model, params):
    """What `GraphCost` counts: the gradient of a batch of one graph of the given size."""

    def summed(params, batch):
        predictions = jax.vmap(lambda graph: model.apply({"params": params}, graph))(batch)
        return sum(x.sum() for x in predictions.values())

    def example(num_nodes, num_edges):
        bucket = Bucket(num_nodes, num_edges)
        graph = graph_for(model, np.random.default_rng(0), num_nodes, num_edges, bucket=bucket)
        return params, jax.tree.map(lambda x: np.asarray(x)[None], graph)

    return jax.grad(summed), example


SIZES = np.array([[n, n + k] for n in range(6, 14) for k in range(-2, 3)])


# One for each way of counting: dense layers, attention along edges, loops, messages.
COUNTED = ("environment", "along_edges", "e3", "egnn", "linear")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[] if v in COUNTED else [pytest.mark.slow]) for v in VARIANTS],
)
def test_cost_of_a_graph_is_a_polynomial_of_its_size(variant, float64):
    """For every model: interpolated counts equal counted ones at sizes that were left out."""
    model, params = build(variant)
    gradient, example = gradient_and_example(model, params)
    cost = flops.graph_cost(gradient, example, SIZES)
    assert cost.deviation < 1e-9
    num_nodes, num_edges = SIZES[len(SIZES) // 3]
    counted = flops.count(gradient, *example(num_nodes, num_edges))
    np.testing.assert_allclose(cost.flops(num_nodes, num_edges), counted.matmul, rtol=1e-9)
    assert cost.bytes(num_nodes, num_edges) > 0


@pytest.mark.parametrize(
    "variant",
    [
        "environment",
        "e3",
        "egnn",
        "egnn_qm9",
        *(
            pytest.param(v, marks=pytest.mark.slow)
            for v in ("default", "deep_set", "set_transformer")
        ),
    ],
)
def test_count_is_near_the_compilers(variant):
    """Wide enough that products are most of it; ones and zeros are no operations of ours."""
    wide = {"width": 64, "dtype": "float32"}
    if "mlp_ratio" in VARIANTS[variant]:
        wide["mlp_ratio"] = 4
    if variant == "e3":
        # The compiler counts the body of a loop once, and drops what remat asks for twice.
        wide |= {"rounds": 1, "remat": False}
    model, params = build(variant, **wide)
    params = jax.tree.map(np.float32, params)
    gradient, example = gradient_and_example(model, params)
    arguments = example(12, 66)
    counted = flops.count(gradient, *arguments)
    compiler = jax.jit(gradient).lower(*arguments).compile().cost_analysis()["flops"]
    assert 0.6 < counted.total / compiler < 1.25


def test_products_with_ones_and_zeros_count_nothing():
    table, one_hot = np.ones((4, 5), np.float32), np.ones((3, 2, 4), np.float32)
    gradient = jax.grad(lambda table: jax.vmap(lambda x: ops.select_rows(x, table))(one_hot).sum())
    assert flops.count(gradient, table).matmul == 0


# --- the peak ----------------------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch):
    """Puts chosen numbers in the place of measurements: call it with those of the next ones."""

    def later(*found):
        queue = [(flops, settled) for flops, settled in found]

        def measured(dtype):
            flops, settled = queue.pop(0)
            return machine.Machine(flops, 1e9, dtype, "a test's", f"measured {flops}", settled)

        monkeypatch.setattr(machine, "_measure", measured)
        return queue

    monkeypatch.setattr(machine, "_PATIENCE", 0.0)
    return later


def test_the_machine_is_measured_and_kept(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(machine, "_SIZES", {"cpu": (128, 256)})
    monkeypatch.setattr(machine, "_LENGTH", 2**16)
    monkeypatch.setattr(machine, "_SECONDS", 0.02)
    real = machine._measure("float32")
    assert real.flops > 1e8 and real.bytes_per_s > 1e7 and real.dtype == "float32"
    assert re.search(r"measured 2.* UTC, other programs took \d+% of the cores", real.source)
    left = measure((100.0, True), (200.0, True))
    assert machine.measured_machine(tmp_path, "float32").flops == 100
    assert machine.measured_machine(tmp_path, "float32").flops == 100 and len(left) == 1
    assert machine.measured_machine(tmp_path, "bfloat16").flops == 200  # another type, another peak
    (file, _) = tmp_path.glob("machine-*.json")
    file.write_text("{")  # cut off
    measure((300.0, True))
    assert 300 in [machine.measured_machine(tmp_path, d).flops for d in ("float32", "bfloat16")]


def test_a_busy_machine_is_measured_again_and_the_best_is_kept(tmp_path, measure, monkeypatch):
    left = measure((50.0, False), (40.0, False), (100.0, True), (1.0, True))
    found = [machine.Peak(tmp_path, "float32") for _ in range(4)]
    assert [peak.flops for peak in found] == [50, 50, 100, 100] and len(left) == 1
    assert [peak.text(peak.share(20)) for peak in found[1:3]] == [
        "at most 40.0% of float32 peak",
        "20.0% of float32 peak",
    ]
    monkeypatch.setattr(machine, "_PATIENCE", 600.0)
    other = tmp_path / "other"
    left = measure((50.0, False), (100.0, True))
    assert [machine.measured_machine(other, "float32").flops for _ in range(2)] == [50, 50]
    assert len(left) == 1  # it will still be busy


def test_no_share_of_the_peak_is_above_1(tmp_path, measure):
    """A run that is faster raises the peak; the next start measures again."""
    left = measure((100.0, True), (120.0, True), (1.0, True))
    peak = machine.Peak(tmp_path, "float32", processes=2)
    assert (peak.flops, peak.share(150)) == (200, 0.75)
    assert (peak.share(300), peak.flops, peak.share(150)) == (1, 300, 0.5)
    assert peak.text(1.0) == "at most 100.0% of float32 peak" and "reached by a run" in str(peak)
    again = machine.Peak(tmp_path, "float32")
    assert again.flops == 150 and again.machine.settled and "reached by a run" in str(again)
    assert machine.Peak(tmp_path, "float32").flops == 150 and len(left) == 1


def test_the_work_of_other_programs_is_seen():
    if not os.path.exists("/proc/stat"):
        pytest.skip("only Linux says how busy its cores are")
    load = machine._Load()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        with load:
            time.sleep(0.4)
        other.kill()
    assert load.share_of_others > 0.5 / len(machine.usable_cores())


def test_own_work_is_not_that_of_others(monkeypatch):
    clocks = iter([(10.0, 100.0, 5.0), (12.0, 103.0, 7.5), (20.0, 200.0, 9.0), (21.0, 200.5, 10.0)])
    monkeypatch.setattr(machine._Load, "_clocks", lambda self: next(clocks))
    monkeypatch.setattr(machine, "usable_cores", lambda: [0, 1])
    load = machine._Load()
    for _ in range(2):
        with load:
            pass
    assert load.share_of_others == 0.5 / 6


def test_pace_counts_the_work_of_the_plan():
    pace = Pace(10, 20, lambda steps: (3 * len(steps), None, 40, 50))
    pace.add(11)
    pace.add(12)
    pace.waited(0.0)
    lap = pace.lap(12)
    assert lap.rate > 0 and lap.flops is None and lap.fill == 0.8 and lap.wait == 0
    assert lap.left > 0


# --- the same numbers, faster --------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        "environment",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("along_edges", "e3", "egnn_qm9")),
    ],
)
def test_bfloat16_is_near_float32(variant):
    """8 bits: predictions within 3 % of their size, gradients in the same direction."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, params = build(variant, dtype=dtype, width=32)
        params = jax.tree.map(np.float32, params)
        graph = graph_for(model, np.random.default_rng(9))
        graph = jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, graph)
        (value, _), (gradient, _) = loss_and_gradients(model, params, graph)
        flat = np.concatenate(
            [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(gradient)]
        )
        found[dtype] = float(value), flat
    (value, gradient), (value_16, gradient_16) = found["float32"], found["bfloat16"]
    assert abs(value_16 / value - 1) < 0.06  # of a square
    cosine = gradient @ gradient_16 / np.linalg.norm(gradient) / np.linalg.norm(gradient_16)
    assert cosine > 0.99


# --- what a person sees -------------------------------------------------------------------------


class AtOnce(concurrent.futures.Executor):
    """Does at once what a run leaves to a thread."""

    def submit(self, function, *arguments):
        done = concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture(scope="module")
def said(cache_dir, tmp_path_factory):
    """What a run with three buckets says, and what JAX says of its compiling."""
    changes = {"data.cache_dir": cache_dir, "data.buckets": (17, 20, 29), "model.num_layers": 1}
    changes |= {"train.num_steps": 30, "train.eval_every": 15, "log.every_steps": 10}
    changes |= {"mesh.data": 1, "data.eval_batch_size": 16, "log.writers": ()}
    job, workdir = Job.alone(), tmp_path_factory.mktemp("said")
    job.background = AtOnce()
    stream = io.StringIO()
    heard = logging.StreamHandler(stream)
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        patch.setattr(sys, "stderr", stream)
        logging.getLogger("jax").addHandler(heard)
        try:
            train_and_evaluate(load_config("qm9:smoke,egnn", changes), workdir, job)
        finally:
            logging.getLogger("jax").removeHandler(heard)
    return stream.getvalue()


def test_each_step_compiles_once_per_bucket(said):
    for name in ("train_step", "evaluate"):
        assert said.count(f"Finished XLA compilation of jit({name})") == 3, name


def test_progress_tells_share_of_the_peak_fill_and_data_wait(said):
    lines = [line for line in said.splitlines() if line.startswith("step ") and "ETA" in line]
    assert len(lines) == 3 and all("fill" in line and "data wait" in line for line in lines)
    share = re.search(r"([\d.]+)% of float32 peak, ", lines[-1])
    assert 0 < float(share[1]) <= 100
    assert re.search(r"peak .* GFLOP/s, float32 matrix products on 8 x cpu", said)


def test_work_of_steps_is_that_of_their_real_graphs(cache_dir, tmp_path):
    """Operations, once they are counted; nodes and slots; graphs that fill up count nothing."""
    experiment, job = trainer_on(cache_dir, 1, 1, 1).experiment, Job.alone()
    split = experiment.dataset.split | {"train": np.arange(20)}
    dataset = dataclasses.replace(experiment.dataset, split=split)
    trainer = Trainer(dataclasses.replace(experiment, dataset=dataset))
    plan, sizes = trainer.plan, experiment.arrays.sizes
    report = Reporter(trainer, tmp_path, Progress.new(2), job, 0)
    assert report.work_of([1])[1] is None
    report.count_operations()
    job.background.shutdown()
    step = next(k for k in range(plan.steps_per_epoch) if (plan[k][1] < 0).any())
    bucket, graphs = plan[step]
    graphs = graphs[graphs >= 0]
    number, operations, nodes, slots = report.work_of([step + 1])
    own = sizes.num_nodes[graphs], sizes.num_edges[graphs]
    assert number == len(graphs) < plan.batch_size and nodes == own[0].sum()
    np.testing.assert_allclose(operations, trainer.experiment.graph_cost.flops(*own).sum())
    assert slots == plan.batch_size * plan.buckets[bucket].num_nodes


def test_a_loss_that_is_not_finite_names_its_step_and_graphs(cache_dir, tmp_path):
    trainer = trainer_on(cache_dir, 1, 1, 1)
    report = Reporter(trainer, tmp_path, Progress.new(2), Job.alone(), 0)
    state = trainer.experiment.create_state()
    bucket, graphs = trainer.gather(6)
    state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
    assert not report.collect(sums, 7)
    graphs.position[3, 0] = np.nan
    _, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
    named = rf"Step 7: the loss is nan.* Not finite: molecules {graphs.index[3]}\. Nothing"
    with pytest.raises(NonFiniteLoss, match=named):
        report.collect(sums, 7)


def test_phases_are_told_by_names():
    phase = trace.phase_of
    assert phase("jit(train_step)/jvp(vmap(Demetar))/joint_0/add", "fusion.3") == "forward"
    assert phase("jit(train_step)/transpose(jvp(vmap(Demetar)))/add", "fusion.4") == "backward"
    assert phase("jit(train_step)/shard_map/psum", "all-reduce.1") == "all-reduce"
    assert phase("jit(train_step)/mul", "multiply.9") == "optimizer"


def test_a_loop_does_not_count_its_body_twice():
    event = lambda name, ts, dur, tid=0: {
        "ph": "X", "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": {"hlo_op": name}
    }  # fmt: skip
    events = [
        event("while", 0, 100),
        event("dot", 10, 30),
        event("add", 50, 20),
        event("dot", 0, 5, 1),
    ]
    assert trace.self_times(events) == {"while": 50, "dot": 35, "add": 20}


@pytest.mark.slow
def test_profile_prints_a_table_and_keeps_a_trace(runner, tmp_path):
    said = runner.run(
        None,
        "--config=qm9:smoke,egnn",
        f"--config.data.cache_dir={runner.cache_dir}",
        "--config.data.buckets=(17,29)",
        "--config.model.num_layers=1",
        "--steps=3",
        f"--trace={tmp_path}",
        module="demetar.profile",
    )
    rows = {words[0]: words[1] for words in map(str.split, said.splitlines()) if len(words) > 1}
    for name in ("assemble", "transfer", *trace.PHASES, "idle", "log", "save", "evaluate"):
        assert float(rows[name]) >= 0, name
    assert float(rows["forward"]) > 0 and float(rows["backward"]) > 0
    assert re.search(r"bucket (17|29)/\d+, batch 16: .* molecules/s, .*% of float32 peak", said)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_profile_looks_at_one_process(monkeypatch):
    profiler.check_alone(Place("one process"))
    profiler.check_alone(Place("TPU", None, None))  # JAX counts: one here
    with pytest.raises(UserError, match="one process, but flags started 2"):
        profiler.check_alone(Place("flags", 1, 2))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one process, but TPU started 4"):
        profiler.check_alone(Place("TPU", None, None))


# --- the first day on an accelerator -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["machine", "numbers", "symmetry", "attention", "resume", "speed"])
def test_a_part_of_the_first_day_on_this_cpu(part):
    """A part in a process of its own, as on the day."""
    script = load_module(REPOSITORY / "benchmarks" / "accelerator.py")
    found = script.run_part(part, seconds=20.0)
    assert found.get("good", True), found
    if part == "speed":
        row = found["rows"][0]
        assert row["seconds"] > 0 and row["launches"] > 0 and 0 < row["share_of_peak"] < 1


def test_a_part_that_fails_is_on_the_page_of_the_first_day(tmp_path, monkeypatch):
    script = load_module(REPOSITORY / "benchmarks" / "accelerator.py")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    machine = script.machine(None)
    failed = {"good": False, "error": ["Traceback", "RuntimeError: no memory"]}
    parts = {"machine": machine, "numbers": failed, "attention": script.attention(None)}
    parts = {name: part | {"took": 1.0} for name, part in parts.items()}
    script.write_page({"command": "this test", "git_commit": "none", "parts": parts})
    page = (tmp_path / "page.md").read_text()
    assert "| numbers | **no** | 1 | RuntimeError: no memory |" in page
    assert f"jax {jax.__version__}" in page and "our kernel is for GPUs" in page
