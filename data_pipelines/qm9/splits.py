"""Named splits of QM9, equal to those that other projects publish.

Each is a permutation of the 130,831 characterized molecules in ascending number, cut into
train, validation and test. Where two projects share sizes they still differ in the
permutation: never compare errors across splits without saying so.
"""

import hashlib

import numpy as np

from data_pipelines.dataset import PARTS
from data_pipelines.errors import UserError, check_known
from data_pipelines.qm9.sources import NUM_CHARACTERIZED, characterized_indices

# name: (permutation of n positions, molecules for training, for validation); test: the rest.
SPLITS = {
    # Cormorant, EGNN, and TFDS qm9/cormorant.
    "cormorant": (lambda n: np.random.RandomState(0).permutation(n), 100_000, 17_748),
    # TFDS qm9/dimenet. (DimeNet's own qm9_eV.npz excludes a slightly different set.)
    "dimenet": (lambda n: np.random.RandomState(42).permutation(n), 110_000, 10_000),
    # TorchMD-NET, Equiformer, GotenNet.
    "torchmd": (lambda n: np.random.default_rng(1).permutation(n), 110_000, 10_000),
}
# For data that are not the whole of QM9, such as the sample: 80 % / 10 % / 10 %.
_FRACTIONS = "random"
SPLIT_NAMES = (*SPLITS, _FRACTIONS)


def get_split(name: str, index_G: np.ndarray) -> dict[str, np.ndarray]:
    """Positions into `index_G` (ascending published numbers) of each part, int64."""
    check_known("config.data.split", name, SPLIT_NAMES)
    num = len(index_G)
    if name == _FRACTIONS:
        order = np.random.RandomState(0).permutation(num)
        num_train, num_validation = num * 8 // 10, num // 10
    else:
        if not np.array_equal(index_G, characterized_indices()):
            raise UserError(
                f"Split {name!r} is a permutation of the {NUM_CHARACTERIZED} characterized "
                f"molecules of QM9, but the data hold {num}"
                + (" others" if num == NUM_CHARACTERIZED else "")
                + f". Complete the data, or set config.data.split to {_FRACTIONS!r}."
            )
        permutation, num_train, num_validation = SPLITS[name]
        order = permutation(num)
    cuts = np.split(order, [num_train, num_train + num_validation])
    return dict(zip(PARTS, cuts, strict=True))


def split_hash(split: dict[str, np.ndarray], index_G: np.ndarray) -> str:
    """SHA-256 over the published numbers (int64, from 1) of train, validation and test."""
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(part.encode() + np.ascontiguousarray(index_G[split[part]], "<i8").tobytes())
    return digest.hexdigest()


def limited(parts: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """`limit` molecules of train (0: all), at most a fifth of that of the others; drawn by seed 0.

    The molecules of a limit are among those of a larger one.
    """
    if limit < 0 or 0 < limit < 5:
        raise UserError(
            f"config.data.limit is {limit}: 0 for all molecules, else at least 5 of the training "
            "part (a fifth of them in the other parts)."
        )
    if not limit:
        return parts
    sizes = {part: limit if part == "train" else limit // 5 for part in parts}
    drawn = lambda rows, n: rows[np.random.RandomState(0).permutation(len(rows))[:n]]
    return {part: drawn(rows, sizes[part]) for part, rows in parts.items()}
