"""DEMETAr on QM9.

    demetar train --config=qm9              full training, HOMO
    demetar train --config=qm9:gap          another target, with settings of its own
    demetar train --config=qm9:quick        ten minutes on two CPU cores
    demetar train --config=qm9:smoke        seconds, on 500 real molecules
    demetar train --config=qm9:egnn         the baseline, as published
    demetar train --config=qm9:wide         8 layers of 256, bonds as edges
    demetar train --config=qm9:large        156 million parameters, see launch/

In a checkout `--config=configs/qm9.py:quick` names the same file. Variants combine: `:quick,gap`,
`:egnn,lumo`, `:large,smoke`. This file says what differs from the defaults in
demetar/config/defaults.py; every key can be set: `--config.optim.learning_rate=1e-4`.

Hardware: the full training and `:large` are meant for accelerators. Neither has been run, so no
result is claimed. `:large,smoke` needs no accelerator: eight virtual CPU devices, the same mesh.
Result of `:quick`, on two CPU cores: README.md.
"""

from ml_collections import ConfigDict

# The properties of data_pipelines/qm9/properties.py. A config imports nothing of the project.
TARGETS = "A B C mu alpha homo lumo gap r2 zpve U0 U H G Cv".split()
_TOTAL_ENERGIES = ("U0", "U", "H", "G", "zpve")


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is what follows the colon: variants and a target, comma-separated."""
    words = list(filter(None, arg.split(",")))
    models = {"egnn": _egnn, "large": _large}
    variants = models | {"wide": _wide, "quick": _quick, "smoke": _smoke}
    for word in words:
        if word not in (*variants, *TARGETS):
            known = ", ".join((*variants, *TARGETS))
            raise ValueError(f"there is no variant {word!r}; known: {known}")
    config = _full()
    # Which model comes first, then how much of it, then the target.
    for word in sorted(filter(variants.get, words), key=lambda word: word not in models):
        variants[word](config)
    for word in filter(TARGETS.__contains__, words):
        config.data.targets = (word,)
    if not set(words).isdisjoint(_TOTAL_ENERGIES):
        # They want a lower rate and no decay, as Equiformer trains them.
        config.optim.update({"learning_rate": config.optim.learning_rate / 2, "weight_decay": 0.0})
    return config


def _full() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"name": "qm9"},
            "model": {
                "name": "demetar",
                "width": 256,
                "edge_layers": 3,
                "node_layers": 3,
                "joint_layers": 6,
                "radial_cutoff": 8.0,
                "edge_attention": "shared_node",
                "environment": True,
            },
            "optim": {"learning_rate": 5e-4, "warmup_steps": 5_000, "weight_decay": 5e-3},
            "train": {"num_steps": 258_000, "eval_every": 4_300},  # 300 epochs, one of 5
            "checkpoint": {},
            "log": {},
            "mesh": {},
        }
    )


def _egnn(config: ConfigDict) -> None:
    """Satorras et al. 2021: complete graphs, 7 x 128, 1000 epochs, no moving average."""
    config.data.update({"split": "cormorant", "edges": "complete", "batch_size": 96})
    config.model = ConfigDict(
        {"name": "egnn", "readout": "sum", "width": 128, "num_layers": 7, "attention": True}
    )
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 0, "final_fraction": 0.0})
    config.optim.update({"weight_decay": 1e-16, "ema_decay": 0.0, "clip_norm": 1e6})
    config.train.num_steps = 1_042_000


def _large(config: ConfigDict) -> None:
    """For a node of 8 accelerators or more: what the sharding is for."""
    config.data.update({"edges": "bonds", "batch_size": 1024, "eval_batch_size": 2048})
    config.data.prefetch_threads = 2
    config.model.update({"width": 1024, "num_heads": 16, "edge_attention": "full"})
    config.model.dtype = "bfloat16"
    config.optim.update({"learning_rate": 2e-4, "warmup_steps": 2_000})
    config.optim.update({"b2": 0.98, "weight_decay": 1e-2})
    config.train.update({"num_steps": 33_000, "eval_every": 1_100})  # about 300 epochs
    config.checkpoint.every_steps = 500
    config.log.every_steps = 50
    config.mesh.update({"fsdp": 4, "model": 2})  # and copies of that on the rest of the machine


def _wide(config: ConfigDict) -> None:
    """8 layers of 256, as TorchMD-NET's equivariant transformer: to be compared with it."""
    config.data.edges = "bonds"
    config.model.update({"edge_layers": 1, "node_layers": 3, "joint_layers": 4})
    config.model.edge_attention = "full"


def _quick(config: ConfigDict) -> None:
    """The README's main job."""
    config.data.update({"edges": "bonds", "batch_size": 64})
    if config.model.name == "demetar":
        config.model.update({"width": 96, "num_heads": 16, "mlp_ratio": 2})
        config.model.update({"edge_layers": 1, "node_layers": 1, "joint_layers": 2})
        config.model.update({"num_radial": 32, "radial_cutoff": 5.0, "edge_attention": "full"})
        config.optim.update({"learning_rate": 1.2e-3, "weight_decay": 1e-2})
    else:
        config.data.edges = "complete"
        config.train.accumulation = 8  # what 4 molecules need stays in the cache of a core
    config.optim.warmup_steps = 300
    config.train.update({"num_steps": 10_000, "eval_every": 2_000})
    config.log.every_steps = 200
    config.mesh.cpu_devices = 2


def _smoke(config: ConfigDict) -> None:
    """A small model on the sample that ships with the code."""
    large = "fsdp" in config.mesh
    if not large:
        _quick(config)
    config.data.update({"source": "sample", "split": "random", "buckets": (29,)})
    config.data.update({"batch_size": 16, "eval_batch_size": 32})
    if config.model.name == "demetar":
        config.model.update({"width": 32, "num_heads": 4, "num_radial": 16})
        config.model.update({"edge_layers": 1, "node_layers": 1, "joint_layers": 1})
    else:
        config.model.update({"width": 16, "num_layers": 2})
        config.train.accumulation = 1
    config.optim.warmup_steps = 5 if large else 10
    steps = 20 if large else 40
    config.train.update({"num_steps": steps, "eval_every": steps // 2})
    config.checkpoint.every_steps = 5
    config.log.every_steps = 1
    config.mesh.cpu_devices = 8 if large else 2
