"""Models that ship with the package: weights as safetensors, a card as JSON, a hash.

The card says all that a model needs to be built again: the config, the targets, and the facts that
its data gave it. Data only: nothing here is executed or unpickled.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from data_pipelines.errors import UserError, check_known
from data_pipelines.graph import Graph
from data_pipelines.targets import Target
from demetar.config import stored
from demetar.models import create_model
from demetar.models import predict as predict_batch
from demetar.models.base import GraphModel

_FOLDER = pathlib.Path(__file__).parents[1] / "weights"
# What a card keeps of `result.json`.
_RESULT = ("split_name", "step", "count", "targets", "validation_score", "seed", "git_commit")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that ships.

    Attributes:
      config: it was trained with.
      params: its averaged weights.
      card: the rest of its `config.json`: targets, facts for the model, the passport of its data,
        the published result.
    """

    config: ml_collections.ConfigDict
    params: dict
    card: dict

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(Target(**fields) for fields in self.card["targets"])

    @property
    def facts(self) -> dict[str, Any]:
        """What its data give a model: `elements`, and what they know besides."""
        return self.card["facts"] | {"elements": tuple(self.card["facts"]["elements"])}

    def network(self) -> GraphModel:
        """The flax module of the weights, for one graph."""
        return create_model(targets=self.targets, facts=self.facts, **self.config.model)


def pretrained_names() -> list[str]:
    """What ships, in alphabetical order."""
    return sorted(file.parent.name for file in _FOLDER.glob("*/config.json"))


def read(name: str) -> Pretrained:
    """The model `name`, its weights checked against their SHA-256."""
    check_known("pretrained model", name, pretrained_names())
    file = _FOLDER / name / "weights.safetensors"
    card = json.loads((_FOLDER / name / "config.json").read_text())
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != card["weights_sha256"]:
        raise UserError(
            f"{file} is damaged: SHA-256 {found[:12]}…, but its config.json says "
            f"{card['weights_sha256'][:12]}…. Install the package again."
        )
    params = traverse_util.unflatten_dict(load_file(file), sep="/")
    return Pretrained(stored.from_json(card["config"]), params, card)


def write(name: str, params, config: dict, card: dict, folder: pathlib.Path) -> None:
    """Writes `folder/name`: weights, config and what is known about them.

    Args:
      name: of the model.
      params: its weights.
      config: it was trained with, as JSON.
      card: `targets`, `facts`, `passport` and `result`, see `Pretrained`.
      folder: of all models.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    file = folder / name / "weights.safetensors"
    save_file(traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/"), file)
    file.chmod(0o644)  # safetensors writes for the owner alone
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = {"config": config, "weights_sha256": digest} | card
    (folder / name / "config.json").write_text(json.dumps(card, indent=1) + "\n")


def load_pretrained(name: str) -> Callable[..., np.ndarray]:
    """A model of positions as a function of NumPy arrays.

    Returns:
      `f(position=[B, N, 3], velocity=[B, N, 3], charge=[B, N]) -> position [B, N, 3]` after the
      horizon it was trained for, in the units of its data; any B, and any N, though it has
      only seen the N of its training.
    """
    model = read(name)
    network = model.network()
    (element,) = model.facts["elements"]

    @jax.jit
    def apply(position, velocity, charge):
        number, n = position.shape[:2]
        senders, receivers = np.triu_indices(n, 1)
        every = lambda x: jnp.broadcast_to(jnp.asarray(x), (number, len(x)))
        batch = Graph(
            position=position,
            velocity=velocity,
            charge=charge,
            atomic_number=every(np.full(n, element, np.int32)),
            node_mask=every(np.ones(n, bool)),
            senders=every(senders.astype(np.int32)),
            receivers=every(receivers.astype(np.int32)),
            edge_type=every(np.zeros(len(senders), np.int32)),
            edge_mask=every(np.ones(len(senders), bool)),
            graph_mask=jnp.ones(number, bool),
            index=jnp.arange(number),
        )
        return predict_batch(network, model.params, batch)[network.position]

    def predict(*, position, velocity, charge) -> np.ndarray:
        arrays = {"position": position, "velocity": velocity, "charge": charge}
        arrays = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
        shape = arrays["position"].shape
        if len(shape) != 3 or shape[2] != 3 or shape[1] < 1:
            raise ValueError(f"position has shape {shape}; it must be [B, N, 3].")
        for key, wanted in (("velocity", shape), ("charge", shape[:2])):
            if arrays[key].shape != wanted:
                raise ValueError(f"{key} has shape {arrays[key].shape}; it must be {wanted}.")
        return np.asarray(apply(**arrays))

    return predict


def export(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Ships the best weights of the finished run in `workdir` as `name`; returns their folder."""
    # Late: who only loads weights needs neither Orbax nor data.
    from demetar.training import runtime
    from demetar.training.checkpoints import Checkpoints
    from demetar.training.experiment import build_experiment

    if not (workdir / "result.json").exists():
        raise UserError(f"{workdir} holds no finished run: it has no result.json.")
    result = json.loads((workdir / "result.json").read_text())
    config = stored.from_json(result["config"])
    runtime.configure(config)
    experiment = build_experiment(config)
    if reason := _why_not(experiment):
        raise UserError(
            f"The model of {workdir} cannot ship: {reason}. `load_pretrained` gives a model only "
            "positions, velocities and charges of particles that all act on each other."
        )
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last)
    state = checkpoints.restore(checkpoints.best_step(), experiment.abstract_state())
    dataset, targets = experiment.dataset, experiment.objective.targets
    card = {
        "targets": [dataclasses.asdict(target) for target in targets],
        "facts": {"elements": dataset.elements, **dataset.model_facts},
        "passport": result["data_passport"],
        "result": {key: result[key] for key in _RESULT},
    }
    saved = stored.to_json(config)
    saved["mesh"] |= {"data": -1, "fsdp": 1, "model": 1, "cpu_devices": 0}  # of any machine
    saved["data"] |= {"cache_dir": ""}
    write(name, jax.device_get(state.ema), saved, card, _FOLDER)
    return _FOLDER / name


def _why_not(experiment) -> str:
    """Why `load_pretrained` could not give the model what it needs; "" if it can."""
    dataset, arrays = experiment.dataset, experiment.arrays
    readouts = [target.readout for target in experiment.objective.targets]
    if readouts != ["position"]:
        return f"its targets are read out as {', '.join(readouts)}, not as one of positions"
    if arrays.velocity is None or arrays.charge is None or len(dataset.elements) > 1:
        return "its nodes are no particles with a velocity and a charge"
    sizes = arrays.sizes
    if (sizes.num_edges != sizes.num_nodes * (sizes.num_nodes - 1) // 2).any():
        return "not all pairs of its particles are edges"
    return ""
