"""Eight virtual CPU devices for all tests, and the sample of 500 real molecules."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pathlib

import jax
import numpy as np
import pytest
from absl import flags

from data_pipelines import qm9
from data_pipelines.dataset import load_dataset
from data_pipelines.plan import Bucket
from demetar.graph import Graph

flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One folder of prepared data and compiled programs for the whole session."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def sample(cache_dir):
    """(MoleculeArrays, passport) of the sample."""
    return qm9.load("sample", cache_dir=cache_dir)


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


MEDIUM = Bucket(10, 14)


def random_graph(rng: np.random.Generator, num_nodes=7, num_edges=9, bucket=MEDIUM):
    """One padded graph of random atoms and edges, float64, zeros in padding."""
    pairs = np.stack(np.triu_indices(num_nodes, 1), 1)
    edges = rng.permutation(pairs)[:num_edges]

    def pad(x, size):
        return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])

    n, e = bucket.num_nodes, bucket.num_edges
    return Graph(
        position=pad(rng.normal(size=(num_nodes, 3)) * 1.5, n),
        atomic_number=pad(rng.choice([1, 6, 7, 8, 9], num_nodes).astype(np.int32), n),
        node_mask=np.arange(n) < num_nodes,
        senders=pad(edges[:, 0].astype(np.int32), e),
        receivers=pad(edges[:, 1].astype(np.int32), e),
        edge_type=pad(rng.integers(0, 5, len(edges)).astype(np.int32), e),
        edge_mask=np.arange(e) < len(edges),
        target=np.zeros(2),
        graph_mask=np.array(True),
        index=np.array(1, np.int32),
    )


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
