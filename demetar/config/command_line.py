"""How every command reads its options and the config of a run.

    --config=configs/qm9.py:quick      a file, and what its `get_config` is given
    --config=qm9:quick                 the same file, of the installed package
    --config.optim.learning_rate=1e-4  any key, in the type that it has

Options of a command are argparse's; keys of a config are ml_collections' flags.
"""

import argparse
import importlib.util
import pathlib
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from data_pipelines.errors import UserError, suggest
from demetar.config import defaults

_PACKAGE = pathlib.Path(__file__).parents[1]
# Of an installed package; of a checkout.
_CONFIG_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_TEXTS = ("--licence",)  # options that may hold an address, which nothing opens
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_OVERRIDE = re.compile(r"--?(?:no)?config\.(?P<path>[^=]+)(?P<value>=.*)?", re.DOTALL)


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """The completed, locked config that a command runs with `--config=name`.

    Args:
      name: `configs/qm9.py:quick` or `qm9:quick`. The file is Python, and is executed.
      overrides: dotted path, without `config.`, -> value. Another model, optimizer, ... brings its
        own options, and those that only the old one had are gone.

    Raises:
      UserError: no such file or variant, an unknown key, a value of the wrong type.
    """
    overrides = dict(overrides or {})
    fields = _with_choices(name, overrides).to_dict()
    for path, value in overrides.items():
        defaults.check_key(path, fields)
        group, _, key = path.rpartition(".")
        _get(fields, group)[key] = value
    return defaults.complete(fields).lock()


def run_name(name: str) -> str:
    """What a run of this config is called: `qm9-quick` for `configs/qm9.py:quick`."""
    file, _, variant = name.partition(":")
    return "-".join([pathlib.Path(file).stem, *filter(None, variant.split(","))])


def packaged_configs() -> dict[str, pathlib.Path]:
    """The config files that come with the package, by name."""
    folder = next((f for f in _CONFIG_FOLDERS if f.is_dir()), _CONFIG_FOLDERS[0])
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `demetar <command>`; the description is printed as it is."""
    return argparse.ArgumentParser(
        prog=f"demetar {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--config.a` is no option of argparse
    )


def add_command(commands, name: str, run, about: str) -> argparse.ArgumentParser:
    """The parser of `demetar <command> <name>`, one of `commands`; `options.run` is then `run`."""
    command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options of a command that takes no config; anything else is a `UserError`."""
    _set_up_absl()
    options, rest = parser.parse_known_args(_with_local_paths(arguments))
    if rest:
        _refuse(rest[0], parser, ())
    return options


def parse_with_config(
    parser: argparse.ArgumentParser, arguments: list[str], required: bool = True
) -> tuple[argparse.Namespace, ml_collections.ConfigDict | None]:
    """The options of a command and the config of `--config`, completed and locked.

    Returns:
      The options, with the name of the config as `options.config`; the config, None where it is
      not `required` and not given.
    """
    _set_up_absl()
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:VARIANT,...]",
        help=f"config file, or a name: {', '.join(packaged_configs())}; "
        "--config.KEY=VALUE sets any of its keys",
    )
    options, rest = parser.parse_known_args(_with_local_paths(arguments))
    if options.config is None:
        if rest:
            _refuse(rest[0], parser, ())
        return options, None
    overrides, unknown = _split(rest)
    texts = {path: tokens[-1].partition("=")[2] for path, tokens in overrides.items()}
    config = _with_choices(options.config, texts)
    for path, tokens in overrides.items():
        _parse_override(config, path, tokens)
    if unknown:
        paths = [f"--config.{path}" for path in defaults.dotted(config)]
        _refuse(unknown[0], parser, paths)
    return options, defaults.complete(config).lock()


def _with_local_paths(arguments: Iterable[str]) -> list[str]:
    """The arguments with `~` as the home, where a shell leaves it; a URL is refused.

    A shell expands `~/data`, but not `--workdir=~/data`.
    """
    found = []
    for token in arguments:
        option, equals, value = token.partition("=") if token.startswith("--") else ("", "", token)
        if _URL.match(value) and option not in _TEXTS:
            raise UserError(
                f"{token}: files and folders must be on this machine, and {value} is a URL. Mount "
                "it and give the path, or copy it here."
            )
        if value == "~" or value.startswith("~/"):
            value = str(pathlib.Path(value).expanduser())
        found.append(f"{option}{equals}{value}")
    return found


def _set_up_absl() -> None:
    """What `absl.app.run` does for libraries: Grain reads flags, Orbax and JAX log."""
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # what a person should see is said by records.log


# --- the file ------------------------------------------------------------------------------------


def _with_choices(name: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The completed config of a file, with the model, optimizer, ... that `overrides` choose."""
    fields = _read(name)
    for key in defaults.CHOICES:
        if key in overrides:
            fields = defaults.choose_again(fields, key, overrides[key])
    config = defaults.complete(fields)
    for path in overrides:
        group, _, target = path.rpartition(".")
        if group in defaults.BY_TARGET:
            _get(config, group)[target] = defaults.BY_TARGET[group]
    return config


def _read(name: str) -> dict:
    """What `get_config` of the file gives."""
    file, colon, variant = name.partition(":")
    path = _find(file)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variant) if colon else module.get_config()
    except ValueError as error:  # how a file refuses a variant
        raise UserError(f"{path}: {error}.") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if pathlib.Path(f.filename) == path.absolute()]
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{at}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config must give a ConfigDict, not {config!r}.")
    return ml_collections.ConfigDict(config).to_dict()


def _find(file: str) -> pathlib.Path:
    """The file of a path, or of the name of one that comes with the package."""
    known = packaged_configs()
    if file in known:
        return known[file]
    path = pathlib.Path(file)
    if path.suffix == ".py" and path.is_file():
        return path
    hint = suggest(path.stem, known)
    raise UserError(
        f"There is no config file {file!r} in {pathlib.Path.cwd()}.{hint} By name: "
        f"{', '.join(known)}; a path must end in .py."
    )


# --- the keys ------------------------------------------------------------------------------------


def _split(arguments: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(dotted path -> its flags, each `--config.path=value` or a switch; what is no such flag)."""
    overrides, unknown = {}, []
    waiting = None  # path of a flag whose value may follow
    for token in arguments:
        match = _OVERRIDE.fullmatch(token)
        if match:
            overrides.setdefault(match["path"], []).append(token)
            waiting = match["path"] if match["value"] is None else None
        elif waiting is not None and not token.startswith("--"):
            overrides[waiting][-1] += f"={token}"
            waiting = None
        else:
            unknown.append(token)
            waiting = None
    return overrides, unknown


def _parse_override(config: ml_collections.ConfigDict, path: str, tokens: list[str]) -> None:
    """Sets one key to what its flags say, in the type that it has."""
    defaults.check_key(path, config)
    before = _get(config, path)
    argv = ["demetar", *tokens]
    flag_values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
        flag_values(argv)
    except (flags.Error, SyntaxError, TypeError, ValueError) as error:
        text = tokens[-1].partition("=")[2]
        raise UserError(
            f"config.{path} is {text!r}, but must be {defaults.type_name(before)}."
        ) from error


def _get(fields: Mapping | ml_collections.ConfigDict, path: str) -> Any:
    """The value of a dotted path; "" is the whole."""
    for key in filter(None, path.split(".")):
        fields = fields[key]
    return fields


def _refuse(token: str, parser: argparse.ArgumentParser, paths: Iterable[str]) -> None:
    """Says that a command does not know an option, and which is near."""
    name = token.partition("=")[0]
    known = [*re.findall(r"--\w+", parser.format_usage()), *paths]
    raise UserError(f"{parser.prog} has no option {name!r}.{suggest(name, known)}")


def positive(text: str) -> int:
    """An argument of a command: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number
