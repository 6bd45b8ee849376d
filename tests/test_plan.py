"""demetar plan and what it counts with: operations, collectives, predictions, refusals."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from jax.sharding import PartitionSpec as P

from data_pipelines.errors import UserError
from demetar.config.command_line import load_config
from demetar.records.files import write_json
from demetar.speed import flops, kernels, timeline, topology
from demetar.speed.program import Program
from demetar.tools import plan_page, planner
from demetar.training import sharding
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer


@functools.cache
def trainer_on(cache_dir, *mesh):
    """A small model on a mesh (data, fsdp, model); its program is compiled once for all tests."""
    changes = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, mesh, strict=True)}
    changes |= {"data.cache_dir": cache_dir, "data.targets": ("homo", "U0"), "model.width": 16}
    return Trainer(build_experiment(load_config("qm9:smoke", changes)))


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


@pytest.mark.parametrize(
    "mesh", [(2, 2, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in ((8, 1, 1), (2, 4, 1)))]
)
def test_count_of_the_train_step_is_near_the_compilers(cache_dir, mesh):
    trainer = trainer_on(cache_dir, *mesh)
    counted = flops.count(trainer.jitted, *trainer.abstract_arguments(0))
    if mesh[2] == 1:  # else all its parts repeat what is not divided
        compiled = trainer.program(0).cost_analysis()["flops"] * trainer.experiment.mesh.size
        assert 0.7 < counted.total / compiled < 1.3  # a tiny model: little of it is products
    # Over all devices, whatever the mesh, but for what each computes for itself.
    one = trainer_on(cache_dir, 1, 1, 1)
    alone = flops.count(one.jitted, *one.abstract_arguments(0))
    assert counted.matmul == alone.matmul


@pytest.fixture
def chip():
    return topology.read_topology("h100:4x8")[1]


def test_collectives_of_a_compiled_program(cache_dir):
    trainer = trainer_on(cache_dir, 2, 4, 1)
    program = Program(trainer.program(0).as_text())
    found = topology.collectives(program, 8, chips_near=4, unit=4).values()
    params = jax.tree.leaves(trainer.experiment.abstract_state().params)
    specs = jax.tree.leaves(trainer.experiment.state_specs.params)
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


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_scaling_agrees_with_the_predicted_step(cache_dir, chip, mesh):
    """With the copies that the mesh has, the formula for n copies gives this very step."""
    trainer = trainer_on(cache_dir, *mesh)
    program = Program(trainer.program(0).as_text())
    found = planner.Plan(
        trainer=trainer,
        topology="",
        chip=chip,
        memory={},
        counted=[flops.Count(1e9, 0.0, 1e6)],
        kernels=kernels.kernels_of(program),
        collectives=topology.collectives(program, 8, chip.chips_near, 8 // mesh[0]),
    )
    now = found.timeline()
    assert found.step_seconds(copies=mesh[0]) == pytest.approx(now.computing + now.waiting)
    if mesh[0] == 1:
        return
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


def test_payload_of_a_collective_as_two_versions_of_xla_print_it():
    old = "%all-reduce-start = f32[256,4]{1,0} all-reduce-start(%x), replica_groups={{0,1}}"
    new = "%all-reduce-start = ((f32[256,4]{1,0}), f32[256,4]{1,0}) all-reduce-start(%x), "
    new += "replica_groups={{0,1}}"
    for line in (old, new):
        program = Program("ENTRY %main () -> f32[] {\n  " + line + "\n}")
        (found,) = topology.collectives(program, 2, 8, 1).values()
        assert found.payload == 4 * 256 * 4, line


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


@pytest.mark.parametrize("name, extra", [("v5e:2x4", "plan-tpu"), ("h100:1x8", "plan-gpu")])
def test_missing_compiler_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=re.escape(f'pip install -e ".[{extra}]"')):
        topology.planned_devices(name)


# --- from the config to the page -----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(cache_dir):
    """A config that compiles in a second, and the plan of it for eight of our CPU's devices."""
    config = load_config("nbody:smoke,linear", {"data.cache_dir": cache_dir})
    chip = topology.read_topology("h100:1x8")[1]
    return config, planner.plan_that_fits(config, "h100:1x8", chip, jax.devices())


def test_the_page_has_the_table_and_a_picture(small, tmp_path):
    _, plan = small
    rows = plan_page.rows_of(plan)
    text = plan_page.as_text(rows)
    for words in ("parameters", "memory of a chip", "all-reduce", "PREDICTED weak scaling"):
        assert words in text
    plan_page.write_html(tmp_path / "plan.html", plan, rows)
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<tr>") == len(text.splitlines()) == len(rows)
    assert "data:image/png;base64,iVBOR" in page


def test_two_plans_side_by_side(small, runner, tmp_path):
    _, plan = small
    numbers = plan_page.numbers_of(plan)
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    for file, factor in zip(files, (1, 3), strict=True):
        write_json(file, numbers | {"launches": factor * numbers["launches"]})
    said = runner.run(None, "--compare", *map(str, files), module="demetar.plan")
    (line,) = [line.split() for line in said.splitlines() if line.startswith("launches")]
    assert line == ["launches", str(plan.launches), str(3 * plan.launches), "3.000"]
    assert "predicted step, worst" in said and "predicted efficiency, 1024 chips" in said
    files[1].write_text("{}")
    said = runner.run(None, "--compare", *map(str, files), module="demetar.plan", code=2)
    assert "other.json is not a file of" in said


class Compiled:
    """A program of so many bytes."""

    def __init__(self, size):
        names = ("argument", "output", "alias", "temp", "generated_code")
        self._sizes = types.SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})
        self._sizes.temp_size_in_bytes = size

    memory_analysis = lambda self: self._sizes
    cost_analysis = lambda self: {}
    as_text = lambda self: "ENTRY %main () -> () {\n}"


@pytest.mark.parametrize(
    "memory, fitting",
    [
        (1250, "--batch=32; --config.train.accumulation=2; --config.mesh.fsdp=2."),
        (900, "--batch=8; --config.train.accumulation=8; --config.mesh.fsdp=8."),
        (850, "none of those tried."),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(small, monkeypatch, memory, fitting):
    """A graph of a chip's micro-batch takes 100 bytes, the state 800: the mildest that fits."""

    def compiled(trainer):
        config = trainer.experiment.config
        graphs = config.data.batch_size / 8 / config.train.accumulation
        return Compiled(100 * graphs + 800 / config.mesh.fsdp)

    monkeypatch.setattr(planner, "compile_largest", compiled)
    config, plan = small
    config = config.copy_and_resolve_references()
    config.data.batch_size = 64
    chip = dataclasses.replace(plan.chip, memory_bytes=memory)
    with pytest.raises(UserError, match=f"would need .* Each of these fits: {re.escape(fitting)}"):
        planner.plan_that_fits(config, "h100:1x8", chip, jax.devices())


def test_a_compiler_that_gives_up_is_no_bug(small, monkeypatch):
    config, plan = small

    class Jitted:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GiB of 79")

    monkeypatch.setattr(Trainer, "jitted", Jitted())
    monkeypatch.setattr(flops, "count", lambda *arguments: flops.Count())
    with pytest.raises(UserError, match="the compiler gave up .RESOURCE_EXHAUSTED: 99 GiB of 79"):
        planner.plan_that_fits(config, "h100:1x8", plan.chip, jax.devices())


@pytest.mark.parametrize(
    "place, module", [("v5e:2x4", "libtpu"), ("h100:1x8", "jax_cuda12_plugin")]
)
def test_the_command_on_a_real_compiler(runner, cache_dir, tmp_path, place, module):
    """Where the extra is installed; continuous integration has neither."""
    pytest.importorskip(module)
    page = tmp_path / "plan.html"
    flags = ["--config=qm9:smoke", f"--config.data.cache_dir={cache_dir}"]
    said = runner.run(None, *flags, f"--topology={place}", f"--html={page}", module="demetar.plan")
    assert "all-reduce" in said and "PREDICTED weak scaling" in said and page.exists()
    name, chip, _ = topology.read_topology(place)
    if chip.kind == "cuda":  # a TPU's name is the compiler's own
        fields = json.loads((topology.FOLDER / f"{name}.json").read_text())
        fields["memory_bytes"] = 3 << 20
        fields["target_config"] = str(topology.FOLDER / fields["target_config"])
        small = tmp_path / f"{name}.json"
        small.write_text(json.dumps(fields))
        flags += [f"--topology={small}:1x8", "--batch=64"]
        said = runner.run(None, *flags, module="demetar.plan", code=2)
        assert "has 3.0 MiB. Each of these fits: " in said


# --- compiled programs, read ---------------------------------------------------------------------

PROGRAM = """HloModule jit_step
%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
%largest (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %most = f32[] maximum(%a, %b)
}
%fused (x: f32[8], i: s32[4,1], u: f32[4]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %u = f32[4]{0} parameter(2)
  %top = f32[] reduce(%u, %x), dimensions={0}, to_apply=%largest
  ROOT %scatter.1 = f32[8]{0} scatter(%x, %i, %u), index_vector_dim=1, MORE, to_apply=%APPLY
}
%body (state: (f32[8], f32[8])) -> (f32[8], f32[8]) {
  %state = (f32[8]{0}, f32[8]{0}) parameter(0)
  %x.2 = f32[8]{0} get-tuple-element(%state), index=0
  %copy.1 = f32[8]{0} copy(%x.2)
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%copy.1, %copy.1)
}
%called (x: f32[8]) -> f32[8] {
  %x.3 = f32[8]{0} parameter(0)
  ROOT %copy.2 = f32[8]{0} copy(%x.3)
}
ENTRY %main (x: f32[8], i: s32[4,1], u: f32[4]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %other = f32[8]{0} call(%x.1), to_apply=%called
  %loop = (f32[8]{0}, f32[8]{0}) while(%x.1), condition=%least, body=%body
  %call = (f32[8]{0}, s8[4]{0}) custom-call(%x.1), custom_call_target="TARGET"
  ROOT %out = f32[8]{0} fusion(%x.1, %i.1, %u.1), kind=kInput, calls=%fused
}
"""


def program(more="indices_are_sorted=true", apply="add.1", target="__cublas$lt$matmul"):
    text = PROGRAM.replace("MORE", more).replace("APPLY", apply).replace("TARGET", target)
    return Program(text)


def test_what_a_program_launches():
    """Loops' bodies and called ones once; what is inside a kernel or the host does, not at all."""
    assert dict(kernels.launches(program())) == {"copy": 2, "custom-call": 1, "fusion": 1}


def test_what_may_differ_between_two_runs_of_a_program():
    (found,) = kernels.may_differ(program())
    assert "scatter.1" in found
    assert kernels.may_differ(program(more="unique_indices=true")) == []
    assert kernels.may_differ(program(apply="largest")) == []
    (found,) = kernels.may_differ(program(more="unique_indices=true", target="__mystery"))
    assert "__mystery" in found


TIMES = """HloModule jit_step
%part (x: f32[100,4], w: f32[4,4]) -> f32[1,4] {
  %w.1 = f32[4,4]{1,0} parameter(1)
  %x.1 = f32[100,4]{1,0} parameter(0)
  %row = f32[1,4]{1,0} slice(%x.1), slice={[0:1], [0:4]}
  ROOT %product = f32[1,4]{1,0} dot(%row, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%turn (state: f32[100,4]) -> f32[100,4] {
  %state = f32[100,4]{1,0} parameter(0)
  ROOT %wave = f32[100,4]{1,0} sine(%state)
}
ENTRY %main (x: f32[100,4], w: f32[4,4]) -> f32[100,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %w = f32[4,4]{1,0} parameter(1)
  %all-reduce-start = f32[100,4]{1,0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %first = f32[1,4]{1,0} fusion(%x, %w), kind=kLoop, calls=%part
  %all-reduce-done = f32[100,4]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %loop = f32[100,4]{1,0} while(%all-reduce-done), condition=%c, body=%turn, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_time_of_a_program_by_hand():
    """A fusion reads a row of x: 16 + 64 + 16 bytes, 32 operations; five turns of a loop."""
    found = kernels.kernels_of(Program(TIMES))
    _, first, _, wave = found
    assert (first.product, first.functions, first.bytes, first.times) == (32, 0, 96, 1)
    assert (wave.product, wave.functions, wave.bytes, wave.times) == (0, 5 * 400, 3200, 5)
    rates = timeline.Rates(product=1.0, function=0.02, byte=0.01, launch=2.0)
    step = timeline.predict(found, rates, {"all-reduce-start": 50.0})
    # Launch of the start, the products, what is left of the collective, five turns.
    assert step.computing == 2 + 32 + 5 * 40 and step.waiting == 50 - 2 - 32
    assert step.communicating == 50 and step.total == 250
    assert step.by_limit == {"launches": 2, "matrix products": 32, "functions": 200}
    half = timeline.predict(found, rates, {"all-reduce-start": 50.0}, part=0.5)
    assert half.computing == 2 + 16 + 5 * 20
    one_by_one = dataclasses.replace(rates, adds_up=True)
    alone = timeline.predict(found, one_by_one, {"all-reduce-start": 0.0})
    assert alone.total == pytest.approx(2 + 32.96 + 5 * 72)


def test_room_to_work_in_is_no_traffic():
    text = """ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4,2]{1,0} parameter(1)
  %call = (f32[8,2]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
}"""  # noqa: E501
    (found,) = kernels.kernels_of(Program(text))
    assert (found.product, found.bytes) == (2 * 8 * 2 * 4, 4 * (32 + 8 + 16))


def test_kernels_of_a_program_do_what_was_counted(cache_dir):
    """Matrix products of the compiled step against those of the traced one, on one device."""
    trainer = trainer_on(cache_dir, 1, 1, 1)
    found = kernels.kernels_of(Program(trainer.program(0).as_text()))
    counted = flops.count(trainer.jitted, *trainer.abstract_arguments(0))
    assert sum(k.times * k.product for k in found) == pytest.approx(counted.matmul, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["qm9:smoke", "qm9:egnn,smoke", "nbody:smoke"])
def test_programs_for_a_gpu_are_the_same_each_time(cache_dir, config):
    """Compiled for H100 with the settings of a run; without them a scatter adds as it comes."""
    pytest.importorskip("jax_cuda12_plugin")
    script = """
import sys
import demetar.plan  # sets what must be set before jax
import jax
from demetar.config.command_line import load_config
from demetar.speed import kernels
from demetar.speed.program import Program
from demetar.speed.topology import planned_devices
from demetar.training import runtime
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer
config = load_config(sys.argv[1], {"mesh.cpu_devices": 0, "data.cache_dir": sys.argv[2]})
_, devices = planned_devices("h100:1x1")
if sys.argv[3] == "free":
    del runtime.COMPILER_FLAGS["xla_gpu_deterministic_ops"]
runtime.configure(config)
jax.config.update("jax_enable_compilation_cache", False)
compiled = Trainer(build_experiment(config, devices)).program(0)
print(len(kernels.may_differ(Program(compiled.as_text()))))
"""
    run = lambda kind: int(
        subprocess.run(
            [sys.executable, "-c", script, config, cache_dir, kind],
            capture_output=True, text=True, check=True, cwd=REPOSITORY,
        ).stdout
    )  # fmt: skip
    assert run("as a run") == 0
    assert (run("free") > 0) == (config != "qm9:smoke")  # which has no scatter
