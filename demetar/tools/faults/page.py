"""The matrix of faults as `benchmarks/results/faults.json` and `docs/results/faults.md`."""

import collections
import pathlib

from data_pipelines.errors import UserError
from demetar.records.files import read_json, write_json
from demetar.tools.faults.bench import LOST, NOT_MADE, REFUSED, SURVIVED
from demetar.training.provenance import git_commit, packages, processor

_ROOT = pathlib.Path(__file__).parents[3]
_JSON = _ROOT / "benchmarks" / "results" / "faults.json"
_PAGE = _ROOT / "docs" / "results" / "faults.md"
_WORDS = _ROOT / "benchmarks" / "faults_page.md"  # around the tables
_LONGEST = 200  # characters of a cell
_GROUPS = {
    "Processes and signals": range(1, 21),
    "Storage": range(21, 43),
    "Topology and resume": range(43, 58),
    "Data": range(58, 68),
    "Numerics, memory, config, security": range(68, 73),
}
_MEANING = {
    SURVIVED: "the run goes on, and ends with the same graphs, state and metrics",
    REFUSED: "one sentence and a typed exit code; nothing is lost",
    NOT_MADE: "needs a machine that we do not have",
    LOST: "something else",
}


def facts(rows: list[dict], arguments: list[str]) -> dict:
    """The rows with what they depend on, as JSON."""
    return {
        "commands": [" ".join(["python -m demetar.faults", *arguments])],
        "commit": git_commit(),
        "packages": packages(),
        "processor": processor(),
        "counts": _counts(rows),
        "rows": rows,
    }


def _counts(rows: list[dict]) -> dict[str, int]:
    counts = collections.Counter(row["verdict"] for row in rows)
    return {verdict: counts[verdict] for verdict in _MEANING}


def joined(earlier: dict, found: dict) -> dict:
    """`found`, with the other rows of `earlier` if one commit on one machine made both."""
    if any(earlier[key] != found[key] for key in ("commit", "packages", "processor")):
        return found
    rows = {row["number"]: row for row in (*earlier["rows"], *found["rows"])}
    rows = [rows[number] for number in sorted(rows)]
    commands = list(dict.fromkeys([*earlier["commands"], *found["commands"]]))
    return found | {"commands": commands, "counts": _counts(rows), "rows": rows}


def write(found: dict) -> None:
    """Writes both files into the checkout; rows of other faults, of the same commit, stay."""
    if not (_ROOT / "docs" / "results").is_dir():
        raise UserError(f"--page writes into a checkout, and {_ROOT} is none: leave it out.")
    if _JSON.exists():
        found = joined(read_json(_JSON), found)
    write_json(_JSON, found)
    _PAGE.write_text(text(found))


def text(found: dict) -> str:
    """The page."""
    counts = "\n".join(
        f"| {verdict} | {found['counts'][verdict]} | {_MEANING[verdict]} |" for verdict in _MEANING
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    head = _WORDS.read_text().format(
        total=len(found["rows"]),
        counts=counts,
        commands=", ".join(f"`{command}`" for command in found["commands"]),
        commit=found["commit"],
        processor=found["processor"],
        versions=versions,
        minutes=sum(row["seconds"] for row in found["rows"]) / 60,
    )
    sections = [_section(title, numbers, found) for title, numbers in _GROUPS.items()]
    return "\n".join([head, *sections])


def _section(title: str, numbers: range, found: dict) -> str:
    lines = [f"## {title}", "", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    for row in found["rows"]:
        if row["number"] in numbers:
            lines.append(_row(_cells(row)))
    return "\n".join([*lines, ""])


def _cells(row: dict) -> list[str]:
    return [
        f"{row['number']}",
        row["fault"],
        row["how"],
        row["wanted"],
        _short("; ".join(dict.fromkeys([*row["failed"], *row["seen"]]))),
        ", ".join(map(str, row["exit_codes"])),
        f"{row['seconds']:.0f}",
        ", ".join(row["oracles"]),
        f"**{row['verdict']}**",
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _short(cell: str) -> str:
    cell = " ".join(cell.split())
    cell = cell if len(cell) <= _LONGEST else f"{cell[:_LONGEST]}…"
    for mark, text in {"<": "&lt;", "*": "\\*", "_": "\\_"}.items():
        cell = cell.replace(mark, text)
    # What a message quotes may be no key of a config, and no address of a page.
    return cell.replace("config.", "config&#46;")


_COLUMNS = ["", "fault", "how it was made", "wanted", "seen", "code", "s", "oracles", "verdict"]
