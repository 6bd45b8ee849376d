"""Eight virtual CPU devices for all tests, and the sample of 500 real molecules."""

import os

# The tests compile some three hundred small programs: code that is generated fast, not fast code.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import importlib.util
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags

from data_pipelines.batch_plan import Bucket
from data_pipelines.graph import Graph
from data_pipelines.qm9 import preparation
from data_pipelines.registry import load_dataset

flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory, worker_id):
    """One folder of prepared data and compiled programs for the whole session, of all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "cache"
    folder.mkdir(exist_ok=True)
    return str(folder)


@pytest.fixture(scope="session")
def sample(cache_dir):
    """(MoleculeArrays, passport) of the sample."""
    return preparation.load("sample", cache_dir=cache_dir)


@pytest.fixture(scope="session")
def dataset(cache_dir):
    """The sample with HOMO and U0 as targets and bonds as edges."""
    return load_dataset(
        name="qm9",
        source="sample",
        path="",
        cache_dir=cache_dir,
        targets=("homo", "U0"),
        split="random",
        edges="bonds",
        edge_cutoff=0.0,
        buckets=(),
    )


def load_module(file):
    """A Python file outside of any package."""
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Models so small that compiling them is most of a run.
TINY = {
    "qm9.py:smoke": [
        "--config.model.width=16",
        "--config.model.num_heads=2",
        "--config.data.eval_batch_size=16",
    ],
    "nbody.py:smoke": [
        "--config.model.width=8",
        "--config.model.rounds=2",
        "--config.data.eval_batch_size=20",  # does not divide the 32 systems: some rows are empty
    ],
    # For what asks nothing of the model.
    "nbody.py:smoke,linear": ["--config.data.eval_batch_size=4"],
    "nbody.py:smoke,set_transformer": [
        "--config.model.width=8",
        "--config.model.num_layers=1",
        "--config.model.num_heads=2",
    ],
}


class Runner:
    """Starts demetar's commands as real processes, on tiny models."""

    def __init__(self, cache_dir):
        self.cache_dir = cache_dir

    def flags(self, config):
        """Of a run of one of the tiny models."""
        return [
            f"--config={REPOSITORY}/configs/{config}",
            f"--config.data.cache_dir={self.cache_dir}",
            *TINY[config],
        ]

    def environment(self):
        """Of a real process: code that is generated fast, and once a session.

        By default JAX keeps only what took a second to compile.
        """
        return os.environ | {
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "XDG_CACHE_HOME": self.cache_dir,  # for what has no config to say it
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }

    def start(self, workdir, *more, module="demetar.main", config="qm9.py:smoke"):
        command = [sys.executable, "-m", module, *([f"--workdir={workdir}"] if workdir else [])]
        command += self.flags(config) if module == "demetar.main" else []
        return subprocess.Popen(
            [*command, *more],
            cwd=REPOSITORY,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir, *more, code=0, **options):
        process = self.start(workdir, *more, **options)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err[-3000:]
        return out + err

    def kill_after(self, workdir, steps, *more, delay=0.0, **options):
        """Kill -9 once `steps` steps are logged."""
        process = self.start(workdir, *more, **options)
        wait_for_steps(workdir, steps, process)
        time.sleep(delay)
        process.kill()
        process.communicate()


def wait_for_steps(workdir, count, process):
    """Until metrics.jsonl has `count` lines of training."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and file.read_text().count('"train"') >= count:
            return
        time.sleep(0.02)


@pytest.fixture(scope="session")
def runner(cache_dir):
    return Runner(cache_dir)


MEDIUM = Bucket(10, 14)


def random_graph(
    rng: np.random.Generator, num_nodes=7, num_edges=9, bucket=MEDIUM, particles=False
):
    """One padded graph of random atoms (or particles) and edges, float64, zeros in padding."""
    pairs = np.stack(np.triu_indices(num_nodes, 1), 1)
    edges = rng.permutation(pairs)[:num_edges]

    def pad(x, size):
        return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])

    n, e = bucket.num_nodes, bucket.num_edges
    graph = Graph(
        position=pad(rng.normal(size=(num_nodes, 3)) * 1.5, n),
        atomic_number=pad(rng.choice([1, 6, 7, 8, 9], num_nodes).astype(np.int32), n),
        node_mask=np.arange(n) < num_nodes,
        senders=pad(edges[:, 0].astype(np.int32), e),
        receivers=pad(edges[:, 1].astype(np.int32), e),
        edge_type=pad(rng.integers(0, 5, len(edges)).astype(np.int32), e),
        edge_mask=np.arange(e) < len(edges),
        graph_mask=np.array(True),
        index=np.array(1, np.int32),
    )
    if not particles:
        return graph
    return graph.replace(
        atomic_number=graph.node_mask.astype(np.int32),
        edge_type=np.zeros(e, np.int32),
        velocity=pad(rng.normal(size=(num_nodes, 3)), n),
        charge=pad(rng.choice([-1.0, 1.0], num_nodes), n),
    )


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
