"""Exact nearest neighbours by blocked matrix product, on the CPU (numpy) or on a CUDA device (torch).

|a - b|^2 = |a|^2 + |b|^2 - 2ab makes all distances of a block of rows one matrix product, which is the fastest thing
either device does, but loses the small distances of near duplicates to rounding. So the product only picks candidates,
a few more than asked for; their distances are computed again from the differences and decide.
"""

import numpy as np

GROUP = 32  # columns that share a minimum in the first pass of a selection
CPU_BLOCK = 256  # rows; fewer waste the matrix product, more leave the caches
SPARE = 8  # candidates beyond k: rounding in the product may not push a true neighbour out


def exact_neighbours(
    x: np.ndarray, k: int, metric: str = "euclidean", device: str = "cpu", memory_mb: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of every row: indices (n, k) int32 and distances (n, k) float32, nearest first.

    x: (n, D) float32, finite.  k above n is lowered to n.  metric: one of EXACT_METRICS, as umap-learn has them (cosine
    and correlation in [0, 2]; two rows without direction are at 0, one and any other at 1).  The row itself comes
    first, at distance 0, also where it has duplicates; equal distances go by index, so nothing is left to chance.
    device: cpu, or a torch device such as cuda:0.  memory_mb: bound in MB (2^20 bytes) of a block of b rows, which
    takes b * (16 n + 8 (k + SPARE) D) bytes; a block has one row at least, on the CPU CPU_BLOCK at most.  Besides it
    there is one copy of x, (n, D) float32.
    """
    points = _euclidean_points(x, metric)
    n, n_columns = points.shape
    k = min(k, n)
    n_candidates = min(k + SPARE, n)
    search = _NumpySearch(points) if device == "cpu" else _TorchSearch(points, device)
    block = max(1, memory_mb * 2**20 // (16 * n + 8 * n_candidates * n_columns))
    block = min(block, CPU_BLOCK) if device == "cpu" else block
    indices, distances = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    for start in range(0, n, block):
        rows = np.arange(start, min(start + block, n))
        found, squared = search(rows, n_candidates)
        squared[found == rows[:, None]] = -1  # itself before its duplicates
        order = np.lexsort((found, squared), axis=1)[:, :k]
        indices[rows] = np.take_along_axis(found, order, axis=1)
        distances[rows] = np.take_along_axis(squared, order, axis=1)
    distances[:, 0] = 0
    return indices, np.sqrt(distances) if metric == "euclidean" else (distances / 2).clip(0, 2)


def _euclidean_points(x: np.ndarray, metric: str) -> np.ndarray:
    """Points (n, D or D + 1) float32 whose squared Euclidean distances are the squared distances, or twice cosine's."""
    if metric == "euclidean":
        return x - x.mean(axis=0)  # the smaller the norms, the less the product loses
    if metric == "correlation":
        x = x - x.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    no_direction = norms == 0
    return np.hstack([x / np.where(no_direction, 1, norms), no_direction]).astype(np.float32)


class _NumpySearch:
    """search(rows (b,), c) -> the c candidates of each row (b, c) int64, the row among them, and |a - b|^2, float32."""

    def __init__(self, points: np.ndarray):
        self.points, self.squares = points, np.einsum("nd,nd->n", points, points)

    def __call__(self, rows: np.ndarray, n_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        own = self.points[rows]
        scores = own @ self.points.T  # |b|^2 - 2ab: |a|^2 is the same along a row
        scores *= -2
        scores += self.squares
        scores[np.arange(len(rows)), rows] = -np.inf
        found = _smallest(scores, n_candidates)
        differences = self.points[found]
        differences -= own[:, None]
        return found, np.einsum("bcd,bcd->bc", differences, differences)


def _smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` smallest entries of each row, in any order: (b, count) int64.

    Selecting among n columns costs far more than one pass of minima: the smallest entries lie in the groups of columns
    whose minima are smallest, so where n is large only those groups (and the columns left over) are selected from.
    """
    n = scores.shape[1]
    n_groups = n // GROUP
    if n_groups <= 4 * count:
        return np.argpartition(scores, count - 1, axis=1)[:, :count]
    # Group g holds the columns whose remainder by n_groups is g.
    minima = scores[:, : n_groups * GROUP].reshape(len(scores), GROUP, n_groups).min(axis=1)
    groups = np.argpartition(minima, count - 1, axis=1)[:, :count]
    columns = (groups[:, None] + np.arange(GROUP)[:, None] * n_groups).reshape(len(scores), -1)
    left_over = np.broadcast_to(np.arange(n_groups * GROUP, n), (len(scores), n % GROUP))
    columns = np.hstack([columns, left_over])
    chosen = np.argpartition(np.take_along_axis(scores, columns, axis=1), count - 1, axis=1)[:, :count]
    return np.take_along_axis(columns, chosen, axis=1)


class _TorchSearch:
    """As _NumpySearch, on a torch device."""

    def __init__(self, points: np.ndarray, device: str):
        import torch

        self.points = torch.from_numpy(points).to(device)
        self.squares = self.points.square().sum(1)

    def __call__(self, rows: np.ndarray, n_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        own = self.points[rows[0] : rows[-1] + 1]
        scores = self.squares.addmm(own, self.points.T, alpha=-2)
        scores[range(len(rows)), rows] = -float("inf")
        found = scores.topk(n_candidates, dim=1, largest=False, sorted=False).indices
        squared = (self.points[found] - own[:, None]).square().sum(2)
        return found.cpu().numpy(), squared.cpu().numpy()
