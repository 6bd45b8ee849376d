"""WaveScatt's own regression: ridge on scattering coefficients, by a closed formula, no loop.

    python benchmarks/scattering.py --targets=homo,U0
    SMOKE=1 python benchmarks/scattering.py        seconds, on 500 molecules and a coarse grid

The coefficients are those that `config.data.graph_features=scattering` prepares, standardised. With
`--order=2` or 3 also all products of two or three of their widest principal components (the paper
adds products one by one, the best first). The strength of the ridge is chosen by the validation
part for each target; the test part is then looked at once.
"""

import argparse
import itertools
import os
import pathlib
import time

import numpy as np

from data_pipelines.dataset import Dataset
from data_pipelines.json_text import json_text
from data_pipelines.qm9 import DEFAULTS as QM9
from data_pipelines.registry import load_dataset
from data_pipelines.scattering import features

# Of the squares' sum over the training part, each column having deviation 1.
STRENGTHS = 10.0 ** np.arange(-12, 1)
SMOKE = {
    "source": "sample",
    "split": "random",
    "scattering": features.DEFAULTS
    | {"shape": (21, 17, 15), "J": 1, "L": 1, "pixels_per_angstrom": 1.0},
}


def columns(feature_GxP: np.ndarray, train_g: np.ndarray, order: int, num_components: int):
    """[G, columns] float64, standardised: the features, then products of their components."""
    standard_GxP = features.standardized(feature_GxP, train_g)
    parts = [standard_GxP]
    if order > 1:
        covariance_PxP = standard_GxP[train_g].T @ standard_GxP[train_g] / len(train_g)
        spread_P, directions_PxP = np.linalg.eigh(covariance_PxP)
        widest = np.argsort(spread_P)[::-1][:num_components]
        component_GxC = standard_GxP @ (directions_PxP[:, widest] / np.sqrt(spread_P[widest]))
    for factors in range(2, order + 1):
        # As many triples as pairs, about: a third of the components.
        count = component_GxC.shape[1] // (1 if factors == 2 else 3)
        rows = np.array(list(itertools.combinations_with_replacement(range(count), factors)))
        product_GxC = component_GxC[:, rows[:, 0]]
        for row in rows.T[1:]:  # in place: these are gigabytes
            product_GxC *= component_GxC[:, row]
        product_GxC -= product_GxC[train_g].mean(axis=0)
        product_GxC /= product_GxC[train_g].std(axis=0)
        parts.append(product_GxC)
    return np.concatenate(parts, axis=1)


def ridge(dataset: Dataset, column_GxC: np.ndarray) -> dict[str, dict]:
    """Of each target the strength that validation chooses, and mean absolute errors."""
    train, validation, test = (dataset.split[p] for p in ("train", "validation", "test"))
    spread_C, directions_CxC = np.linalg.eigh(column_GxC[train].T @ column_GxC[train])
    spread_C = np.maximum(spread_C, 0)
    found = {}
    for target in dataset.targets:
        label_G = dataset.labels(target)
        mean = label_G[train].mean()
        along_C = directions_CxC.T @ (column_GxC[train].T @ (label_G[train] - mean))
        weights = {
            strength: directions_CxC @ (along_C / (spread_C + strength * len(train)))
            for strength in STRENGTHS
        }

        def error(graphs_g, weight_C, label_G=label_G, mean=mean):
            return float(np.abs(column_GxC[graphs_g] @ weight_C + mean - label_G[graphs_g]).mean())

        by_validation = {s: error(validation, weight_C) for s, weight_C in weights.items()}
        best = min(by_validation, key=by_validation.get)
        found[target.name] = {
            "unit": target.unit,
            "strength": float(best),
            "validation": by_validation[best],
            "test": error(test, weights[best]),
            "training_mean": float(np.abs(label_G[test] - mean).mean()),
        }
    return found


def main(arguments=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default="homo", help="of QM9, with commas")
    parser.add_argument("--source", default=QM9["source"])
    parser.add_argument("--split", default=QM9["split"])
    parser.add_argument("--cache_dir", default="")
    parser.add_argument("--order", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--components", type=int, default=40, help="that are multiplied")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    given = {"source": options.source, "split": options.split}
    given |= {"edges": "bonds", "targets": tuple(options.targets.split(","))}
    smoke = bool(os.environ.get("SMOKE"))
    data = QM9 | given | (SMOKE if smoke else {})
    start = time.perf_counter()
    dataset = load_dataset(name="qm9", cache_dir=options.cache_dir, **data)
    feature_GxP = features.compute(data["scattering"], dataset.arrays, options.cache_dir)
    computed = time.perf_counter()
    components = min(options.components, 12) if smoke else options.components
    column_GxC = columns(feature_GxP, dataset.split["train"], options.order, components)
    result = {
        "command": "python benchmarks/scattering.py",
        "order": options.order,
        "split": data["split"],
        "graphs": {part: len(graphs) for part, graphs in dataset.split.items()},
        "columns": column_GxC.shape[1],
        "targets": ridge(dataset, column_GxC),
        "seconds": {"features": computed - start, "fit": time.perf_counter() - computed},
    }
    for name, row in result["targets"].items():
        print(
            f"{name}: test {row['test']:.4g} {row['unit']} (validation {row['validation']:.4g}, "
            f"strength {row['strength']:.0e}; the mean of training: {row['training_mean']:.4g})"
        )
    if options.json:
        options.json.write_text(json_text(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
