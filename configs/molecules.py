"""DEMETAr on molecules of your own.

    demetar check FILE                                     what is in the file, and what is wrong
    demetar train --config=molecules --config.data.path=FILE --config.data.targets="('homo:eV',)"
    demetar train --config=molecules:small ...             up to some thousand molecules
    demetar predict OTHER_FILE --model=WORKDIR --out=FILE  with the model that was trained

Targets are columns of the file with their units: `homo:eV`, `logp:1`, `tpsa:angstrom^2`. Formats:
CSV or Parquet with SMILES, SDF, xyz, extxyz, ASE databases, NPZ, HDF5. Without positions in the
file RDKit makes them (ETKDGv3, MMFF94s). Energies are extensive:
`--config.data.extensive="('U0',)"`. All options: data_pipelines/molecules/loading.py.

Hardware: two CPU cores. The model and optimizer are those of `qm9:quick`, with each target's own
read-out; they were chosen for orbital energies of QM9.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is what follows the colon: variants, comma-separated."""
    words = list(filter(None, arg.split(",")))
    variants = {"small": _small, "smoke": _smoke}
    for word in words:
        if word not in variants:
            raise ValueError(f"there is no variant {word!r}; known: {', '.join(variants)}")
    config = _full()
    for word, change in variants.items():  # smoke last: it is the smallest
        if word in words:
            change(config)
    return config


def _full() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"name": "molecules", "batch_size": 64},
            "model": {
                "name": "demetar",
                "width": 96,
                "num_heads": 16,
                "mlp_ratio": 2,
                "edge_layers": 1,
                "node_layers": 1,
                "joint_layers": 2,
                "num_radial": 32,
                "radial_cutoff": 5.0,
                "edge_attention": "full",
                "environment": True,
                "directions": 32,
                "edge_angles": True,
            },
            "optim": {
                "name": "muon",
                "learning_rate": 3.4e-3,
                "warmup_steps": 300,
                "weight_decay": 0.1,
            },
            "train": {"num_steps": 10_000, "eval_every": 1_000},
            "checkpoint": {},
            "log": {},
            "mesh": {"cpu_devices": 2},
        }
    )


def _small(config: ConfigDict) -> None:
    """A few minutes: a few hundred to some thousand molecules."""
    config.data.batch_size = 32
    config.model.update({"width": 64, "num_heads": 8, "dropout": 0.1})
    config.model.update({"environment": False, "directions": 0, "edge_angles": False})
    config.optim.update({"name": "adamw", "learning_rate": 1.2e-3, "weight_decay": 1e-2})
    config.optim.update({"warmup_steps": 100, "ema_decay": 0.99})
    config.train.update({"num_steps": 1_500, "eval_every": 150})
    config.log.every_steps = 50


def _smoke(config: ConfigDict) -> None:
    """Seconds: whether everything fits together."""
    config.data.update({"batch_size": 8, "eval_batch_size": 16})
    config.model.update({"width": 16, "num_heads": 4, "joint_layers": 1})
    config.optim.warmup_steps = 5
    config.train.update({"num_steps": 20, "eval_every": 10})
    config.checkpoint.every_steps = 5
    config.log.every_steps = 5
