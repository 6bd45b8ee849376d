"""A large DEMETAr on QM9: 156 million parameters, for a node of 8 accelerators or more.

    python -m demetar.main --config=configs/qm9_large.py        on every process, see launch/
    python -m demetar.plan --config=configs/qm9_large.py --topology=h100:4x8

The state is divided over 4 (`fsdp`), each layer over 2 (`model`), and copies fill the rest of
the machine (`data`). Never trained: it is what the sharding is for, and no result is claimed.
Variant `:smoke` is seconds on eight virtual CPU devices, with the same mesh and a tiny model.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is empty or `smoke`."""
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/qm9_large.py has no variant {arg!r}; known: smoke")
    config = ConfigDict(
        {
            "seed": 0,
            "data": {
                "name": "qm9",
                "source": "qm9pack",
                "path": "",
                "cache_dir": "",
                "targets": ("homo",),
                "split": "dimenet",
                "edges": "bonds",
                "edge_cutoff": 0.0,
                "buckets": (),
                "batch_size": 1024,
                "eval_batch_size": 2048,
                "prefetch_threads": 2,
                "prefetch_batches": 8,
            },
            "model": {
                "name": "demetar",
                "readout": "auto",
                "width": 1024,
                "num_heads": 16,
                "edge_layers": 3,
                "node_layers": 3,
                "joint_layers": 6,
                "mlp_ratio": 4,
                "num_radial": 64,
                "radial_cutoff": 8.0,  # angstrom
                "attention": "all",
                "edge_attention": "full",
                "edge_atoms": True,
                "pair_bias": True,
                "environment": True,
                "scaling": "standard",
                "remat": False,
                "dropout": 0.0,
                "dtype": "bfloat16",
            },
            "optim": {
                "learning_rate": 2e-4,
                "schedule": "cosine",
                "warmup_steps": 2_000,
                "final_fraction": 0.01,
                "plateau": {"factor": 0.8, "patience": 15, "min_scale": 1e-3},
                "b1": 0.9,
                "b2": 0.98,
                "weight_decay": 1e-2,
                "clip_norm": 1.0,
                "ema_decay": 0.999,
            },
            "train": {
                "num_steps": 33_000,  # about 300 epochs
                "loss": "mae",
                "accumulation": 1,
                "steps_per_call": 1,
                "eval_every": 1_100,
            },
            "checkpoint": {"every_steps": 500, "keep_last": 2, "stop_at": 0},
            "log": {"every_steps": 50, "identity": False},
            "cluster": {"start_seconds": 300, "lost_seconds": 30, "stuck_seconds": 80},
            "mesh": {"data": -1, "fsdp": 4, "model": 2, "cpu_devices": 0},
        }
    )
    if arg == "smoke":
        config.data.update({"source": "sample", "split": "random", "buckets": (29,)})
        config.data.update({"batch_size": 16, "eval_batch_size": 32})
        config.model.update({"width": 32, "num_heads": 4, "num_radial": 16})
        config.model.update({"edge_layers": 1, "node_layers": 1, "joint_layers": 1})
        config.optim.warmup_steps = 5
        config.train.update({"num_steps": 20, "eval_every": 10})
        config.checkpoint.every_steps = 5
        config.log.every_steps = 1
        config.mesh.cpu_devices = 8
    return config
