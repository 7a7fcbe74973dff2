"""From products with S to energies and gradients: the algebra of Potts model, compatibility matrix and logits.

With G = S p, and without a matrix, energy = sum_i ((S 1)_i - p_i . G_i), and its gradient by p is -2 G. From logits, p
sums to 1, so that 1 - p_i . p_j = p_i^T (1 - I) p_j, and

    energy = sum_i p_i^T (1 - I) G_i = sum_i (sum_{c != t} G_ic + sum_c p_ic (G_it - G_ic))      t: argmax of G_i

whose terms are all positive, so that nothing cancels where pixels agree. The gradient by the logits is that by p times
the Jacobian of softmax, diag(p) - p p^T, which takes away what is the same for all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .problem import Energy, Mode, Problem
from .tensors import accumulation_dtype
from .threads import WHOLE_SHARES, AdaptiveThreads

# `apply_pairwise` of an engine: S v for columns v, but for Mode.ENERGY any r with sum_i v_i . r_i = v^T S v / 2
Multiply = Callable[[Sequence[Tensor], Problem, Mode], Tensor]


def energy_of_products(
    multiply: Multiply,
    input: Tensor,
    problem: Problem,
    energy: Energy,
    mode: Mode,
    gradient: Tensor,
    scale: float,
    threads: AdaptiveThreads,
) -> Tensor:
    """Return the energy of an input times a scale, and fill its gradient if wanted, times that too.

    D is left to the caller, who puts 1 / D into the scale or into the problem.
    """
    dtype, with_gradient = accumulation_dtype(input.dtype), mode is Mode.ENERGY_AND_GRADIENT
    whole = math.prod(input.shape[2:]) % WHOLE_SHARES == 0  # else softmax rounds differently with several threads
    with threads.using(input.numel() if whole else 0):
        p = torch.softmax(input, dim=1, dtype=dtype) if energy.from_logits else input.to(dtype)
    if energy.compatibility is not None:
        by_p = _through_matrix(multiply, p, problem, energy.compatibility)
        base = torch.zeros_like(p[:, 0])
    else:
        ones = [p.new_ones(1).expand(p.shape[0], 1, *p.shape[2:])] if energy.counts_mass() else []
        products = multiply([p, *ones], problem, mode)
    with threads.using(p.numel()):
        if energy.compatibility is None:
            base, by_p = (_from_logits if energy.from_logits else _from_probabilities)(products)
        inner = torch.linalg.vecdot(p, by_p, dim=1)
        if with_gradient:
            if energy.from_logits:
                by_p = by_p.sub_(inner[:, None])
            if scale != 1:  # here, as small affinities would fall below float32's range, and be slow
                by_p = by_p.mul_(scale)
            if energy.from_logits:
                torch.mul(p, by_p, out=gradient)
            else:
                gradient.copy_(by_p)
    # base_i + p_i . by_p_i / 2, before the sum over pixels: where neighbours agree two equal sums cancel exactly
    value = scale * torch.add(base, inner, alpha=0.5).sum()
    counted_once = energy.compatibility is None and not with_gradient  # every pair, at one of its pixels
    return 2 * value if counted_once else value


def _from_probabilities(products: Tensor) -> tuple[Tensor, Tensor]:
    # (S 1)_i [N, H, W] and -2 G_i: the gradient by p
    return products[:, -1], products[:, :-1].mul_(-2)


def _from_logits(products: Tensor) -> tuple[Tensor, Tensor]:
    # sum_{c != t} G_ic [N, H, W] and 2 (G_it - G_i): the gradient by p, up to what is the same for all classes
    largest, others = products, torch.zeros_like(products[:, 0])
    while pairs := largest.shape[1] // 2:  # in pairs of classes: the smaller ones are summed, the larger ones go on
        one, two, odd = largest.split([pairs, pairs, largest.shape[1] - 2 * pairs], dim=1)
        others += torch.minimum(one, two).sum(1)
        largest = torch.cat([torch.maximum(one, two), odd], dim=1)
    return others, torch.sub(2 * largest, products, alpha=2, out=products)


def _through_matrix(multiply: Multiply, p: Tensor, problem: Problem, mu: Tensor) -> Tensor:
    # d mu K (s p) + s mu^T K (d p), with the affinities K alone: mu need not be symmetric
    s, d = (1 if gate is None else gate[:, None] for gate in (problem.source, problem.destination))
    # no name for the columns, which would keep them beside what follows
    products = multiply([s * p, d * p] if problem.has_gates() else [p], problem.without_gates(), Mode.PRODUCT)
    by_source, by_destination = products[:, : len(mu)], products[:, -len(mu) :]  # the same without gates
    return d * torch.einsum("ce,ne...->nc...", mu, by_source) + s * torch.einsum("ec,ne...->nc...", mu, by_destination)


def energies_of_pixels(p: Tensor, products: Tensor, destination: Tensor | None, energy: Energy) -> Tensor:
    """Energies d_i sum_j k_ij s_j (1 - p_i . p_j) [N, H, W] from products of the affinities with columns [s p | s]."""
    mu = energy.compatibility
    if mu is None and energy.from_logits:
        mu = 1 - torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    if mu is None:
        energies = products[:, -1] - (p * products[:, :-1]).sum(1)
    else:
        rows = mu.view(*mu.shape, *[1] * (p.dim() - 2))
        towards = torch.stack([(row * products[:, :-1]).sum(1) for row in rows], dim=1)
        energies = (p * towards).sum(1)
    return energies if destination is None else destination * energies


def differentiate_gradient(
    gradient_by_p: Callable[[Tensor], Tensor], input: Tensor, v: Tensor, energy: Energy
) -> Tensor:
    """The gradient's own derivative, applied to a cotangent v.

    By p, the gradient is a symmetric matrix L times p: the derivative is L v. By logits it is J L p, with the Jacobian
    J = diag(p) - p p^T of softmax, and both factors depend on the logits.
    """
    if not energy.from_logits:
        return gradient_by_p(v)
    p = torch.softmax(input, dim=1, dtype=v.dtype)
    l_p = gradient_by_p(p)
    mean_l_p, mean_v = ((p * other).sum(1, keepdim=True) for other in (l_p, v))
    by_p = gradient_by_p(_through_softmax(p, v)) + v * (l_p - mean_l_p) - l_p * mean_v
    return _through_softmax(p, by_p)


def _through_softmax(p: Tensor, gradient: Tensor) -> Tensor:
    return p * (gradient - torch.linalg.vecdot(p, gradient, dim=1)[:, None])
