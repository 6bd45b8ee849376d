"""Our models against numbers of official implementations: same weights, same results, in float64.

The files hold inputs, weights, outputs, gradients and layers, see tests/golden/README.md. The
same tests run on any folder of files of this form:

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
SYSTEMS = {
    stem: system
    for module in pkgutil.iter_modules(golden_systems.__path__)
    for stem, system in getattr(
        importlib.import_module(f"golden_systems.{module.name}"), "SYSTEMS", {}
    ).items()
}


def close(ours, theirs, rtol, name):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_outputs_gradients_and_layers_equal_the_official_ones(path):
    golden = dict(np.load(path))
    meta = json.loads(str(golden["meta"])) if "meta" in golden else {}
    system = SYSTEMS[path.stem]
    batch, model = system.batch(golden, meta), system.model(golden, meta)
    official = lambda params: system.official(params, golden, meta)
    prefixed = lambda prefix: {
        name.removeprefix(prefix): golden[name] for name in golden if name.startswith(prefix)
    }
    weights = prefixed("param/")
    params = load_weights(initial_shapes(model, batch), official, weights)
    assert set(official(params)) | set(system.weightless) == set(weights)
    variables = system.variables(golden, meta)

    def total(params, position):
        graphs = batch.replace(position=position)
        predictions, captured = run(model, params, graphs, variables)
        output = system.output(predictions, graphs)
        return output.sum(), (output, system.layers(captured, predictions, graphs, golden, meta))

    function = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, (output, layers)), (by_params, by_position) = function(params, batch.position)
    close(output, golden["output"], system.rtol, "output")
    close(by_position, golden["gradient"], system.rtol, "gradient")
    for name, ours in layers.items():
        close(ours, golden[name], system.rtol, name)
    norms = prefixed("gradnorm/")
    for name, ours in official(by_params).items():
        if name in norms:
            close(np.linalg.norm(ours), norms[name], system.rtol, f"gradnorm/{name}")
