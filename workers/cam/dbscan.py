"""DBSCAN (Ester et al., KDD 1996) on a distance matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

NOISE = -1


def dbscan(distances: NDArray[np.float64], eps: float, min_samples: int) -> NDArray[np.int64]:
    """Clusters of points by density.

    A point with `min_samples` points within `eps`, itself counted, is a core point; core points within `eps` of each other
    are of one cluster. Another point within `eps` of a core point joins that one's cluster: of several, the one whose
    first core point comes first, so that only such border points depend on the order of the points.

    Parameters
    ----------
    distances
        `(N, N)`, symmetric.
    eps, min_samples
        Density.

    Returns
    -------
    ndarray
        `(N,)` int64: clusters from 0 in the order of their first core points, `NOISE` for points in none.
    """
    near = distances <= eps
    core = near.sum(1) >= min_samples
    labels = np.full(len(distances), NOISE, dtype=np.int64)
    if not core.any():
        return labels
    # components come numbered by their first member
    _, labels[core] = connected_components(near[np.ix_(core, core)], directed=False)
    of_core = np.where(near[:, core], labels[core], len(labels)).min(1)
    border = ~core & (of_core < len(labels))
    labels[border] = of_core[border]
    return labels
