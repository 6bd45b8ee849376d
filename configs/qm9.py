"""DEMETAr on QM9.

    python -m demetar.main --config=configs/qm9.py              full training, HOMO
    python -m demetar.main --config=configs/qm9.py:gap          another target, its defaults
    python -m demetar.main --config=configs/qm9.py:quick        10 minutes on two CPU cores
    python -m demetar.main --config=configs/qm9.py:smoke        seconds, on 500 real molecules
    python -m demetar.main --config=configs/qm9.py:egnn         the baseline, as published
    python -m demetar.main --config=configs/qm9.py:wide         8 layers of 256, bonds as edges

Variants combine: `:quick,gap`, `:egnn,lumo`. Every value can be set:
`--config.optim.learning_rate=1e-4`.

Full training: meant for one or more accelerators; never run, so no result is claimed.
`:quick`: two CPU cores, at most 10 minutes of training; result in README.md.
"""

from ml_collections import ConfigDict

# Of the table data_pipelines/targets.py; configs import nothing of the project.
TARGETS = "A B C mu alpha homo lumo gap r2 zpve U0 U H G Cv".split()


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is what follows the colon: variants and a target, comma-separated."""
    config = _full()
    words = list(filter(None, arg.split(",")))
    if "egnn" in words:
        _egnn(config)
    for word in words:
        if word == "egnn":
            continue
        elif word == "wide":
            _wide(config)
        elif word == "quick":
            _quick(config)
        elif word == "smoke":
            _smoke(config)
        elif word in TARGETS:
            config.data.targets = (word,)
            if word in ("U0", "U", "H", "G", "zpve"):
                # Total energies want a lower rate and no decay, as Equiformer trains them.
                config.optim.learning_rate *= 0.5
                config.optim.weight_decay = 0.0
        else:
            known = ", ".join(("quick", "smoke", "egnn", "wide", *TARGETS))
            raise ValueError(f"configs/qm9.py has no variant {word!r}; known: {known}")
    return config


def _full() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # of initial weights, data order and dropout
            "data": {
                "name": "qm9",
                "source": "qm9pack",  # qm9pack | raw | tfds | sample
                "path": "",  # of the files, for raw and tfds
                "cache_dir": "",  # prepared data; empty: ~/.cache/demetar
                "targets": ("homo",),
                "split": "dimenet",  # cormorant | dimenet | torchmd | random
                "edges": "cutoff",  # bonds | cutoff | complete
                "edge_cutoff": 3.0,  # angstrom, for cutoff
                "buckets": (),  # most nodes of each bucket; empty: the best 6 for the data
                "batch_size": 128,  # molecules a step, over all devices
                "eval_batch_size": 256,
                "prefetch_threads": 1,
                "prefetch_batches": 8,
            },
            "model": {
                "name": "demetar",
                "readout": "auto",  # auto: as the target's row says | cls | sum | mean
                "width": 256,
                "num_heads": 8,
                "edge_layers": 3,
                "node_layers": 3,
                "joint_layers": 6,
                "mlp_ratio": 4,
                "num_radial": 64,
                "radial_cutoff": 8.0,  # angstrom
                "attention": "all",  # all | edges: along the graph's edges only, for large graphs
                "edge_attention": "shared_node",  # full | shared_node | none
                "edge_atoms": True,
                "pair_bias": True,
                "environment": True,
                "scaling": "standard",  # standard | blog
                "remat": False,  # compute layers again in the backward pass: less memory
                "dropout": 0.0,
                "dtype": "float32",  # float32 | bfloat16 | float64
            },
            "optim": {
                "learning_rate": 5e-4,
                "schedule": "cosine",  # cosine | plateau | constant
                "warmup_steps": 5_000,
                "final_fraction": 0.01,  # of the peak, at the end of the cosine
                "plateau": {"factor": 0.8, "patience": 15, "min_scale": 1e-3},
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 5e-3,
                "clip_norm": 1.0,
                "ema_decay": 0.999,
            },
            "train": {
                "num_steps": 258_000,  # 300 epochs
                "loss": "mae",  # mae | mse, of standardised targets
                "accumulation": 1,  # micro-batches a step
                "steps_per_call": 1,  # more needs graphs of one bucket
                "eval_every": 4_300,
            },
            "checkpoint": {
                "every_steps": 1_000,
                "keep_last": 2,
                "stop_at": 0,  # step after which to save and stop, as if preempted; 0: never
            },
            "log": {
                "every_steps": 100,
                "identity": False,  # also which graphs each process computed in each step
            },
            "cluster": {
                "start_seconds": 300,  # how long the first process waits for the last
                "lost_seconds": 30,  # silence after which a process is lost, and the job ends
                "stuck_seconds": 80,  # without any progress, after which the job ends
            },
            "mesh": {
                "data": -1,  # copies of the state, each with other graphs; -1: all that is left
                "fsdp": 1,  # parts of the state, each with other graphs
                "model": 1,  # parts of each layer, all with the same graphs
                "cpu_devices": 0,  # virtual CPU devices; 0: one
            },
        }
    )


def _egnn(config: ConfigDict) -> None:
    """Satorras et al. 2021: complete graphs, 7 x 128, 1000 epochs, no moving average."""
    config.data.update({"split": "cormorant", "edges": "complete", "batch_size": 96})
    config.model = ConfigDict(
        {
            "name": "egnn",
            "readout": "sum",
            "width": 128,
            "num_layers": 7,
            "attention": True,
            "remat": False,
            "dtype": "float32",
        }
    )
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 0, "final_fraction": 0.0})
    config.optim.update({"weight_decay": 1e-16, "ema_decay": 0.0, "clip_norm": 1e6})
    config.train.num_steps = 1_042_000


def _wide(config: ConfigDict) -> None:
    """8 layers of 256, as TorchMD-NET's equivariant transformer: to be compared with it."""
    config.data.edges = "bonds"
    config.model.update({"edge_layers": 1, "node_layers": 3, "joint_layers": 4})
    config.model.edge_attention = "full"


def _quick(config: ConfigDict) -> None:
    """The README's main job."""
    config.data.update({"edges": "bonds", "batch_size": 64})
    if config.model.name == "demetar":
        config.model.update(
            {
                "width": 96,
                "num_heads": 16,
                "edge_layers": 1,
                "node_layers": 1,
                "joint_layers": 2,
                "mlp_ratio": 2,
                "num_radial": 32,
                "radial_cutoff": 5.0,
                "edge_attention": "full",
            }
        )
        config.optim.update({"learning_rate": 1.2e-3, "weight_decay": 1e-2})
    else:
        config.data.edges = "complete"
        config.train.accumulation = 8  # what 4 molecules need stays in the cache of a core
    config.optim.warmup_steps = 300
    config.train.update({"num_steps": 10_000, "eval_every": 2_000})
    config.checkpoint.every_steps = 1_000
    config.log.every_steps = 200
    config.mesh.cpu_devices = 2


def _smoke(config: ConfigDict) -> None:
    """A small model on the sample that ships with the repository."""
    _quick(config)
    config.data.update({"source": "sample", "split": "random", "batch_size": 16})
    config.data.update({"eval_batch_size": 32, "buckets": (29,)})
    if config.model.name == "demetar":
        config.model.update({"width": 32, "num_heads": 4, "joint_layers": 1, "num_radial": 16})
    else:
        config.model.update({"width": 16, "num_layers": 2})
        config.train.accumulation = 1
    config.optim.warmup_steps = 10
    config.train.update({"num_steps": 40, "eval_every": 20})
    config.checkpoint.every_steps = 5
    config.log.every_steps = 1
