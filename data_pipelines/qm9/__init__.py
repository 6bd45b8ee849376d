"""QM9: 130,831 small molecules of H, C, N, O and F, with fifteen properties."""

from collections.abc import Mapping

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset, make_buckets, training_mean
from data_pipelines.edges import load_edges
from data_pipelines.errors import UserError
from data_pipelines.qm9 import geometry as geometries
from data_pipelines.qm9 import node_features as atoms
from data_pipelines.qm9 import preparation
from data_pipelines.qm9.properties import ELEMENTS, get_properties, labels, references
from data_pipelines.qm9.splits import get_split, limited
from data_pipelines.scattering import features

DEFAULTS = {
    "source": "qm9pack",  # qm9pack | raw | tfds | sample
    "path": "",  # of the files, for raw and tfds
    "targets": ("homo",),  # any of data_pipelines/qm9/properties.py
    "split": "dimenet",  # cormorant | dimenet | torchmd | random
    "limit": 0,  # molecules of the training part, drawn by seed 0; a fifth in the others; 0: all
    "geometry": "file",  # file | mmff | etkdg (made from SMILES) | file+mmff (each molecule twice)
    "edges": "cutoff",  # bonds | cutoff (all pairs within edge_cutoff, and bonds) | complete
    "edge_cutoff": 3.0,  # angstrom, for cutoff
    "node_features": "none",  # none | pyg (PyTorch Geometric's 11 of each atom)
    "graph_features": "none",  # none | scattering (of each molecule, computed once)
    "scattering": dict(features.DEFAULTS),  # what scattering is made with
}


def load(
    *,
    source,
    path,
    targets,
    split,
    edges,
    edge_cutoff,
    limit: int = 0,
    geometry: str = "file",
    node_features: str = "none",
    graph_features: str = "none",
    scattering: Mapping = features.DEFAULTS,
    cache_dir: str = "",
    buckets=(),
) -> Dataset:
    """QM9 with the options of `DEFAULTS`."""
    rows = get_properties(targets)
    molecules, passport = preparation.load(source, path, cache_dir)
    parts = limited(get_split(split, molecules.index), limit)
    if geometry != "file" and node_features != "none":
        raise UserError(
            f"config.data.node_features ({node_features!r}) describes atoms in the order of the "
            f"file, but config.data.geometry is {geometry!r}: set one of them to its default."
        )
    molecules, parts, passport = geometries.load(
        geometry, molecules, parts, passport, source, path, cache_dir
    )
    graph_labels = labels(rows, molecules.properties, molecules.composition())
    arrays = GraphArrays(
        index=molecules.index,
        node_offset=molecules.node_offset,
        atomic_number=molecules.atomic_number,
        position=molecules.position,
        edges=load_edges(molecules, edges, edge_cutoff, passport, cache_dir),
        graph_labels=graph_labels,
        node_feature=atoms.load(node_features, source, path, cache_dir),
        graph_feature=features.load(
            graph_features, scattering, molecules, parts["train"], cache_dir
        ),
    )
    bonds = passport["smiles_and_geometry"]
    about = {
        "data": f"qm9 from {passport['source']}: {passport['molecules']} molecules, content "
        f"{passport['content_sha256'][:12]}",
        "bonds": f"SMILES and geometry agree for {bonds['agree']} molecules; the SMILES is kept "
        f"for {bonds['heavy_graph_differs']}, distances decide for {bonds['smiles_unusable']}",
    }
    if geometry != "file":
        facts = passport["geometry"]
        about["geometry"] = (
            f"{geometry}, made from SMILES by RDKit {facts['rdkit']}; left out where that failed: "
            f"{facts['failed']} of {facts['failed'] + facts['molecules']} molecules"
        )
    changes = (f"limit {limit}" if limit else "", f"geometry {geometry}" * (geometry != "file"))
    return Dataset(
        name="qm9",
        items="molecules",
        elements=ELEMENTS,
        arrays=arrays,
        targets=tuple(row.target for row in rows),
        split=parts,
        split_name=", ".join(filter(None, (split, *changes))),
        buckets=make_buckets(arrays, buckets),
        passport=passport,
        about=about,
        references=references(rows),
        baselines=training_mean(graph_labels, parts["train"]),
    )
