"""The Gated CRF loss with every window unfolded: the algorithm people run today and the benchmarks' baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_crf_unfold(
    probabilities: Tensor,
    features: Mapping[str, Tensor],
    kernels: Sequence[Mapping[str, float]],
    radius: int,
    source: Tensor | None = None,
    destination: Tensor | None = None,
    compatibility: Tensor | None = None,
) -> Tensor:
    """The numerator sum_ij d_i s_j k_ij m_ij of the loss, by autograd through tensors of (2 radius + 1)^2 windows.

    Args and equations are those of `gated_crf_energies`, with tensors in place of arrays. Differentiable everywhere.
    """
    n, classes, height, width = probabilities.shape
    inside = _windows(probabilities.new_ones(n, 1, height, width), radius)  # [N, 1, (2r+1)^2, H, W]
    inside[:, :, inside.shape[2] // 2] = 0  # j != i

    gated_kernel = torch.zeros_like(inside)
    for kernel in kernels:
        exponent = torch.zeros_like(inside)
        for name, sigma in kernel.items():
            if name == "weight":
                continue
            feature = _coordinates(probabilities) if name == "xy" else features[name]
            scaled = feature / sigma
            difference = _windows(scaled, radius) - scaled[:, :, None]
            exponent = exponent - 0.5 * difference.square().sum(1, keepdim=True)
        gated_kernel = gated_kernel + kernel["weight"] * exponent.exp()
    gated_kernel = gated_kernel * inside
    if source is not None:
        gated_kernel = gated_kernel * _windows(source[:, None].to(probabilities), radius)
    if destination is not None:
        gated_kernel = gated_kernel * destination[:, None, None].to(probabilities)

    messages = (gated_kernel * _windows(probabilities, radius)).sum(2)  # sum_j s_j d_i k_ij p_j  [N, C, H, W]
    if compatibility is None:
        return gated_kernel.sum() - (probabilities * messages).sum()
    mu = (classes - 1) * compatibility / compatibility.sum(1, keepdim=True)
    return torch.einsum("nchw,cd,ndhw->", probabilities, mu, messages)


def _windows(image: Tensor, radius: int) -> Tensor:
    # [N, C, H, W] -> [N, C, (2r+1)^2, H, W], zeros outside the image
    n, channels, height, width = image.shape
    return F.unfold(image, 2 * radius + 1, padding=radius).view(n, channels, -1, height, width)


def _coordinates(like: Tensor) -> Tensor:
    n, _, height, width = like.shape
    y = torch.arange(height, dtype=like.dtype, device=like.device)
    x = torch.arange(width, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(n, 2, height, width)
