"""demetar: trains DEMETAr, a double-encoder equivariant graph transformer.

`demetar.pretrained_names()` lists the models that ship; `demetar.load_pretrained(name)` gives
one as a function of NumPy arrays.
"""

_PUBLIC = ("load_pretrained", "pretrained_names")


def __getattr__(name: str):
    # Late: `import demetar` takes no time, JAX takes a second.
    if name in _PUBLIC:
        from demetar.tools import shipped

        return getattr(shipped, name)
    raise AttributeError(f"module 'demetar' has no attribute {name!r}")


def __dir__():
    return sorted((*globals(), *_PUBLIC))
