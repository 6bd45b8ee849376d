"""Models that ship with the package: weights as safetensors, their config as JSON, a hash.

    python -m demetar.pretrained --workdir=DIR --name=NAME      makes one from a finished run
    python -m demetar.evaluate --pretrained=NAME                repeats its published number

Data only: nothing here is executed or unpickled.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from data_pipelines.errors import UserError, suggest
from data_pipelines.graph import Graph
from data_pipelines.nbody import simulation
from demetar.config import stored
from demetar.exits import exits_cleanly
from demetar.models import create_model
from demetar.training import runtime

_FOLDER = pathlib.Path(__file__).parent / "weights"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that ships.

    Attributes:
      config: it was trained with.
      params: its averaged weights.
      card: the rest of its `config.json`: the passport of its data, the published result.
    """

    config: ml_collections.ConfigDict
    params: dict
    card: dict


def pretrained_names() -> list[str]:
    """What ships, in alphabetical order."""
    return sorted(file.parent.name for file in _FOLDER.glob("*/config.json"))


def read(name: str) -> Pretrained:
    """The model `name`, its weights checked against their SHA-256."""
    known = pretrained_names()
    if name not in known:
        raise UserError(
            f"No pretrained model {name!r}.{suggest(name, known)} Known: {', '.join(known)}."
        )
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


def write(name: str, params, config: dict, card: dict, folder: pathlib.Path = _FOLDER) -> None:
    """Writes `folder/name`: weights, config and what is known about them."""
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
      horizon it was trained for, in the simulator's units; any B, and any N, though it has
      only seen the N of its training.
    """
    model = read(name)
    horizon = simulation.Protocol(**model.card["passport"]["protocol"]).horizon
    options = model.config.model.to_dict()
    network = create_model(target_readouts=("position",), horizon=horizon, **options)

    @jax.jit
    def apply(position, velocity, charge):
        number, n = position.shape[:2]
        senders, receivers = np.triu_indices(n, 1)
        every = lambda x: jnp.broadcast_to(jnp.asarray(x), (number, len(x)))
        batch = Graph(
            position=position,
            velocity=velocity,
            charge=charge,
            target=position,
            atomic_number=every(np.ones(n, np.int32)),
            node_mask=every(np.ones(n, bool)),
            senders=every(senders.astype(np.int32)),
            receivers=every(receivers.astype(np.int32)),
            edge_type=every(np.zeros(len(senders), np.int32)),
            edge_mask=every(np.ones(len(senders), bool)),
            graph_mask=jnp.ones(number, bool),
            index=jnp.arange(number),
        )
        return jax.vmap(lambda graph: network.apply({"params": model.params}, graph))(batch)

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


def _export(workdir: pathlib.Path, name: str) -> None:
    """Ships the best weights of the finished run in `workdir` as `name`."""
    # Late: who only loads weights needs neither Orbax nor data.
    from demetar.training.checkpoints import Checkpoints
    from demetar.training.experiment import build_experiment

    if not (workdir / "result.json").exists():
        raise UserError(f"{workdir} holds no finished run: it has no result.json.")
    result = json.loads((workdir / "result.json").read_text())
    protocol = result["data_passport"].get("protocol", {})
    if protocol.get("interaction") != "charged":
        raise UserError(f"{workdir} is no run on charged particles: nothing can load its weights.")
    config = stored.from_json(result["config"])
    runtime.configure(config)
    experiment = build_experiment(config)
    checkpoints = Checkpoints(workdir, experiment.config.checkpoint.keep_last)
    state = checkpoints.restore(checkpoints.best_step(), experiment.abstract_state())
    keys = ("split_name", "step", "count", "targets", "validation_score", "seed", "git_commit")
    card = {"passport": result["data_passport"], "result": {key: result[key] for key in keys}}
    anywhere = {
        "mesh": {"data": 1, "cpu_devices": 0},
        "data": result["config"]["data"] | {"cache_dir": ""},
    }
    write(name, jax.device_get(state.ema), result["config"] | anywhere, card)
    print(f"{_FOLDER / name}: {name} ships now.")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
    _NAME = flags.DEFINE_string("name", None, "What to call the model.", required=True)
    logging.set_verbosity(logging.WARNING)
    main = lambda argv: _export(pathlib.Path(_WORKDIR.value), _NAME.value)
    app.run(exits_cleanly(main))
