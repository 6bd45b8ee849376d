"""README and docs say what is so: commands run or parse, examples work, names exist.

A fence of `sh` says why no test runs it: `<!-- not run: why -->` before it. Its demetar commands
are parsed nevertheless, and their configs loaded. Fences of `python` are run, page by page. The
examples of docs/extending.md are added to a copy of the packages, and its commands run there.
"""

import ast
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from demetar import cli, main
from demetar.config import command_line, defaults
from demetar.tools import local_job

PAGES = sorted(
    [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "launch" / "README.md",
        *(REPOSITORY / "docs").rglob("*.md"),
    ]
)
EXTENDING = "docs/extending.md"  # its commands are run where its examples are
SHELL = ("sh", "bash", "console", "")  # a fence without a language is read as a command too
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Fence:
    page: str
    language: str
    text: str
    reason: str | None

    def commands(self) -> list[list[str]]:
        """Each line as words; comments and empty lines left out."""
        lines = [shlex.split(line, comments=True) for line in self.text.splitlines()]
        return [words for words in lines if words]


def fences(page: pathlib.Path) -> list[Fence]:
    name = str(page.relative_to(REPOSITORY))
    return [
        Fence(name, m["language"], m["text"], m["reason"])
        for m in _FENCE.finditer(page.read_text())
    ]


ALL = [fence for page in PAGES for fence in fences(page)]


def demetar_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command of this project."""
    if words[0] == "demetar":
        return cli.COMMANDS[words[1]][0], words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("demetar."):
        return words[2].removeprefix("demetar."), words[3:]
    return None


# --- commands ------------------------------------------------------------------------------------


class Parsed(BaseException):
    """The command line was understood."""


@pytest.fixture
def parse_only(monkeypatch):
    """Commands stop once their options and config are parsed."""

    def stop_after(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    for name in ("parse", "parse_with_config"):
        monkeypatch.setattr(command_line, name, stop_after(getattr(command_line, name)))
    monkeypatch.setattr(local_job, "run", lambda rest, *args, **kwargs: main.main(rest))
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may be started
    monkeypatch.chdir(REPOSITORY)

    def parses(module: str, arguments: list[str]) -> str:
        """What is wrong with a command line; "" if nothing is."""
        try:
            code = importlib.import_module(f"demetar.{module}").main(arguments)
        except Parsed:
            return ""
        except SystemExit as error:
            code = error.code
        return f"exit code {code}"

    return parses


def test_a_command_line_that_is_wrong_is_noticed(parse_only, capsys):
    assert parse_only("main", ["--config=configs/qm9.py:quick"]) == ""
    assert parse_only("main", ["--config=configs/qm9.py:quik"]) == "exit code 2"
    assert parse_only("main", ["--config=qm9", "--config.optim.learing_rate=1"]) == "exit code 2"
    assert parse_only("evaluate", ["--workdirs=runs"]) == "exit code 2"
    assert parse_only("local", ["--cpu=2", "--config=qm9:quik"]) == "exit code 2"
    capsys.readouterr()


def test_every_command_stands_on_its_page():
    page = (REPOSITORY / "docs" / "reference" / "commands.md").read_text()
    rows = " ".join(re.findall(r"^\| (`.+?) \|", page, re.MULTILINE))
    for command in cli.COMMANDS:
        assert f"\ndemetar {command} " in page and f"`{command}`" in rows, command


def test_commands_that_are_not_run_are_understood(parse_only, capsys):
    wrong, seen = [], 0
    for fence in ALL:
        if fence.language not in SHELL or fence.page == EXTENDING:
            continue
        for words in fence.commands():
            command = demetar_command(words)
            if command is None:
                continue
            seen += 1
            if problem := parse_only(*command):
                wrong.append((fence.page, " ".join(words), problem, capsys.readouterr().err[-300:]))
    assert not wrong
    assert seen > 60  # most of them in docs/results/nbody.md


def test_a_command_that_no_test_runs_says_why():
    for fence in ALL:
        if fence.language in SHELL and fence.page != EXTENDING:
            assert fence.reason, f"{fence.page}: write <!-- not run: why --> before\n{fence.text}"
            for file in re.findall(r"\btests/\w+\.py", fence.reason):
                assert (REPOSITORY / file).exists(), (fence.page, file)


def test_the_readme_begins_with_the_two_set_ups():
    """`.ci/run` takes the second; a stranger takes the first."""
    first, second, *_ = [f for f in ALL if f.page == "README.md" and f.language in SHELL]
    main_job = ["python", "-m", "demetar.main", "--config=configs/qm9.py:quick"]
    assert first.commands()[-1] == main_job
    assert second.commands()[-1] == ["python", "-m", "pytest"]


def test_other_commands_name_what_exists():
    setup = (REPOSITORY / "setup.py").read_text()
    for fence in ALL:
        for words in fence.commands() if fence.language in SHELL else []:
            for word in words:
                extras = re.fullmatch(r"\.\[(.+)\]", word)
                for extra in extras[1].split(",") if extras else []:
                    assert f'"{extra}"' in setup, (fence.page, extra)
                if word.startswith((".ci/", "launch/", "tests/", "benchmarks/", "configs/")):
                    file = word.partition(":")[0]
                    if fence.page != EXTENDING:
                        assert (REPOSITORY / file).exists(), (fence.page, word)


# --- Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        name
        for name in dict.fromkeys(fence.page for fence in ALL if fence.language == "python")
        if name != EXTENDING
    ],
)
def test_python_on_a_page_runs(page, monkeypatch, cache_dir, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", cache_dir)
    monkeypatch.chdir(tmp_path)
    blocks = [fence for fence in ALL if fence.page == page and fence.language == "python"]
    assert all(block.reason is None for block in blocks)
    namespace = {"__name__": "page"}
    for block in blocks:
        exec(compile(block.text, page, "exec"), namespace)


def insert_row(file: pathlib.Path, table: str, text: str) -> None:
    """Adds rows to a table, and imports above it."""
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    rows = [line for line in text.splitlines() if line not in imports]
    source = file.read_text()
    start = re.search(rf"^{table}\b.* = \{{", source, re.MULTILINE)
    assert start, (file, table)
    head, tail = source[: start.start()], source[start.end() :]
    file.write_text("\n".join([head, *imports, start[0], *rows]) + tail)


def test_every_example_of_extending_is_one_file_or_one_row(runner, tmp_path):
    for package in ("demetar", "data_pipelines", "configs"):
        shutil.copytree(
            REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    commands, checks, rows = [], [], set()
    for fence in fences(REPOSITORY / EXTENDING):
        if fence.language != "python":
            commands += fence.commands()
            continue
        first, _, rest = fence.text.partition("\n")
        if match := re.fullmatch(r"# new file: (\S+)", first):
            file = tmp_path / match[1]
            assert not file.exists()
            file.write_text(rest)
        elif match := re.fullmatch(r"# in (\S+), (\w+):", first):
            insert_row(tmp_path / match[1], match[2], rest)
            rows.add(match[2])
        else:
            checks.append(fence.text)
    assert {"DATASETS", "MODELS", "MEASURES", "WRITERS", "OPTIMIZERS", "SCHEDULES"} <= rows
    program = "\n".join(
        [
            "import demetar.cli",
            f"assert demetar.__file__.startswith({str(tmp_path)!r})",
            *(f"assert demetar.cli.main({words[1:]}) == 0" for words in commands),
            *checks,
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=runner.environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "clusters"
    energy = json.loads((run / "result.json").read_text())["targets"]["energy"]
    assert energy["unit"] == "kJ/mol"
    assert energy["l4"] < 0.5 * energy["l4_of_training_mean"]  # the model has learned
    assert energy["labelled"] < 40  # a tenth has none
    table = (run / "metrics.csv").read_text().splitlines()
    assert len(table) > 1 + 4 and any("energy_l4" in line for line in table)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["many_page", "nbody_page", "plan", "gate"])
def test_pages_of_results_are_what_their_numbers_give(script, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    page = importlib.import_module(script)
    assert page.PAGE.read_text() == page.page_text(), f"run benchmarks/{script}.py"


_ROOTS = {"demetar", "data_pipelines", "configs", "docs", "tests", "launch", "benchmarks", ".ci"}


def code_in_text(page: pathlib.Path) -> list[str]:
    """What stands in backticks, outside of fences."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_paths_exist(page):
    for text in code_in_text(page):
        path = text.removeprefix("--config=").partition(":")[0]
        if (
            "/" not in path
            or path.split("/")[0] not in _ROOTS
            or not re.fullmatch(r"[\w./-]+", path)
        ):
            continue
        assert (REPOSITORY / path).exists(), f"{page.name} names {text}"


def test_links_of_pages_outside_of_the_site_lead_somewhere():
    """Sphinx checks those of the site."""
    for page in PAGES:
        if REPOSITORY / "docs" not in page.parents:
            for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
                assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_dotted_names_exist(page):
    for text in code_in_text(page):
        name = text.partition("(")[0]
        if not re.fullmatch(r"(demetar|data_pipelines)(\.\w+)+", name):
            continue
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.util.find_spec(".".join(parts[:end])) is not None
            except ModuleNotFoundError:
                found = False
            if found:
                break
        value = importlib.import_module(".".join(parts[:end])) if end < len(parts) else None
        for attribute in parts[end:]:
            value = getattr(value, attribute)  # an AttributeError names what is missing


def test_settings_exist():
    """Every `config.group.key` on a page is a key of a config that ships, or of a choice."""
    known = set()
    for name in ("qm9:quick", "qm9:egnn", "nbody"):
        known |= set(defaults.dotted(command_line.load_config(name)))
    for key, (rows, options) in defaults.CHOICES.items():
        group = key.partition(".")[0]
        known |= {f"{group}.{option}" for row in rows for option in options(row)}
    for page in PAGES:
        for key in re.findall(r"config\.([a-z_]+(?:\.[a-zA-Z_]+)+)", page.read_text()):
            is_file = key.endswith((".py", ".json", ".yml"))
            of_target = key.rpartition(".")[0] in defaults.BY_TARGET
            assert is_file or of_target or key in known, (page.name, key)


def test_every_module_has_a_place_in_the_api():
    pages = "".join(p.read_text() for p in (REPOSITORY / "docs" / "reference" / "api").glob("*.md"))
    listed = set(re.findall(r"automodule:: (\S+)", pages))
    modules = set()
    for package in ("demetar", "data_pipelines"):
        for file in (REPOSITORY / package).rglob("*.py"):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if ast.get_docstring(ast.parse(file.read_text())):
                modules.add(name)
    commands = {f"demetar.{module}" for module, _ in cli.COMMANDS.values()} | {"demetar.cli"}
    assert listed == modules - commands


# --- error messages ------------------------------------------------------------------------------


def messages_in_source() -> list[str]:
    """Every text in the code, with `…` for what is filled in."""

    def text_of(node) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "…"
        if isinstance(node, ast.JoinedStr):
            return "".join(text_of(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text_of(node.left) + text_of(node.right)
        return "…"

    found = []
    for package in ("demetar", "data_pipelines"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                    found.append(text_of(node))
    return found


def test_error_messages_are_those_of_the_code():
    page = (REPOSITORY / "docs" / "reference" / "errors.md").read_text()
    listed = re.findall(r"^`(.+)`\n: ", page, re.MULTILINE)
    assert len(listed) > 30
    sources = [re.sub(r"\s+", " ", text) for text in messages_in_source()]
    for message in listed:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in sources), message
