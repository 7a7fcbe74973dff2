"""What PyTorch sees: one operator, `torch.ops.gcrf_triton.pairwise_energy`, with every derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
    symmetric: bool,
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
        features, source, destination, weights, sigmas, radius: as for `torch_engine.apply_pairwise`; one gate will do.
        compatibility: mu [C, C], used as it is.
        symmetric: mu is its own transpose, which makes gates cheaper.
        with_product: False leaves the product empty and, but for a matrix that is not symmetric, does half the work.

    Returns:
        A scalar and [N, C, H, W], in the accumulation dtype, differentiable in `input` any number of times.
    """
    if source is not None or destination is not None:
        ones = torch.ones_like(input[:, 0], dtype=accumulation_dtype(input.dtype))
        source, destination = (ones if gate is None else gate for gate in (source, destination))
    apply = functools.partial(
        torch_engine.apply_pairwise,
        features=features,
        weights=weights,
        sigmas=sigmas,
        radius=radius,
        threads=torch.get_num_threads(),
    )
    with torch_engine.limit_threads(input.device):
        p = input.to(accumulation_dtype(input.dtype))
        if compatibility is not None and not symmetric:
            energy, product = _any_matrix(apply, p, source, destination, compatibility)
        else:
            apply = functools.partial(apply, source=source, destination=destination, both_ends=with_product)
            energy, product = _potts(apply, p) if compatibility is None else _symmetric_matrix(apply, p, compatibility)
            energy = energy if with_product else 2 * energy
        return energy, product.contiguous() if with_product else p.new_empty(0)


def _potts(apply: Callable[..., Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
    sums = apply([p, p.new_ones(1).expand(p.shape[0], 1, *p.shape[2:])])
    product, mass = sums[:, :-1], sums[:, -1]
    # pixel by pixel, so that where neighbours agree two equal sums cancel exactly
    return (mass - torch.linalg.vecdot(p, product, dim=1)).sum(), product


def _symmetric_matrix(apply: Callable[..., Tensor], p: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    mixed = torch.einsum("cd,ndhw->nchw", mu, apply([p]))
    return torch.linalg.vecdot(p, mixed, dim=1).sum(), -mixed


def _any_matrix(
    apply: Callable[..., Tensor], p: Tensor, source: Tensor | None, destination: Tensor | None, mu: Tensor
) -> tuple[Tensor, Tensor]:
    s, d = (1 if gate is None else gate[:, None] for gate in (source, destination))
    columns = [p] if source is None else [s * p, d * p]
    sums = apply(columns, source=None, destination=None).split(p.shape[1], dim=1)
    towards = d * torch.einsum("cd,ndhw->nchw", mu, sums[0])  # d mu K (s p)
    away = s * torch.einsum("dc,ndhw->nchw", mu, sums[-1])  # s mu^T K (d p)
    return torch.linalg.vecdot(p, towards, dim=1).sum(), -0.5 * (towards + away)


@pairwise_energy.register_fake
def _(input, features, source, destination, compatibility, symmetric, weights, sigmas, radius, with_product):
    dtype = accumulation_dtype(input.dtype)
    return input.new_empty((), dtype=dtype), input.new_empty(input.shape if with_product else (0,), dtype=dtype)


def _setup_context(ctx, inputs, output):
    input, features, source, destination, compatibility, *ctx.settings, ctx.with_product = inputs
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
        _, again = pairwise_energy(grad_product, features, source, destination, compatibility, *ctx.settings, True)
        grad = again if grad is None else grad + again
    return None if grad is None else grad.to(ctx.dtype), [None] * len(features), *[None] * 8


pairwise_energy.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda", "xpu", "mps"):
    pairwise_energy.register_autocast(_device_type, torch.float32)


@torch.library.custom_op("gcrf_triton::area_average", mutates_args=())
def area_average(image: Tensor, height: int, width: int) -> Tensor:
    """Average [N, F, h, w] down to [N, F, height, width]; opaque, as compilers fail on it where sizes are dynamic."""
    return torch.nn.functional.adaptive_avg_pool2d(image, (height, width))


@area_average.register_fake
def _(image, height, width):
    return image.new_empty(*image.shape[:2], height, width)
