"""Faults 68 to 72: numbers that are not finite, memory, settings, input that would execute."""

import os
import pathlib
import pickle  # to make what must never be read
import shutil

import jax
import numpy as np

from data_pipelines import batching
from demetar.config.command_line import load_config
from demetar.exits import EXIT_FAILED, EXIT_USER_ERROR
from demetar.tools.faults.bench import Case
from demetar.tools.faults.data import other_data
from demetar.tools.faults.scene import Scene
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer


def not_finite(scene: Scene) -> None:
    every = "--config.checkpoint.every_steps=1"
    cache = scene.folder / "cache"
    shutil.copytree(scene.bench.undisturbed().parent / "cache" / "nbody", cache / "nbody")

    def throw(arrays):
        arrays["target"][5] = 1e30  # in float32 its square is infinite; on one process only

    other_data(cache, throw)
    for count, flag, says in (
        (1, "--config.optim.learning_rate=1e30", "the loss is"),
        (2, "--config.optim.learning_rate=1e30", "the loss is"),
        (2, f"--config.data.cache_dir={cache}", "Not finite: systems"),
    ):
        scene.another_run()
        scene.train(count, flag, every, code=EXIT_FAILED, says=(says, "Nothing of this step"))
        scene.check_finite()


def all_masked(scene: Scene) -> None:
    config = load_config(
        "qm9:smoke",
        {"model.width": 16, "model.num_heads": 2, "mesh.cpu_devices": 1, "mesh.data": 1}
        | {"data.cache_dir": str(scene.bench.cache)},
    )
    experiment = build_experiment(config)
    trainer = Trainer(experiment)
    limits = trainer.plan.buckets[0]
    none = batching.gather(experiment.arrays, np.full(config.data.batch_size, -1), limits)
    _, some = trainer.gather(0)
    lonely = some.replace(edge_mask=np.zeros_like(some.edge_mask))  # no atom has a neighbour
    for name, graphs, counted in (("none", none, 0), ("no edges", lonely, len(trainer.rows))):
        state, sums = trainer.step(experiment.create_state(), 0, trainer.to_devices(graphs))
        leaves = [np.asarray(x) for x in jax.tree.leaves((state.params, sums.loss))]
        good = all(np.isfinite(leaf).all() for leaf in leaves)
        scene.check("finite", good, f"{name}: weights, loss, norm")
        scene.check("finite", int(sums.graphs) == counted, f"{name}: {int(sums.graphs)} graphs")
    scene.saw("finite; padding counts for nothing")


def no_memory(scene: Scene) -> None:
    """A process that may have no more address space than so: what malloc then says."""
    limit = ["prlimit", f"--as={6 << 30}"]
    flags = ("--config.model.name=deep_set", "--config.model.width=4000")
    scene.train(1, *flags, "--config.data.eval_batch_size=32", code=EXIT_USER_ERROR, prefix=limit,
                says="config.data.batch_size")  # fmt: skip


def wrong_settings(scene: Scene) -> None:
    scene.command("faults", "--only=7,99", code=EXIT_USER_ERROR, says="fault of --only '99'")
    for flag, says in (
        ("--config.optim.learning_rat=1", "Did you mean config.optim.learning_rate"),
        ("--config.train.num_steps=many", "must be a whole number"),
        ("--config.data.7=1", "There is no config.data.7"),
        ("--config.model.width=1", "config.model.width"),
        ("--confg.seed=1", "has no option"),
        ("--config.cluster.lost_seconds=-1", "a whole number from 1"),
    ):
        scene.train(1, flag, code=EXIT_USER_ERROR, says=says, within=30)
    scene.check("files", not scene.run.exists(), "before anything is written")


class _Canary:
    """Would touch a file when it is unpickled."""

    def __init__(self, file: pathlib.Path):
        self._file = file

    def __reduce__(self):
        return os.system, (f"touch {self._file}",)


def would_execute(scene: Scene) -> None:
    canary = scene.folder / "canary"
    pickled = pickle.dumps(_Canary(canary))
    objects = scene.folder / "objects.npz"
    np.savez(objects, numbers=np.array([_Canary(canary)], object), positions=np.zeros((1, 1, 3)))
    scene.command("check", objects, code=EXIT_USER_ERROR, says="objects.npz")
    run = scene.half()
    whole = (run / "config.json").read_text()
    for content in (
        pickled,
        f'!!python/object/apply:os.system ["touch {canary}"]'.encode(),
        b"[" * 200_000,
        b'{"config": ' * 50_000,
    ):
        (run / "config.json").write_bytes(content)
        scene.train(code=EXIT_USER_ERROR, says="does not hold the settings of a run")
    (run / "config.json").write_text(whole)
    model = scene.folder / "model"
    model.mkdir()
    (model / "model.json").write_bytes(pickled)
    (model / "weights.safetensors").write_bytes(pickled)
    scene.command("model_files", "verify", model, code=EXIT_USER_ERROR, says="no card of a")
    meta = run / "checkpoints" / "40" / "meta" / "metadata"
    meta.write_bytes(pickled)
    scene.sign("40")  # whole, as its manifest says
    scene.train(code=EXIT_USER_ERROR, says="does not hold the settings of a run")
    scene.check("files", not canary.exists(), "no code ran")


CASES = [
    Case(68, "loss or gradient not finite, also on one process only", "a rate of 1e30, 1 and 2 "
         "processes; one system thrown to 1e30, 2 processes", "all stop with code 1 and the "
         "graphs; what was saved before is whole and finite", not_finite),
    Case(69, "attention with nothing to attend to; a batch of padding", "all edges masked; all "
         "graphs empty", "finite, counts for nothing", all_masked),
    Case(70, "out of memory", "prlimit: 6 GB of address space; on a CPU only",
         "code 2, names the settings to lower", no_memory),
    Case(71, "unknown key, wrong type, wrong option", "real commands", "code 2, suggests, before "
         "anything is written", wrong_settings),
    Case(72, "pickles, YAML tags, deep JSON", "as NPZ, `config.json`, saved model, metadata of a "
         "checkpoint; each would touch a file", "refused; no code runs", would_execute),
]  # fmt: skip
