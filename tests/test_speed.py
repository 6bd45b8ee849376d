"""What makes steps fast changes nothing but the speed; and what is told of it is right."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, load_config
from test_models import VARIANTS, build, graph_for, loss_and_gradients
from test_step import make_experiment, run, tree_close

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan, Bucket
from data_pipelines.errors import UserError
from demetar.models.layers import attend
from demetar.records import graph_log
from demetar.speed import flops, machine, trace
from demetar.speed.pace import Pace
from demetar.train import new_pace
from demetar.training.experiment import build_experiment

# --- counting ----------------------------------------------------------------------------------


def gradient_and_example(model, params):
    """What `GraphCost` counts: the gradient of a batch of one graph of the given size."""

    def summed(params, batch):
        return jax.vmap(lambda graph: model.apply({"params": params}, graph))(batch).sum()

    def example(num_nodes, num_edges):
        bucket = Bucket(num_nodes, num_edges)
        graph = graph_for(model, np.random.default_rng(0), num_nodes, num_edges, bucket=bucket)
        return params, jax.tree.map(lambda x: np.asarray(x)[None], graph)

    return jax.grad(summed), example


SIZES = np.array([[n, n + k] for n in range(6, 14) for k in range(-2, 3)])


@pytest.mark.parametrize("variant", VARIANTS)
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
    "variant", ["default", "environment", "e3", "egnn", "egnn_qm9", "deep_set", "set_transformer"]
)
def test_count_is_near_the_compilers(variant):
    """Wide enough that products are most of it; ones and zeros are no operations of ours."""
    wide = {"width": 64, "dtype": "float32"}
    if "mlp_ratio" in VARIANTS[variant]:
        wide["mlp_ratio"] = 4
    if variant == "e3":
        wide["rounds"] = 1  # the compiler counts the body of a loop once
    model, params = build(variant, **wide)
    params = jax.tree.map(np.float32, params)
    gradient, example = gradient_and_example(model, params)
    arguments = example(12, 66)
    counted = flops.count(gradient, *arguments)
    compiler = jax.jit(gradient).lower(*arguments).compile().cost_analysis()["flops"]
    assert 0.6 < counted.total / compiler < 1.25


def test_products_with_ones_and_zeros_count_nothing():
    from demetar.models.layers import select_rows

    table, one_hot = np.ones((4, 5), np.float32), np.ones((3, 2, 4), np.float32)
    gradient = jax.grad(lambda table: jax.vmap(lambda x: select_rows(x, table))(one_hot).sum())
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
    assert load.share_of_others > 0.5 / len(machine._cores())


def test_own_work_is_not_that_of_others(monkeypatch):
    clocks = iter([(10.0, 100.0, 5.0), (12.0, 103.0, 7.5), (20.0, 200.0, 9.0), (21.0, 200.5, 10.0)])
    monkeypatch.setattr(machine._Load, "_clocks", lambda self: next(clocks))
    monkeypatch.setattr(machine, "_cores", lambda: [0, 1])
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


def test_the_written_gradient_of_attention_is_autodiffs(float64):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, n, 4)) for n in (5, 7, 7))
    bias = rng.normal(size=(3, 5, 7))
    bias[:, :, 5:] = -1e30
    bias[:, 2] = -1e30  # a query that may attend to nothing

    def plain(q, k, v, bias):
        weights = jax.nn.softmax(jax.numpy.einsum("hnd,hmd->hnm", q, k) + bias)
        return jax.numpy.einsum("hnm,hmd->hnd", weights, v)

    weigh = rng.normal(size=(3, 5, 4))
    found, expected = (
        jax.value_and_grad(lambda *x: (f(*x) * weigh).sum(), argnums=(0, 1, 2, 3))(q, k, v, bias)  # noqa: B023
        for f in (attend, plain)
    )
    tree_close(found, expected, rtol=1e-10, atol=1e-12)


def test_several_steps_in_one_call_are_the_steps(dataset, float64):
    """`lax.scan` over stacked batches: the same losses and the same state."""
    plain, state_1 = run(make_experiment(dataset, 2, "float64"), 6)
    together = make_experiment(dataset, 2, "float64", steps_per_call=3)
    losses, state_3 = run(together, 6)
    np.testing.assert_allclose(losses, plain, rtol=1e-12)
    tree_close(state_3.params, state_1.params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("checkpoint.every_steps", 7, r"every_steps \(7\) must be a multiple of .*\(5\): 5 or 10"),
        ("train.num_steps", 42, r"num_steps \(42\) must be a multiple"),
        ("data.buckets", (12, 29), "needs graphs of one bucket, and the data have 2"),
    ],
)
def test_steps_per_call_refuses_what_it_cannot_align(cache_dir, key, value, message):
    config = load_config("qm9", "smoke")
    config.data.cache_dir = cache_dir
    config.log.every_steps = 5
    config.train.steps_per_call = 5
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        build_experiment(config)


def test_a_config_file_of_before_is_told_what_it_lacks():
    config = load_config("qm9", "smoke")
    del config.train.steps_per_call
    with pytest.raises(UserError, match="no train.steps_per_call: set it"):
        build_experiment(config)


def test_a_killed_run_of_several_steps_a_call_goes_on_bit_for_bit(runner, tmp_path):
    several = ["--config.train.steps_per_call=5", "--config.log.every_steps=5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    several.append("--config.log.identity=True")
    runner.run(whole, *several, config="nbody.py:smoke")
    runner.kill_after(cut, 3, *several, config="nbody.py:smoke")
    said = runner.run(cut, *several, config="nbody.py:smoke")
    assert graph_log.read_identity(whole) == graph_log.read_identity(cut)
    assert "resumed at step" in said
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    hashes = [json.loads((d / "result.json").read_text())["state_sha256"] for d in (whole, cut)]
    assert hashes[0] == hashes[1]


def test_a_loss_that_is_not_finite_inside_a_call_names_its_step(runner, tmp_path):
    flags = ["--config.train.steps_per_call=5", "--config.log.every_steps=5"]
    flags += ["--config.optim.learning_rate=1e30", "--config.optim.clip_norm=1e30"]
    said = runner.run(tmp_path / "run", *flags, config="nbody.py:smoke", code=1)
    assert re.search(r"Step [2345]: the loss is (nan|inf).* systems \d+", said)


@pytest.mark.parametrize("variant", ["default", "environment", "along_edges", "e3", "egnn_qm9"])
def test_bfloat16_is_near_float32(variant):
    """8 bits: predictions within 3 % of their size, gradients in the same direction."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, params = build(variant, dtype=dtype, width=32)
        params = jax.tree.map(np.float32, params)
        graph = graph_for(model, np.random.default_rng(9))
        graph = jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, graph)
        value, (gradient, _) = loss_and_gradients(model, params, graph)
        flat = np.concatenate(
            [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(gradient)]
        )
        found[dtype] = float(value), flat
    (value, gradient), (value_16, gradient_16) = found["float32"], found["bfloat16"]
    assert abs(value_16 / value - 1) < 0.06  # of a square
    cosine = gradient @ gradient_16 / np.linalg.norm(gradient) / np.linalg.norm(gradient_16)
    assert cosine > 0.99


def test_each_step_compiles_once_per_bucket(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    flags = ["--config.data.buckets=(17,20,29)", "--config.train.num_steps=60"]
    said = runner.run(tmp_path / "run", *flags)
    for name in ("train_step", "evaluate"):
        assert said.count(f"Finished XLA compilation of jit({name})") == 3, name


# --- what a person sees -------------------------------------------------------------------------


def test_stacked_batches_are_the_batches(dataset):
    bucket = dataset.buckets[-1]
    graphs = [
        batching.gather(dataset.arrays, np.arange(start, start + 3), bucket) for start in (0, 3)
    ]
    number, both = batching.stacked([(5, g) for g in graphs])
    assert number == 5 and both.velocity is None
    np.testing.assert_array_equal(both.position[1], graphs[1].position)
    assert batching.stacked([(2, graphs[0])]) == (2, graphs[0])


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


@pytest.mark.parametrize("config", ["qm9.py:smoke", "nbody.py:smoke"])
def test_profile_prints_a_table_and_keeps_a_trace(runner, tmp_path, config):
    several = ["--config.train.steps_per_call=5"] if "nbody" in config else []
    said = runner.run(
        None,
        f"--config={REPOSITORY}/configs/{config}",
        f"--config.data.cache_dir={runner.cache_dir}",
        "--config.model.width=16",
        *several,
        "--steps=3",
        f"--trace={tmp_path}",
        module="demetar.profile",
    )
    rows = {words[0]: words[1] for words in map(str.split, said.splitlines()) if len(words) > 1}
    for name in ("assemble", "transfer", *trace.PHASES, "idle", "log", "save", "evaluate"):
        assert float(rows[name]) >= 0, name
    assert float(rows["forward"]) > 0 and float(rows["backward"]) > 0
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_progress_tells_share_of_the_peak_fill_and_data_wait(runner, tmp_path):
    said = runner.run(tmp_path / "run")
    lines = [line for line in said.splitlines() if line.startswith("step ") and "ETA" in line]
    assert lines and all("fill" in line and "data wait" in line for line in lines)


def test_work_of_steps_is_that_of_their_real_graphs(dataset):
    """Operations, once they are counted; nodes and slots; graphs that fill up count nothing."""
    experiment = make_experiment(dataset)
    sizes = experiment.arrays.sizes
    plan = BatchPlan(sizes, np.arange(20), dataset.buckets, 16, seed=0)
    cost = concurrent.futures.Future()
    pace = new_pace(experiment, plan, 0, cost)
    pace.add(1)
    assert pace.lap(1).flops is None
    cost.set_result(experiment.graph_cost)
    step = next(k for k in range(plan.steps_per_epoch) if (plan[k][1] < 0).any())
    bucket, graphs = plan[step]
    graphs = graphs[graphs >= 0]
    pace.add(step + 1)
    lap = pace.lap(step + 1)
    flops_g = experiment.graph_cost.flops(sizes.num_nodes[graphs], sizes.num_edges[graphs])
    np.testing.assert_allclose(lap.flops / lap.rate, flops_g.mean())
    slots = 16 * plan.buckets[bucket].num_nodes
    np.testing.assert_allclose(lap.fill, sizes.num_nodes[graphs].sum() / slots)
