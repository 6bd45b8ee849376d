"""Repeats the evaluation of a run from its folder alone.

    python -m demetar.evaluate --workdir=DIR [--split=test]

reads the run's `config.json` and its best checkpoint, as data: no config file is executed.
Prints JSON, with the same keys as `result.json`.
"""

import json
import pathlib

from absl import app, flags

from data_pipelines.splits import PARTS
from demetar import config as config_lib
from demetar import runtime
from demetar.checkpoint import Checkpoints
from demetar.errors import UserError, exits_cleanly
from demetar.evaluation import Evaluator, result_of
from demetar.experiment import build_experiment

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", PARTS, "Which part to evaluate.")


def evaluate_run(workdir: pathlib.Path, split: str) -> dict:
    """Errors of the best weights of the run in `workdir` on `split`."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json.")
    saved = json.loads(file.read_text())
    config = config_lib.from_json(saved["config"])
    runtime.configure(config)
    experiment = build_experiment(config)
    config_lib.check_same_run(saved, experiment.identity, workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last)
    step = checkpoints.best_step()
    if step is None:
        raise UserError(f"{workdir} has no evaluated checkpoint yet: train for longer first.")
    state = checkpoints.restore(step, experiment.abstract_state())
    return result_of(Evaluator(experiment).run(state.ema, split), split, step, saved)


@exits_cleanly
def _main(argv) -> None:
    del argv
    print(json.dumps(evaluate_run(pathlib.Path(_WORKDIR.value), _SPLIT.value), indent=1))


if __name__ == "__main__":
    app.run(_main)
