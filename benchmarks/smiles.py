"""What it costs to have a SMILES in the place of a geometry: HOMO of QM9's test molecules.

    python benchmarks/smiles.py --model=file=DIR --model=mmff=DIR

Each model (a name of the geometry it was trained on, and the folder of its run) predicts all test
molecules of the split twice: with QM9's own geometry (DFT), and with the one that `demetar predict`
makes of the first SMILES that QM9 gives (ETKDGv3, MMFF94s). Molecules of which none can be made are
left out of both. Writes benchmarks/results/smiles.json and docs/results/smiles.md, the words around
whose numbers are in benchmarks/smiles_page.md. Test molecules
were looked at by no choice: weights are the best by validation.
"""

import argparse
import json
import pathlib
import string

import numpy as np
from ours import keep

from data_pipelines.edges import rows_of
from data_pipelines.molecules.record import Molecule
from data_pipelines.prepared import default_cache_dir
from data_pipelines.registry import load_dataset
from demetar.inference.model import load_model
from demetar.speed.machine import processor
from demetar.training import runtime
from demetar.training.provenance import git_commit

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smiles.json"
PAGE = ROOT / "docs" / "results" / "smiles.md"
GEOMETRIES = {"file": "QM9's own (DFT)", "mmff": "made from SMILES"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True, metavar="GEOMETRY=DIR")
    parser.add_argument("--cache-dir", default=str(default_cache_dir()))
    options = parser.parse_args()
    runtime.configure_for_prediction()
    sets = {name: _test_part(name, options.cache_dir) for name in GEOMETRIES}
    common = sorted(set(sets["file"][0]) & set(sets["mmff"][0]))
    result = {"split": "dimenet", "test": len(sets["file"][0]), "molecules": len(common)}
    result |= {"machine": processor(), "commit": git_commit(), "models": {}}
    for text in options.model:
        trained_on, _, folder = text.partition("=")
        model = load_model(folder)
        row = result["models"][trained_on] = {
            "trained": json.loads((pathlib.Path(folder) / "result.json").read_text())["git_commit"],
            "errors": {},
        }
        for name, (molecules, labels) in sets.items():
            found = model.predict_molecules([molecules[index] for index in common])["homo"]
            error = np.abs(found - np.array([labels[index] for index in common]))
            row["errors"][name] = {"mae": error.mean(), "interval_95": _interval(error)}
            print(f"trained on {trained_on}, {GEOMETRIES[name]}: {error.mean():.2f} meV")
    keep(result, RESULTS)
    PAGE.write_text(_page(result))


def _test_part(geometry: str, cache_dir: str) -> tuple[dict[int, Molecule], dict[int, float]]:
    """Number -> molecule, and number -> HOMO in meV, of the test part."""
    options = {"source": "qm9pack", "path": "", "targets": ("homo",), "split": "dimenet"}
    options |= {"edges": "bonds", "edge_cutoff": 0.0, "geometry": geometry}
    dataset = load_dataset(name="qm9", cache_dir=cache_dir, **options)
    arrays, label = dataset.arrays, dataset.arrays.graph_labels["homo"]
    molecules, labels = {}, {}
    for g in dataset.split["test"].tolist():
        atoms = slice(*arrays.node_offset[g : g + 2])
        bonds = rows_of(arrays.edges, np.array([g]))
        index = int(arrays.index[g])
        numbers, positions = arrays.atomic_number[atoms], arrays.position[atoms]
        molecules[index] = Molecule(index, numbers, positions, bonds, 0, 1, geometry, "smiles")
        labels[index] = float(label[g])
    return molecules, labels


def _interval(error: np.ndarray) -> list[float]:
    rng = np.random.default_rng(0)
    means = [rng.choice(error, len(error)).mean() for _ in range(1_000)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def _page(result: dict) -> str:
    """The page, from the numbers."""
    rows = []
    for trained_on, row in result["models"].items():
        cells = [
            f"{found['mae']:.1f} ({found['interval_95'][0]:.1f} to {found['interval_95'][1]:.1f})"
            for found in row["errors"].values()
        ]
        rows.append(f"| {GEOMETRIES[trained_on]} | {' | '.join(cells)} | {row['trained']} |")
    text = string.Template(pathlib.Path(__file__).with_name("smiles_page.md").read_text())
    counts = {name: f"{result[name]:,}" for name in ("molecules", "test")}
    words = {name: result[name] for name in ("split", "machine", "commit")}
    return text.substitute(words | counts, rows="\n".join(rows))


if __name__ == "__main__":
    main()
