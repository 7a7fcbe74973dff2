"""The Gated CRF energy as explicit loops over pixels in float64, to be read beside the paper (arXiv 1906.04651)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def gated_crf_energies(
    probabilities: np.ndarray,
    features: Mapping[str, np.ndarray],
    kernels: Sequence[Mapping[str, float]],
    radius: int,
    source: np.ndarray | None = None,
    destination: np.ndarray | None = None,
    compatibility: np.ndarray | None = None,
) -> np.ndarray:
    """Energy of every destination pixel.

        e_i = d_i sum_j s_j k_ij m_ij,    m_ij = 1 - p_i . p_j,  or  p_i^T mu' p_j  with a compatibility matrix mu
        k_ij = sum_m w_m exp(-1/2 sum_f |f_i - f_j|^2 / sigma_mf^2)

    over the pixels j != i of the same image with |y_j - y_i| <= radius and |x_j - x_i| <= radius. The f of "xy" are the
    pixel coordinates. mu' is C - 1 times mu with every row divided by its sum.

    Args:
        probabilities: p [N, C, H, W].
        features: name -> [N, F, H, W], of the size of the prediction.
        kernels: mappings with a "weight" and a sigma a modality.
        radius: pixels.
        source, destination: gates s and d [N, H, W], 1 if None.
        compatibility: mu [C, C].

    Returns:
        e [N, H, W], float64. The loss is its sum over the sum of d, or of s, or the number of pixels.
    """
    import numpy as np  # which the rest of the project does without

    n_images, n_classes, height, width = probabilities.shape
    probabilities = probabilities.astype(np.float64)
    if compatibility is not None:
        compatibility = (n_classes - 1) * compatibility / compatibility.sum(axis=1, keepdims=True)
    energies = np.zeros((n_images, height, width))
    for n in range(n_images):
        for y in range(height):
            for x in range(width):
                for v in range(max(y - radius, 0), min(y + radius + 1, height)):
                    for u in range(max(x - radius, 0), min(x + radius + 1, width)):
                        if (v, u) == (y, x):
                            continue
                        p_i, p_j = probabilities[n, :, y, x], probabilities[n, :, v, u]
                        potts = compatibility is None
                        disagreement = 1 - p_i @ p_j if potts else p_i @ compatibility @ p_j
                        gate = 1.0 if source is None else float(source[n, v, u])
                        gate *= 1.0 if destination is None else float(destination[n, y, x])
                        energies[n, y, x] += gate * _kernel(features, kernels, n, (y, x), (v, u)) * disagreement
    return energies


def _kernel(
    features: Mapping[str, np.ndarray],
    kernels: Sequence[Mapping[str, float]],
    n: int,
    i: tuple[int, int],
    j: tuple[int, int],
) -> float:
    total = 0.0
    for kernel in kernels:
        exponent = 0.0
        for name, sigma in kernel.items():
            if name == "weight":
                continue
            if name == "xy":
                squared_distance = float((i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2)
            else:
                f_i, f_j = (features[name][n, :, y, x].astype(float) for y, x in (i, j))
                squared_distance = float(((f_i - f_j) ** 2).sum())
            exponent -= squared_distance / (2 * sigma**2)
        total += kernel["weight"] * math.exp(exponent)
    return total
