"""The tables of the DEMETAr post, alive: every system it is compared with, at equal wall-clock.

    pip install -e ".[qm9,bench]"
    python benchmarks/table.py                    all rows, one after the other, and the page: hours
    python benchmarks/table.py --rows qm9-et nbody-tfn
    python benchmarks/table.py --ratios           ours over the official PyTorch, and the page
    python benchmarks/table.py --page             the page alone
    SMOKE=1 python benchmarks/table.py            minutes: tiny models on little data, in runs/

A row is a run of `demetar.main` whose schedule is as long as the budget: a pilot in a process of
its own measures steps a second, and `--minutes` times that is `num_steps`; warm-up (5 %) and
evaluations (6) are parts of it. So every system sees its rate fall to the end. The budget is
training alone: compiling and evaluating come on top. Test is evaluated once, with the weights that
validation chose.

The pilots of all rows come first: they need a quiet machine, the runs after them do not, for what a
run computes depends on its number of steps and not on the time that they take.

What is finished is skipped and what was killed goes on: runs live in runs/table, numbers in
benchmarks/results/table.json, from which the page, docs/results/table.md, is written.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from data_pipelines.edges import rows_of
from data_pipelines.json_text import json_text

SMOKE = bool(os.environ.get("SMOKE"))
ROOT = pathlib.Path(__file__).parents[1]
RUNS = ROOT / "runs" / ("table-smoke" if SMOKE else "table")
RESULTS = RUNS / "table.json" if SMOKE else ROOT / "benchmarks" / "results" / "table.json"
PAGE = RUNS / "table.md" if SMOKE else ROOT / "docs" / "results" / "table.md"
EVALUATIONS, WARMUP = 6, 0.05  # of a run: how many, and which share of its steps
PILOT_SECONDS = 1.0 if SMOKE else 20.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One system in one table.

    Attributes:
      table: `qm9` or `nbody`.
      system: its name in the table's config, or of the model.
      title: what the page calls it.
      published: as printed, empty where nothing is.
      source: link to it.
      note: what else there is to say.
      variant: of the config, where it is not the system's name.
      changes: key of the config -> value.
    """

    table: str
    system: str
    title: str
    published: str
    source: str = ""
    note: str = ""
    variant: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.table}-{self.system}"

    @property
    def config(self) -> str:
        words = [self.system if self.variant is None else self.variant]
        words += [] if self.table == "qm9" else ["fuchs"]
        words += ["smoke" if SMOKE else "quick"]
        return f"{self.table}:{','.join(filter(None, words))}"

    @property
    def overrides(self) -> dict[str, Any]:
        """Key of the config -> value, for the pilot and the run alike."""
        common = {"data.split": "dimenet"} if self.table == "qm9" and not SMOKE else {}
        return common | {"mesh.cpu_devices": os.cpu_count()} | dict(self.changes)


_ARXIV = "https://arxiv.org/abs/"
# A grid so coarse that the features of the sample take seconds.
_SCATTERING = (
    ("data.scattering.shape", (21, 17, 15)),
    ("data.scattering.pixels_per_angstrom", 1.0),
    ("data.scattering.J", 1),
    ("data.scattering.L", 1),
)
_OTHER_TASK = "Published on other tasks only."
ROWS = [
    Row(
        "qm9", "wavescatt", "WaveScatt", "85", _ARXIV + "1805.00571",
        "Head trained in the loop; making the features is not counted.",
        changes=_SCATTERING if SMOKE else (),
    ),
    Row(
        "qm9", "nmp", "NMP", "43", _ARXIV + "1704.01212",
        "The form of PyTorch Geometric: the published search for each target is not repeatable.",
    ),
    Row("qm9", "schnet", "SchNet", "41", _ARXIV + "1706.08566", "The authors' first code."),
    Row(
        "qm9", "tfn", "Tensor Field Network", "40", _ARXIV + "2006.10503",
        "As the SE(3)-Transformer's paper prints it.",
    ),
    Row(
        "qm9", "se3_transformer", "SE(3)-Transformer", "35.0", _ARXIV + "2006.10503",
        "The authors' table; their paper's text once has 33.0.",
    ),
    Row("qm9", "cormorant", "Cormorant", "34", _ARXIV + "1906.04015"),
    Row(
        "qm9", "lieconv", "LieConv-T(3)", "30", _ARXIV + "2002.12880",
        "Normalised within each graph, and no turned copies of the data.",
    ),
    Row("qm9", "egnn", "EGNN", "29", _ARXIV + "2102.09844"),
    Row(
        "qm9", "et", "TorchMD-Net's equivariant transformer", "20.3", _ARXIV + "2202.02541",
        "As later tables print it.",
    ),
    Row(
        "qm9", "equiformer", "Equiformer", "15.4", _ARXIV + "2206.11990",
        "As later tables print it.",
    ),
    Row(
        "qm9", "demetar", "DEMETAr", "", "", "The post prints no number.", variant="",
        changes=(("data.targets", ("homo",)),),
    ),  # fmt: skip
    Row("nbody", "linear", "Linear", "0.0691", _ARXIV + "2006.10503"),
    Row("nbody", "deep_set", "DeepSet", "0.0639", _ARXIV + "2006.10503"),
    Row(
        "nbody", "tfn", "Tensor Field Network", "0.0151", _ARXIV + "2006.10503",
        "Velocities are learned too.",
    ),
    Row("nbody", "set_transformer", "Set Transformer", "0.0139", _ARXIV + "2006.10503"),
    Row(
        "nbody", "se3_transformer", "SE(3)-Transformer", "0.0076", _ARXIV + "2006.10503",
        "Velocities are learned too.",
    ),
    Row("nbody", "egnn", "EGNN", "", "", _OTHER_TASK),
    Row(
        "nbody", "velocity", "DEMETAr, velocity", "", "",
        "The post prints 0.0509, of another horizon.",
    ),
    Row("nbody", "e3", "DEMETAr, edge-space E(3) transformer", "", "", "Not in the post."),
]  # fmt: skip
UNITS = {"qm9": "meV", "nbody": "squared length"}
ITEMS = {"qm9": "molecules", "nbody": "systems"}
TARGETS = {"qm9": ("homo", "mae"), "nbody": ("position", "mse")}

# --- training ------------------------------------------------------------------------------------


def pilot_of(row: Row) -> dict:
    """Rates of a row, measured once."""
    file = RUNS / row.name / "pilot.json"
    if not file.exists():
        found = measure(row.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json_text(found))
    return json.loads(file.read_text())


def train(row: Row, minutes: float, seed: int) -> dict:
    """Trains a row, or goes on with it; what the page needs of it."""
    pilot, folder = pilot_of(row), RUNS / row.name
    workdir = folder / f"run-{minutes:g}-{seed}"
    flags = _flags(row, pilot, minutes) | {"seed": seed}
    command = ["-m", "demetar.main", f"--config={row.config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    with (folder / "run.log").open("a") as log:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}; see {folder}/run.log")
    return _collect(row, workdir, pilot, flags) | {
        "minutes": minutes,
        "command": shlex.join(["python", *command]).replace(f"{ROOT}/", ""),
    }


def _flags(row: Row, pilot: dict, minutes: float) -> dict:
    """The whole schedule in the budget."""
    steps = 60 * minutes * pilot["train"] / pilot["batch_size"]
    steps = max(EVALUATIONS, int(steps / EVALUATIONS) * EVALUATIONS)
    return row.overrides | {
        "train.num_steps": steps,
        "train.eval_every": steps // EVALUATIONS,
        "optim.warmup_steps": int(WARMUP * steps),
        "checkpoint.every_steps": max(1, round(steps / minutes)),  # once a minute
        "log.every_steps": max(1, steps // 50),
    }


def _collect(row: Row, workdir: pathlib.Path, pilot: dict, flags: dict) -> dict:
    """Of a finished run."""
    from demetar.records.files import read_jsonl
    from demetar.speed.machine import processor

    result = json.loads((workdir / "result.json").read_text())
    target, measure = TARGETS[row.table]
    lines = read_jsonl(workdir / "metrics.jsonl")
    key = f"{target}_{measure}"
    curve = [(x["step"], x[key]) for x in lines if x["split"] == "validation"]
    found = result["targets"][target]
    return {
        "test": found[measure],
        "interval_95": found["interval_95"],
        "validation": min(value for _, value in curve),
        "curve": curve,
        "steps": flags["train.num_steps"],
        "batch_size": pilot["batch_size"],
        "parameters": pilot["parameters"],
        "train_per_second": pilot["train"],
        "predict_per_second": pilot["forward"],
        "minutes_with_all": result["train_seconds"] / 60,
        "split": result["split_name"],
        "seed": result["seed"],
        "git_commit": result["git_commit"],
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


# --- rates ---------------------------------------------------------------------------------------

# Ours in the sizes of the official PyTorch -> config, changes; and what it is compared with.
_FROM_PYG = {
    "model.generation": "schnetpack", "model.width": 128, "model.filter_width": 128,
    "model.num_layers": 6, "model.num_radial": 50, "model.cutoff": 5.0,
    "data.edges": "cutoff", "data.edge_cutoff": 5.0,
}  # fmt: skip
RATIOS = {
    "schnet": ("qm9:schnet", _FROM_PYG, "schnet-pyg", "SchNet of PyTorch Geometric, 6 x 128"),
    "nmp": ("qm9:nmp", {}, "nmp-pyg", "NMP of PyTorch Geometric's example, 64 wide, 3 rounds"),
    "et": ("qm9:et", {}, "et-torchmdnet", "equivariant transformer of torchmd-net, 8 x 256"),
}
MICRO_BATCH = 16  # molecules that ours computes together: what they need stays in the caches
SIDES = ("ours", "theirs")
ROUNDS, SECONDS = (1, 1.0) if SMOKE else (5, 5.0)


def measure(name: str) -> dict:
    """Rates of a row, or of one side of a ratio (`schnet/ours`), in a process of its own."""
    command = [sys.executable, __file__, f"--measure={name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_here(name: str) -> dict:
    """Parameters, batch size, graphs/s of training steps and of predictions."""
    if name.endswith("/theirs"):
        return _rates(*_their_worker(name.removesuffix("/theirs")), SECONDS)
    from ours import Run

    from demetar.config.command_line import load_config

    if name.endswith("/ours"):
        text, changes, *_ = RATIOS[name.removesuffix("/ours")]
        config, seconds = load_config(text, changes | {"mesh.cpu_devices": os.cpu_count()}), SECONDS
        config.train.accumulation = max(1, config.data.batch_size // MICRO_BATCH)
    else:
        row = next(row for row in ROWS if row.name == name)
        config, seconds = load_config(row.config, row.overrides), PILOT_SECONDS
    worker = Run(config)
    worker.warm_up()
    train = worker.train
    worker.train = lambda seconds: train(seconds).rate
    return _rates(worker, config.data.batch_size, seconds)


def _their_worker(name: str):
    import torch_peers
    from peers import PeerWorker

    from demetar.config.command_line import load_config

    text, changes, peer, _ = RATIOS[name]
    torch_peers.PEERS["nmp-pyg"] = _nmp_peer
    batch_size = load_config(text, changes).data.batch_size
    return PeerWorker(peer, batch_size), batch_size


def _rates(worker, batch_size: int, seconds: float) -> dict:
    worker.train(min(2.0, seconds))  # the first steps are slower
    found = {kind: getattr(worker, kind)(seconds) for kind in ("train", "forward")}
    return {"parameters": worker.num_parameters, "batch_size": batch_size, **found}


def _nmp_peer():
    """NMP as PyTorch Geometric's example for QM9 builds it of its parts."""
    import numpy as np
    import torch
    from torch import nn
    from torch_geometric.nn import NNConv, Set2Set
    from torch_peers import Flat, Peer

    class Nmp(nn.Module):
        def __init__(self, width: int = 64, rounds: int = 3):
            super().__init__()
            self.rounds, self.first = rounds, nn.Linear(11, width)
            edge = nn.Sequential(nn.Linear(5, 128), nn.ReLU(), nn.Linear(128, width * width))
            self.message = NNConv(width, width, edge, aggr="mean")
            self.update, self.read_out = nn.GRU(width, width), Set2Set(width, 3)
            self.last = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

        def forward(self, feature, edges, edge_feature, batch):
            x = torch.relu(self.first(feature))
            state = x[None]
            for _ in range(self.rounds):
                message = torch.relu(self.message(x, edges, edge_feature))
                x, state = self.update(message[None], state)
                x = x[0]
            return self.last(self.read_out(x, batch))[:, 0]

    class NmpPeer(Peer):
        edges, learning_rate = "complete", 1e-3

        def __init__(self):
            self.model = Nmp()

        def assemble(self, arrays, graphs):
            flat = Flat(arrays, graphs)
            edges = rows_of(arrays.edges, graphs)
            kind = torch.from_numpy(edges[:, 2].astype(np.int64)).repeat(2)
            bond = nn.functional.one_hot(kind, 5)[:, 1:].float()
            one, other = flat.position[flat.edges[0]], flat.position[flat.edges[1]]
            flat.edge_feature = torch.cat([bond, (one - other).norm(dim=1, keepdim=True)], dim=1)
            # The element and Z of the 11 features, the rest 0: values do not change the time.
            one_hot = flat.number[:, None] == torch.tensor([1, 6, 7, 8, 9])
            features = torch.cat([one_hot.float(), flat.number[:, None].float()], dim=1)
            flat.feature = nn.functional.pad(features, (0, 5))
            return flat

        def predict(self, batch):
            return self.model(batch.feature, batch.edges, batch.edge_feature, batch.batch)

    return NmpPeer()


def compare(name: str) -> dict:
    """Ours and theirs in turn, round after round; medians."""
    rounds = [
        {side: measure(f"{name}/{side}") for side in ("ours", "theirs")} for _ in range(ROUNDS)
    ]
    found = {"against": RATIOS[name][3], "batch_size": rounds[0]["ours"]["batch_size"]}
    for side in SIDES:
        found[side] = {
            kind: statistics.median(turn[side][kind] for turn in rounds)
            for kind in ("train", "forward")
        } | {"parameters": rounds[0][side]["parameters"]}
    for kind in ("train", "forward"):
        found[f"ratio_{kind}"] = found["ours"][kind] / found["theirs"][kind]
    return found


# --- results -------------------------------------------------------------------------------------


def read_results() -> dict:
    empty = {"rows": {}, "ratios": {}}
    return empty | (json.loads(RESULTS.read_text()) if RESULTS.exists() else {})


def keep_result(kind: str, name: str, found: dict) -> None:
    """Adds to table.json, whole or not at all."""
    results = read_results()
    results[kind][name] = found
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = RESULTS.with_suffix(".new")
    new.write_text(json_text(results, indent=1) + "\n")
    new.replace(RESULTS)


def _try(job: Callable[..., dict], *arguments) -> dict:
    """What the job finds, or why it finds nothing: the other rows are worth having."""
    try:
        return job(*arguments)
    except RuntimeError as error:
        return {"blank": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=[row.name for row in ROWS])
    parser.add_argument("--minutes", type=float, default=0.05 if SMOKE else 15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", action="store_true", help="against PyTorch, in place of rows")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json_text(_measure_here(options.measure)))
        return
    from table_page import write_page

    if options.ratios:
        jobs = [("ratios", name, lambda name=name: compare(name)) for name in RATIOS]
    else:
        rows = [row for row in ROWS if row.name in (options.rows or [row.name])]
        for row in [] if options.page else rows:
            print(f"{row.name}: pilot {_try(pilot_of, row)}", flush=True)
        jobs = [
            ("rows", row.name, lambda row=row: train(row, options.minutes, options.seed))
            for row in rows
        ]
    for kind, name, job in [] if options.page else jobs:
        known = read_results()[kind].get(name, {"blank": ""})
        if "blank" not in known and known.get("minutes", options.minutes) == options.minutes:
            print(f"{name}: finished before", flush=True)
            continue
        print(f"{name} ...", flush=True)
        found = _try(job)
        keep_result(kind, name, found)
        print({k: v for k, v in found.items() if k != "curve"}, flush=True)
        write_page()
    write_page()


if __name__ == "__main__":
    main()
