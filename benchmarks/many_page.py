"""Writes docs/results/many.md and its pictures from the JSON files of the study of many particles.

    python benchmarks/many_page.py

Reads benchmarks/results/many/*.json, which `many.py` wrote; the words around the tables are in
benchmarks/many_page.md. What has not been run stays blank.
"""

import numpy as np
from many import COST_SIZES, ROWS, SIZES, STUDY, TITLES
from study import ROOT

PAGE = ROOT / "docs" / "results" / "many.md"
TASKS = (*(f"glad_{n}" for n in SIZES), "gravity_100")
_TRIVIAL = {
    "mse_of_no_motion": "no motion: x",
    "mse_of_free_flight": "free flight: x + v T",
    "mse_of_linear": "best linear in x and v, least squares",
}


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*cells) -> list[str]:
    return [_line(*cells), _line(*["---"] * len(cells))]


def _seeds(group: str, task: str) -> list[dict]:
    """What has been run of a row, seed after seed."""
    rows = [
        r.name for r in ROWS if r.group == group and r.name.rpartition("-")[0] == f"{task}-{group}"
    ]
    return [found for name in rows if (found := STUDY.read(name))]


def _mean_mse(found: list[dict]) -> str:
    if not found:
        return ""
    errors = [x["test"]["mse"] for x in found]
    spread = f" ± {np.std(errors, ddof=1):.5f}" if len(errors) > 1 else ""
    return f"{np.mean(errors):.5f}{spread}"


def _table_errors() -> list[str]:
    """Test MSE: a line for each predictor, a column for each task."""
    lines = _head("predictor", *TASKS)
    any_of = {
        task: next((f for group in TITLES for f in _seeds(group, task)), None) for task in TASKS
    }
    for key, title in _TRIVIAL.items():
        cells = [f"{found['test'][key]:.4g}" if (found := any_of[task]) else "" for task in TASKS]
        lines.append(_line(title, *cells))
    for group, title in reversed(TITLES.items()):
        lines.append(_line(title, *(_mean_mse(_seeds(group, task)) for task in TASKS)))
    if exact := STUDY.read("exact"):
        title = f"gravity's own law in {exact['steps']} steps, as many as the model's"
        cells = [f"{exact['mse']:.5f}" if task == "gravity_100" else "" for task in TASKS]
        lines.append(_line(title, *cells))
    floors = [STUDY.read(f"floor-{task}") for task in TASKS]
    cells = [f"{floor['any']['test']['mse']:.4f}" if floor else "" for floor in floors]
    lines.append(_line("floor of equivariant models", *cells))
    return lines


def _table_runs() -> list[str]:
    """Every run."""
    lines = _head(
        "run", "parameters", "steps", "batch", "test MSE", "95 % interval", "median",
        "validation MSE", "systems a second, training", "minutes",
    )  # fmt: skip
    for row in ROWS:
        found = STUDY.read(row.name)
        cells = [""] * 9
        if found:
            low, high = found["test"]["interval_95"]
            cells = [
                f"{found['parameters']:,}",
                f"{found['steps']:,}",
                found["batch_size"],
                f"{found['test']['mse']:.5f}",
                f"{low:.5f} to {high:.5f}",
                f"{found['test']['median']:.1e}",
                f"{found['validation_mse']:.5f}",
                f"{found['systems_per_second']:,.0f}",
                f"{found['steps'] * found['batch_size'] / found['systems_per_second'] / 60:.0f}",
            ]
        lines.append(_line(f"`{row.name}`", *cells))
    return lines


def _table_cost() -> list[str]:
    found = STUDY.read("cost")
    lines = _head("edges", *(f"{n} particles" for n in COST_SIZES), "exponent")
    for name, row in found["rows"].items() if found else ():
        cells = [f"{1 / seconds:,.0f}" for seconds in row["seconds_a_system"]]
        lines.append(_line(name, *cells, f"{row['exponent']:.2f}"))
    return lines


def _before() -> list[str]:
    """What training was before cost became linear."""
    if not (found := STUDY.read("before")):
        return []
    rates = found["systems_per_second"]
    return [
        f"Training a hundred charges on {found['machine']}, one run after the other: "
        f"**{rates['after']:,.0f} systems a second**, {rates['before']:,.1f} at commit "
        f"{found['before_commit']}, where cost grew with the third power: {found['ratio']:,.0f} "
        "times. Ten systems a batch; all pairs then, 8 neighbours and the field now. The old code "
        "cannot take its config's batch of 100 on this machine: it needs more than 24 GB."
    ]


def _rollout() -> list[str]:
    """Ten predictions, each from the last: errors, energy, momentum, a picture."""
    if not (found := STUDY.read("rollout")):
        return []
    drift, horizon = found["energy_drift"], found["time_of_a_prediction"]
    lines = _head(
        "predictions", "time", "MSE of positions", "energy off, predicted", "energy off, simulated",
        "mean velocity off",
    )  # fmt: skip
    columns = (
        found["mse"],
        drift["predicted"],
        drift["simulated"],
        found["largest_change_of_mean_velocity"],
    )
    for k, cells in enumerate(zip(*columns, strict=True)):
        lines.append(_line(k, f"{k * horizon:.1f}", *(f"{x:.2g}" for x in cells)))
    return [
        *lines,
        "",
        f"Of {found['systems']} systems of the test part. Energies: median over systems of the "
        f"absolute change since the start, whose median absolute value is "
        f"{found['median_energy']:.3g}. Mean velocity: the largest change of any component in any "
        "system.",
        "",
        "![a hundred charges, true and predicted](many_bodies.png)",
    ]


def _plots() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for group, title in TITLES.items():
        dashes = "o--" if group.startswith("short") else "o-"
        points = [
            (n, np.mean([x["test"]["mse"] for x in found]))
            for n in SIZES
            if (found := _seeds(group, f"glad_{n}"))
        ]
        if points:
            left.plot(*zip(*points, strict=True), dashes, label=title)
    floor = [(n, x["any"]["test"]["mse"]) for n in SIZES if (x := STUDY.read(f"floor-glad_{n}"))]
    if floor:
        left.plot(*zip(*floor, strict=True), "k:", label="floor of equivariant models")
    left.set(xscale="log", yscale="log", xlabel="particles", ylabel="test MSE", title="GLAD")
    left.set_xticks(SIZES, SIZES)
    left.legend(fontsize=8)
    if found := STUDY.read("cost"):
        for name, row in found["rows"].items():
            label = f"{name}: exponent {row['exponent']:.2f}"
            right.plot(COST_SIZES, 1e3 * np.array(row["seconds_a_system"]), "o-", label=label)
    right.set(xscale="log", yscale="log", xlabel="particles", ylabel="ms a system",
              title="forward and backward of a batch")  # fmt: skip
    right.set_xticks(COST_SIZES, COST_SIZES)
    right.legend(fontsize=8)
    figure.savefig(PAGE.with_suffix(".png"), dpi=120)


def page_text() -> str:
    """docs/results/many.md, from the JSON files alone."""
    text = (ROOT / "benchmarks" / "many_page.md").read_text()
    commands = [x["command"] for row in ROWS if (x := STUDY.read(row.name))]
    others = (*(f"floor-{task}" for task in TASKS), "exact", "cost", "before", "rollout")
    commands += [x["command"] for name in others if (x := STUDY.read(name))]
    for key, lines in {
        "errors": _table_errors(),
        "runs": _table_runs(),
        "cost": _table_cost(),
        "before": _before(),
        "rollout": _rollout(),
        "commands": ["```", *commands, "```"],
    }.items():
        text = text.replace("{{" + key + "}}", "\n".join(lines))
    return text


if __name__ == "__main__":
    PAGE.write_text(page_text())
    _plots()
