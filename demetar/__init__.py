"""demetar: trains DEMETAr, a double-encoder equivariant graph transformer, and uses it.

`demetar.load_model(name, run folder or file)` gives a model of molecules, `demetar.ase` its
calculator. `demetar.pretrained_names()` lists the models that ship; `demetar.load_pretrained(name)`
gives one of particles as a function of NumPy arrays.
"""

import importlib

# Name -> module that has it.
_PUBLIC = {
    "load_model": "demetar.inference.model",
    "load_pretrained": "demetar.inference.particles",
    "pretrained_names": "demetar.inference.package",
    "ase": "demetar.ase",
}


def __getattr__(name: str):
    # Late: `import demetar` takes no time, JAX takes a second.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'demetar' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__ == f"demetar.{name}" else getattr(module, name)


def __dir__():
    return sorted((*globals(), *_PUBLIC))
