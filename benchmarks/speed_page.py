"""Writes docs/results/speed.md and its pictures from the JSON files of the speed benchmarks.

    python benchmarks/speed_page.py

Reads benchmarks/results/{peers,growth,changes}.json, throughput-*.json and race/*.json; the
words around the tables are in benchmarks/speed_page.md. What was not measured stays blank.
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "speed.md"
# Order of the race's rows, and how they are called.
RACERS = {
    "demetar": "DEMETAr, `configs/qm9.py:quick`",
    "egnn-demetar": "EGNN, ours",
    "schnet-pyg": "SchNet, PyTorch Geometric",
    "egnn-pytorch": "EGNN, PyTorch",
    "et-torchmdnet": "Equivariant transformer, torchmd-net",
}


def read(name: str):
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def throughput() -> str:
    files = sorted(RESULTS.glob("throughput-*.json"))
    return "\n\n".join(throughput_of(json.loads(file.read_text())) for file in files)


def throughput_of(found: dict) -> str:
    rows = [
        [
            f"`{name}`", f"{x['parameters']:,}", x["batch"], f"{x['train_per_second']:.0f}",
            f"{x['spread']:.0%}", f"{x['forward_per_second']:.0f}", f"{x['gflops']:.0f}",
            f"**{x['share_of_peak']:.1%}**", f"{x['data_wait']:.2%}",
            percent(x.get("fill_of_node_slots")), len(x["buckets"]),
        ]
        for name, x in found["configs"].items()
    ]  # fmt: skip
    header = (
        "config", "parameters", "batch", "train, molecules/s", "spread", "forward, molecules/s",
        "GFLOP/s", "of the peak", "data wait", "fill of node slots", "buckets",
    )  # fmt: skip
    return (
        f"On {found['measured_on']}: peak of matrix products {found['peak_gflops']:.0f} GFLOP/s "
        f"(float32, through jax), memory {found['memory_gb_per_s']:.1f} GB/s. First step of "
        f"`:quick` {found['first_step_seconds_warm']:.1f} s after the start, caches warm.\n\n"
        + table(header, rows)
    )


def peers() -> str:
    found = read("peers")
    parts = []
    for size, batch in found["batches"].items():
        rows = []
        for name, x in batch["entries"].items():
            if "blank" in x:
                rows.append([f"`{name}`", "", "", "", "", x["blank"]])
                continue
            cells = [
                f"{x[kind]['median']:.0f} ({x[kind]['spread']:.0%})"
                for kind in ("train", "forward")
            ]
            times = x["train"]["median"] / batch["entries"]["egnn-pytorch"]["train"]["median"]
            rows.append([f"`{name}`", f"{x['parameters']:,}", *cells, f"{times:.1f}", ""])
        header = (
            "entry", "parameters", "train, molecules/s (spread)", "forward (spread)",
            "train, PyTorch's EGNN = 1", "blank because",
        )  # fmt: skip
        ratios = [
            [name, f"**{x['train']:.1f}**", f"**{x['forward']:.1f}**"]
            for name, x in batch["ratios"].items()
        ]
        parts += [
            f"Batch {size}:",
            table(header, rows),
            table(("ours over theirs", "train", "forward"), ratios),
        ]
    parts.append(
        "Predictions of the PyTorch EGNN differ from those of its authors' code by "
        f"{found['egnn_pytorch_to_official_relative']:.0e}, relative, in float64."
    )
    return "\n\n".join(parts)


def race() -> str:
    rows = []
    for name, title in RACERS.items():
        x = read(f"race/{name}")
        if x is None:
            rows.append([title, "", "", "", "", ""])
            continue
        rows.append(
            [
                title, f"{x['parameters']:,}", f"{x['steps']:,}",
                f"{x['molecules_per_second']:.0f}", f"{x['seconds'] / 60:.1f}",
                f"**{x['validation_mae_mev']:.1f}**",
            ]
        )  # fmt: skip
    header = (
        "model", "parameters", "steps of 64", "molecules/s", "minutes", "validation MAE, meV",
    )  # fmt: skip
    return table(header, rows)


def changes() -> str:
    rows = [
        [name, x["expected"], f"{x['before']:.1f}", f"{x['after']:.1f}", f"{x['ratio'] - 1:+.0%}"]
        for name, x in read("changes")["changes"].items()
    ]
    header = ("change", "expected", "before, ms/step", "after, ms/step", "time")
    return table(header, rows)


def growth() -> str:
    found = read("growth")
    atoms = next(iter(found["by_atoms"].values()))["atoms"]
    rows = [
        [name, *(f"{1e3 * t:.2f}" for t in x["seconds_a_graph"]), f"**{x['exponent']:.2f}**"]
        for name, x in found["by_atoms"].items()
    ]
    by_atoms = table(("ms a graph, at atoms:", *atoms, "exponent"), rows)
    rows = []
    for kind, x in found["sweeps"].items():
        pairs = zip(x["values"], x["seconds_a_batch"], strict=True)
        cells = ", ".join(f"{value}: {1e3 * t:.1f}" for value, t in pairs)
        rows.append([kind, cells, f"{x['exponent']:.2f}"])
    return by_atoms + "\n\n" + table(("of the quick model", "value: ms a batch", "exponent"), rows)


def plot_race() -> None:
    figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for name, title in RACERS.items():
        x = read(f"race/{name}")
        if x is not None:
            points = [(p["seconds"] / 60, p["mae"]) for p in x["curve"]]
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=title.replace("`", ""))
    axis.set_yscale("log")
    ticks = (50, 60, 80, 100, 150, 200, 300, 400)
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_xlabel("minutes of training, 2 cores")
    axis.set_ylabel("validation MAE of HOMO [meV]")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(PAGE.with_name("speed_race.png"), dpi=130)


def plot_growth() -> None:
    found = read("growth")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    for name, x in found["by_atoms"].items():
        label = f"{name} (exponent {x['exponent']:.2f})"
        left.plot(x["atoms"], [1e3 * t for t in x["seconds_a_graph"]], "o-", label=label)
    left.set_xlabel("atoms of a graph")
    left.set_ylabel("forward and backward [ms a graph]")
    for kind, x in found["sweeps"].items():
        first = x["values"][0], x["seconds_a_batch"][0]
        scaled = [v / first[0] for v in x["values"]], [t / first[1] for t in x["seconds_a_batch"]]
        right.plot(*scaled, "o-", label=f"{kind} from {first[0]} (exponent {x['exponent']:.2f})")
    right.set_xlabel("times the first value")
    right.set_ylabel("times its seconds")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(PAGE.with_name("speed_growth.png"), dpi=130)


def main() -> None:
    text = (ROOT / "benchmarks" / "speed_page.md").read_text()
    for part in (throughput, peers, race, changes, growth):
        text = text.replace("{{" + part.__name__ + "}}", part())
    PAGE.write_text(text)
    plot_race()
    plot_growth()


if __name__ == "__main__":
    main()
