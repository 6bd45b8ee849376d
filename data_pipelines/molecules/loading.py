"""Molecules of one's own: any file that `demetar check` can read, any targets with their units."""

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace as Options  # the keys of DEFAULTS as attributes

import numpy as np

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import PARTS, Dataset, make_buckets, training_mean
from data_pipelines.edges import load_edges
from data_pipelines.elements import composition, symbols
from data_pipelines.errors import UserError, check_known, suggest
from data_pipelines.molecules import preparation, readers, references
from data_pipelines.molecules.preparation import OwnMolecules, Request
from data_pipelines.molecules.splits import check_together, conflicts, make_split
from data_pipelines.molecules.units import parse_column
from data_pipelines.targets import Target

DEFAULTS = {
    "path": "",  # file of molecules: csv, parquet, sdf, xyz, extxyz, db, npz, h5
    "validation_path": "",  # files of their own for these parts; then `split` is not looked at
    "test_path": "",
    "targets": (),  # columns with their units, as in ("homo:eV", "logp:1"); "1" is none
    "extensive": (),  # those of the targets that grow with the molecule, such as energies
    "references": "fit",  # of atoms, for extensive targets: fit | none | a JSON file
    "smiles": "",  # column of the SMILES; "": found by its name
    "geometry": "auto",  # file | etkdg | mmff | xtb; auto: the file's, else mmff
    "charges": "refuse",  # refuse | embed: whether molecules of several charges may mix
    "split": "random",  # random | scaffold | column | file | kfold
    "split_column": "",  # that names the part of each row, for split "column"
    "split_file": "",  # with the rows of each part, for split "file"
    "fractions": (0.8, 0.1, 0.1),  # of train, validation and test
    "fold": 0,  # which of `folds` is the test part, for split "kfold"
    "folds": 5,
    "split_seed": 0,
    "group": "",  # column: rows of one group are in one part
    "max_failed": 0.01,  # part of the rows that may have no molecule
    "edges": "bonds",  # bonds | cutoff (all pairs within edge_cutoff, and bonds) | complete
    "edge_cutoff": 3.0,  # angstrom, for cutoff
}
_SHOWN = 5  # rows
_FEW = 20  # molecules with an element; fewer teach a model little about it


def load(*, cache_dir: str = "", buckets=(), **options) -> Dataset:
    """A file of molecules with the options of `DEFAULTS`."""
    options = _checked(Options(**DEFAULTS | options))
    columns = tuple(parse_column(text) for text in options.targets)
    request = Request(
        paths=_paths(options),
        targets=columns,
        smiles=options.smiles,
        geometry=_geometry(options),
        group=options.group,
        part=options.split_column if options.split == "column" else "",
        scaffolds=options.split == "scaffold",
    )
    molecules, passport = preparation.load(request, cache_dir)
    _check_refused(passport, options)
    _check_charges(molecules, options)
    elements = tuple(int(z) for z in np.unique(molecules.atomic_number))
    counts_GxZ = composition(molecules.atomic_number, molecules.node_offset, elements)
    parts = _split(molecules, counts_GxZ, passport, options)
    _check_elements(molecules, counts_GxZ, elements, parts)
    targets = tuple(_target(column, molecules, options) for column in columns)
    labels, found = _labels(molecules, targets, counts_GxZ, elements, parts, options)
    sizes = np.diff(molecules.node_offset)
    arrays = GraphArrays(
        index=molecules.index,
        node_offset=molecules.node_offset,
        atomic_number=molecules.atomic_number,
        position=molecules.position,
        edges=load_edges(molecules, options.edges, options.edge_cutoff, passport, cache_dir),
        graph_labels=labels,
        node_labels={t.name: molecules.node_labels[t.name] for t in targets if t.per_node},
        charge=np.repeat(molecules.charge, sizes) if options.charges == "embed" else None,
    )
    split_hash = hashlib.sha256(b"|".join(parts[p].astype("<i8").tobytes() for p in PARTS))
    passport = passport | {"split_sha256": split_hash.hexdigest()}
    if options.references not in ("fit", "none"):  # a file, which may change before a resume
        by_symbol = lambda one: {symbols()[z]: value for z, value in one.items()}
        passport |= {"references": {name: by_symbol(one) for name, one in found.items()}}
    return Dataset(
        name="molecules",
        items="molecules",
        elements=elements,
        arrays=arrays,
        targets=targets,
        split=parts,
        split_name="files" if len(_paths(options)) > 1 else options.split,
        buckets=make_buckets(arrays, buckets),
        passport=passport,
        about=_about(molecules, passport, parts, elements, targets),
        baselines=training_mean(labels, parts["train"]),
        references=found,
    )


def _paths(options: Options) -> tuple[str, ...]:
    """The file, or the files of the three parts."""
    return tuple(filter(None, (options.path, options.validation_path, options.test_path)))


def _checked(options: Options) -> Options:
    if not options.path:
        raise UserError(
            "config.data.path is empty: name a file of molecules, e.g. "
            "--config.data.path=molecules.csv. `demetar check FILE` says what is in it."
        )
    if not options.targets:
        raise UserError(
            "config.data.targets is empty: name at least one column and its unit, e.g. "
            "--config.data.targets=\"('homo:eV',)\"."
        )
    names = [parse_column(text).name for text in options.targets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"config.data.targets names {repeated[0]!r} twice: once is enough.")
    if options.split == "file" and not options.split_file:
        raise UserError("config.data.split is 'file': name it in config.data.split_file.")
    if bool(options.validation_path) != bool(options.test_path):
        raise UserError(
            f"config.data.validation_path ({options.validation_path!r}) and config.data.test_path "
            f"({options.test_path!r}): give both, or neither to split config.data.path."
        )
    check_known("config.data.charges", options.charges, ("refuse", "embed"))
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"config.data.max_failed ({options.max_failed}) must be from 0 to 1.")
    if options.split == "column" and not options.split_column:
        raise UserError("config.data.split is 'column': name it in config.data.split_column.")
    return options


def _geometry(options: Options) -> str:
    """What `auto` means: the positions of the file, if it has any."""
    first = preparation.first_row(options.path, options.smiles)
    known = {*first.columns, *first.node_columns}
    wanted = [parse_column(text).name for text in options.targets] + [options.group]
    wanted += [options.split_column] if options.split == "column" else []
    if not known.issuperset(filter(None, wanted)):
        known |= set(readers.columns(options.path))  # the first row may lack one
    for name in filter(None, wanted):
        if name not in known:
            raise UserError(
                f"{options.path} has no column {name!r}.{suggest(name, known)} Columns: "
                f"{', '.join(sorted(known)) or 'none'}."
            )
    if options.geometry != "auto":
        return options.geometry
    return "mmff" if first.positions is None else "file"


def _check_refused(passport: dict, options: Options) -> None:
    refused = sum(passport["refused"].values())
    rows = refused + passport["molecules"]
    if refused > options.max_failed * rows:
        first = "; ".join(
            f"{passport['sources'][file]['name']} row {number}: {message}"
            for file, number, message in passport["refused_rows"][:_SHOWN]
        )
        raise UserError(
            f"{refused} of {rows} rows have no molecule, more than config.data.max_failed "
            f"({options.max_failed:g}) allows. {first}. Correct or remove these rows, or raise "
            "config.data.max_failed."
        )


def _check_charges(molecules: OwnMolecules, options: Options) -> None:
    charges = np.unique(molecules.charge)
    if len(charges) > 1 and options.charges == "refuse":
        odd = molecules.charge != np.bincount(molecules.charge - charges[0]).argmax() + charges[0]
        raise UserError(
            f"The molecules have charges {', '.join(map(str, charges))}; row "
            f"{molecules.number[odd][0]} is the first of {odd.sum()} that differ. Set "
            "config.data.charges to 'embed', so that the model is told, or leave them out."
        )


def _check_elements(molecules: OwnMolecules, counts_GxZ, elements, parts) -> None:
    """Refuses an element that no training molecule has: nothing would be learned of it."""
    new_Z = ~(counts_GxZ[parts["train"]] > 0).any(axis=0)
    for part in PARTS[1:]:
        has_gxZ = (counts_GxZ[parts[part]] > 0) & new_Z
        if has_gxZ.any():
            g = has_gxZ.any(axis=1).argmax()
            raise UserError(
                f"Row {molecules.number[parts[part][g]]} is of the {part} part and has "
                f"{symbols()[elements[has_gxZ[g].argmax()]]}, which no training molecule has, so "
                "no number of it could be right. Leave such rows out, or put some into training "
                "(config.data.split 'column' or 'file')."
            )


def _target(column, molecules: OwnMolecules, options: Options) -> Target:
    """How a column is read out: of atoms where the file has a number of each."""
    if column.name in molecules.node_labels:
        if molecules.node_labels[column.name].ndim > 1:
            raise UserError(
                f"Column {column.name!r} has a vector of each atom, and no read-out gives one: "
                "name a column of single numbers."
            )
        return Target(column.name, column.unit, column.name, readout="node")
    extensive = column.name in options.extensive
    return Target(
        column.name, column.unit, column.name, "sum" if extensive else "cls", extensive=extensive
    )


def _split(
    molecules: OwnMolecules, counts_GxZ: np.ndarray, passport: dict, options: Options
) -> dict[str, np.ndarray]:
    if len(_paths(options)) > 1:
        # Files may share molecules: geometries of one, of a trajectory. `_about` says how many.
        if options.group:
            check_together(molecules.source, molecules.group)
        return {part: np.flatnonzero(molecules.source == k) for k, part in enumerate(PARTS)}
    column = None
    if options.split == "column":
        column = np.array(passport["parts"])[molecules.part]
    return make_split(
        options.split,
        keys=molecules.identity,
        groups=molecules.group if options.group else None,
        scaffolds=molecules.scaffold,
        column=column,
        file=options.split_file,
        fractions=options.fractions,
        fold=options.fold,
        num_folds=options.folds,
        seed=options.split_seed,
        numbers=molecules.number,
        num_rows=passport["molecules"] + sum(passport["refused"].values()),
        elements=counts_GxZ > 0,
    )


def _labels(
    molecules: OwnMolecules,
    targets: tuple[Target, ...],
    counts_GxZ: np.ndarray,
    elements,
    parts,
    options: Options,
) -> tuple[dict[str, np.ndarray], dict[str, dict[int, float]]]:
    """Labels of graphs with the references of atoms taken off, and these references."""
    unknown = set(options.extensive) - {target.name for target in targets}
    if unknown:
        raise UserError(
            f"config.data.extensive names {sorted(unknown)[0]!r}, which is no target. Targets: "
            f"{', '.join(target.name for target in targets)}."
        )
    labels, found = {}, {}
    for k, target in enumerate(targets):
        if target.per_node:
            continue
        label_G = molecules.labels[:, k]
        if target.extensive and options.references != "none":
            train = parts["train"]
            if options.references == "fit":
                found[target.name] = references.fit(label_G[train], counts_GxZ[train], elements)
            else:
                found[target.name] = references.read(options.references, target.name, elements)
            label_G = label_G - references.total(found[target.name], counts_GxZ, elements)
        labels[target.name] = label_G
    return labels, found


def _about(
    molecules: OwnMolecules, passport: dict, parts: Mapping, elements, targets
) -> dict[str, str]:
    """Lines for a person: what the data are, and what is odd about them."""
    names = ", ".join(source["name"] for source in passport["sources"])
    lines = {
        "data": f"{names}: {passport['molecules']} molecules, content "
        f"{passport['content_sha256'][:12]}",
        "geometry": passport["geometry"]
        + "; bonds from "
        + ", ".join(f"{source}: {n}" for source, n in sorted(passport["bonds_from"].items())),
    }
    if passport["refused"]:
        lines["refused"] = ", ".join(f"{s}: {n}" for s, n in sorted(passport["refused"].items()))
        rows = ", ".join(str(number) for _, number, _ in passport["refused_rows"][:_SHOWN])
        lines["refused"] += f"; the first are rows {rows}"
    train = parts["train"]
    atoms = np.concatenate(
        [
            np.unique(molecules.atomic_number[a:b])
            for a, b in zip(
                molecules.node_offset[train], molecules.node_offset[train + 1], strict=True
            )
        ]
    )
    counts = np.bincount(atoms, minlength=max(elements) + 1)
    few = [f"{symbols()[z]} in {counts[z]}" for z in elements if counts[z] < _FEW]
    if few:
        lines["rare"] = f"{', '.join(few)} training molecules: little can be learned about them"
    repeats = len(molecules.identity) - len(np.unique(molecules.identity))
    if repeats:
        columns = {target.name: molecules.labels[:, k] for k, target in enumerate(targets)}
        odd = conflicts(molecules.identity, columns)
        lines["duplicates"] = f"{repeats} rows repeat a molecule, {_where(molecules, parts)}"
        if odd:
            rows = ", ".join(str(molecules.number[row]) for row in odd[0].rows[:3])
            lines["duplicates"] += (
                f"; labels of {len(odd)} molecules differ, as {odd[0].name} of rows {rows} from "
                f"{odd[0].low:g} to {odd[0].high:g}"
            )
    return lines


def _where(molecules: OwnMolecules, parts: Mapping) -> str:
    """Whether rows of one molecule are in one part: those of files of their own may not be."""
    trained = molecules.identity[parts["train"]]
    also = {
        part: np.isin(molecules.identity[parts[part]], trained).sum()
        for part in PARTS
        if part != "train"
    }
    if not any(also.values()):
        return "always in one part"
    shares = ", ".join(f"{n} of {len(parts[part])} for {part}" for part, n in also.items())
    return f"and molecules that are trained on are in other parts too: {shares}"
