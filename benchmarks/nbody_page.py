"""Writes docs/results/nbody.md and its pictures from the JSON files of the N-body study.

    python benchmarks/nbody_page.py

Reads benchmarks/results/nbody/*.json, which `nbody.py` wrote; the words around the tables are in
benchmarks/nbody_page.md. What has not been run stays blank.
"""

import shutil

import numpy as np
from nbody import GROWTH, POST_ROWS, ROWS, STUDY
from study import ROOT

PAGE = ROOT / "docs" / "results" / "nbody.md"

# Printed in the named papers; see docs/results/nbody.md for what differs.
_PUBLISHED = (
    ("Multivector Neurons (2024)", 0.0035),
    ("SEGNN (2021), PONITA (2023)", 0.0043),
    ("EGNN (2021), 300,000 updates", 0.0071),
    ("Radial Field (2021)", 0.0104),
    ("GNN (2021)", 0.0107),
    ("TFN (2021)", 0.0155),
    ("SE(3)-Transformer (2021)", 0.0244),
    ("Linear (2021)", 0.0819),
)


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _mse(found: dict | None, key: str = "mse") -> str:
    return f"{found['test'][key]:.5f}" if found else ""


def _interval(found: dict | None) -> str:
    return "{:.5f} to {:.5f}".format(*found["test"]["interval_95"]) if found else ""


def _table_official() -> list[str]:
    lines = [
        _line("model", "parameters", "steps", "seed", "test MSE", "95 % interval", "median",
              "validation MSE", "minutes"),
        _line(*["---"] * 9),
    ]  # fmt: skip
    for row in ROWS:
        if row.group != "official":
            continue
        found = STUDY.read(row.name)
        cells = [row.title]
        if found:
            cells += [
                f"{found['parameters']:,}",
                f"{found['steps']:,}",
                found["seed"],
                _mse(found),
                _interval(found),
                f"{found['test']['median']:.1e}",
                f"{found['validation_mse']:.5f}",
                f"{found['train_seconds'] / 60:.0f}",
            ]
        lines.append(_line(*cells, *[""] * (9 - len(cells))))
    return lines


def _trivial(found: dict | None) -> list[str]:
    names = {
        "mse_of_no_motion": "no motion: x",
        "mse_of_free_flight": "free flight: x + v T",
        "mse_of_linear": "best linear in x and v, least squares",
    }
    lines = [_line("predictor", "test MSE"), _line("---", "---")]
    return lines + [_line(title, _mse(found, key)) for key, title in names.items()]


def _headline() -> str:
    found = [STUDY.read(f"official-e3-{seed}") for seed in range(3)]
    errors = [x["test"]["mse"] for x in found if x]
    if len(errors) < 3:
        return f"Only {len(errors)} of 3 seeds have been run."
    floor = STUDY.read("floor")
    text = (
        f"**{np.mean(errors):.5f}** is the mean test MSE of the edge-space transformer over three "
        f"seeds (standard deviation {np.std(errors, ddof=1):.5f}), weights chosen by validation; "
        "the best published that we know is 0.0035."
    )
    if floor:
        text += (
            " A model whose prediction turns with its input can reach about "
            f"{floor['any']['test']['mse']:.4f} on this test set at best: see *The floor*."
        )
    return text


def _table_post() -> list[str]:
    lines = [
        _line("model", "parameters", "test MSE, 240 updates of 500",
              "test MSE, 3,000 updates of 100", "95 % interval", "minutes"),
        _line(*["---"] * 6),
    ]  # fmt: skip
    for model, title in POST_ROWS.items():
        short, long = STUDY.read(f"seed240-{model}"), STUDY.read(f"seed3000-{model}")
        any_ = long or short
        lines.append(
            _line(
                title,
                f"{any_['parameters']:,}" if any_ else "",
                _mse(short),
                _mse(long),
                _interval(long),
                f"{long['train_seconds'] / 60:.1f}" if long else "",
            )
        )
    return lines


def _verdict() -> str:
    """What the double encoder adds, in numbers and with their intervals."""
    rows = {
        model: STUDY.read(f"seed3000-{model}")
        for model in ("velocity", "edge_cross", "node_only", "egnn", "e3")
    }
    if not all(rows.values()):
        return "Not all of its rows have been run."
    say = {model: f"{_mse(found)} ({_interval(found)})" for model, found in rows.items()}
    mse = {model: found["test"]["mse"] for model, found in rows.items()}
    return (
        f"At 3,000 updates the double encoder has a test MSE of {say['velocity']}, the same model "
        f"whose edges are only embedded {say['edge_cross']}, and without edges "
        f"{say['node_only']}. Edges change the error by a factor of "
        f"{mse['edge_cross'] / mse['node_only']:.2f}, an encoder of their own between embedding "
        f"and cross-attention by another {mse['velocity'] / mse['edge_cross']:.2f} (one seed "
        "each). Their read-out x + v phi cannot point anywhere but along the velocity; EGNN, "
        f"which can, reaches {say['egnn']}. The edge-space transformer, another "
        "model with a node and an edge encoder, whose edges' outputs weight relative vectors, "
        f"reaches {say['e3']}."
    )


def _table_growth() -> list[str]:
    lines = [
        _line("particles", "model", "test MSE", "free flight", "systems a second, training"),
        _line(*["---"] * 5),
    ]
    for n in GROWTH:
        for model in ("e3", "egnn"):
            found = STUDY.read(f"growth-{model}-{n}")
            title = next(r.title for r in ROWS if r.name == f"growth-{model}-{n}")
            rate = f"{found['systems_per_second']:.0f}" if found else ""
            lines.append(_line(n, title, _mse(found), _mse(found, "mse_of_free_flight"), rate))
    return lines


def _plots() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for row in ROWS:
        found = STUDY.read(row.name)
        if found and row.group == "official":
            left.plot(*zip(*found["validation_curve"], strict=True), ".-", label=row.name[9:])
    lines = {"best published": 0.0035, "EGNN published": 0.0071}
    floor = STUDY.read("floor")
    if floor:
        lines["floor of equivariant models"] = floor["any"]["validation"]["mse"]
    for text, value in lines.items():
        left.axhline(value, color="grey", linestyle=":")
        left.annotate(text, (0.01, value), xycoords=("axes fraction", "data"), va="bottom")
    left.set(xscale="log", yscale="log", xlabel="step", ylabel="validation MSE",
             title="egnn protocol")  # fmt: skip
    left.legend(fontsize=7)
    for model in ("e3", "egnn"):
        points = [
            (n, found["test"]["mse"] / found["test"]["mse_of_free_flight"])
            for n in GROWTH
            if (found := STUDY.read(f"growth-{model}-{n}"))
        ]
        if points:
            right.plot(*zip(*points, strict=True), "o-", label=model)
    right.set(xscale="log", ylim=(0, None), xlabel="particles", ylabel="test MSE / free flight",
              title="general protocol, 300 steps of training")  # fmt: skip
    right.legend()
    right.set_xticks(GROWTH, GROWTH)
    left.set_xticks((500, 1_000, 2_000, 4_000, 8_000), ("500", "1,000", "2,000", "4,000", "8,000"))
    for axis in (left.xaxis, right.xaxis):
        axis.set_minor_locator(ticker.NullLocator())
    figure.savefig(PAGE.with_name("nbody.png"), dpi=120)


def page_text() -> str:
    """docs/results/nbody.md, from the JSON files alone."""
    floor = STUDY.read("floor")
    floors = [
        _line("part", "any rotation: MSE", "95 % interval", "systems above 0.01",
              "axes exchanged: MSE", "systems above 0.01"),
        _line(*["---"] * 6),
    ]  # fmt: skip
    for part in ("train", "validation", "test"):
        cells = [""] * 5
        if floor:
            any_, axes = floor["any"][part], floor["axes"][part]
            low, high = any_["interval_95"]
            cells = [f"{any_['mse']:.5f}", f"{low:.5f} to {high:.5f}", any_["above_0.01"],
                     f"{axes['mse']:.5f}", axes["above_0.01"]]  # fmt: skip
        floors.append(_line(part, *cells))
    text = (ROOT / "benchmarks" / "nbody_page.md").read_text()
    for key, lines in {
        "headline": [_headline()],
        "official": _table_official(),
        "trivial_official": _trivial(STUDY.read("official-e3-0")),
        "published": [
            _line("published", "test MSE"),
            _line("---", "---"),
            *(_line(name, value) for name, value in _PUBLISHED),
        ],
        "floor": floors,
        "seed": _table_post(),
        "trivial_blog": _trivial(STUDY.read("seed3000-velocity")),
        "verdict": [_verdict()],
        "growth": _table_growth(),
        "commands": ["```"]
        + [x["command"] for row in ROWS if (x := STUDY.read(row.name))]
        + ["```"],
    }.items():
        text = text.replace("{{" + key + "}}", "\n".join(lines))
    return text


if __name__ == "__main__":
    PAGE.write_text(page_text())
    _plots()
    trajectories = STUDY.runs / "official-e3-0" / "trajectories.png"
    if trajectories.exists():
        shutil.copy(trajectories, PAGE.with_name("nbody_trajectories.png"))
