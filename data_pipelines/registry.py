"""The registry of data sets: a name in `config.data.name` -> how to load it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from data_pipelines import nbody, qm9
from data_pipelines.dataset import Dataset
from data_pipelines.errors import check_known
from data_pipelines.molecules import loading as molecules


class Source(NamedTuple):
    """A data set that a config can name.

    Attributes:
      load: its own options, `cache_dir` and `buckets` -> the data set, prepared where needed.
      defaults: its own options in the group `config.data`.
    """

    load: Callable[..., Dataset]
    defaults: dict[str, Any]


DATASETS = {
    "qm9": Source(qm9.load, qm9.DEFAULTS),
    "nbody": Source(nbody.load, nbody.DEFAULTS),
    "molecules": Source(molecules.load, molecules.DEFAULTS),
}


def load_dataset(*, name: str, cache_dir: str, buckets=(), **options) -> Dataset:
    """Loads (preparing it first where needed) what the group `config.data` names.

    Args:
      name: of `DATASETS`.
      cache_dir: folder of prepared data; empty: `prepared.default_cache_dir()`.
      buckets: node limits; empty: the best for the data.
      **options: the data set's own; keys of `config.data` for the pipeline are left alone.
    """
    check_known("config.data.name", name, DATASETS)
    source = DATASETS[name]
    own = {key: options[key] for key in source.defaults if key in options}
    return source.load(cache_dir=cache_dir, buckets=buckets, **own)
