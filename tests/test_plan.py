"""demetar.plan and demetar.flops: counting, reading compiled programs, predicting, refusing."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from jax.sharding import PartitionSpec as P
from test_step import lower, make_experiment

from data_pipelines.errors import UserError
from demetar import plan
from demetar.speed import flops, topology
from demetar.train import jitted_train_step
from demetar.training import sharding


def test_count_of_products_is_exact():
    a, b = np.ones((3, 4, 5), np.float32), np.ones((5, 7), np.float32)
    found = flops.count(lambda a, b: a @ b, a, b)
    assert found.matmul == 2 * 3 * 4 * 5 * 7
    assert found.matmul_bytes == 4 * (60 + 35 + 84)

    def repeated(a, b):
        body = lambda carry, _: (jnp.sin(carry @ b), None)
        return jax.lax.scan(body, a, None, length=6)[0]

    found = flops.count(jax.jit(repeated), np.ones((2, 5), np.float32), np.ones((5, 5), np.float32))
    assert (found.matmul, found.other) == (6 * 2 * 2 * 5 * 5, 6 * 10)


@pytest.mark.parametrize("mesh", [1, (4, 2, 1), (2, 1, 2)])
def test_count_of_the_train_step_is_near_the_compilers(dataset, mesh):
    experiment = make_experiment(dataset, mesh)
    counted = flops.count(jitted_train_step(experiment), *plan.abstract_arguments(experiment, 0))
    compiled = lower(experiment).compile().cost_analysis()["flops"] * experiment.mesh.size
    if experiment.mesh.shape["model"] == 1:  # else all its parts repeat what is not divided
        assert 0.7 < counted.total / compiled < 1.3  # a tiny model: little of it is products
    # Over all devices, whatever the mesh, but for what each computes for itself.
    one = make_experiment(dataset, 1)
    alone = flops.count(jitted_train_step(one), *plan.abstract_arguments(one, 0))
    assert counted.matmul == alone.matmul


@pytest.fixture
def chip():
    return topology.read_topology("h100:4x8")[1]


def test_collectives_of_a_compiled_program(dataset):
    experiment = make_experiment(dataset, (2, 4, 1))
    found = topology.collectives(lower(experiment).compile().as_text(), 8, chips_near=4, unit=4)
    params = jax.tree.leaves(experiment.abstract_state().params)
    specs = jax.tree.leaves(experiment.state_specs.params)
    divided = sum(x.size for x, spec in zip(params, specs, strict=True) if "fsdp" in spec)
    for name in ("all-gather", "reduce-scatter"):
        of_name = [c for c in found if c.name == name]
        assert sum(c.payload for c in of_name) == 4 * divided
        assert {(c.group, c.near) for c in of_name} == {(4, 4)}  # neighbours share a node
    over_data = [c for c in found if c.group == 2]
    assert over_data and all(c.near == 1 and c.over_data for c in over_data)  # on other nodes
    assert not any(c.over_data for c in found if c.group == 4)
    # Of what is repeated; of gradients over copies; of the norm over parts of a copy.
    assert sorted(c.group for c in found if c.name == "all-reduce") == [2, 4, 8]


def test_scaling_agrees_with_the_predicted_step(dataset, chip):
    """With the copies that the mesh has, the formula for n copies gives this very step."""
    for mesh in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
        experiment = make_experiment(dataset, mesh)
        text = lower(experiment).compile().as_text()
        counted = [flops.Count(1e9, 0.0, 1e6)]
        found = plan.Plan(
            experiment=experiment,
            topology="",
            chip=chip,
            memory={},
            counted=counted,
            compiler_flops=None,
            step_bytes=[1e6],
            bytes_source="",
            collectives=topology.collectives(text, 8, chip.chips_near, 8 // mesh[0]),
        )
        predicted = found.compute_seconds() + found.communication_seconds()
        assert found.step_seconds(mesh[0]) == pytest.approx(predicted)
        chips, efficiency = zip(*found.scaling(), strict=True)
        assert chips[0] == 8 // mesh[0] and chips[-1] == 1024 and efficiency[0] == 1
        assert sorted(efficiency, reverse=True) == list(efficiency)


@pytest.mark.parametrize(
    "text, members",
    [
        ("replica_groups={{0,2},{1,3}}, to_apply", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'model'=1] {'fsdp'}, to_apply", [0, 1, 2, 3]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'model'=2] {'data','model'}", [0, 1, 4, 5]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}", [2, 3]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [0, 1, 4, 5]),
        ("replica_groups={}, dimensions={0}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("no groups", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_of_a_collective(text, members):
    assert sorted(topology.first_group(text, 8).tolist()) == members


def test_groups_in_an_unknown_form_are_not_guessed():
    with pytest.raises(ValueError, match="cannot read: <4 of 8>"):
        topology.first_group("replica_groups=<4 of 8>", 8)


@pytest.mark.parametrize("by", ["shard_map", "the compiler"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_groups_are_those_that_a_program_adds_up(axes, by):
    """Chip k gives 2**k: the bits of a sum are its members, however this XLA writes them."""
    mesh = sharding.make_mesh(2, 2, 2)
    spec = P(*sharding.AXES)
    add_up = lambda x: x.sum(axes)
    if by == "shard_map":
        over = [sharding.AXES[k] for k in axes]
        add_up = lambda x: jax.lax.psum(x, over)
        add_up = jax.shard_map(add_up, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    bits = 2 ** np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    program = jax.jit(add_up, in_shardings=jax.NamedSharding(mesh, spec)).lower(bits).compile()
    written = re.findall(r" all-reduce(?:-start)?\(.*", program.as_text())
    groups = [topology.first_group(text, 8) for text in written]  # the compiler: axis by axis
    members = functools.reduce(np.add.outer, groups)
    assert np.sum(2**members) == np.ravel(program(bits))[0]


def test_time_of_a_collective_by_hand(chip):
    gigabyte = 1e9
    # 8 of one node: 7/8 of a gigabyte over NVLink, twice for a sum.
    assert topology.Collective("all-gather", 8, 8, gigabyte).seconds(chip) == 7 / 8 / 450
    assert topology.Collective("all-reduce", 8, 8, gigabyte).seconds(chip) == 2 * 7 / 8 / 450
    # 4 nodes of 8: each GPU's eighth goes around the nodes too.
    across = topology.Collective("all-reduce", 32, 8, gigabyte).seconds(chip)
    assert across == pytest.approx(2 * (7 / 8 / 450 + 3 / 4 / 8 / 50))
    assert topology.Collective("all-reduce", 1, 1, gigabyte).seconds(chip) == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("h100", "write it as h100:4x8"),
        ("h10:4x8", "Did you mean 'h100'"),
        ("/nowhere/my.json:1x1", "No accelerator"),
        ("h100:4xx", "write it as"),
    ],
)
def test_wrong_topology_is_explained(wrong, message):
    with pytest.raises(UserError, match=message):
        topology.read_topology(wrong)


def test_own_accelerator_by_its_file(tmp_path, chip):
    fields = json.loads((topology.FOLDER / "h100.json").read_text()) | {"memory_bytes": 1 << 30}
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    name, mine, sizes = topology.read_topology(f"{tmp_path}/mine.json:2x4")
    assert mine.memory_bytes == 1 << 30 and sizes == (2, 4)
    (tmp_path / "mine.json").write_text('{"kind": "cuda"}')
    with pytest.raises(UserError, match="does not describe an accelerator"):
        topology.read_topology(f"{tmp_path}/mine.json:2x4")


def command(cache_dir, *more):
    return subprocess.run(
        [sys.executable, "-m", "demetar.plan", *more, f"--config.data.cache_dir={cache_dir}"],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("name, extra", [("v5e:2x4", "plan-tpu"), ("h100:1x8", "plan-gpu")])
def test_missing_compiler_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=re.escape(f'pip install -e ".[{extra}]"')):
        topology.planned_devices(name)


@pytest.mark.parametrize(
    "place, module", [("v5e:2x4", "libtpu"), ("h100:1x8", "jax_cuda12_plugin")]
)
def test_the_command_on_a_real_compiler(cache_dir, tmp_path, place, module):
    """Where the extra is installed; continuous integration has neither."""
    pytest.importorskip(module)
    page = tmp_path / "plan.html"
    flags = ["--config=configs/qm9.py:smoke", f"--topology={place}", f"--html={page}"]
    done = command(cache_dir, *flags)
    assert done.returncode == 0, done.stderr
    for words in ("parameters", "memory of a chip", "all-reduce", "PREDICTED weak scaling"):
        assert words in done.stdout
    assert page.read_text().count("<tr>") == len(done.stdout.splitlines())
    name, chip, _ = topology.read_topology(place)
    fields = json.loads((topology.FOLDER / f"{name}.json").read_text()) | {"memory_bytes": 3 << 20}
    if fields.get("target_config"):
        fields["target_config"] = str(topology.FOLDER / fields["target_config"])
    small = tmp_path / f"{name}.json"
    small.write_text(json.dumps(fields))
    if chip.kind == "cuda":  # a TPU's name is the compiler's own
        flags[1] = f"--topology={small}:1x8"
        done = command(cache_dir, *flags, "--config.model.width=128", "--batch=512")
        assert done.returncode == 2 and "Each of these fits: --batch=" in done.stderr
