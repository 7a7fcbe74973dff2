"""What PyTorch sees: one operator, `torch.ops.gcrf_triton.pairwise_energy`, with every derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import torch_engine

ENGINES = ("auto", "torch")


def select_engine(impl: str) -> str:
    """Name the engine that `impl` stands for; ValueError if there is none of that name."""
    if impl not in ENGINES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, ENGINES))}, got {impl!r}")
    return "torch"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of a dtype are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("gcrf_triton::pairwise_energy", mutates_args=())
def pairwise_energy(
    input: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    compatibility: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    with_product: bool,
) -> tuple[Tensor, Tensor]:
    """Energy of all pairs of a local window, and half its negative gradient.

        energy  = sum_ij d_i s_j k_ij (1 - p_i . p_j)      (p_i^T mu p_j with a compatibility matrix mu)
        product = -1/2 d energy / d p                      (sum_j k_ij (s_j d_i + s_i d_j) p_j / 2 without one)

    The product is linear in p with a symmetric operator, so its own gradient is that operator again.

    Args:
        input: p [N, C, H, W].
        features, source, destination, weights, sigmas, radius: as for `torch_engine.apply_pairwise`.
        compatibility: mu [C, C], used as it is.
        with_product: False leaves the product empty and does half the work.

    Returns:
        A scalar and [N, C, H, W], in the accumulation dtype, differentiable in `input` any number of times.
    """
    p = input.to(accumulation_dtype(input.dtype))
    kernel = (weights, sigmas, radius)
    if compatibility is None:
        ones = p.new_ones(1).expand(p.shape[0], 1, *p.shape[2:])
        sums = torch_engine.apply_pairwise([p, ones], features, source, destination, *kernel, both_ends=with_product)
        product, mass = sums.split([p.shape[1], 1], dim=1)
        # the sum over pairs, pixel by pixel: where neighbours agree the difference of two equal sums is exactly 0
        energy = (mass[:, 0] - torch.linalg.vecdot(p, product, dim=1)).sum() * (1 if with_product else 2)
    else:
        columns = [p] if source is None or destination is None else [source[:, None] * p, destination[:, None] * p]
        sums = torch_engine.apply_pairwise(columns, features, None, None, *kernel).split(p.shape[1], dim=1)
        from_sources, from_destinations = sums[0], sums[-1]
        towards = torch.einsum("cd,ndhw->nchw", compatibility, from_sources)
        energy = torch.linalg.vecdot(columns[-1], towards, dim=1).sum()
        away = torch.einsum("dc,ndhw->nchw", compatibility, from_destinations)
        if source is not None and destination is not None:
            towards, away = destination[:, None] * towards, source[:, None] * away
        product = -0.5 * (towards + away)
    return energy, product.contiguous() if with_product else p.new_empty(0)


@pairwise_energy.register_fake
def _(input, features, source, destination, compatibility, weights, sigmas, radius, with_product):
    dtype = accumulation_dtype(input.dtype)
    return input.new_empty((), dtype=dtype), input.new_empty(input.shape if with_product else (0,), dtype=dtype)


def _setup_context(ctx, inputs, output):
    input, features, source, destination, compatibility, *ctx.kernel, ctx.with_product = inputs
    ctx.dtype = input.dtype
    ctx.save_for_backward(output[1], source, destination, compatibility, *features)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_energy, grad_product):
    if not ctx.with_product:
        raise RuntimeError("pairwise_energy was called with_product=False, which leaves nothing to differentiate")
    product, source, destination, compatibility, *features = ctx.saved_tensors
    grad = None
    if grad_energy is not None:
        grad = -2 * grad_energy * product
    if grad_product is not None:
        _, again = pairwise_energy(grad_product, features, source, destination, compatibility, *ctx.kernel, True)
        grad = again if grad is None else grad + again
    return None if grad is None else grad.to(ctx.dtype), [None] * len(features), *[None] * 7


pairwise_energy.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    pairwise_energy.register_autocast(_device_type, torch.float32)
