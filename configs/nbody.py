"""DEMETAr on N-body systems: where will the particles be?

    demetar train --config=nbody            the record model on EGNN's task
    demetar train --config=nbody:quick      the same in under 5 minutes
    demetar train --config=nbody:smoke      seconds
    demetar train --config=nbody:egnn       another model, with settings of its own
    demetar train --config=nbody:blog       another protocol
    demetar train --config=nbody:glad_100   a hundred charges

In a checkout `--config=configs/nbody.py:quick` names the same file. Variants combine:
`:egnn,quick`, `:blog,velocity`. This file says what differs from the defaults in
demetar/config/defaults.py; every key can be set: `--config.seed=1`.

Protocols: `egnn`, unless another is named; `blog`, of the DEMETAr post; `fuchs`; `glad_5`,
`glad_20`, `glad_50`, `glad_100` and `gravity_100`; `general`.
Models: `e3`, unless another is named; `egnn`; of the post `not_equivariant`, `translation`, `com`,
`velocity`, `node_only`, `edge_cross`; `linear`, `deep_set`, `set_transformer`; and `tfn`,
`se3_transformer`, which have protocol `fuchs` and learn velocities too, as published.

Hardware: two CPU cores. Results: docs/results/nbody.md and, of `glad` and `gravity`,
docs/results/many.md.
"""

from ml_collections import ConfigDict

# The post's model, about 100,000 parameters in every variant.
_POST = {
    "name": "demetar",
    "width": 64,
    "num_heads": 4,
    "edge_layers": 1,
    "node_layers": 1,
    "joint_layers": 1,
    "mlp_ratio": 2,
    "num_radial": 16,
    "radial_cutoff": 8.0,
    "edge_atoms": False,
    "pair_bias": False,
}
_MODELS = {
    "e3": {"name": "demetar_e3"},
    "egnn": {"name": "egnn", "width": 64, "num_layers": 4},
    "linear": {"name": "linear"},
    "deep_set": {"name": "deep_set", "width": 128, "num_layers": 3},
    "set_transformer": {"name": "set_transformer", "width": 64, "num_heads": 4, "num_layers": 3},
    "tfn": {"name": "tfn", "width": 8, "num_layers": 4},
    "se3_transformer": {
        "name": "se3_transformer",
        "width": 8,
        "num_layers": 4,
        "num_heads": 2,
        "division": 4,
    },
    "not_equivariant": _POST | {"equivariance": "none"},
    "translation": _POST | {"equivariance": "translation"},
    "com": _POST | {"equivariance": "com"},
    "velocity": _POST | {"equivariance": "velocity"},
    "node_only": _POST | {"cross_attention": False, "edge_layers": 0, "joint_layers": 3},
    "edge_cross": _POST | {"edge_layers": 0, "joint_layers": 2},
}
_PUBLISHED = ("tfn", "se3_transformer")  # with the training of Fuchs et al. 2020
# Systems of a batch, fewer where each has more particles; steps; neighbors of each particle.
_MANY = {
    "glad_5": (50, 16_000, 0),
    "glad_20": (20, 16_000, 8),
    "glad_50": (10, 32_000, 8),
    "glad_100": (10, 32_000, 8),
    "gravity_100": (10, 4_000, 1),
}
_PROTOCOLS = ("blog", "fuchs", "general", *_MANY)  # "egnn" is the default, and the name of a model


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is what follows the colon: model, protocol and variants, by comma."""
    words = list(filter(None, arg.split(",")))
    variants = {"quick": _quick, "smoke": _smoke}
    known = (*_MODELS, *_PROTOCOLS, *variants)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"there is no variant {unknown[0]!r}; known: {', '.join(known)}")
    models = [word for word in words if word in _MODELS]
    protocols = [word for word in words if word in _PROTOCOLS]
    if len(models) > 1 or len(protocols) > 1:
        raise ValueError(f"at most one model and one protocol can be named, not {', '.join(words)}")
    config = _full(*models or ["e3"])
    if not set(models).isdisjoint(_PUBLISHED):
        _as_published(config)
    if protocols:
        config.data.protocol = protocols[0]
        if protocols[0] in _MANY:
            _many(config)
    for word, change in variants.items():  # smoke last: it has a protocol of its own
        if word in words:
            change(config)
    return config


def _full(model: str) -> ConfigDict:
    record = model == "e3"
    return ConfigDict(
        {
            "data": {"name": "nbody", "batch_size": 100, "eval_batch_size": 200},
            "model": _MODELS[model],
            "optim": {
                "learning_rate": 3e-3 if record else 1e-3,
                "warmup_steps": 200,
                "weight_decay": 0.3 if record else 1e-4,
                "clip_norm": 0.1,
            },
            "train": {"num_steps": 8_000, "loss": "mse", "eval_every": 400},
            "checkpoint": {},
            "log": {},
            "mesh": {"cpu_devices": 2},
        }
    )


def _as_published(config: ConfigDict) -> None:
    """Both outputs learned, Adam, cosine to a tenth, 500 epochs."""
    config.data.update({"protocol": "fuchs", "targets": ("position", "velocity")})
    config.data.batch_size = 128
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "final_fraction": 0.1})
    config.optim.update({"warmup_steps": 0, "clip_norm": 0.0, "ema_decay": 0.0})
    config.train.num_steps = 19_500


def _many(config: ConfigDict) -> None:
    """Up to a hundred particles: edges to the nearest, and a field of all."""
    batch_size, config.train.num_steps, neighbors = _MANY[config.data.protocol]
    config.train.eval_every = config.train.num_steps // 20
    config.data.update({"batch_size": batch_size, "eval_batch_size": 2 * batch_size})
    if config.model.name == "demetar_e3":
        config.data.neighbors = neighbors
        config.model.field_kernels = 4
        if config.data.protocol.startswith("gravity"):
            # Every particle pulls on every other by one law: the field does most, in 256 steps of
            # time, and has to be exact to a percent before tokens have anything to add.
            config.model.update({"rounds": 8, "field_steps": 32})
            config.model.update({"field_kernels": 1, "field_rate": 5.0})
            config.optim.learning_rate = 1e-3


def _quick(config: ConfigDict) -> None:
    """Within five minutes below a plain GNN's 0.0107."""
    config.train.num_steps = 2_000


def _smoke(config: ConfigDict) -> None:
    """A few steps on a few small simulations."""
    config.data.protocol = "general"
    config.data.general = {"num_particles": 4, "horizon_steps": (20,)}
    config.data.general.update({"num_train": 64, "num_validation": 32, "num_test": 32})
    config.data.update({"batch_size": 16, "eval_batch_size": 32})
    config.optim.warmup_steps = 10
    config.train.update({"num_steps": 40, "eval_every": 20})
    config.checkpoint.every_steps = 5
    config.log.every_steps = 1
