"""Writers by name: where the curves of a run go beside `metrics.jsonl`.

A writer is a class that is opened with a `Run` and has two methods:

    scalars(step, values)    one point of each curve; values: {"train/loss": 0.5, ...}
    close()

and, as `package`, the name of the package that it imports. A new writer is a class and a row of
`WRITERS`; if its package is optional, also an extra of the same name in setup.py.

A writer may fail or hang: a disk is full, a server does not answer for minutes. So each has a
thread of its own (`Background`), and its failure ends it, never the run.
"""

import dataclasses
import importlib.util
import os
import pathlib
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from data_pipelines.errors import UserError, check_known
from demetar.records.files import read_json, write_json
from demetar.records.log import complain

# How long the end of a run waits for a writer. A cluster that stops a job gives it 30 s.
CLOSE_SECONDS = 20.0
# Points of time that may wait for a writer; with lines every 100 steps, days of training.
_MOST_WAITING = 10_000


@dataclasses.dataclass(frozen=True)
class Run:
    """What a writer is told of a run.

    Attributes:
      workdir: of the run; its name is the name of the run.
      step: from which the run goes on; points of later steps are written again.
      config: resolved, as JSON values.
      project: `config.log.project`, what servers group runs by.
    """

    workdir: pathlib.Path
    step: int
    config: dict[str, Any]
    project: str

    @property
    def name(self) -> str:
        return self.workdir.resolve().name


class TensorBoard:
    """Event files in `events/`, for TensorBoard."""

    package = "tensorboardX"

    def __init__(self, run: Run):
        import tensorboardX

        folder = str(run.workdir / "events")
        self._events = tensorboardX.SummaryWriter(folder, purge_step=run.step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases; offline, in `wandb/`, where nobody is logged in.

    `WANDB_MODE` and the other variables of wandb are obeyed. `wandb_run.json` keeps the id: a
    restart goes on with the same run. Steps that run again are written again, with equal values.
    """

    package = "wandb"

    def __init__(self, run: Run):
        import wandb

        mode = None  # as WANDB_MODE says
        if not os.environ.get("WANDB_MODE"):
            # Without a login wandb would ask for one on the screen, and wait.
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        file = run.workdir / "wandb_run.json"
        if not file.exists():
            write_json(file, {"id": uuid.uuid4().hex[:12]})
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=read_json(file)["id"],
            resume="allow",
            dir=run.workdir,
            config=run.config,
            allow_val_change=True,  # of what a resume may change, such as the mesh
            mode=mode,
            settings=wandb.Settings(console="off", finish_timeout=CLOSE_SECONDS),
        )
        # wandb's own step may not fall, but after a restart ours does.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at `MLFLOW_TRACKING_URI` or where MLflow writes by itself.

    `mlflow_run.json` keeps the id: a restart goes on with the same run. Steps that run again are
    written again, with equal values.
    """

    package = "mlflow"

    def __init__(self, run: Run):
        import mlflow

        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        file = run.workdir / "mlflow_run.json"
        self._id = read_json(file)["id"] if file.exists() else None
        if self._id is None or not self._continues():
            experiment = mlflow.set_experiment(run.project)
            created = self._client.create_run(experiment.experiment_id, run_name=run.name)
            self._id = created.info.run_id
            write_json(file, {"id": self._id})
        if not self._client.get_run(self._id).data.params:
            flat = flatten_dict(run.config, sep=".")
            params = [mlflow.entities.Param(k, str(v)) for k, v in flat.items()]
            for first in range(0, len(params), 100):  # a server takes no more at once
                self._client.log_batch(self._id, params=params[first : first + 100])

    def _continues(self) -> bool:
        """Opens the run of the last start; False where this store has none."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        points = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._id)


WRITERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def check_writers(names: Sequence[str]) -> None:
    """Refuses a name that is no row, and a writer whose package is not installed."""
    for name in names:
        check_known("writer in config.log.writers", name, WRITERS)
        package = WRITERS[name].package
        found = importlib.util.find_spec(package)
        # A folder of that name in the current one (wandb makes such) is found too, with no file.
        if found is None or found.origin is None:
            raise UserError(
                f"config.log.writers has {name!r}, but its package {package!r} is not installed: "
                f"run `pip install 'demetar[{name}]'`, or take {name!r} out of "
                "config.log.writers."
            )


class Background:
    """Opens a writer and gives it its values on a thread: it can neither stop nor delay a run.

    Whatever goes wrong is complained about once. From then on the writer gets nothing.

    Args:
      name: row of `WRITERS`.
      run: what it is opened with.
    """

    def __init__(self, name: str, run: Run):
        self._name = name
        self._waiting: queue.Queue = queue.Queue(_MOST_WAITING)
        self._off = threading.Event()
        # Daemon: a writer that hangs does not keep the process from ending.
        self._thread = threading.Thread(
            target=self._work, args=(WRITERS[name], run), name=f"writer {name}", daemon=True
        )
        self._thread.start()

    def _work(self, open_writer, run: Run) -> None:
        try:
            writer = open_writer(run)
            while (point := self._waiting.get()) is not None and not self._off.is_set():
                writer.scalars(*point)
            writer.close()
        except (Exception, SystemExit) as error:
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Returns at once."""
        if self._off.is_set():
            return
        try:
            self._waiting.put_nowait((step, values))
        except queue.Full:
            self._give_up(f"it is {_MOST_WAITING} lines behind")

    def finish(self) -> None:
        """Says that nothing more comes; returns at once."""
        if self._off.is_set():
            return
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._give_up(f"it is {_MOST_WAITING} lines behind")

    def join(self, seconds: float) -> None:
        """Waits for all to be written, but no longer than that."""
        if not self._off.is_set():
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._give_up(f"it did not finish within {CLOSE_SECONDS:.0f} s of the end")

    def _give_up(self, reason: str) -> None:
        if not self._off.is_set():
            self._off.set()
            complain(
                f"The writer {self._name!r} of config.log.writers is switched off: {reason}. The "
                "run goes on; metrics.jsonl has every value."
            )


def close_all(writers: Sequence[Background]) -> None:
    """Waits until the writers have written all, `CLOSE_SECONDS` for all of them together."""
    for writer in writers:
        writer.finish()
    deadline = time.monotonic() + CLOSE_SECONDS
    for writer in writers:
        writer.join(max(0.0, deadline - time.monotonic()))
