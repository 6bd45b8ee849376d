"""Configs: defaults for every key, files that say only what differs, the command line, resuming."""

import ast
import graphlib
import itertools
import json
import pathlib
import re

import ml_collections
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import UserError
from demetar.config import command_line, defaults, stored
from demetar.config.command_line import load_config
from demetar.training.checkpoints import Checkpoints

REPOSITORY = pathlib.Path(__file__).parents[1]
FILES = command_line.packaged_configs()
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "configs.json").read_text())
EVERY = GOLDEN.pop("every")


def flat(config):
    return flatten_dict(stored.to_json(config), sep=".")


def parse(*arguments):
    return command_line.parse_with_config(command_line.make_parser("train", ""), list(arguments))[1]


# --- defaults ------------------------------------------------------------------------------------


def test_every_default_says_what_it_means():
    source = pathlib.Path(defaults.__file__).read_text()
    table = source[source.index("DEFAULTS = {") : source.index("\n}\n")]
    leaves = [line for line in table.splitlines() if re.match(r'\s+"\w+":(?! \{$)', line)]
    assert len(leaves) == len(list(defaults.dotted(defaults.DEFAULTS)))
    assert not [line for line in leaves if not re.search(r",  # \S+ \S+", line)]


def test_options_of_a_choice_hide_no_other_key():
    for key, (rows, options) in defaults.CHOICES.items():
        group = key.partition(".")[0]
        others = [c for c in defaults.CHOICES if c != key and c.startswith(f"{group}.")]
        for name in rows:
            common = options(name).keys() & defaults.DEFAULTS[group].keys()
            assert common <= {"readout"}, (key, name)
            for other in others:
                for more in defaults.CHOICES[other][0]:
                    assert not options(name).keys() & defaults.CHOICES[other][1](more).keys()


def test_what_a_file_leaves_out_is_at_its_default():
    config = defaults.complete({"data": {"name": "qm9"}}).to_dict()
    for path in defaults.dotted(defaults.DEFAULTS):
        if path != "data.name":
            wanted = command_line._get(defaults.DEFAULTS, path)
            assert command_line._get(config, path) == wanted
    assert (
        config["optim"]["final_fraction"] == defaults.SCHEDULES["cosine"].defaults["final_fraction"]
    )


@pytest.mark.parametrize("key", list(defaults.CHOICES))
def test_every_choice_completes(key):
    for name in defaults.CHOICES[key][0]:
        group, _, last = key.partition(".")
        fields = {"data": {"name": "qm9"}}
        config = defaults.complete(fields | {group: fields.get(group, {}) | {last: name}})
        assert set(defaults.CHOICES[key][1](name)) <= set(config[group])


@pytest.mark.parametrize("name", list(GOLDEN))
def test_completing_again_and_json_change_nothing(name):
    config = load_config(name)
    assert defaults.complete(config).lock() == config
    assert stored.from_json(json.loads(json.dumps(stored.to_json(config)))) == config
    assert config.is_locked


@pytest.mark.parametrize("name", list(GOLDEN))
def test_values_that_results_were_made_with_stay(name):
    """Whatever becomes of defaults: these are of published results and frozen runs."""
    found, wanted = flat(load_config(name)), EVERY | GOLDEN[name]
    assert {key: found.get(key) for key in wanted} == wanted
    assert all(type(found[key]) is type(wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optim": {"learning_rat": 1.0}}, "config.optim.learning_rat. Did you mean config.optim"),
        ({"lerning_rate": 1.0}, "Did you mean config.optim.learning_rate?"),
        ({"train": {"batch_size": 8}}, "Did you mean config.data.batch_size?"),
        ({"model": {"rounds": 3}}, "config.model.name is 'demetar': it belongs to demetar_e3"),
        ({"optim": {"patience": 3}}, "config.optim.schedule is 'cosine': it belongs to plateau"),
        ({"unheard_of": 1}, "config has checkpoint, cluster, data"),
        ({"seed": {"x": 1}}, "config.seed is {'x': 1}, but must be a whole number"),
        ({"seed": 1.5}, "config.seed is 1.5, but must be a whole number"),
        ({"seed": True}, "config.seed is True, but must be a whole number"),
        ({"log": {"graphs": 1}}, "config.log.graphs is 1, but must be true or false"),
        ({"optim": {"learning_rate": "1"}}, "config.optim.learning_rate is '1', but must be a num"),
        ({"data": {"name": "qm9", "buckets": 29}}, "config.data.buckets is 29, but must be a tupl"),
        ({"data": {"name": "qm8"}}, "Unknown config.data.name 'qm8'. Did you mean 'qm9'?"),
        ({"data": {"name": ""}}, "The config has no config.data.name: set it. Known: qm9, nbody"),
        ({"optim": {"name": "muom"}}, "Did you mean 'muon'?"),
        ({"optim": {"schedule": "cosin"}}, "Did you mean 'cosine'?"),
        ({"model": {"name": "egn"}}, "Did you mean 'egnn'?"),
        ({"model": 3}, "config.model is 3, but must be a group of keys"),
        ({"train": {"weights": {"homo": "2"}}}, "config.train.weights.homo is '2', but must be a"),
        ({"train": {"losses": {"homo": 2}}}, "config.train.losses.homo is 2, but must be a text"),
        ({"seed": -1}, "config.seed is -1, but must be from 0 to 4294967295"),
        ({"seed": 2**32}, "config.seed is 4294967296, but must be from 0 to 4294967295"),
        ({"data": {"name": "qm9", "batch_size": 0}}, "config.data.batch_size is 0, but must be a"),
        ({"data": {"name": "qm9", "prefetch_threads": -1}}, "prefetch_threads is -1, but must be"),
        ({"train": {"num_steps": 0}}, "config.train.num_steps is 0, but must be a whole number f"),
        ({"checkpoint": {"keep_last": 1}}, "config.checkpoint.keep_last is 1, but must be at lea"),
        ({"checkpoint": {"stop_at": -1}}, "config.checkpoint.stop_at is -1, but must be at least"),
        ({"cluster": {"lost_seconds": 0}}, "config.cluster.lost_seconds is 0, but must be a whol"),
        ({"mesh": {"cpu_devices": -1}}, "config.mesh.cpu_devices is -1, but must be at least 0"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        defaults.complete({"data": {"name": "qm9"}} | fields)


def test_numbers_and_lists_take_the_type_of_the_default():
    config = defaults.complete(
        {
            "data": {"name": "qm9", "targets": ["homo", "gap"]},
            "optim": {"learning_rate": 1},
            "train": {"weights": {"gap": 2}, "losses": {"gap": "mse"}},
        }
    )
    assert config.data.targets == ("homo", "gap")
    assert type(config.optim.learning_rate) is type(config.train.weights.gap) is float
    assert config.train.losses.gap == "mse"


def test_groups_may_be_dicts_or_config_dicts():
    data, model = {"name": "qm9"}, {"width": 64}
    wanted = defaults.complete({"data": data, "model": model})
    mixed = {"data": ml_collections.ConfigDict(data), "model": model}
    assert defaults.complete(mixed) == defaults.complete(ml_collections.ConfigDict(mixed)) == wanted


def test_another_choice_keeps_what_both_have():
    fields = {"data": {"name": "qm9"}, "model": {"width": 96, "edge_layers": 7}}
    config = defaults.complete(defaults.choose_again(fields, "model.name", "egnn"))
    assert config.model.name == "egnn" and config.model.width == 96
    assert "edge_layers" not in config.model
    assert fields["model"] == {"width": 96, "edge_layers": 7}
    with pytest.raises(UserError, match="Did you mean 'egnn'"):
        defaults.choose_again(fields, "model.name", "egn")


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES.values(), ids=str)
def test_config_files_import_nothing_of_the_project(file):
    nodes = ast.walk(ast.parse(file.read_text()))
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [n.module for n in imports] == ["ml_collections"]


def test_a_run_goes_on_where_its_file_has_another_name():
    config = stored.to_json(load_config("qm9:smoke"))
    of = lambda name, digest: {
        "config": config,
        "passport": {"sources": [{"name": name, "sha256": digest}]},
    }
    stored.check_same_run(of("a.csv", "1"), of("b.csv", "1"), "here")
    with pytest.raises(UserError, match="sources"):
        stored.check_same_run(of("a.csv", "1"), of("a.csv", "2"), "here")


def test_no_circle_of_modules_and_no_way_back():
    """Law of the rooms: docs/architecture.md."""
    files = [f for top in ("demetar", "data_pipelines") for f in (REPOSITORY / top).rglob("*.py")]
    parts = {f: f.relative_to(REPOSITORY).with_suffix("").parts for f in files}
    names = {".".join(p[:-1] if p[-1] == "__init__" else p): f for f, p in parts.items()}
    needs = {name: _imported(file, names) - {name} for name, file in names.items()}
    list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError with the circle
    pairs = [(name, other) for name, others in needs.items() for other in others]
    for room, forbidden in (("data_pipelines", "demetar"), ("demetar.models", "demetar.training")):
        assert not [p for p in pairs if p[0].startswith(room) and p[1].startswith(forbidden)]


def _imported(file, names) -> set[str]:
    """Modules of ours that a file imports when it is imported."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & names.keys() or {node.module}
    return found & names.keys()


def test_variants_of_qm9_combine_in_any_order():
    pairs = [("quick", "U0"), ("egnn", "quick"), ("large", "smoke"), ("egnn", "gap")]
    for words in [*pairs, ("et", "quick"), ("smoke", "schnet", "U0")]:
        variants = [",".join(order) for order in itertools.permutations(words)]
        assert load_config(f"qm9:{variants[0]}") == load_config(f"qm9:{variants[1]}")
    energy, other = load_config("qm9:quick,U0"), load_config("qm9:quick,gap")
    assert energy.optim.learning_rate == other.optim.learning_rate / 2
    assert energy.optim.weight_decay == 0 < other.optim.weight_decay


SYSTEMS = "schnet nmp et tfn se3_transformer equiformer cormorant lieconv".split()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_published_system_has_small_variants(name):
    full, quick, smoke = (load_config(f"qm9:{name}{more}") for more in ("", ",quick", ",smoke"))
    assert {c.model.name for c in (full, quick, smoke)} == {name}
    assert full.train.num_steps > quick.train.num_steps > smoke.train.num_steps
    # The task, its loss and the optimizer stay; the schedule ends with the run.
    for small in (quick, smoke):
        assert small.optim.name == full.optim.name and small.optim.schedule == "cosine"
        assert small.optim.learning_rate == full.optim.learning_rate
        assert (small.train.loss, small.data.edges) == (full.train.loss, full.data.edges)
    energy = load_config(f"qm9:{name},U0")
    assert energy.optim == full.optim and energy.data.targets == ("U0",)


def test_a_path_and_a_name_are_the_same_config(monkeypatch, tmp_path):
    path = REPOSITORY / "configs" / "qm9.py"
    assert load_config(f"{path}:quick") == load_config("qm9:quick")
    monkeypatch.chdir(REPOSITORY)
    assert load_config("configs/qm9.py:quick") == load_config("qm9:quick")
    monkeypatch.chdir(tmp_path)
    assert load_config("qm9") == load_config(f"{path}")
    assert command_line.run_name("configs/qm9.py:quick,gap") == "qm9-quick-gap"
    assert command_line.run_name("qm9") == "qm9"


@pytest.mark.parametrize(
    "source, message",
    [
        ("x =", "SyntaxError"),
        ("\ndef get_config():\n    return nope", "line 3: NameError: name 'nope' is not defined"),
        ("", "has no attribute 'get_config'"),
        ("def get_config(arg):\n    return {}", "TypeError"),
        ("def get_config():\n    raise ValueError('no such thing')", "mine.py: no such thing."),
        ("def get_config():\n    return 3", "get_config must give a ConfigDict, not 3"),
        ("def get_config():\n    return {'data': {'nme': 'qm9'}}", "has no config.data.name"),
    ],
)
def test_a_file_that_fails_says_where(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(f"{tmp_path}/mine.py")


@pytest.mark.parametrize(
    "name, message",
    [
        ("qm8", "Did you mean 'qm9'?"),
        ("configs/nbdy.py:quick", "Did you mean 'nbody'?"),
        ("qm9:quik", "no variant 'quik'; known: egnn, schnet, nmp, et, tfn"),
        ("nbody:egnn,linear", "at most one model"),
        ("setup.cfg", "nbody, qm9; a path must end in .py"),
    ],
)
def test_a_config_that_is_not_there(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(name)


# --- the command line ----------------------------------------------------------------------------

VALUES = {
    "seed": st.integers(0, 2**31),
    "optim.learning_rate": st.floats(1e-9, 1e3),
    "optim.name": st.sampled_from(["lion", "adamw"]),
    "optim.schedule": st.sampled_from(["constant", "plateau", "wsd"]),
    "data.targets": st.lists(st.sampled_from(["homo", "gap", "U0"]), min_size=1).map(tuple),
    "data.split": st.text(st.characters(categories=["L", "N"]), min_size=1),
    "data.buckets": st.lists(st.integers(1, 99), max_size=3).map(tuple),
    "log.graphs": st.booleans(),
    "mesh.data": st.integers(-1, 8),
    "model.dtype": st.sampled_from(["float64", "bfloat16"]),
    "train.losses.homo": st.sampled_from(["mse", "huber"]),
    "train.weights.gap": st.floats(0.0, 10.0),
}
OVERRIDES = st.fixed_dictionaries({}, optional=VALUES)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(OVERRIDES, st.booleans())
def test_the_command_line_says_what_python_says(overrides, spaces):
    arguments = []
    for path, value in overrides.items():
        if spaces and not isinstance(value, bool):
            arguments += [f"--config.{path}", str(value)]
        else:
            arguments.append(f"--config.{path}={value}")
    wanted = load_config("qm9:smoke", overrides)
    assert parse("--config=qm9:smoke", *arguments) == wanted
    for path, value in overrides.items():
        assert command_line._get(wanted, path) == value


def test_switches_repeats_and_the_last_word():
    config = parse("--config=qm9:smoke", "--config.log.graphs", "--config.seed=1")
    assert config.log.graphs is True and config.seed == 1
    assert (
        parse("--config", "qm9", "--config.log.graphs", "--noconfig.log.graphs").log.graphs is False
    )
    assert parse("--config=qm9", "--config.seed=1", "--config.seed=2").seed == 2
    two = parse("--config=qm9", "--config.data.targets=gap", "--config.data.targets=mu")
    assert two.data.targets == ("gap", "mu")
    assert parse("--config=qm9", "--config.train.losses={'homo': 'mse'}").train.losses.homo == "mse"


def test_a_path_may_begin_with_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    parser = command_line.make_parser("train", "")
    parser.add_argument("--workdir")
    arguments = ["--config=molecules", "--workdir=~/runs/a=~/b", "--config.data.path", "~/a.csv"]
    options, config = command_line.parse_with_config(parser, arguments)
    assert options.workdir == "/home/someone/runs/a=~/b"
    assert config.data.path == "/home/someone/a.csv"
    parser = command_line.make_parser("check", "")
    parser.add_argument("file")
    assert command_line.parse(parser, ["~/a.csv"]).file == "/home/someone/a.csv"
    assert command_line.parse(parser, ["a~/b"]).file == "a~/b"


def test_a_url_is_no_path():
    with pytest.raises(UserError, match="gs://bucket/run is a URL. Mount it"):
        parse("--config=qm9:smoke", "--config.data.cache_dir=gs://bucket/run")


def test_a_licence_may_be_an_address():
    parser = command_line.make_parser("models", "")
    parser.add_argument("--licence")
    assert command_line.parse(parser, ["--licence=https://a.org/by"]).licence == "https://a.org/by"


def test_a_folder_whose_checkpoints_orbax_could_not_restore(tmp_path):
    for name in ("[x]", "a*", "a?"):
        with pytest.raises(UserError, match=r"Choose another --workdir"):
            Checkpoints(tmp_path / name, keep_last=2)
        assert not (tmp_path / name).exists()


def test_a_choice_on_the_command_line_brings_its_options():
    config = parse("--config=qm9:quick", "--config.model.name=egnn", "--config.model.num_layers=2")
    assert config.model.num_layers == 2 and config.model.width == 96
    config = parse("--config=nbody", "--config.optim.schedule=plateau", "--config.optim.patience=3")
    assert config.optim.patience == 3 and "final_fraction" not in config.optim


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.optim.learning_rat=1", "no config.optim.learning_rat. Did you mean config.op"),
        ("--config.seed=abc", "config.seed is 'abc', but must be a whole number"),
        (
            "--config.train.num_steps=1e3",
            "config.train.num_steps is '1e3', but must be a whole num",
        ),
        (
            "--config.optim.learning_rate=fast",
            "config.optim.learning_rate is 'fast', but must be a",
        ),
        ("--config.log.graphs=maybe", "config.log.graphs is 'maybe', but must be true or false"),
        ("--config.data.targets=('homo',", "is \"('homo',\", but must be a tuple"),
        ("--config.model=3", "config.model is '3', but must be a group of keys"),
        ("--config.train.weights.homo=x", "config.train.weights.homo is 'x', but must be a number"),
        ("--config.train.losses={'homo': 3}", "config.train.losses.homo is 3, but must be a text"),
        ("--config.optim.name=muom", "Did you mean 'muon'?"),
        ("--wrkdir=x", "demetar train has no option '--wrkdir'. Did you mean '--workdir'?"),
        ("--optim.learning_rate=1", "Did you mean '--config.optim.learning_rate'?"),
        ("quick", "demetar train has no option 'quick'"),
    ],
)
def test_a_wrong_argument_is_a_user_error(argument, message):
    parser = command_line.make_parser("train", "")
    parser.add_argument("--workdir")
    with pytest.raises(UserError, match=re.escape(message)):
        command_line.parse_with_config(parser, ["--config=qm9:smoke", argument])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"optim.learning_rat": 1.0}, "Did you mean config.optim.learning_rate"),
        ({"seed": "1"}, "config.seed is '1'"),
        ({"optim.name": "adm"}, "Did you mean 'adam"),
    ],
)
def test_a_wrong_override_in_python_is_a_user_error(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config("qm9:smoke", overrides)


# --- stored configs ------------------------------------------------------------------------------


def identity(config, **passport):
    return {"config": stored.to_json(config), "passport": {"content_sha256": "a"} | passport}


def test_a_resume_may_change_what_changes_no_number(tmp_path):
    saved = identity(load_config("qm9:smoke"))
    free = {
        "log.every_steps": 7,
        "log.writers": (),
        "checkpoint.every_steps": 3,
        "mesh.data": 2,
        "cluster.lost_seconds": 60,
        "data.prefetch_threads": 3,
        "data.cache_dir": "elsewhere",
        "data.path": "elsewhere",
    }
    stored.check_same_run(saved, identity(load_config("qm9:smoke", free)), tmp_path)


@pytest.mark.parametrize(
    "path, value",
    [
        ("seed", 1),
        ("optim.learning_rate", 0.1),
        ("optim.name", "lion"),
        ("model.width", 16),
        ("model.dtype", "float64"),
        ("data.batch_size", 32),
        ("data.targets", ("gap",)),
        ("train.accumulation", 2),
        ("train.losses.homo", "mse"),
        ("train.eval_every", 10),
    ],
)
def test_a_resume_with_other_numbers_is_refused_with_the_keys(path, value, tmp_path):
    saved, today = (identity(load_config("qm9:smoke", more)) for more in ({}, {path: value}))
    value = list(value) if isinstance(value, tuple) else value
    with pytest.raises(UserError) as error:
        stored.check_same_run(saved, today, tmp_path)
    assert f"config.{path}: " in str(error.value) and f"{value!r} today" in str(error.value)


def test_other_data_are_refused(tmp_path):
    saved = identity(load_config("qm9:smoke"))
    today = saved | {"passport": {"content_sha256": "b"}}
    with pytest.raises(UserError, match="passport.content_sha256: 'a' in the run, 'b' today"):
        stored.check_same_run(saved, today, tmp_path)


def test_a_stored_config_is_completed_with_the_defaults_of_today(tmp_path):
    saved = identity(load_config("qm9:smoke"))
    today = json.loads(json.dumps(saved))
    del saved["config"]["train"]["accumulation"], saved["config"]["optim"]["eps"]
    assert stored.from_json(saved["config"]) == stored.from_json(today["config"])
    stored.check_same_run(saved, today, tmp_path)
    saved["config"]["train"]["steps_a_call"] = 4
    with pytest.raises(UserError, match="another version of demetar.*config.train.steps_a_call"):
        stored.from_json(saved["config"])


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"config": 3, "passport": {}}', "[" * 100_000, "\ud800"]
)
def test_settings_of_a_run_that_are_damaged(text, tmp_path):
    (tmp_path / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match="config.json does not hold the settings of a run"):
        stored.read_identity(tmp_path / "config.json")


def test_a_key_that_no_group_can_have():
    with pytest.raises(UserError, match="config.data.name is {'a': 1}, but must be a text"):
        stored.from_json({"data": {"name": {"a": 1}}})
    with pytest.raises(UserError, match="no groups of keys and values"):
        stored.from_json({"model": {"na.me": "demetar"}})


def test_real_dtype():
    names = {"float32": "float32", "bfloat16": "float32", "float64": "float64"}
    for name, wanted in names.items():
        config = ml_collections.ConfigDict({"model": {"dtype": name}})
        assert stored.real_dtype(config).name == wanted
