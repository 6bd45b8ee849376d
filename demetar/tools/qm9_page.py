"""The twelve targets of QM9 as `benchmarks/results/qm9.json` and `docs/results/qm9.md`."""

import pathlib

from data_pipelines.errors import UserError
from demetar.records.files import read_json, read_jsonl, write_json

_ROOT = pathlib.Path(__file__).parents[2]
_JSON = _ROOT / "benchmarks" / "results" / "qm9.json"
_PAGE = _ROOT / "docs" / "results" / "qm9.md"
_SEARCH = _ROOT / "benchmarks" / "results" / "search.jsonl"
_WORDS = _ROOT / "benchmarks" / "qm9_page.md"  # around the tables
# Targets that one network learns together. The last two have read-outs of their own.
GROUPS = {
    "orbitals": ("homo", "lumo", "gap"),
    "energies": ("alpha", "zpve", "U0", "U", "H", "G", "Cv"),
    "dipole": ("mu",),
    "extent": ("r2",),
}
# Variant of configs/qm9.py -> what the page calls it.
BUDGETS = {"quick": "ten minutes"}
_COLUMNS = "mu alpha homo lumo gap r2 zpve U0 U H G Cv".split()
_HEADS = dict(zip(_COLUMNS, "μ α HOMO LUMO gap ⟨R²⟩ ZPVE U₀ U H G c_v".split(), strict=True))
_UNITS = {"mu": "D", "alpha": "a₀³", "r2": "a₀²", "Cv": "cal/(mol K)"}  # others: meV
_DIGITS = {"mu": 3, "alpha": 3, "r2": 3, "Cv": 3, "zpve": 2}  # others: 1


def facts(workdir: pathlib.Path, budget: str, command: list[str]) -> dict:
    """What the table needs of a finished run."""
    result = read_json(workdir / "result.json")
    lines = read_jsonl(workdir / "metrics.jsonl")
    best = next(x for x in lines if x["split"] == "validation" and x["step"] == result["step"])
    return {
        "budget": budget,
        "seed": result["seed"],
        "steps": result["config"]["train"]["num_steps"],
        "batch_size": result["config"]["data"]["batch_size"],
        "minutes": round(result["train_seconds"] / 60, 1),
        "split": result["split_name"],
        "targets": {
            name: {
                "test": row["mae"],
                "interval_95": row["interval_95"],
                "validation": best[f"{name}_mae"],
                "of_training_mean": row["mae_of_training_mean"],
                "unit": row["unit"],
            }
            for name, row in result["targets"].items()
        },
        "command": " ".join(["python -m demetar.main", *command]),
        "git_commit": result["git_commit"],
        "machine": f"{result['processor']}, {result['devices']}",
        "params_sha256": result["params_sha256"],
    }


def check_checkout() -> None:
    """Refuses an installed package, which has no pages."""
    if not (_ROOT / "docs" / "results").is_dir():
        raise UserError(f"--page writes into a checkout, and {_ROOT} is none: leave it out.")


def keep(found: list[dict]) -> None:
    """Writes both files into the checkout; rows of other runs stay."""
    rows = {_key(row): row for row in (*(read_json(_JSON) if _JSON.exists() else ()), *found)}
    rows = [rows[key] for key in sorted(rows)]
    write_json(_JSON, rows)
    _PAGE.write_text(text(rows))


def _key(row: dict) -> tuple:
    return [*BUDGETS].index(row["budget"]), ",".join(row["targets"]), row["seed"]


def text(rows: list[dict]) -> str:
    """The page."""
    parts = {"table": table(rows), "runs": _runs(rows), "search": _search()}
    return _WORDS.read_text().format(**parts)


def table(rows: list[dict]) -> str:
    """Test errors, a line for each budget and seed; blank where nothing was trained."""
    heads = [f"{_HEADS[name]}, {_UNITS.get(name, 'meV')}" for name in _COLUMNS]
    lines = [f"| | seed | {' | '.join(heads)} |", "|---" * (len(_COLUMNS) + 2) + "|"]
    merged, of_mean = {}, {}
    for row in rows:
        merged.setdefault((row["budget"], row["seed"]), {}).update(row["targets"])
        of_mean |= {name: x["of_training_mean"] for name, x in row["targets"].items()}
    lines.append(_line("the mean of the training molecules", "", of_mean))
    for (budget, seed), found in merged.items():
        errors = {name: x["test"] for name, x in found.items()}
        lines.append(_line(f"`qm9:{budget}`, {BUDGETS[budget]}", str(seed), errors))
    return "\n".join(lines)


def _line(name: str, seed: str, errors: dict[str, float]) -> str:
    digits = lambda column: _DIGITS.get(column, 1)
    cells = [f"{errors[c]:.{digits(c)}f}" if c in errors else "" for c in _COLUMNS]
    return f"| {name} | {seed} | {' | '.join(cells)} |"


def _runs(rows: list[dict]) -> str:
    lines = ["| command | test, 95 % interval | validation | minutes | commit | machine |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        tests, validations = [], []
        for name, x in row["targets"].items():
            digits = _DIGITS.get(name, 1)
            low, high = (f"{end:.{digits}f}" for end in x["interval_95"])
            tests.append(f"{_HEADS[name]} {x['test']:.{digits}f} ({low} to {high})")
            validations.append(f"{x['validation']:.{digits}f}")
        cells = [f"`{row['command']}`", ", ".join(tests), ", ".join(validations)]
        cells += [f"{row['minutes']:.1f}", row["git_commit"], row["machine"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _search() -> str:
    """What `benchmarks/search.py` has found, in the order of its trials."""
    lines = ["| trial | differs from the recipe of its commit by | steps | validation HOMO, meV |"]
    lines[0] += " training HOMO, meV | molecules/s | commit |"
    lines.append("|---" * 7 + "|")
    for x in read_jsonl(_SEARCH):
        changes = ", ".join(f"`{key}={value}`" for key, value in x["changes"].items())
        rate = f"{x['molecules_per_second']:.0f} x {x['at_once']}"
        cells = [x["trial"], changes, f"{x['steps']:,}", f"{x['validation_homo_mev']:.1f}"]
        cells += [f"{x['train_homo_mev']:.1f}", rate, x["git_commit"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
