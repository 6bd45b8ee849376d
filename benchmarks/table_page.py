"""Writes docs/results/table.md and its picture from benchmarks/results/table.json.

The words around the tables are in table_page.md. `python benchmarks/table.py --page` runs it.
"""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from speed_page import table
from table import (
    EVALUATIONS,
    ITEMS,
    PAGE,
    PILOT_SECONDS,
    RATIOS,
    ROOT,
    ROWS,
    SIDES,
    TARGETS,
    UNITS,
    WARMUP,
    read_results,
)


def write_page() -> None:
    """The page and its picture, of what table.json holds."""
    results = read_results()
    done = [x for x in results["rows"].values() if "minutes" in x]
    picture = f"![validation error against minutes of training]({PAGE.stem}.png)"
    parts = {
        "minutes": f"{done[0]['minutes'] if done else 15:g}",
        "seconds": f"{PILOT_SECONDS:.0f}",
        "warmup": f"{WARMUP:.0%}",
        "evaluations": EVALUATIONS,
        "qm9": _rows("qm9", results),
        "nbody": _rows("nbody", results),
        "picture": picture if done else "",
        "ratios": _ratios(results),
        "commands": _commands(results),
    }
    text = (ROOT / "benchmarks" / "table_page.md").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", str(part))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text.replace("\n\n\n", "\n\n"))
    if done:
        _draw(results)


def _rows(name: str, results: dict) -> str:
    lines = []
    digits = 1 if name == "qm9" else 5
    for row in (row for row in ROWS if row.table == name):
        x, notes = results["rows"].get(row.name), [row.note]
        published = f"[{row.published}]({row.source})" if row.published else ""
        if x is None or "blank" in x:
            notes.append(f"Blank: {'not run yet' if x is None else x['blank']}.")
            cells = [""] * 6
        else:
            low, high = x["interval_95"]
            cells = [
                f"**{x['test']:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})",
                f"{x['validation']:.{digits}f}", f"{x['parameters']:,}",
                f"{x['steps']:,} x {x['batch_size']}", f"{x['train_per_second']:.0f}",
                f"{x['predict_per_second']:.0f}",
            ]  # fmt: skip
        ratio = results["ratios"].get(row.system, {}) if name == "qm9" else {}
        cells.append(f"{ratio['ratio_train']:.1f}" if "ratio_train" in ratio else "")
        lines.append([row.title, published, *cells, " ".join(filter(None, notes))])
    header = (
        "system", f"published, {UNITS[name]}", "ours, test (95 %)", "validation", "parameters",
        "steps x batch", f"training, {ITEMS[name]}/s", f"predicting, {ITEMS[name]}/s",
        "training, official PyTorch = 1", "notes",
    )  # fmt: skip
    if name == "nbody":  # there is none to compare with
        header = (*header[:8], header[9])
        lines = [[*line[:8], line[9]] for line in lines]
    return table(header, lines)


def _ratios(results: dict) -> str:
    lines = []
    for name, (*_, against) in RATIOS.items():
        x = results["ratios"].get(name, {"blank": "not run yet"})
        if "blank" in x:
            lines.append([against, *[""] * 8, x["blank"]])
            continue
        sides = [f"{x[side][kind]:.0f}" for kind in ("train", "forward") for side in SIDES]
        ratios = [f"**{x['ratio_train']:.1f}**", f"{x['ratio_forward']:.1f}"]
        parameters = [f"{x[side]['parameters']:,}" for side in SIDES]
        lines.append(
            [against, x["batch_size"], *parameters, *sides[:2], ratios[0], *sides[2:], ratios[1]]
        )
    header = (
        "against", "batch", "parameters, ours", "theirs", "training, molecules/s, ours", "theirs",
        "ratio", "predicting, ours", "theirs", "ratio, or blank because",
    )  # fmt: skip
    return table(header, lines)


def _commands(results: dict) -> str:
    lines = [
        f"- {row.title}, {row.table}: `{x['command']}`; commit {x['git_commit']}, {x['machine']}; "
        f"{x['minutes_with_all']:.1f} minutes with evaluating and compiling."
        for row in ROWS
        if "command" in (x := results["rows"].get(row.name, {}))
    ]
    return "\n".join(lines) or "Nothing was run yet."


def _draw(results: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for axis, name in zip(axes, TARGETS, strict=True):
        for row in (row for row in ROWS if row.table == name):
            if "curve" in (x := results["rows"].get(row.name, {})):
                points = [(x["minutes"] * step / x["steps"], value) for step, value in x["curve"]]
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=row.title)
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.set_xlabel("minutes of training")
        if axis.lines:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("validation MAE of HOMO [meV]")
    axes[1].set_ylabel("validation MSE of positions")
    figure.savefig(PAGE.with_suffix(".png"), dpi=130)
