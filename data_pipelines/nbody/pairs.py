"""Which pairs of particles are edges."""

import numpy as np

_AT_ONCE = 4_000_000  # distances; their arrays stay small


def edges_of(
    position_GxNx3: np.ndarray, spring_GxP: np.ndarray | None, neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Edges of each system: `(offset [G + 1] int64, rows [sum, 3] uint16)`.

    A row is (sender, receiver, 0) with sender < receiver; rows of a system are sorted.

    Args:
      position_GxNx3: at the input.
      spring_GxP: the pairs that act, in the order of `np.triu_indices(N, 1)`; None: all.
      neighbors: K; a pair is an edge if one is among the K nearest of the other. 0: every pair
        that acts. Not together with springs.
    """
    number, n, _ = position_GxNx3.shape
    i_P, j_P = np.triu_indices(n, 1)
    row_Px3 = np.stack([i_P, j_P, np.zeros_like(i_P)], axis=1).astype(np.uint16)
    if 0 < neighbors < n - 1:
        keep_GxP = _near(position_GxNx3, neighbors)[:, i_P, j_P]
    elif spring_GxP is not None:
        keep_GxP = spring_GxP
    else:
        return np.arange(number + 1) * len(i_P), np.tile(row_Px3, (number, 1))
    offset_G = np.concatenate([[0], np.cumsum(keep_GxP.sum(axis=1))])
    return offset_G, np.concatenate([row_Px3[keep_P] for keep_P in keep_GxP])


def _near(position_GxNx3: np.ndarray, neighbors: int) -> np.ndarray:
    """`[G, N, N]` bool, symmetric: whether one is among the nearest of the other."""
    number, n, _ = position_GxNx3.shape
    near_GxNxN = np.zeros((number, n, n), bool)
    size = max(1, _AT_ONCE // n**2)
    for start in range(0, number, size):
        x_gxNx3 = position_GxNx3[start : start + size].astype(np.float64)
        x_gxNx3 = x_gxNx3 - x_gxNx3.mean(axis=1, keepdims=True)  # squares are of distances, then
        square_gxN = np.square(x_gxNx3).sum(axis=-1)
        square_gxNxN = square_gxN[:, :, None] + square_gxN[:, None] - 2 * (x_gxNx3 @ x_gxNx3.mT)
        square_gxNxN[:, np.arange(n), np.arange(n)] = np.inf
        nearest_gxNxK = np.argpartition(square_gxNxN, neighbors - 1)[..., :neighbors]
        near_gxNxN = near_GxNxN[start : start + size]
        np.put_along_axis(near_gxNxN, nearest_gxNxK, True, axis=-1)
        near_gxNxN |= near_gxNxN.mT.copy()
    return near_GxNxN
