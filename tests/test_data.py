"""Sources, bonds, splits, targets and preparation, on real molecules."""

import bz2
import csv
import io
import multiprocessing
import pathlib
import shutil
import tarfile
import types

import numpy as np
import pytest

from data_pipelines import prepared
from data_pipelines.batch_plan import Bucket
from data_pipelines.batching import GraphArrays, gather
from data_pipelines.bonds import Agreement, BondType, find_bonds
from data_pipelines.edges import PairEdges, load_edges, make_edges, rows_of
from data_pipelines.elements import atomic_number, atomic_weights, covalent_radii, symbols
from data_pipelines.errors import UserError
from data_pipelines.qm9 import node_features, preparation, sources
from data_pipelines.qm9.properties import (
    COLUMNS,
    ELEMENTS,
    HARTREE_IN_MEV,
    get_properties,
    labels,
)
from data_pipelines.qm9.sources import (
    characterized_indices,
    excluded_indices,
    parse_raw_xyz,
    read_qm9pack,
    read_raw,
    read_tfds,
)
from data_pipelines.qm9.splits import get_split, split_hash
from data_pipelines.registry import load_dataset

NMP = pathlib.Path(__file__).parent / "golden" / "nmp.npz"
# Molecule 1 exactly as published in dsgdb9nsd_000001.xyz.
METHANE = """\
5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t\
-40.47893\t-40.476062\t-40.475117\t-40.498597\t6.469\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 0.0002765748\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


def same(a, b, **tolerance):
    assert a.index == b.index
    np.testing.assert_array_equal(a.atomic_numbers, b.atomic_numbers)
    np.testing.assert_allclose(a.positions, b.positions, **tolerance)
    np.testing.assert_allclose(a.properties, b.properties, **tolerance)


# --- sources -----------------------------------------------------------------------------------


def test_raw_methane():
    molecule = parse_raw_xyz(METHANE, "dsgdb9nsd_000001.xyz")
    assert (molecule.index, molecule.smiles) == (1, "C")
    assert molecule.atomic_numbers.tolist() == [6, 1, 1, 1, 1]
    assert molecule.positions[0].tolist() == [-0.0126981359, 1.0858041578, 0.0080009958]
    values = dict(zip(COLUMNS, molecule.properties, strict=True))
    assert values["homo"] == -0.3877 and values["U0"] == -40.47893 and values["Cv"] == 6.469


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_raw_exponents_and_line_ends(newline):
    text = METHANE.replace("0.0020150416", "2.0*^-3").replace("0.002150416", "2.150416*^-3")
    molecule = parse_raw_xyz(text.replace("\n", newline), "x")
    assert molecule.positions[1, 0] == 2.150416e-3


@pytest.mark.parametrize(
    "broken",
    [
        METHANE[:200],
        METHANE.replace("\nC\t", "\nXx\t"),
        "",
        METHANE.replace("6.469", ""),
        METHANE.replace("5", "6", 1),
        METHANE.replace("5", "4", 1),
        METHANE + "junk\n",
    ],
)
def test_broken_raw_file_is_named(broken):
    with pytest.raises(UserError, match="here.xyz"):
        parse_raw_xyz(broken, "here.xyz")


def test_folder_equals_archive(tmp_path):
    with tarfile.open(preparation.SAMPLE_FILE) as archive:
        archive.extractall(tmp_path, filter="data")
    for a, b in zip(read_raw(str(tmp_path)), read_raw(str(preparation.SAMPLE_FILE)), strict=True):
        same(a, b, rtol=0)


def test_excluded_molecules_are_left_out(tmp_path):
    excluded = min(excluded_indices())
    text = METHANE.replace("gdb 1\t", f"gdb {excluded}\t")
    (tmp_path / "a.xyz").write_text(text)
    (tmp_path / "b.xyz").write_text(METHANE)
    assert [m.index for m in read_raw(str(tmp_path))] == [1]


def test_exclusions_count_from_one():
    assert len(excluded_indices()) == 3054
    assert len(characterized_indices()) == 130_831
    # The first of the published list; an off-by-one list would start at 57 or 59.
    assert min(excluded_indices()) == 58


def test_truncated_archive_is_refused(tmp_path):
    broken = tmp_path / "dsgdb9nsd.xyz.tar.bz2"
    broken.write_bytes(preparation.SAMPLE_FILE.read_bytes()[:100_000])
    with pytest.raises(UserError, match="truncated"):
        list(read_raw(str(broken)))


def test_members_of_an_archive_are_small_and_never_written(tmp_path):
    file = tmp_path / "in" / "q.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        for name, kind in (("l.xyz", tarfile.SYMTYPE), ("h.xyz", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("../a.xyz", f"{tmp_path}/b.xyz"):
            member = tarfile.TarInfo(name)
            member.size = len(METHANE)
            archive.addfile(member, io.BytesIO(METHANE.encode()))
    assert [molecule.index for molecule in read_raw(str(file))] == [1, 1]
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("bomb.xyz")
        member.size = 2 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(UserError, match="bomb.xyz has 2097152 bytes; .* at most 1048576"):
        list(read_raw(str(file)))
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "q.tar.gz"]


def test_a_file_of_the_folder_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.xyz").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="a.xyz cannot be read"):
        list(read_raw(str(tmp_path)))


def test_qm9pack_format_equals_raw(tmp_path):
    """Ten molecules, in the columns of qm9pack and as published, give the same float64."""
    molecules = list(read_raw(str(preparation.SAMPLE_FILE)))[:10]
    with (tmp_path / "qm9_part1.csv").open("w", newline="") as stream:
        names = ["Index", "SMILES", "Elements", "XYZ_Ang", *sources._QM9PACK_COLUMNS]
        rows = csv.DictWriter(stream, names)
        rows.writeheader()
        for m in molecules:
            rows.writerow(
                {
                    "Index": m.index,
                    "SMILES": m.smiles,
                    "Elements": str([symbols()[int(z)] for z in m.atomic_numbers]),
                    "XYZ_Ang": str(m.positions.tolist()),
                }
                | dict(zip(sources._QM9PACK_COLUMNS, m.properties, strict=True))
            )
    for a, b in zip(read_qm9pack(str(tmp_path)), molecules, strict=True):
        same(a, b, rtol=0)
    # Cut off in the middle of a row.
    file = tmp_path / "qm9_part1.csv"
    file.write_text(file.read_text()[:-60])
    with pytest.raises(UserError, match="qm9_part1.csv, line"):
        list(read_qm9pack(str(tmp_path)))


def test_real_qm9pack_equals_raw_files():
    published = {m.index: m for m in read_raw(str(preparation.SAMPLE_FILE))}
    compared = 0
    for molecule in read_qm9pack():
        if molecule.index in published:
            same(molecule, published[molecule.index], rtol=0)
            compared += 1
        if compared == 10:
            break
    assert compared == 10


def test_tfds_source_equals_raw(tmp_path, monkeypatch):
    """A folder written by the public TFDS builder itself, from the published files.

    Only its download is replaced: figshare cannot be reached from a test.
    """
    pytest.importorskip("pandas")
    import pandas
    from tensorflow_datasets.datasets.qm9 import qm9_dataset_builder as public

    from data_pipelines.qm9.properties import ATOM_REFERENCES

    files = tmp_path / "xyz"
    with tarfile.open(preparation.SAMPLE_FILE) as archive:
        archive.extractall(files, filter="data")
    ids = sorted(int(f.stem[-6:]) for f in files.glob("*.xyz"))[:12]
    references = pandas.DataFrame(
        {k: {symbols()[z]: v[z] for z in ELEMENTS} for k, v in ATOM_REFERENCES.items()}
    ).to_dict()

    def split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(ids[:8], references, files),
            "test": self._generate_examples(ids[8:], references, files),
        }

    monkeypatch.setattr(public.Builder, "_split_generators", split_generators)
    builder = public.Builder(data_dir=tmp_path, config="original", file_format="array_record")
    builder.download_and_prepare()
    expected = {m.index: m for m in read_raw(str(files))}
    molecules = list(read_tfds(str(builder.data_dir)))
    assert [m.index for m in molecules] == ids
    for molecule in molecules:
        same(molecule, expected[molecule.index], rtol=1.2e-7, atol=1e-7)
        # Total energies are better than float32: rebuilt from the atomization columns.
        row = COLUMNS.index("U0")
        error = abs(molecule.properties[row] - expected[molecule.index].properties[row])
        assert error * HARTREE_IN_MEV < 0.01


def test_tfds_folder_missing_or_in_tfrecord_is_explained(tmp_path):
    with pytest.raises(UserError, match="dataset_info.json"):
        list(read_tfds(str(tmp_path)))


# --- bonds and edges ---------------------------------------------------------------------------


def test_bond_types_of_known_molecules(sample):
    molecules, _ = sample
    by_index = {m.index: m for m in read_raw(str(preparation.SAMPLE_FILE))}
    kinds = {}
    for index in (1, 4, 6, 8):  # methane, acetylene, formaldehyde, methanol
        m = by_index[index]
        bonds, agreement = find_bonds(m.smiles, m.atomic_numbers, m.positions)
        assert agreement == Agreement.AGREE
        kinds[index] = bonds[:, 2].tolist()
    assert kinds[1] == [BondType.SINGLE] * 4
    assert sorted(kinds[4]) == [BondType.SINGLE] * 2 + [BondType.TRIPLE]
    assert sorted(kinds[6]) == [BondType.SINGLE] * 2 + [BondType.DOUBLE]
    assert len(kinds[8]) == 5
    assert (molecules.bonds[:, 0] < molecules.bonds[:, 1]).all()


def test_aromatic_ring():
    angle = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    positions = np.concatenate([1.39 * ring, 2.48 * ring])
    numbers = np.array([6] * 6 + [1] * 6)
    bonds, agreement = find_bonds("c1ccccc1", numbers, positions)
    assert agreement == Agreement.AGREE
    assert sorted(bonds[:, 2]) == [BondType.SINGLE] * 6 + [BondType.AROMATIC] * 6


def test_geometry_decides_where_the_smiles_does_not_fit():
    methane = parse_raw_xyz(METHANE, "x")
    for smiles in ("N", "CC", "not smiles"):
        bonds, agreement = find_bonds(smiles, methane.atomic_numbers, methane.positions)
        assert agreement == Agreement.SMILES_UNUSABLE
        assert bonds.tolist() == [[0, k, BondType.SINGLE] for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "kind, cutoff", [("bonds", 2.5), ("cutoff", 2.5), ("cutoff", 1.2), ("complete", 2.5)]
)
def test_edges_of_each_kind(sample, kind, cutoff):
    """At 1.2 angstrom most bonds are longer than the cutoff, and edges all the same."""
    molecules, _ = sample
    edges = make_edges(molecules, kind, cutoff)
    for g in (0, 17, 499):
        n0, n1 = molecules.node_offset[g : g + 2]
        x = molecules.position[n0:n1]
        bonds = molecules.bonds[molecules.bond_offset[g] : molecules.bond_offset[g + 1]]
        types = {(int(i), int(j)): int(t) for i, j, t in bonds}
        distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
        expected = {
            (i, j): types.get((i, j), 0)
            for i in range(n1 - n0)
            for j in range(i + 1, n1 - n0)
            if kind == "complete"
            or (i, j) in types
            or (kind == "cutoff" and distance[i, j] < cutoff)
        }
        rows = rows_of(edges, np.array([g]))
        assert {(int(i), int(j)): int(t) for i, j, t in rows} == expected
        assert len(rows) == len(expected) == edges.counts[g]
    some = np.array([499, 3, 3, 17])
    parts = [rows_of(edges, np.array([g])) for g in some]
    np.testing.assert_array_equal(rows_of(edges, some), np.concatenate(parts))


def test_numbers_of_edges_are_counted_once(sample, tmp_path, monkeypatch):
    molecules, passport = sample
    monkeypatch.setattr("data_pipelines.edges._MANY", 100)
    first = load_edges(molecules, "cutoff", 2.5, passport, str(tmp_path))
    counts = make_edges(molecules, "cutoff", 2.5).counts
    np.testing.assert_array_equal(first.counts, counts)
    monkeypatch.setattr(PairEdges, "of", None)  # nothing can be counted now
    again = load_edges(molecules, "cutoff", 2.5, passport, str(tmp_path))
    np.testing.assert_array_equal(again.counts, counts)
    with pytest.raises(TypeError):
        load_edges(molecules, "cutoff", 2.6, passport, str(tmp_path))


def test_unknown_edges():
    with pytest.raises(UserError, match="Did you mean 'bonds'"):
        make_edges(None, "bond", 1.0)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan"), float("inf")])
def test_cutoffs_that_are_none(cutoff):
    with pytest.raises(UserError, match=f"config.data.edge_cutoff is {cutoff}, but must be a fin"):
        make_edges(None, "cutoff", cutoff)


# --- features of atoms ---------------------------------------------------------------------------


@pytest.mark.skipif(not NMP.exists(), reason="no golden file with features of atoms")
def test_features_of_atoms_equal_the_golden_ones():
    """The golden file says whether an atom has hydrogen neighbours; ours, as PyG, how many."""
    golden = np.load(NMP)
    for b, smiles in enumerate(golden["smiles"]):
        n = golden["node_mask"][b].sum()
        numbers, expected = golden["atomic_number"][b, :n], golden["node_feature"][b, :n]
        bonds, agreement = find_bonds(str(smiles), numbers, golden["position"][b, :n])
        assert agreement == Agreement.AGREE
        found = node_features.describe(str(smiles), numbers, bonds)
        np.testing.assert_array_equal(found[:, :10], expected[:, :10])
        np.testing.assert_array_equal(found[:, 10] > 0, expected[:, 10] > 0)
        assert found[:, 10].sum() == (numbers == 1).sum()


def test_features_of_methane_and_of_a_smiles_that_does_not_fit():
    methane = parse_raw_xyz(METHANE, "x")
    bonds, _ = find_bonds("C", methane.atomic_numbers, methane.positions)
    describe = lambda smiles: node_features.describe(smiles, methane.atomic_numbers, bonds).tolist()
    hydrogens = [[1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]] * 4
    assert describe("C") == [[0, 1, 0, 0, 0, 6, 0, 0, 0, 1, 4], *hydrogens]
    for smiles in ("N", "CC", "not smiles"):
        assert describe(smiles) == [[0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 4], *hydrogens]


def test_features_of_atoms_are_prepared_once_and_change_nothing_else(sample, cache_dir):
    molecules, passport = sample
    options = dict(name="qm9", source="sample", path="", cache_dir=cache_dir, split="random")
    options |= dict(targets=("homo",), edges="bonds", edge_cutoff=0.0)
    plain, more = (load_dataset(**options, node_features=kind) for kind in ("none", "pyg"))
    assert plain.passport == passport == more.passport
    assert plain.arrays.node_feature is None
    feature = more.arrays.node_feature
    assert feature.shape == (len(molecules.atomic_number), 11)
    np.testing.assert_array_equal(feature[:, 5], molecules.atomic_number)
    np.testing.assert_array_equal(more.arrays.position, plain.arrays.position)
    assert node_features.load("pyg", "sample", cache_dir=cache_dir).base is not None  # a map
    with pytest.raises(UserError, match="Did you mean 'pyg'"):
        load_dataset(**options, node_features="pgy")


# --- targets -----------------------------------------------------------------------------------


def test_misspelt_target_is_suggested():
    with pytest.raises(UserError, match="Did you mean 'homo'"):
        get_properties(("hommo",))
    with pytest.raises(UserError, match="twice"):
        get_properties(("homo", "homo"))


def test_units_and_atom_references(sample):
    molecules, _ = sample
    rows = get_properties(("homo", "U0", "mu", "Cv"))
    found = labels(rows, molecules.properties, molecules.composition())
    # Methane, by hand: U0 - (C + 4 H) = -40.47893 + 37.846772 + 4 * 0.500273 hartree.
    atomization = (-40.47893 + 37.846772 + 4 * 0.500273) * 27.211386245988 * 1000
    np.testing.assert_allclose(
        [found[name][0] for name in ("homo", "U0", "mu", "Cv")],
        [-0.3877 * 27211.386245988, atomization, 0.0, 6.469 - 5 * 2.981],
        rtol=1e-12,
    )


def test_float32_after_references_keeps_microhartree(sample):
    """The trap: cast before subtracting loses 0.8 meV; ours loses less than 0.01."""
    molecules, _ = sample
    u0 = lambda columns: labels(get_properties("U0"), columns, molecules.composition())["U0"]
    exact = u0(molecules.properties)
    ours = np.abs(exact.astype(np.float32) - exact).max()
    row = COLUMNS.index("U0")
    naive = molecules.properties.copy()
    naive[:, row] = naive[:, row].astype(np.float32)
    assert ours < 0.01 < 0.3 < np.abs(u0(naive) - exact).max()


# --- splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, order, sizes",
    [
        ("cormorant", np.random.RandomState(0).permutation, (100_000, 17_748, 13_083)),
        ("dimenet", np.random.RandomState(42).permutation, (110_000, 10_000, 10_831)),
        ("torchmd", np.random.default_rng(1).permutation, (110_000, 10_000, 10_831)),
    ],
)
def test_named_splits_are_the_published_permutations(name, order, sizes):
    ids = characterized_indices()
    split = get_split(name, ids)
    assert tuple(len(split[p]) for p in ("train", "validation", "test")) == sizes
    permuted = ids[order(130_831)]
    np.testing.assert_array_equal(
        np.concatenate([ids[split[p]] for p in ("train", "validation", "test")]), permuted
    )


def test_splits_that_tfds_defines_are_equal_to_tfds():
    public = pytest.importorskip("tensorflow_datasets.datasets.qm9.qm9_dataset_builder")
    for name, seed, train, validation in (
        ("cormorant", 0, 100_000, 17_748),
        ("dimenet", 42, 110_000, 10_000),
    ):
        theirs = public._get_split_ids(
            sorted(excluded_indices()),
            permutation_seed=seed,
            train_size=train,
            validation_size=validation,
        )
        ids = characterized_indices()
        for part, positions in get_split(name, ids).items():
            np.testing.assert_array_equal(ids[positions], theirs[part])


def test_unknown_or_impossible_split(sample):
    with pytest.raises(UserError, match="Did you mean 'dimenet'"):
        get_split("dimnet", characterized_indices())
    with pytest.raises(UserError, match="130831 characterized.*hold 500"):
        get_split("dimenet", sample[0].index)
    shifted = characterized_indices().copy()
    shifted[-1] -= 1  # an off-by-one exclusion
    with pytest.raises(UserError, match="others"):
        get_split("dimenet", shifted)


def test_split_hash_sees_a_swap():
    ids = characterized_indices()
    split = get_split("dimenet", ids)
    before = split_hash(split, ids)
    split["train"][0], split["test"][0] = split["test"][0], split["train"][0]
    assert split_hash(split, ids) != before


# --- preparation -------------------------------------------------------------------------------


def test_passport_describes_the_sample(sample):
    molecules, passport = sample
    assert passport["molecules"] == len(molecules.index) == 500
    assert passport["atoms"] == molecules.node_offset[-1]
    assert passport["units"]["homo"] == "hartree"
    assert sum(passport["smiles_and_geometry"].values()) == 500
    for g, molecule in enumerate(read_raw(str(preparation.SAMPLE_FILE))):
        atoms = slice(molecules.node_offset[g], molecules.node_offset[g + 1])
        np.testing.assert_array_equal(molecules.atomic_number[atoms], molecule.atomic_numbers)
        np.testing.assert_array_equal(
            molecules.position[atoms], molecule.positions.astype(np.float32)
        )
        np.testing.assert_array_equal(molecules.properties[g], molecule.properties)


def _prepare_small(cache, folder, results):
    molecules, passport = preparation.load("raw", folder, cache)
    results.put((len(molecules.index), passport["content_sha256"]))


def test_two_jobs_prepare_at_once(tmp_path):
    with tarfile.open(preparation.SAMPLE_FILE) as archive:
        members = [m for m in archive if m.isfile()][:40]
        archive.extractall(tmp_path / "xyz", members, filter="data")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "cache"), str(tmp_path / "xyz"), results)
    jobs = [context.Process(target=_prepare_small, args=arguments) for _ in range(2)]
    for job in jobs:
        job.start()
    found = [results.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    assert found[0] == found[1] and found[0][0] == 40
    prepared = [p for p in (tmp_path / "cache" / "qm9").iterdir() if p.is_dir()]
    assert len(prepared) == 1  # one result, and nothing half-built beside it


def test_of_large_files_each_start_reads_other_blocks(tmp_path, monkeypatch):
    for name, size in (("_LARGE", 1000), ("_BLOCK", 64), ("_SAMPLED", 2)):
        monkeypatch.setattr(prepared, name, size)
    numbers = np.arange(1000, dtype=np.int32)
    build = lambda folder: prepared.write(folder, {"numbers": numbers}, {})
    open_again = lambda: prepared.prepare(tmp_path / "kept", build, "nothing")
    np.testing.assert_array_equal(open_again()[0]["numbers"], numbers)
    file = tmp_path / "kept" / "arrays" / "numbers.npy"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1  # in one of 65 blocks: a start finds it with 2 / 65
    file.write_bytes(content)
    found = 0
    for _ in range(300):
        try:
            open_again()
        except UserError as error:
            found += "is damaged" in str(error)
    assert 0 < found < 60
    with prepared.checked_whole(), pytest.raises(UserError, match="is damaged: 4128 bytes"):
        open_again()
    file.write_bytes(content[:-64])
    with pytest.raises(UserError, match="4064 bytes .* says 4128"):
        open_again()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "passport"])
def test_damaged_preparation_is_refused(tmp_path, cache_dir, damage):
    preparation.load("sample", cache_dir=cache_dir)
    shutil.copytree(pathlib.Path(cache_dir) / "qm9", tmp_path / "qm9")
    (folder,) = (p for p in (tmp_path / "qm9").iterdir() if p.is_dir())
    file = folder / "arrays" / "position.npy"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-100])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "passport.json").write_text("{")
    with pytest.raises(UserError, match="Delete .* to prepare it again"):
        preparation.load("sample", cache_dir=str(tmp_path))


def test_a_preparation_is_named_after_the_content_of_its_files(tmp_path, monkeypatch):
    """Also of files edited in place, which leave their folder as it was."""
    folder = tmp_path / "xyz"
    folder.mkdir()
    for name in ("a.xyz", "b.xyz"):
        (folder / name).write_text(METHANE)
    name = lambda: preparation.folder_of("raw", str(folder)).name
    for most_hashed in (100, 1):  # by hashes; by sizes and times
        monkeypatch.setattr(preparation, "_MOST_HASHED", most_hashed)
        before = name()
        (folder / "b.xyz").write_text(METHANE.replace("-0.3877", "-0.3878"))
        edited = name()
        folder = folder.rename(tmp_path / f"moved{most_hashed}")
        assert name() == edited != before
        (folder / "b.xyz").write_text(METHANE)
    monkeypatch.setattr(preparation, "_MOST_HASHED", 100)
    with_two = name()
    (folder / "c.xyz").write_text(METHANE)
    assert name() != with_two


def test_nan_coordinate_is_refused_with_its_molecule(tmp_path):
    (tmp_path / "xyz").mkdir()
    (tmp_path / "xyz" / "a.xyz").write_text(METHANE.replace("1.0858041578", "nan"))
    with pytest.raises(UserError, match="Molecule 1 has a coordinate"):
        preparation.load("raw", str(tmp_path / "xyz"), str(tmp_path / "cache"))
    assert not [p for p in (tmp_path / "cache" / "qm9").iterdir() if p.is_dir()]


def test_an_element_outside_of_qm9_is_named_with_its_molecule(tmp_path):
    """Chlorine is no broken file; an element that does not exist is one."""
    (tmp_path / "xyz").mkdir()
    file = tmp_path / "xyz" / "a.xyz"
    for symbol, message in (
        ("Cl", "Molecule 1 has the element Cl.*only H, C, N, O, F"),
        ("Xx", "a.xyz: Unknown element 'Xx'"),
    ):
        file.write_text(METHANE.replace("\nC\t-0.0126", f"\n{symbol}\t-0.0126"))
        with pytest.raises(UserError, match=message):
            preparation.load("raw", str(tmp_path / "xyz"), str(tmp_path / "cache"))


def test_the_periodic_table_knows_every_element():
    assert len(symbols()) == len(atomic_weights()) == len(covalent_radii()) == 119
    assert [symbols()[z] for z in (1, 17, 35, 118)] == ["H", "Cl", "Br", "Og"]
    assert [atomic_number(s) for s in symbols()[1:]] == list(range(1, 119))
    assert (atomic_weights()[1:] > 1).all() and (covalent_radii()[1:] > 0.2).all()
    # QM9's, in the digits that the published results were made with.
    assert atomic_weights()[list(ELEMENTS)].tolist() == [1.008, 12.011, 14.007, 15.999, 18.998]
    with pytest.raises(UserError, match="Unknown element 'cl'. Did you mean 'Cl'"):
        atomic_number("cl")


def test_bonds_of_other_elements():
    """Boron and chlorine have radii of their own: BCl3, no SMILES, all single bonds."""
    angle = np.arange(3) * 2 * np.pi / 3
    ring = 1.74 * np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    positions = np.concatenate([np.zeros((1, 3)), ring])
    bonds, agreement = find_bonds("", np.array([5, 17, 17, 17]), positions)
    assert agreement == Agreement.SMILES_UNUSABLE
    assert bonds.tolist() == [[0, k, BondType.SINGLE] for k in (1, 2, 3)]


def test_more_than_255_atoms():
    """A chain of 400 carbon atoms: bonds, edges and batches hold every number."""
    n = 400
    positions = np.stack([1.5 * np.arange(n), 0 * np.arange(n), 0 * np.arange(n)], 1)
    numbers = np.full(n, 6)
    bonds, _ = find_bonds("", numbers, positions)
    assert bonds[:, :2].tolist() == [[k, k + 1] for k in range(n - 1)]
    molecule = types.SimpleNamespace(
        node_offset=np.array([0, n]), position=positions, bonds=bonds,
        bond_offset=np.array([0, len(bonds)]),
    )  # fmt: skip
    edges = make_edges(molecule, "cutoff", 3.1)
    rows = rows_of(edges, np.array([0]))
    assert edges.counts.tolist() == [2 * n - 3]
    assert rows[-1].tolist() == [n - 2, n - 1, BondType.SINGLE]
    arrays = GraphArrays(
        np.array([1]), np.array([0, n]), numbers.astype(np.uint8), positions, edges
    )
    batch = gather(arrays, np.array([0]), Bucket(n, len(rows)))
    assert batch.receivers.max() == n - 1 and batch.edge_mask.all()


def test_unknown_source():
    with pytest.raises(UserError, match="Did you mean 'qm9pack'"):
        preparation.load("qm9pak")


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="config.data.cache_dir"):
        preparation.load("sample", cache_dir=str(tmp_path / "file"))


def test_sample_is_bz2_of_published_text():
    text = bz2.decompress(preparation.SAMPLE_FILE.read_bytes())
    assert METHANE.encode() in text
