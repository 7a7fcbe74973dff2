"""What PyTorch sees: one operator, `torch.ops.gcrf_triton.pairwise_energy`, with every derivative."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from . import torch_engine

IMPLS = ("auto", "triton", "torch")
GROUP_VALUES = 700_000  # what lies between these and their gradient stays in cache
HALF_LIMIT = 2**14  # float16 ends at 2^16, and a gradient is at most twice the mass of a kernel


def check_impl(impl: str) -> None:
    """ValueError unless `impl` is the name of an engine or "auto"."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def select_engine(impl: str, device: torch.device) -> str:
    """Name the engine, "triton" or "torch", that `impl` stands for on a device; ValueError if a named one cannot run.

    "auto" is what the environment variable GCRF_TRITON_IMPL names, else Triton on GPUs it can run on, else PyTorch.
    """
    check_impl(impl)
    if impl == "auto":
        impl = os.environ.get("GCRF_TRITON_IMPL") or "auto"
        if impl not in IMPLS:
            raise ValueError(f"GCRF_TRITON_IMPL: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "torch" or (impl == "auto" and device.type not in ("cuda", "xpu")):
        return "torch"
    reason = _triton_unavailable(device)
    if reason is None:
        return "triton"
    if impl == "auto":
        warnings.warn(f"{reason}; the PyTorch engine, which is slower, takes its place", stacklevel=2)
        return "torch"
    raise ValueError(f"impl: 'triton' cannot run on {device}: {reason}; impl='torch' runs everywhere")


def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    return _triton_engine().unavailable(device)


def _triton_engine():
    return importlib.import_module(".triton_engine", __package__)  # late, as Triton need not be there


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
    from_logits: bool,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Energy of all pairs of a local window, and its gradient.

        energy   = sum_ij d_i s_j k_ij (1 - p_i . p_j)      (p_i^T mu p_j with a compatibility matrix mu)
        gradient = d energy / d p                           (-sum_j k_ij (s_j d_i + s_i d_j) p_j without one)

    From logits z, p is their softmax and the gradient is that by z. Else it is linear in p with a symmetric operator,
    so that its own gradient is that operator again.

    Args:
        input: p or z [N, C, H, W].
        features, source, destination, weights, sigmas, radius: as for `torch_engine.apply_pairwise`; one gate will do.
        compatibility: mu [C, C], used as it is.
        with_gradient: False leaves the gradient empty and saves its work.
        impl: as for `select_engine`.

    Returns:
        A scalar in the accumulation dtype, and [N, C, H, W] in the dtype and memory format of the input (in float32
        where float16 might not hold it). Differentiable in `input` any number of times.
    """
    gated = source is not None or destination is not None
    gradient = _empty_gradient(input, gated, weights, radius, with_gradient)
    if select_engine(impl, input.device) == "triton":
        engine = _triton_engine()
        if gated:
            ones = torch.ones_like(input[:, 0], dtype=accumulation_dtype(input.dtype))
            source, destination = (ones if gate is None else gate for gate in (source, destination))
        pairs = (features, source, destination, weights, sigmas, radius)
        if compatibility is None and engine.fits(input, input.shape[1] + (not from_logits), features, sigmas):
            return engine.potts_energy(input, *pairs, from_logits, gradient), gradient
        return _assemble(engine.apply_pairwise, input, *pairs, compatibility, from_logits, gradient), gradient
    pace = torch_engine.Pace(input.device, torch.get_num_threads())
    apply = functools.partial(torch_engine.apply_pairwise, pace=pace)
    energy = input.new_zeros((), dtype=accumulation_dtype(input.dtype))
    with torch_engine.limit_threads(input.device):
        for few in _groups(*input.shape):
            some = [feature[few] for feature in features]
            s, d = (gate if gate is None else gate[few] for gate in (source, destination))
            pairs = (some, s, d, weights, sigmas, radius)
            energy += _assemble(apply, input[few], *pairs, compatibility, from_logits, gradient[few], pace.lead)
    return energy, gradient


def _groups(images: int, *shape: int) -> list[slice]:
    # as many images at a time as have GROUP_VALUES, or one
    groups = -(-images // max(GROUP_VALUES // max(math.prod(shape), 1), 1))
    return [slice(images * group // groups, images * (group + 1) // groups) for group in range(groups)]


def _empty_gradient(input: Tensor, gated: bool, weights: Sequence[float], radius: int, with_gradient: bool) -> Tensor:
    dtype = input.dtype
    if dtype == torch.float16 and (gated or sum(weights) * (2 * radius + 1) ** 2 > HALF_LIMIT):
        dtype = torch.float32
    return torch.empty_like(input, dtype=dtype) if with_gradient else input.new_empty(0, dtype=dtype)


def _assemble(
    apply_pairwise: Callable[..., Tensor],
    input: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    mu: Tensor | None,
    from_logits: bool,
    gradient: Tensor,
    lead: Callable[[int], AbstractContextManager] = nullcontext,
) -> Tensor:
    # energy from the pairwise operator on columns, and its gradient unless that is empty
    dtype, with_gradient = accumulation_dtype(input.dtype), gradient.numel() > 0
    # softmax rounds whole vectors and what is left over differently
    with lead(0 if math.prod(input.shape[2:]) % torch_engine.SHARED_PIXELS else input.numel()):
        p = torch.softmax(input, dim=1, dtype=dtype) if from_logits else input.to(dtype)
    apply = functools.partial(apply_pairwise, features=features, weights=weights, sigmas=sigmas, radius=radius)
    s, d = (1 if gate is None else gate[:, None] for gate in (source, destination))
    if mu is not None:
        sums = apply([p] if s is d else [s * p, d * p], source=None, destination=None)
        rest, by_p = torch.zeros_like(p[:, 0]), _through_matrix(sums, s, d, mu)
    else:
        columns = [p] if from_logits else [p, p.new_ones(1).expand(p.shape[0], 1, *p.shape[2:])]
        sums = apply(columns, source=source, destination=destination, both_ends=with_gradient)
    with lead(p.numel()):
        if mu is None:
            rest, by_p = _agreement(sums) if from_logits else (sums[:, -1], sums[:, :-1].mul_(-2))
        mean = torch.linalg.vecdot(p, by_p, dim=1)
        if with_gradient and from_logits:
            torch.mul(p, by_p.sub_(mean[:, None]), out=gradient)
        elif with_gradient:
            gradient.copy_(by_p)
    # energy = sum_i rest_i + p_i . by_p_i / 2, pixel by pixel: where neighbours agree two equal sums cancel exactly
    energy = torch.add(rest, mean, alpha=0.5).sum()
    return energy if with_gradient or mu is not None else 2 * energy


def _agreement(sums: Tensor) -> tuple[Tensor, Tensor]:
    # Softmax sums to 1, so 1 - p_i . p_j = p_i^T (1 - I) p_j. With t the largest of G_i = (S p)_i that sums up to all
    # others plus p_i . (t - G_i): positive terms, exact where pixels agree. The gradient may lack what softmax drops.
    largest, others = sums, torch.zeros_like(sums[:, 0])
    while pairs := largest.shape[1] // 2:  # a tournament of the classes: losers are summed
        one, two, rest = largest.split([pairs, pairs, largest.shape[1] - 2 * pairs], dim=1)
        others += torch.minimum(one, two).sum(1)
        largest = torch.cat([torch.maximum(one, two), rest], dim=1)
    return others, torch.sub(2 * largest, sums, alpha=2, out=sums)


def _through_matrix(sums: Tensor, s: Tensor | int, d: Tensor | int, mu: Tensor) -> Tensor:
    by_source, by_destination = sums[:, : len(mu)], sums[:, -len(mu) :]  # K (s p) and K (d p), or K p for both
    return d * torch.einsum("cd,ndhw->nchw", mu, by_source) + s * torch.einsum("dc,ndhw->nchw", mu, by_destination)


def _through_softmax(p: Tensor, gradient: Tensor) -> Tensor:
    return p * (gradient - torch.linalg.vecdot(p, gradient, dim=1)[:, None])


@pairwise_energy.register_fake
def _(
    input, features, source, destination, compatibility, from_logits, weights, sigmas, radius, with_gradient, impl
):  # fmt: skip
    gated = source is not None or destination is not None
    energy = input.new_empty((), dtype=accumulation_dtype(input.dtype))
    return energy, _empty_gradient(input, gated, weights, radius, with_gradient)


def _setup_context(ctx, inputs, output):
    input, features, source, destination, compatibility, ctx.from_logits, *settings = inputs
    *ctx.settings, ctx.with_gradient, ctx.impl = settings
    ctx.dtype = input.dtype
    ctx.save_for_backward(output[1], input if ctx.from_logits else None, source, destination, compatibility, *features)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_energy, grad_gradient):
    if not ctx.with_gradient:
        raise RuntimeError("pairwise_energy was called with_gradient=False, which leaves nothing to differentiate")
    gradient, logits, source, destination, compatibility, *features = ctx.saved_tensors

    def linear(p: Tensor) -> Tensor:
        pairs = (features, source, destination, compatibility, False, *ctx.settings, True, ctx.impl)
        return pairwise_energy(p, *pairs)[1]

    # not in halves, as which a small factor would be rounded
    grad = None if grad_energy is None else grad_energy * gradient.to(grad_energy.dtype)
    if grad_gradient is not None:
        if logits is None:
            again = linear(grad_gradient)
        else:
            # gradient = J L p with the Jacobian J = diag(p) - p p^T of softmax; both factors depend on the logits
            p = torch.softmax(logits, dim=1, dtype=accumulation_dtype(logits.dtype))
            towards, v = linear(p), grad_gradient.to(p.dtype)
            means = ((p * other).sum(1, keepdim=True) for other in (towards, v))
            mean_towards, mean_v = means
            again = linear(_through_softmax(p, v)) + v * (towards - mean_towards) - towards * mean_v
            again = _through_softmax(p, again)
        grad = again if grad is None else grad + again
    return None if grad is None else grad.to(ctx.dtype), [None] * len(features), *[None] * 9


pairwise_energy.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    pairwise_energy.register_autocast(_device_type, torch.float32)
for _device_type in ("xpu", "mps"):
    with suppress(ValueError):  # PyTorch 2.11 and older registers for the CPU and CUDA alone
        pairwise_energy.register_autocast(_device_type, torch.float32)


@torch.library.custom_op("gcrf_triton::area_average", mutates_args=())
def area_average(image: Tensor, height: int, width: int) -> Tensor:
    """Average [N, F, h, w] down to [N, F, height, width]; opaque, as compilers fail on it where sizes are dynamic."""
    return torch.nn.functional.adaptive_avg_pool2d(image, (height, width))


@area_average.register_fake
def _(image, height, width):
    return image.new_empty(*image.shape[:2], height, width)
