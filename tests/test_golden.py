"""Our models against numbers of official implementations: same weights, same results, in float64.

The files hold inputs, weights, outputs, gradients and layers, see tests/golden/README.md; what a
file has is compared. The same tests run on any folder of files of this form, named after a system
(`et.npz`, `et_other.npz`):

    DEMETAR_GOLDEN=FOLDER pytest tests/test_golden.py
"""

import importlib
import json
import os
import pathlib
import pkgutil

import golden_systems
import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from golden_systems.common import initial_shapes, load_weights, run

pytestmark = pytest.mark.usefixtures("float64")
FOLDER = pathlib.Path(os.environ.get("DEMETAR_GOLDEN", REPOSITORY / "tests" / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
SYSTEMS = {
    stem: system
    for module in pkgutil.iter_modules(golden_systems.__path__)
    for stem, system in getattr(
        importlib.import_module(f"golden_systems.{module.name}"), "SYSTEMS", {}
    ).items()
}


def load(path):
    """(arrays of the file, its `meta`, the system that its name begins with)."""
    names = [name for name in SYSTEMS if f"{path.stem}_".startswith(f"{name}_")]
    assert names, f"{path.name} begins with none of {', '.join(SYSTEMS)}"
    golden = dict(np.load(path))
    meta = json.loads(str(golden["meta"])) if "meta" in golden else {}
    return golden, meta, SYSTEMS[max(names, key=len)]


def prefixed(golden, prefix):
    return {name.removeprefix(prefix): golden[name] for name in golden if name.startswith(prefix)}


def close(ours, theirs, rtol, name):
    assert np.shape(ours) == np.shape(theirs), name
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * scale, err_msg=name)


def values_and_gradients(model, golden, meta, system, variables):
    """((loss, (output, layers)), gradients by parameters and positions), and our parameters."""
    batch = system.batch(golden, meta)
    official = lambda params: system.official(params, golden, meta)
    shapes = initial_shapes(system.model(golden, meta), batch)
    params = load_weights(shapes, official, prefixed(golden, "param/"))

    def loss(params, position):
        graphs = batch.replace(position=position)
        predictions, captured = run(model, params, graphs, variables)
        output = system.output(predictions, graphs)
        layers = system.layers(captured, predictions, graphs, golden, meta)
        return system.loss(output, golden), (output, layers)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return function(params, batch.position), params


# Of a model with several files one by default, for they take the longest; of a folder that is
# named all.
_SLOW = () if "DEMETAR_GOLDEN" in os.environ else ("se3_transformer_nbody", "tfn_nbody")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) if p.stem in _SLOW else p for p in FILES],
    ids=lambda path: path.stem,
)
def test_outputs_gradients_and_layers_equal_the_official_ones(path):
    golden, meta, system = load(path)
    model, variables = system.model(golden, meta), system.variables(golden, meta)
    ((loss, (output, layers)), (by_params, by_position)), params = values_and_gradients(
        model, golden, meta, system, variables
    )
    same = lambda ours, name: close(ours, golden[name], system.rtol, name)
    same(output, "output" if "output" in golden else "prediction")
    for name, ours in {"gradient": by_position, "loss": loss}.items():
        if name in golden:
            same(ours, name)
    for name, ours in layers.items():
        mask = golden.get("node_mask")
        if mask is not None and ours.shape[:2] == mask.shape:
            real = np.broadcast_to(mask.reshape(*mask.shape, *[1] * (ours.ndim - 2)), ours.shape)
            ours = np.where(real, ours, golden[name])
        same(ours, name)

    ours = system.official(by_params, golden, meta)
    grads, norms = prefixed(golden, "grad/"), prefixed(golden, "gradnorm/")
    for name in ours:
        if name in grads:
            same(ours[name], f"grad/{name}")
        if name in norms:
            same(np.linalg.norm(ours[name]), f"gradnorm/{name}")
    reach = lambda name: not (grads | norms) or np.any((grads | norms).get(name, 0))
    missing = set(prefixed(golden, "param/")) - set(ours) - set(system.weightless)
    assert not [name for name in missing if reach(name)]


OF_BATCH = [path for path in FILES if "output_train" in np.load(path).files]


@pytest.mark.parametrize("path", OF_BATCH, ids=lambda path: path.stem)
def test_with_the_statistics_of_the_batch(path):
    golden, meta, system = load(path)
    model = system.of_batch(golden, meta)
    ((_, (output, _)), (_, by_position)), _ = values_and_gradients(model, golden, meta, system, {})
    close(output, golden["output_train"], system.rtol, "output_train")
    close(by_position, golden["gradient_train"], system.rtol, "gradient_train")
