"""Repeats the evaluation of a run from its folder alone, or of a model that ships.

    python -m demetar.evaluate --workdir=DIR [--split=test]
    python -m demetar.evaluate --pretrained=NAME [--split=test]

reads `config.json` and the best weights, as data: no config file is executed. Prints JSON,
with the same keys as `result.json`.
"""

import json
import pathlib

from absl import app, flags, logging

from data_pipelines.errors import UserError
from data_pipelines.splits import PARTS
from demetar import pretrained
from demetar.config import stored
from demetar.exits import exits_cleanly
from demetar.training import runtime
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator, result_of
from demetar.training.experiment import build_experiment

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_PRETRAINED = flags.DEFINE_string("pretrained", None, "Name of a model that ships.")
flags.mark_flags_as_mutual_exclusive(["workdir", "pretrained"], required=True)
_SPLIT = flags.DEFINE_enum("split", "test", PARTS, "Which part to evaluate.")


def evaluate_run(workdir: pathlib.Path, split: str) -> dict:
    """Errors of the best weights of the run in `workdir` on `split`."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json.")
    saved = json.loads(file.read_text())
    config = stored.from_json(saved["config"])
    runtime.configure(config)
    experiment = build_experiment(config)
    stored.check_same_run(saved, experiment.identity, workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last)
    step = checkpoints.best_step()
    if step is None:
        raise UserError(f"{workdir} has no evaluated checkpoint yet: train for longer first.")
    state = checkpoints.restore(step, experiment.abstract_state())
    return result_of(Evaluator(experiment).run(state.ema, split), split, step, saved)


def evaluate_pretrained(name: str, split: str) -> dict:
    """Errors of a model that ships, on data simulated here; with what was published beside.

    `same_data` says whether the numbers are the published ones too: chaotic systems differ
    between machines whose arithmetic differs in the last bit.
    """
    model = pretrained.read(name)
    config = model.config
    runtime.configure(config)
    experiment = build_experiment(config)
    today, published = experiment.dataset.passport, model.card["passport"]
    if today["protocol"] != published["protocol"]:
        raise UserError(
            f"{name} was trained on {published['protocol']}, but its protocol is "
            f"{today['protocol']} here: use the version of demetar that it came with."
        )
    outcome = Evaluator(experiment).run(model.params, split)
    result = result_of(outcome, split, model.card["result"]["step"], experiment.identity)
    return result | {
        "pretrained": name,
        "published": model.card["result"],
        "same_data": today["content_sha256"] == published["content_sha256"],
    }


@exits_cleanly
def _main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    if _PRETRAINED.value:
        found = evaluate_pretrained(_PRETRAINED.value, _SPLIT.value)
    else:
        found = evaluate_run(pathlib.Path(_WORKDIR.value), _SPLIT.value)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    app.run(_main)
