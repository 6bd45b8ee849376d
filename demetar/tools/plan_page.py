"""A plan as a table, for the terminal and as a page."""

import base64
import html
import io
import pathlib

from demetar.records.log import size_text
from demetar.speed.timeline import ASSUMPTIONS
from demetar.speed.topology import COLLECTIVES
from demetar.tools.planner import Plan

# What bounds a kernel -> what would make it shorter.
_REMEDIES = {
    "launches": "more graphs on a chip, or fewer kernels",
    "matrix products": "config.model.dtype=bfloat16",
    "functions": "fewer exponentials, cosines, powers",
    "memory": "config.model.dtype=bfloat16, or fewer and larger kernels",
}


def rows_of(plan: Plan) -> list[tuple[str, str]]:
    """Rows of the table: name, text."""
    return [*_rows_known(plan), *_rows_predicted(plan)]


def _rows_known(plan: Plan) -> list[tuple[str, str]]:
    """What was compiled or counted."""
    experiment, chip, config = plan.experiment, plan.chip, plan.experiment.config
    graphs = config.data.batch_size
    flops = plan.mean_over_buckets([c.total for c in plan.counted])
    peak = chip.peak_flops.get(config.model.dtype, float("nan"))
    mesh = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    parts = ", ".join(f"{k} {size_text(v)}" for k, v in plan.memory.items() if k != "all")
    rows = [
        ("config", f"{plan.num_parameters:,} parameters, {config.model.dtype}, batch {graphs}"),
        ("topology", f"{plan.topology}: {plan.chips} chips, mesh {mesh}"),
        (
            "chip",
            f"{size_text(chip.memory_bytes)}, {peak / 1e12:.0f} TFLOP/s, "
            f"{chip.memory_bytes_per_s / 1e9:.0f} GB/s memory. {chip.source}",
        ),
        (
            "memory of a chip",
            f"{size_text(plan.memory['all'])} of {size_text(chip.memory_bytes)} "
            f"({plan.memory['all'] / chip.memory_bytes:.1%}): {parts} "
            f"(compiler, largest bucket: {experiment.dataset.buckets[-1].num_nodes} nodes)",
        ),
        (
            "operations of a step",
            f"{flops:.3e} (counted from the traced step, mean over buckets; "
            f"{flops / graphs:.3e} for each of the {experiment.dataset.items})",
        ),
        (
            "kernels of a step",
            f"{plan.launches} launches; matrix products {plan.sum_of_kernels('product'):.3e} "
            f"operations, {plan.sum_of_kernels('bytes') / 1e6:.1f} MB read and written (of a chip, "
            "largest bucket, read from the compiled program)",
        ),
    ]
    for name in COLLECTIVES:
        same = [c for c in plan.collectives.values() if c.name == name]
        if same:
            groups = ", ".join(sorted({str(c.group) for c in same}))
            total = sum(c.payload for c in same)
            rows.append((name, f"{len(same)} a step, {total / 1e6:.2f} MB, groups of {groups}"))
    return rows


def _rows_predicted(plan: Plan) -> list[tuple[str, str]]:
    """What follows from it, as a range."""
    config, items = plan.experiment.config, plan.experiment.dataset.items
    seconds = {name: plan.step_seconds(name) for name in ASSUMPTIONS}
    low, likely, high = seconds["best"], seconds["likely"], seconds["worst"]
    largest = plan.timeline()
    hours = lambda seconds: config.train.num_steps * seconds / 3600
    hidden = 1 - largest.waiting / largest.communicating if largest.communicating else 0.0
    limits = ", ".join(
        f"{name} {share / largest.total:.0%}" for name, share in sorted(largest.by_limit.items())
    )
    rows = [
        (
            "PREDICTED step",
            f"{likely * 1e3:.3f} ms, between {low * 1e3:.3f} and {high * 1e3:.3f}. Kernel by "
            "kernel: the longest of launch, products, functions and memory; collectives "
            "beside them. The range: which share of a data sheet's peaks is reached "
            "(demetar/speed/timeline.py)",
        ),
        (
            "PREDICTED limits",
            f"{limits}; waiting for collectives {largest.waiting / largest.total:.0%}, "
            f"{hidden:.0%} of whose time is hidden (largest bucket)",
        ),
    ]
    for part, (spent, limit) in sorted(largest.by_part.items(), key=lambda x: -x[1][0])[:3]:
        rows.append(
            (
                "PREDICTED cost",
                f"{part}: {spent / largest.total:.0%}, bound by {limit}; {_REMEDIES[limit]}",
            )
        )
    rows.append(
        (
            "PREDICTED rate",
            f"{config.data.batch_size / likely:,.0f} {items}/s, between "
            f"{config.data.batch_size / high:,.0f} and {config.data.batch_size / low:,.0f}",
        )
    )
    if scaling := plan.scaling():
        rows.append(
            (
                "PREDICTED weak scaling",
                ", ".join(f"{n}: {e:.1%}" for n, e in scaling)
                + ". E(n) = T(unit) / T(n), the batch of a chip kept",
            )
        )
    rows.append(
        (
            "PREDICTED training",
            f"{config.train.num_steps:,} steps: {hours(likely):.2f} hours, between "
            f"{hours(low):.2f} and {hours(high):.2f}; {hours(likely) * plan.chips:,.1f} "
            "chip-hours; without evaluation, saving and compiling",
        )
    )
    return rows


def as_text(rows: list[tuple[str, str]]) -> str:
    """For the terminal."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def numbers_of(plan: Plan) -> dict:
    """The plan as numbers, for a file; seconds, bytes and operations of one chip."""
    config, largest = plan.experiment.config, plan.timeline()
    seconds = {name: plan.step_seconds(name) for name in ASSUMPTIONS}
    return {
        "topology": plan.topology,
        "batch": config.data.batch_size,
        "type": config.model.dtype,
        "parameters": plan.num_parameters,
        "memory": plan.memory["all"],
        "launches": plan.launches,
        "products": plan.sum_of_kernels("product"),
        "bytes": plan.sum_of_kernels("bytes"),
        "collectives": len(plan.collectives),
        "predicted": {
            "step": seconds["likely"],
            "step, best": seconds["best"],
            "step, worst": seconds["worst"],
            "graphs a second": config.data.batch_size / seconds["likely"],
            "computing": largest.computing,
            "waiting for collectives": largest.waiting,
            "communicating": largest.communicating,
            **{f"bound by {name}": spent for name, spent in sorted(largest.by_limit.items())},
        },
        "predicted_scaling": dict(plan.scaling()),
        "predicted_costs": {
            part: {"seconds": spent, "bound_by": limit}
            for part, (spent, limit) in sorted(largest.by_part.items(), key=lambda x: -x[1][0])
        },
    }


def comparison(names: list[str], plans: list[dict]) -> str:
    """Two plans side by side, each number with the ratio of the second to the first."""
    flat = [
        {key: value for key, value in plan.items() if not isinstance(value, dict)}
        | {f"predicted {key}": value for key, value in plan["predicted"].items()}
        | {f"predicted efficiency, {n} chips": e for n, e in plan["predicted_scaling"].items()}
        for plan in plans
    ]
    lines = [("", *names, "ratio")]
    for key in flat[0] | flat[1]:
        values = [one.get(key, "") for one in flat]
        known = all(isinstance(value, int | float) and value for value in values)
        text = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        lines.append((key, *text, f"{values[1] / values[0]:.3f}" if known else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_html(file: pathlib.Path, plan: Plan, rows: list[tuple[str, str]]) -> None:
    """The table, and a plot of the predicted weak scaling; one file, nothing to fetch."""
    image = base64.b64encode(_picture(plan)).decode() if plan.scaling() else ""
    plot = f'<img alt="predicted weak scaling" src="data:image/png;base64,{image}" width=640>'
    table = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
    )
    file.write_text(
        "<!doctype html><meta charset=utf-8>"
        f"<title>demetar plan {html.escape(plan.topology)}</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "th{text-align:left;vertical-align:top;white-space:nowrap;padding:.3em 1em .3em 0}"
        "td{padding:.3em 0}</style>"
        f"<h1>{html.escape(plan.topology)}</h1><table>{table}</table>"
        f"{plot if image else ''}\n"
    )


def _picture(plan: Plan) -> bytes:
    """PNG of the predicted weak scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chips, efficiency = zip(*plan.scaling(), strict=True)
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.plot(chips, [100 * e for e in efficiency], "o-")
    axis.axvline(plan.chips, color="grey", linestyle=":", label=f"this plan: {plan.chips} chips")
    axis.set_xscale("log", base=2)
    axis.set_xticks(chips, [str(n) for n in chips])
    axis.set_ylim(0, 105)
    axis.set_xlabel("chips")
    axis.set_ylabel("predicted weak-scaling efficiency [%]")
    axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)
    return picture.getvalue()
