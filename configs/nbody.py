"""DEMETAr on N-body systems: where will the particles be?

    python -m demetar.main --config=configs/nbody.py            the record model on EGNN's task
    python -m demetar.main --config=configs/nbody.py:quick      the same in under 5 minutes
    python -m demetar.main --config=configs/nbody.py:smoke      seconds
    python -m demetar.main --config=configs/nbody.py:egnn       another model, its settings
    python -m demetar.main --config=configs/nbody.py:blog       another protocol

Variants combine: `:egnn,quick`, `:blog,velocity`. Every value can be set: `--config.seed=1`.
Protocols: `egnn` (default), `blog`, `fuchs`, `general`. Models: `e3` (default), `egnn`, the
seed's `not_equivariant`, `translation`, `com`, `velocity`, `node_only`, `edge_cross`, and
`linear`, `deep_set`, `set_transformer`.

Hardware: two CPU cores. Results: docs/results/nbody.md.
"""

from ml_collections import ConfigDict

# The seed's model, about 100,000 parameters in every variant.
_SEED = {
    "name": "demetar",
    "readout": "auto",
    "equivariance": "velocity",  # none | translation | com | velocity
    "cross_attention": True,  # False: node only
    "width": 64,
    "num_heads": 4,
    "edge_layers": 1,
    "node_layers": 1,
    "joint_layers": 1,
    "mlp_ratio": 2,
    "num_radial": 16,
    "radial_cutoff": 8.0,
    "attention": "all",  # all | edges
    "edge_attention": "full",  # full | shared_node | none
    "edge_atoms": False,
    "pair_bias": False,
    "scaling": "standard",
    "remat": False,
    "dropout": 0.0,
    "dtype": "float32",
}
_E3 = {
    "name": "demetar_e3",
    "readout": "auto",
    "width": 32,
    "num_heads": 4,
    "mlp_ratio": 2,
    "rounds": 12,
    "num_invariants": 8,
    "dtype": "float32",
}
_PLAIN = {"readout": "auto", "width": 64, "dtype": "float32"}
_MODELS = {
    "e3": _E3,
    "egnn": _PLAIN | {"name": "egnn", "num_layers": 4, "attention": False},
    "linear": {"name": "linear", "readout": "auto", "dtype": "float32"},
    "deep_set": _PLAIN | {"name": "deep_set", "width": 128, "num_layers": 3},
    "set_transformer": _PLAIN | {"name": "set_transformer", "num_heads": 4, "num_layers": 3},
    "not_equivariant": _SEED | {"equivariance": "none"},
    "translation": _SEED | {"equivariance": "translation"},
    "com": _SEED | {"equivariance": "com"},
    "velocity": _SEED,
    "node_only": _SEED | {"cross_attention": False, "edge_layers": 0, "joint_layers": 3},
    "edge_cross": _SEED | {"edge_layers": 0, "joint_layers": 2},
}
_PROTOCOLS = ("blog", "fuchs", "general")  # "egnn" is the default, and the model's name


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is what follows the colon: model, protocol and variants, by comma."""
    words = list(filter(None, arg.split(",")))
    variants = {"quick": _quick, "smoke": _smoke}
    known = (*_MODELS, *_PROTOCOLS, *variants)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(
            f"configs/nbody.py has no variant {unknown[0]!r}; known: {', '.join(known)}"
        )
    models = [word for word in words if word in _MODELS]
    protocols = [word for word in words if word in _PROTOCOLS]
    if len(models) > 1 or len(protocols) > 1:
        raise ValueError(f"At most one model and one protocol can be named, not {', '.join(words)}")
    config = _full(*models or ["e3"])
    if protocols:
        config.data.protocol = protocols[0]
    for word, change in variants.items():  # smoke last: it has a protocol of its own
        if word in words:
            change(config)
    return config


def _full(model: str) -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,  # of initial weights, data order and dropout
            "data": {
                "name": "nbody",
                "protocol": "egnn",  # egnn | blog | fuchs | general
                "general": {  # what protocol "general" simulates
                    "num_particles": 20,
                    "interaction": "charged",  # charged | springs
                    "horizon_steps": 500,
                    "num_train": 2_000,
                    "num_validation": 500,
                    "num_test": 500,
                    "seed": 0,
                },
                "cache_dir": "",  # simulated data; empty: ~/.cache/demetar
                "buckets": (),
                "batch_size": 100,  # systems a step, over all devices
                "eval_batch_size": 200,
                "prefetch_threads": 1,
                "prefetch_batches": 8,
            },
            "model": _MODELS[model],
            "optim": {
                "learning_rate": 3e-3,
                "schedule": "cosine",  # cosine | plateau | constant
                "warmup_steps": 200,
                "final_fraction": 0.01,  # of the peak, at the end of the cosine
                "plateau": {"factor": 0.8, "patience": 15, "min_scale": 1e-3},
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.3,
                "clip_norm": 0.1,
                "ema_decay": 0.999,
            },
            "train": {
                "num_steps": 8_000,
                "loss": "mse",  # mae | mse
                "accumulation": 1,  # micro-batches a step
                "steps_per_call": 1,  # more, where a step takes less time than its dispatch
                "eval_every": 400,
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
                "cpu_devices": 2,  # virtual CPU devices; 0: one
            },
        }
    )
    if model != "e3":
        config.optim.update({"learning_rate": 1e-3, "weight_decay": 1e-4})
    return config


def _quick(config: ConfigDict) -> None:
    """Within five minutes below a plain GNN's 0.0107."""
    config.train.update({"num_steps": 2_000, "eval_every": 400})


def _smoke(config: ConfigDict) -> None:
    """A few steps on a few small simulations."""
    config.data.protocol = "general"
    config.data.general.update({"num_particles": 4, "horizon_steps": 20})
    config.data.general.update({"num_train": 64, "num_validation": 32, "num_test": 32})
    config.data.update({"batch_size": 16, "eval_batch_size": 32})
    config.optim.warmup_steps = 10
    config.train.update({"num_steps": 40, "eval_every": 20})
    config.checkpoint.every_steps = 5
    config.log.every_steps = 1
