"""What PyTorch sees: one operator, `torch.ops.gcrf_triton.pairwise_energy`, with every derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import torch_engine

ENGINES = ("auto", "torch")
Gates = tuple[Tensor | None, Tensor | None]


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
    gates = (source, destination)
    apply = functools.partial(
        torch_engine.apply_pairwise,
        features=features,
        weights=weights,
        sigmas=sigmas,
        radius=radius,
        threads=torch.get_num_threads(),
    )
    with torch_engine.serial_operations(input.device):
        p = input.to(accumulation_dtype(input.dtype))
        if compatibility is None:
            energy, product = _potts(apply, p, gates, with_product)
        else:
            energy, product = _with_compatibility(apply, p, gates, compatibility)
        return energy, product.contiguous() if with_product else p.new_empty(0)


def _potts(apply: Callable[..., Tensor], p: Tensor, gates: Gates, with_product: bool) -> tuple[Tensor, Tensor]:
    ones = p.new_ones(1).expand(p.shape[0], 1, *p.shape[2:])
    sums = apply([p, ones], source=gates[0], destination=gates[1], both_ends=with_product)
    product, mass = sums[:, :-1], sums[:, -1]
    # pixel by pixel, so that where neighbours agree two equal sums cancel exactly
    energy = (mass - torch.linalg.vecdot(p, product, dim=1)).sum()
    return energy if with_product else 2 * energy, product


def _with_compatibility(apply: Callable[..., Tensor], p: Tensor, gates: Gates, mu: Tensor) -> tuple[Tensor, Tensor]:
    source, destination = (1 if gate is None else gate[:, None] for gate in gates)
    columns = [p] if all(gate is None for gate in gates) else [source * p, destination * p]
    sums = apply(columns, source=None, destination=None).split(p.shape[1], dim=1)
    towards = destination * torch.einsum("cd,ndhw->nchw", mu, sums[0])  # d mu K (s p)
    away = source * torch.einsum("dc,ndhw->nchw", mu, sums[-1])  # s mu^T K (d p)
    return torch.linalg.vecdot(p, towards, dim=1).sum(), -0.5 * (towards + away)


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
        with torch_engine.serial_operations(product.device):
            grad = -2 * grad_energy * product
    if grad_product is not None:
        _, again = pairwise_energy(grad_product, features, source, destination, compatibility, *ctx.kernel, True)
        grad = again if grad is None else grad + again
    return None if grad is None else grad.to(ctx.dtype), [None] * len(features), *[None] * 7


pairwise_energy.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    pairwise_energy.register_autocast(_device_type, torch.float32)


@torch.library.custom_op("gcrf_triton::area_average", mutates_args=())
def area_average(image: Tensor, height: int, width: int) -> Tensor:
    """Average [N, F, h, w] down to [N, F, height, width]; opaque, since compilers fail on it where sizes are dynamic."""
    return torch.nn.functional.adaptive_avg_pool2d(image, (height, width))


@area_average.register_fake
def _(image, height, width):
    return image.new_empty(*image.shape[:2], height, width)
