"""Models as files and in Python: whole, the same numbers for any batch, exported, in ASE."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import ase
import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_graph
from rdkit import Chem
from rdkit.Chem import AllChem

import demetar
from data_pipelines.errors import UserError
from data_pipelines.molecules.readers.ase_files import row_of_atoms
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.qm9 import properties
from demetar import model_files
from demetar.config.command_line import load_config
from demetar.exits import EXIT_DONE, NonFiniteLoss
from demetar.inference import export, inputs, package, runs
from demetar.inference.card import CARD, describe
from demetar.inference.domain import Domain
from demetar.inference.model import Model, load_model
from demetar.models import create_model, predict, predict_and_embed
from demetar.models.base import GraphModel
from demetar.records import files
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import build_experiment
from demetar.training.progress import Progress

NO_LAYERS = {"edge_layers": 0, "node_layers": 0}  # compiling them is most of a test
TARGETS = ("homo", "U0")
GEOMETRY = "trained on the geometry 'file', and these molecules have 'mmff'"


def experiment_of(cache_dir, **overrides):
    """One of a tiny model on the sample."""
    tiny = {"model.width": 16, "model.num_heads": 2, "data.targets": TARGETS}
    tiny |= {f"model.{name}": number for name, number in NO_LAYERS.items()}
    tiny |= {"model.environment": False}
    return build_experiment(
        load_config("qm9:smoke", tiny | {"data.cache_dir": cache_dir} | overrides)
    )


def weights_of(experiment):
    """Random ones, not those that a model starts with: nothing in them is 0."""
    return random_weights(experiment.abstract_state().ema)


def random_weights(shapes):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)
    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def experiment(cache_dir):
    return experiment_of(cache_dir)


@pytest.fixture(scope="module")
def packed(experiment):
    card = describe(experiment, {}, "CC0")
    return package.with_hash(package.Package("tiny", weights_of(experiment), card))


@pytest.fixture(scope="module")
def model(packed):
    return Model(packed)


@pytest.fixture(scope="module")
def molecules(sample):
    """Some of the sample, of two shapes: each is compiled."""
    sizes = np.diff(sample[0].node_offset)
    chosen = np.concatenate([np.flatnonzero((sizes > a) & (sizes <= a + 4))[:9] for a in (8, 16)])
    return [molecule_of(sample[0], g) for g in chosen]


def molecule_of(arrays, g):
    atoms = slice(*arrays.node_offset[g : g + 2])
    bonds = arrays.bonds[slice(*arrays.bond_offset[g : g + 2])]
    numbers, positions = arrays.atomic_number[atoms], arrays.position[atoms]
    return Molecule(int(arrays.index[g]), numbers, positions, bonds, 0, 1, "file", "smiles")


class Compiled:
    """How many programs JAX has compiled since."""

    def __init__(self):
        self.count = 0

    def __call__(self, event, *_, **__):
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    counter = Compiled()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine", "mine.zip"])
def test_a_model_comes_back_as_it_was_written(packed, name, tmp_path):
    domain = {"training": np.ones((2, 3), np.float32)}
    whole = package.Package("mine", packed.params, packed.card, domain)
    written = package.write(whole, tmp_path / name)
    assert written.name == "mine" and written.targets == packed.targets
    assert written.references["U0"][1] == pytest.approx(-0.500273 * properties.HARTREE_IN_MEV)
    jax.tree.map(np.testing.assert_array_equal, written.params, packed.params)
    np.testing.assert_array_equal(written.domain["training"], domain["training"])
    assert written.card["licence"] == "CC0" and written.card["largest"]["nodes"] > 20
    json.dumps(written.card)  # only what JSON has
    again = package.write(whole, tmp_path / f"again-{name}")
    assert again.card == written.card
    with pytest.raises(UserError, match="exists already"):
        package.write(whole, tmp_path / name)
    assert not list(tmp_path.glob(".*"))


def spoil(folder: pathlib.Path, how: str) -> str:
    """Damages a model in a folder; what is said of it."""
    weights, card = folder / package.WEIGHTS, folder / CARD
    if how == "a byte":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        return "is damaged"
    if how == "no weights":
        weights.unlink()
        return "cannot be read"
    if how == "no JSON":
        card.write_text("{")
        return "no card of a model"
    card.write_text(card.read_text().replace('"format": 1', '"format": 2'))
    return "format 2, and this demetar reads format 1"


@pytest.mark.parametrize("how", ["a byte", "no weights", "no JSON", "a later format"])
def test_a_damaged_folder_is_refused(packed, how, tmp_path):
    package.write(packed, tmp_path / "mine")
    said = spoil(tmp_path / "mine", how)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "mine")


@pytest.mark.parametrize(
    "members, said",
    [
        ({"../weights.safetensors": b"", "model.json": b"{}"}, "a model is a zip of"),
        ({"model.json": b"{}"}, "a model is a zip of"),
        ({"model.json": b"{}", "weights.safetensors": b"", "x.pkl": b""}, "a model is a zip of"),
        ({"model.json": b"{}", "weights.safetensors": bytes(9 << 20)}, "has 9437184 bytes"),
        (None, "no zip that can be read"),
    ],
)
def test_a_zip_of_something_else_is_refused(members, said, tmp_path):
    file = tmp_path / "mine.zip"
    file.write_text("no zip")
    if members is not None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    with pytest.raises(UserError, match=said):
        load_model(file)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.zip"]


@pytest.mark.parametrize(
    "card, said",
    [
        ('{"format": 2, "weights_sha256": "", "versions": "1"}', "has format 2"),
        ('{"format": 1, "weights_sha256": 1}', "is damaged"),
        ("[" * 100_000, "is no card of a model"),
    ],
    ids=["versions", "hash", "deep"],
)
def test_a_card_of_other_types_is_refused(card, said, tmp_path):
    (tmp_path / CARD).write_text(card)
    (tmp_path / package.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "place, value, said",
    [
        ("buckets", [], None),  # what a later version adds
        ("edges", None, None),
        ("charges", None, "charges is 'None', not a list"),
        ("elements", [1, "6"], r"elements\[1\] is '6', not int"),
        ("largest.nodes", True, "largest.nodes is 'True', not int"),
        ("targets.0.unit", ..., r"targets\[0\].unit is missing"),
        ("targets.0.readout", "pickle", "Unknown read-out"),
        ("targets.0.head", "x", r"targets\[0\].head is unknown"),
        ("targets.0.name", "gap", "no normalization of gap"),
        ("normalizations.homo.scale", "1", "normalizations.homo.scale is '1', not float"),
        ("references", {"homo": {"C": 1.0}}, "reference of 'C'"),
        ("passport", ..., "passport is missing"),
        ("config.model.width", "wide", "width"),
    ],
)
def test_each_field_of_a_card_is_looked_at(packed, place, value, said, tmp_path):
    folder = tmp_path / "mine"
    card = json.loads(json.dumps(package.write(packed, folder).card))
    *path, last = [int(key) if key.isdecimal() else key for key in place.split(".")]
    inner = functools.reduce(lambda found, key: found[key], path, card)
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    (folder / CARD).write_text(json.dumps(card))
    if said is None:
        package.read(folder)
        return
    with pytest.raises(UserError, match=said):
        package.read(folder)


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(UserError, match="Models that ship: nbody-egnn-e3-seed0"):
        load_model("qm9-homo-7")
    with pytest.raises(UserError, match=r"it has no model\.json"):
        load_model(tmp_path)


def test_commands_say_what_a_model_is(packed, tmp_path, capsys):
    file = tmp_path / "mine.zip"
    package.write(packed, file)
    assert model_files.main(["ls"]) == EXIT_DONE
    assert "nbody-egnn-e3-seed1" in capsys.readouterr().out
    assert model_files.main(["show", str(file)]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["geometry"] == "file"
    assert model_files.main(["verify", str(file)]) == EXIT_DONE
    assert "targets homo (meV), U0 (meV)" in capsys.readouterr().out


# --- runs ----------------------------------------------------------------------------------------


def test_the_best_weights_of_a_run_are_read_and_nothing_is_changed(
    cache_dir, tmp_path, monkeypatch
):
    """From a mesh of eight devices, while a save is under way."""
    trained = experiment_of(cache_dir, **{"mesh.fsdp": 2})
    filled = lambda s, x: jax.device_put(np.full(s.shape, x, s.dtype), s.sharding)
    abstract = trained.abstract_state()
    states = [jax.tree.map(lambda s, x=x: filled(s, x), abstract) for x in (1, 2)]
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.check_space(abstract)
    size = sum(x.nbytes for x in jax.tree.leaves(states[0]))
    usage = lambda folder: SimpleNamespace(free=2 * size - 1)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(UserError, match=rf"need {2 * size / 1e6:.1f} MB \(.* each\): free some"):
        checkpoints.check_space(abstract)
    for state in states:
        progress = Progress.new(2)
        progress.record_evaluation(1, 0.5, "")
        checkpoints.save(state, trained.identity, progress)
    checkpoints.check_space(abstract)  # one is there: room for another is enough
    checkpoints.close()
    (tmp_path / "checkpoints" / "3").mkdir()  # a save that has not ended
    files.write_json(tmp_path / "config.json", trained.identity)
    before = sorted((str(f), f.stat().st_mtime_ns) for f in tmp_path.rglob("*"))
    model = load_model(tmp_path)
    assert sorted((str(f), f.stat().st_mtime_ns) for f in tmp_path.rglob("*")) == before
    jax.tree.map(np.testing.assert_array_equal, model.package.params, jax.device_get(states[0].ema))
    assert model.package.card["result"] == {"step": 1} and model.name == tmp_path.name
    with pytest.raises(UserError, match=r"no finished run: it has no result\.json"):
        runs.save(tmp_path, tmp_path / "out")
    domain = model.domain  # computed from the run's data
    assert len(domain.training) == len(trained.dataset.split["train"])
    assert 0 <= domain.percentile(domain.training[:1] + 1)[0] <= 100


# --- numbers -------------------------------------------------------------------------------------


def test_predictions_are_those_of_evaluation_and_totals_are_the_source_s(
    experiment, packed, model, sample
):
    """Other padding, other batches, and the references of the atoms on top."""
    arrays, _ = sample
    outcome = Evaluator(experiment).run(packed.params, "test")
    size = np.diff(arrays.node_offset)[outcome.graphs]
    few = (size > 16) & (size <= 20)
    assert few.sum() > 10
    graphs = outcome.graphs[few]
    found = model.predict_molecules([molecule_of(arrays, g) for g in graphs], batch_size=16)
    homo, scale = outcome.predictions["homo"][few], packed.normalizations["homo"].scale
    np.testing.assert_allclose(found["homo"], homo, rtol=0, atol=1e-5 * scale)
    broken = jax.tree.map(lambda x: x * np.nan, packed.params)
    named = rf"predictions of {outcome.count} of {outcome.count} molecules are not finite: \d+, "
    with pytest.raises(NonFiniteLoss, match=named):
        Evaluator(experiment).run(broken, "test")
    rest = properties.atom_reference_sum("U0", arrays.composition()[graphs])
    total = outcome.predictions["U0"][few] + rest * properties.HARTREE_IN_MEV
    np.testing.assert_allclose(
        found["U0"], total, rtol=0, atol=1e-5 * packed.normalizations["U0"].scale
    )
    assert found["U0"].dtype == np.float64 and np.abs(found["U0"]).min() > 1e6
    # Labels and predictions are the source's column when the network is right.
    column = arrays.properties[:, properties.COLUMNS.index("U0")] * properties.HARTREE_IN_MEV
    target = outcome.targets[1]
    labels = experiment.dataset.labels_of(target, graphs)
    exact = labels + rest * properties.HARTREE_IN_MEV
    np.testing.assert_allclose(exact, column[graphs], rtol=1e-14)


def test_neither_batch_size_nor_order_nor_neighbours_change_a_number(model, packed, molecules):
    together = model.predict_molecules(molecules, batch_size=256)
    alone = model.predict_molecules(molecules, batch_size=1)
    order = np.random.default_rng(0).permutation(len(molecules))
    shuffled = model.predict_molecules([molecules[k] for k in order], batch_size=256)
    for name in TARGETS:
        tolerance = {"rtol": 0, "atol": 1e-5 * packed.normalizations[name].scale}
        np.testing.assert_allclose(alone[name], together[name], **tolerance)
        np.testing.assert_allclose(shuffled[name], together[name][order], **tolerance)
    embedding = model.embed_molecules(molecules, batch_size=256)
    shuffled = model.embed_molecules([molecules[k] for k in order], batch_size=1)
    np.testing.assert_allclose(shuffled, embedding[order], atol=1e-5)
    assert embedding.shape == (len(molecules), 32) and embedding.std(axis=0).min() > 0


def test_a_second_molecule_of_a_shape_compiles_nothing(packed, molecules, compiled):
    fresh = Model(packed)
    sizes = [len(m.atomic_numbers) for m in molecules]
    shape = [m for m, n in zip(molecules, sizes, strict=True) if n <= 12]
    fresh.predict_molecules(shape[:1])
    first = compiled.count
    assert first > 0 and len(shape) > 3
    for molecule in shape[1:]:
        fresh.predict_molecules([molecule])
    assert compiled.count == first


def test_no_setting_of_jax_is_changed(cache_dir, molecules):
    before = dict(jax.config.values)
    wide = experiment_of_wide(cache_dir)
    assert dict(jax.config.values) == before and not jax.config.jax_enable_x64
    found = wide.predict_molecules(molecules[:1])
    assert wide.programs.dtype == np.float64
    np.testing.assert_array_equal(wide.predict_molecules(molecules[:1])["homo"], found["homo"])
    assert dict(jax.config.values) == before
    with jax.enable_x64(True):  # as somebody may have it around us
        again = wide.predict_molecules(molecules[:1])
    np.testing.assert_array_equal(again["homo"], found["homo"])


def experiment_of_wide(cache_dir) -> Model:
    """A model that computes in float64, with all pairs as edges."""
    options = {"model.dtype": "float64", "data.edges": "complete"}
    with jax.enable_x64(True):
        experiment = experiment_of(cache_dir, **options)
        params = weights_of(experiment)
    return Model(package.Package("wide", params, describe(experiment, {})))


# --- what is refused -----------------------------------------------------------------------------


def bromide(molecule: Molecule) -> Molecule:
    numbers = molecule.atomic_numbers.copy()
    numbers[-1] = 35
    return Molecule(**{**vars(molecule), "atomic_numbers": numbers})


def test_what_a_model_has_not_learned_is_refused(model, molecules):
    small = molecules[0]
    assert model.refusal(small) is None
    found = model.refusal(bromide(small))
    assert found.status == "element" and "has Br" in found.message and "H, C, N" in found.message
    charged = Molecule(**{**vars(small), "charge": 1})
    found = model.refusal(charged)
    assert found.status == "charge" and "charge 1," in found.message
    n = model.max_nodes
    line = Molecule(**{**vars(small), "atomic_numbers": np.full(n, 6), "positions": np.eye(n, 3)})
    assert model.refusal(line) is None
    n += 1
    line = Molecule(**{**vars(small), "atomic_numbers": np.full(n, 6), "positions": np.eye(n, 3)})
    assert model.refusal(line).status == "too_large" and f"{n} atoms" in model.refusal(line).message
    broken = Molecule(**{**vars(small), "positions": small.positions * np.nan})
    assert model.refusal(broken).status == "nonfinite"


def test_bad_inputs_are_rows_and_change_no_neighbour(model, molecules, monkeypatch):

    atoms = ase.build.molecule("CH3CH2OH")
    flat = Chem.MolFromSmiles("CCN")
    row = Row(7, smiles="CCC")
    given = ["CCO", molecules[5], "C(", atoms, bromide(molecules[5]), flat, None, row, "[NH4+]"]
    with pytest.warns(UserWarning, match=GEOMETRY):
        table = model.predict(given)
    statuses = ["ok", "ok", "bad_smiles", "ok", "element", "ok", "bad_row", "ok", "charge"]
    assert table["status"].tolist() == statuses
    assert table["geometry"].tolist() == ["mmff", "file", "", "file", "", "mmff", "", "mmff", ""]
    good = table["status"] == "ok"
    for name in TARGETS:
        assert np.isfinite(table[f"{name}_pred"][good]).all()
        assert np.isnan(table[f"{name}_pred"][~good]).all()
    assert (table["message"] != "")[~good].all() and (table["message"] == "")[good].all()
    assert table["ood"].isna().all()  # nothing is kept of this model's training
    assert table.attrs["units"]["U0_pred"] == "meV"
    alone = model.predict(molecules[5])
    assert alone["homo_pred"][0] == table["homo_pred"][1]
    embedding = model.embed(molecules[5:7])
    assert embedding.shape == (2, 32)
    monkeypatch.setitem(sys.modules, "pandas", None)  # not installed
    without = model.predict([molecules[5], bromide(molecules[5])])
    assert isinstance(without, dict) and without["homo_pred"][0] == alone["homo_pred"][0]
    with pytest.raises(UserError, match="Input 2 is a int"):
        model.predict(["CC", 7])


def test_a_model_of_one_geometry_makes_it_of_positions_too():
    atoms = row_of_atoms(1, ase.build.molecule("CH4"))
    smiles = Row(1, smiles="C")
    for trained, of_atoms, of_smiles in (("file", "file", "mmff"), ("etkdg", "etkdg", "etkdg")):
        assert inputs.geometry_for(atoms, trained) == of_atoms
        assert inputs.geometry_for(smiles, trained) == of_smiles


# --- embeddings ----------------------------------------------------------------------------------


def test_a_percentile_says_how_far_training_is():
    rng = np.random.default_rng(0)
    draw = lambda n: rng.normal(size=(n, 4)) * [1, 10, 0.1, 0] + [0, 0, 0, 3]
    domain = Domain.fit(draw(500), draw(500))
    assert domain.percentile(domain.training[:9] * domain.scale).max() == 0
    seen = domain.percentile(draw(2_000))
    assert 40 < seen.mean() < 60 and 0 < np.mean(seen > 90) < 0.2
    assert domain.percentile(np.full((1, 4), 1e3)) == [100]
    assert Domain.of_arrays({}) is None
    again = Domain.of_arrays(domain.arrays())
    np.testing.assert_array_equal(again.percentile(draw(9)) >= 0, True)


@pytest.mark.parametrize(
    "name, options",
    [
        ("demetar", {"width": 8, "num_heads": 2, **NO_LAYERS, "joint_layers": 1}),
        ("egnn", {"width": 8, "num_layers": 1}),
    ],
)
def test_an_embedding_is_free_in_training_and_blind_to_padding(name, options, monkeypatch):
    from data_pipelines.targets import Target

    target = Target("energy", "eV", readout="sum")
    model = create_model(
        name=name, targets=(target,), facts={"elements": (1, 6, 7, 8, 9)}, **options
    )
    graph = random_graph(np.random.default_rng(0))
    batch = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None)[None], graph
    )
    one = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    params = random_weights(shapes)
    forward = lambda params: predict(model, params, batch)["energy"]
    program = str(jax.make_jaxpr(forward)(params))
    embed = jax.jit(lambda params, batch: predict_and_embed(model, params, batch)[1])
    embedding = embed(params, batch)
    junk = batch.replace(
        position=jnp.where(batch.node_mask[..., None], batch.position, 7.0),
        atomic_number=jnp.where(batch.node_mask, batch.atomic_number, 8),
    )
    np.testing.assert_array_equal(embed(params, junk), embedding)
    monkeypatch.setattr(GraphModel, "keep_embedding", lambda self, embedding_D: None)
    assert str(jax.make_jaxpr(forward)(params)) == program
    assert predict_and_embed(model, params, batch)[1] is None


def test_a_model_without_an_embedding_says_so(packed, molecules, monkeypatch):
    monkeypatch.setattr(GraphModel, "keep_embedding", lambda self, embedding_D: None)
    silent = Model(packed)
    with pytest.raises(UserError, match="Demetar does not call `keep_embedding`"):
        silent.embed_molecules(molecules[:1])
    assert np.isnan(silent.predict(molecules[:1])["ood"]).all()


# --- export --------------------------------------------------------------------------------------

STRANGER = """
import json, sys
for name in ("demetar", "data_pipelines", "flax"):
    sys.modules[name] = None  # an import of it fails
import numpy as np
from jax import export
folder = sys.argv[1]
program = export.deserialize(bytearray(open(f"{folder}/mine.jaxexport", "rb").read()))
card = json.load(open(f"{folder}/mine.json"))
arrays = dict(np.load(f"{folder}/inputs.npz"))
assert set(arrays) == set(card["inputs"]), (set(arrays), set(card["inputs"]))
found = program.call(arrays)
mask = arrays["node_mask"]
values = {}
for name, row in card["outputs"].items():
    reference = np.zeros(119)
    for z, value in row["references"].items():
        reference[int(z)] = value
    atoms = np.where(mask, reference[arrays["atomic_number"]], 0).sum(1)
    n = mask.sum(1)
    z = np.asarray(found[name], float)
    values[name] = z * row["scale"] + row["offset"] + row["slope"] * n + atoms
np.savez(f"{folder}/found.npz", **values)
"""


def test_an_exported_model_is_the_same_without_demetar(model, packed, molecules, tmp_path):
    from data_pipelines import batching
    from data_pipelines.batch_plan import Bucket

    card = export.export(packed, tmp_path / "mine.jaxexport")
    _, nodes, _ = card["inputs"]["position"]["shape"]
    _, edges = card["inputs"]["senders"]["shape"]
    arrays, three = model.arrays_of(molecules[:3]), np.arange(3)
    batch = batching.gather(arrays, three, Bucket(nodes, edges))
    np.savez(tmp_path / "inputs.npz", **{name: getattr(batch, name) for name in card["inputs"]})
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wanted, found = model.predict_molecules(molecules[:3]), np.load(tmp_path / "found.npz")
    for name in TARGETS:
        scale = packed.normalizations[name].scale
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5 * scale)
    assert card["outputs"]["U0"]["unit"] == "meV" and card["platforms"] == ["cpu", "cuda", "tpu"]


def test_an_export_may_have_one_shape(packed, tmp_path):
    card = export.export(packed, tmp_path / "x.bin", ("cpu",), batch=2, nodes=9, edges=12)
    assert card["inputs"]["position"]["shape"] == [2, 9, 3]
    assert card["inputs"]["edge_mask"]["shape"] == [2, 12]
    with pytest.raises(UserError, match="Unknown platform 'gpu'"):
        export.export(packed, tmp_path / "x.bin", ("gpu",))
    with pytest.raises(UserError, match="choose another suffix"):
        export.export(packed, tmp_path / "x.json")


def test_molecules_of_rdkit_come_as_they_are():
    bad = Chem.MolFromSmiles("c1cccc1", sanitize=False)
    good = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(good, randomSeed=1)
    refused, row = inputs.items_of([bad, good])
    assert refused.refusal.status == "bad_row" and "kekulize" in refused.refusal.message
    np.testing.assert_array_equal(row.positions, good.GetConformer().GetPositions())


# --- ASE -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calculator(cache_dir):
    return demetar.ase.Calculator(experiment_of_wide(cache_dir), energy="U0")


def test_forces_are_the_gradient_and_turn_with_the_molecule(calculator):
    atoms = ase.build.molecule("CH3OH")
    atoms.calc = calculator
    forces, energy = atoms.get_forces(), atoms.get_potential_energy()
    assert energy == pytest.approx(calculator.results["U0"] / 1_000)
    assert np.abs(forces).max() > 0.1 and np.abs(forces.sum(axis=0)).max() < 1e-6
    step = 1e-4
    for atom, axis in ((0, 0), (1, 2), (4, 1)):
        moved = []
        for sign in (1, -1):
            copy = atoms.copy()
            copy.calc = calculator
            copy.positions[atom, axis] += sign * step
            moved.append(copy.get_potential_energy())
        assert (moved[1] - moved[0]) / (2 * step) == pytest.approx(forces[atom, axis], abs=1e-3)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = atoms.copy()
    turned.calc = calculator
    turned.positions = atoms.positions @ rotation.T + 1
    assert turned.get_potential_energy() == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(turned.get_forces(), forces @ rotation.T, atol=1e-6)


def test_a_second_molecule_of_a_bucket_compiles_nothing(calculator, compiled):
    for name in ("CH3OH", "H2CO"):
        atoms = ase.build.molecule(name)
        atoms.calc = calculator
        before = compiled.count
        atoms.get_forces()
    assert compiled.count == before


def test_what_invalidates_the_results(calculator):
    atoms = ase.build.molecule("CH3OH")
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    assert calculator.check_state(atoms) == []
    atoms.positions[0, 0] += 1.5  # torn apart, but its bonds are those of the first call
    bonds = calculator._current(atoms).bonds
    assert len(bonds) == 5 and atoms.get_potential_energy() != energy
    atoms.numbers[1] = 9
    assert "numbers" in calculator.check_state(atoms)
    other = ase.build.molecule("CH3OH")
    other.calc = calculator
    assert other.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    other.info["charge"] = 1
    assert calculator.check_state(other) == ["info"]
    with pytest.raises(UserError, match="has charge 1,"):
        other.get_potential_energy()


def test_what_a_calculator_refuses(calculator, model):
    with pytest.raises(UserError, match="Unknown energy= of the calculator: 'U'"):
        demetar.ase.Calculator(model, energy="U")
    silent = demetar.ase.Calculator(model)
    atoms = ase.build.molecule("CH4")
    atoms.calc = silent
    silent.calculate(atoms)
    assert set(silent.results) == set(TARGETS)
    with pytest.raises(NotImplementedError, match=r"Calculator\(model, energy="):
        atoms.get_forces()
    atoms.pbc = True
    with pytest.raises(UserError, match=r"set atoms\.pbc = False"):
        silent.calculate(atoms)
    bromine = ase.build.molecule("CH3Cl")
    bromine.calc = calculator
    with pytest.raises(UserError, match="CH3Cl: has Cl"):
        bromine.get_potential_energy()


def test_what_ase_has_a_name_for_is_given_in_its_unit_or_not_at_all(model, monkeypatch):
    """A target called `energy` may be in meV: ASE would read it as eV."""
    monkeypatch.setattr(demetar.ase, "all_properties", ["U0", "energy"])
    for energy in ("", "U0"):
        calculator = demetar.ase.Calculator(model, energy=energy)
        assert "U0" not in calculator.implemented_properties
        atoms = ase.build.molecule("CH4")
        atoms.calc = calculator
        calculator.calculate(atoms)
        assert "U0" not in calculator.results and ("energy" in calculator.results) == bool(energy)
