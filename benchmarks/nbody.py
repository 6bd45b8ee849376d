"""The N-body study: trains every row of docs/results/nbody.md.

    python benchmarks/nbody.py --rows=official [--cores=0]   train (or go on with) a group of rows
    python benchmarks/nbody.py --floor                       the least error of an equivariant model

Groups: official, post (the DEMETAr post's budget), growth; or rows by name, comma-separated. Every
row is one run of `python -m demetar.main`, so it resumes where it stopped; runs live in runs/study.
Numbers go to benchmarks/results/nbody/*.json; `nbody_page.py` writes the page from them alone.
"""

from study import ROOT, Row, Study, measure_floor


def _steps(number: int, batch_size: int = 100) -> tuple[str, ...]:
    return (
        f"--config.train.num_steps={number}",
        f"--config.train.eval_every={max(1, number // 10)}",
        f"--config.data.batch_size={batch_size}",
    )


# The DEMETAr post's budget is 40 epochs of 6 batches of 500.
_POST_BUDGET = (*_steps(240, 500), "--config.optim.warmup_steps=20")
_LARGER_BUDGET = _steps(3_000)
POST_ROWS = {
    "not_equivariant": "standard transformer (not equivariant)",
    "translation": "translation equivariant",
    "com": "roto-translation, centre of mass",
    "velocity": "roto-translation, velocity = double encoder",
    "node_only": "node only, 4 blocks",
    "edge_cross": "edge cross-attention",
    "egnn": "EGNN (ours)",
    "e3": "edge-space E(3) transformer",
    "linear": "linear: x + c v",
    "deep_set": "DeepSet",
    "set_transformer": "Set Transformer",
}
GROWTH = (5, 10, 20, 50, 100)


def _growth_row(model: str, title: str, n: int) -> Row:
    batch = max(2, 200 // n)
    num_train = 600 if n < 100 else 150  # simulating 100 particles takes a second a system
    return Row(
        "growth",
        f"growth-{model}-{n}",
        title,
        f"general,{model}",
        (
            f"--config.data.general.num_particles={n}",
            *_steps(300, batch),
            "--config.train.eval_every=300",
            f"--config.data.eval_batch_size={batch}",
            f"--config.data.general.num_train={num_train}",
            f"--config.data.general.num_validation={num_train // 10}",
            f"--config.data.general.num_test={num_train // 10}",
            "--config.optim.warmup_steps=30",
        ),
    )


ROWS = [
    *(
        Row("official", f"official-e3-{s}", POST_ROWS["e3"], "", (f"--config.seed={s}",))
        for s in range(3)
    ),
    Row(
        "official",
        "official-egnn-0",
        "EGNN (ours)",
        "egnn",
        (*_steps(8_000), "--config.optim.learning_rate=2e-3", "--config.train.eval_every=400"),
    ),
    *(
        Row("official", f"official-{model}-0", POST_ROWS[model], model, _LARGER_BUDGET)
        for model in ("velocity", "linear", "deep_set", "set_transformer")
    ),
    *(
        Row("post", f"{budget}-{model}", title, f"blog,{model}", options)
        for budget, options in (("seed240", _POST_BUDGET), ("seed3000", _LARGER_BUDGET))
        for model, title in POST_ROWS.items()
    ),
    *(
        _growth_row(model, title, n)
        for model, title in (("e3", "edge-space E(3) transformer"), ("egnn", "EGNN (ours)"))
        for n in GROWTH
    ),
]


STUDY = Study(ROWS, ROOT / "runs" / "study", ROOT / "benchmarks" / "results" / "nbody")


def main() -> None:
    parser = STUDY.parser(__doc__)
    parser.add_argument("--floor", action="store_true", help="measure the floor")
    options = parser.parse_args()
    STUDY.train_rows(options.rows, options.cores)
    if options.floor:
        command = {"command": "python benchmarks/nbody.py --floor"}
        STUDY.keep("floor", command | measure_floor("egnn"))


if __name__ == "__main__":
    main()
