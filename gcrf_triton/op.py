"""What PyTorch sees: one operator, `torch.ops.gcrf_triton.pairwise_energy`, with every derivative."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from . import torch_engine
from .messages import warn_caller

IMPLS = ("auto", "triton", "torch")
GROUP_VALUES = 700_000  # what lies between these and their gradient stays in cache
HALF_LIMIT = 2**14  # float16 ends at 2^16, and without a matrix a gradient is at most twice the mass of a kernel


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
        warn_caller(f"{reason}; the PyTorch engine, which is slower, takes its place")
        return "torch"
    raise ValueError(f"impl: 'triton' cannot run on {device}: {reason}; impl='torch' runs everywhere")


def _triton_unavailable(device: torch.device) -> str | None:
    if not _triton_is_installed():
        return "Triton is not installed (pip install triton; it exists for Linux)"
    return _triton_engine().unavailable(device)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_engine() -> Any:
    return importlib.import_module(".triton_engine", __package__)  # late, as Triton need not be there


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of a dtype are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute(
    input: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    compatibility: Tensor | None,
    from_logits: bool,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    mean: bool,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy of all pairs of a local window, its gradient, and a copy of what is constant.

        energy   = 1/D sum_ij d_i s_j k_ij (1 - p_i . p_j)      (p_i^T mu p_j with a compatibility matrix mu)
        gradient = d energy / d p                               (-1/D sum_j k_ij (s_j d_i + s_i d_j) p_j without one)

    From logits z, p is their softmax and the gradient is that by z. Else it is linear in p with a symmetric operator,
    so that its own gradient is that operator again. Where a prediction or a feature is not finite under a closed gate,
    its pixel leaves the sum, but not D.

    Args:
        input: p or z [N, C, H, W].
        features: [N, F, H, W] each, floating or uint8, which is scaled to [0, 1].
        source, destination: gates s and d [N, H, W] of any real dtype; one that is not given is 1.
        weights, sigmas, radius: as for `torch_engine.apply_pairwise`.
        compatibility: mu [C, C], used as it is.
        mean: D is the sum of d, of s if only that is given, else N H W, and at least 1; without `mean` it is 1.
        with_gradient: False leaves the gradient empty and saves its work.
        impl: as for `select_engine`.

    Returns:
        A scalar in the accumulation dtype; [N, C, H, W] in the dtype and memory format of the input, but in float32
        where float16 might not hold it, and of a mean in float16 times N H W, as it would fall below float16's range;
        and what further derivatives need, the features and with gates both of them, [N, K, H, W] in the accumulation
        dtype. Differentiable in `input` any number of times.
    """
    gradient = _empty_gradient(input, source, destination, compatibility, weights, radius, mean, with_gradient)
    unit = float(_pixels(input)) if mean and gradient.dtype == torch.float16 else 1.0
    radius = min(radius, max(*input.shape[2:], 1) - 1)
    factor = 1 / max(_pixels(input), 1) if mean and source is None and destination is None else 1.0
    engine = _triton_engine() if select_engine(impl, input.device) == "triton" else None
    columns = input.shape[1] + (not from_logits)
    tiles = engine and compatibility is None and radius and input.numel()
    if engine and tiles and engine.fits(input, columns, features, sigmas):
        scaled = [factor * weight for weight in weights]
        energy, constants = engine.potts_energy(
            input, features, source, destination, scaled, sigmas, radius, mean, from_logits, gradient, unit
        )
        return energy, gradient, constants

    with torch_engine.limit_threads(input.device):  # too short for a team that may have to wait for a core
        inverse = inverse_mass(source, destination, input) if mean else None
        constants, input, features, source, destination = prepare(input, features, source, destination, from_logits)
    if inverse is not None and readable(inverse):
        factor = inverse.item()
    elif inverse is not None and compatibility is not None:
        compatibility = inverse * compatibility
    elif inverse is not None and destination is not None:
        destination = inverse * destination
    elif inverse is not None and source is not None:
        source = inverse * source
    energy = input.new_zeros((), dtype=accumulation_dtype(input.dtype))
    if engine:
        if source is not None or destination is not None:
            ones = torch.ones_like(input[:, 0], dtype=energy.dtype)
            source, destination = (ones if gate is None else gate for gate in (source, destination))
        pairs = (features, source, destination, weights, sigmas, radius)
        energy += _assemble(engine.apply_pairwise, input, *pairs, compatibility, from_logits, gradient, factor * unit)
        return energy / unit, gradient, constants
    pace = torch_engine.Pace(input.device, torch.get_num_threads())
    apply = functools.partial(torch_engine.apply_pairwise, pace=pace)
    with torch_engine.limit_threads(input.device):
        for few in _groups(*input.shape):
            some = [feature[few] for feature in features]
            s, d = (gate if gate is None else gate[few] for gate in (source, destination))
            pairs = (some, s, d, weights, sigmas, radius)
            energy += _assemble(
                apply, input[few], *pairs, compatibility, from_logits, gradient[few], factor * unit, pace.lead
            )
    return energy / unit, gradient, constants


def _pixels(input: Tensor) -> int:
    return input.shape[0] * input.shape[2] * input.shape[3]


def inverse_mass(source: Tensor | None, destination: Tensor | None, input: Tensor) -> Tensor | None:
    """1 / D of a mean with gates."""
    gate = source if destination is None else destination
    return None if gate is None else 1 / ordered_sum(gate.to(accumulation_dtype(input.dtype))).clamp(min=1)


def ordered_sum(values: Tensor) -> Tensor:
    """Sum [N, H, W] dimension by dimension: the same bits on any number of threads."""
    return values.sum(2).sum(1).sum()


def prepare(
    input: Tensor, features: Sequence[Tensor], source: Tensor | None, destination: Tensor | None, from_logits: bool
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, Tensor | None]:
    """What the operator is made of, with PyTorch alone, for what Triton's tiles cannot do.

    Returns the constants [N, K, H, W]: a copy of the channels of all features and, with any gate, of both gates, in the
    accumulation dtype; and, where nothing leaves the sum views of them, the input, the features and the given gates.
    """
    dtype = accumulation_dtype(input.dtype)
    copies = [input.new_empty(input.shape[0], 0, *input.shape[2:], dtype=dtype)]
    copies += [feature.to(dtype) / 255 if feature.dtype == torch.uint8 else feature.to(dtype) for feature in features]
    if source is not None or destination is not None:
        open_gate = input.new_ones(1, dtype=dtype).expand_as(input[:, 0])
        copies += [(open_gate if gate is None else gate.to(dtype))[:, None] for gate in (source, destination)]
    constants = torch.cat(copies, dim=1)
    channels = [feature.shape[1] for feature in features]
    features = list(constants[:, : sum(channels)].split(channels, dim=1))
    if source is None and destination is None:
        return constants, input, features, None, None
    both, values = constants[:, -2:].unbind(1), input.detach()
    # a sum is finite only if all its terms are
    if readable(values) and all(tensor.sum(dtype=dtype).isfinite() for tensor in (values, *features)):
        s, d = (None if gate is None else copy for gate, copy in zip((source, destination), both, strict=True))
        return constants, input, features, s, d
    finite = values.amax(1).isfinite() if from_logits else values.isfinite().all(1)  # a logit of -inf is a 0
    for feature in features:
        finite = finite & feature.isfinite().all(1)
    hidden = ~finite & ((both[0] == 0) | (both[1] == 0))  # [N, H, W]
    columns = hidden[:, None]
    features = [feature.masked_fill(columns, 0) for feature in features]
    s, d = (gate.masked_fill(hidden, 0) for gate in both)
    return constants, input.masked_fill(columns, 0), features, s, d


def holds_values(tensor: Tensor) -> bool:
    """Whether values lie in the tensor itself: not while compiling, nor in fake tensors and wrappers of torch.func."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    wrapped = is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) and not wrapped


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and holds_values(tensor)


def _groups(images: int, *shape: int) -> list[slice]:
    # as many images at a time as have GROUP_VALUES, or one
    groups = -(-images // max(GROUP_VALUES // max(math.prod(shape), 1), 1))
    return [slice(images * group // groups, images * (group + 1) // groups) for group in range(groups)]


def _empty_gradient(
    input: Tensor,
    source: Tensor | None,
    destination: Tensor | None,
    compatibility: Tensor | None,
    weights: Sequence[float],
    radius: int,
    mean: bool,
    with_gradient: bool,
) -> Tensor:
    dtype = input.dtype
    if dtype == torch.float16:  # neither how large a matrix and gates are is known, nor how small the sum of a gate
        weighted = any(gate is not None and (mean or gate.dtype != torch.bool) for gate in (source, destination))
        if compatibility is not None or weighted or sum(weights) * (2 * radius + 1) ** 2 > HALF_LIMIT:
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
    scale: float,
    lead: Callable[[int], AbstractContextManager] = nullcontext,
) -> Tensor:
    # energy from the pairwise operator on columns, and its gradient, unless that is empty, both times a scale
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
            by_p = by_p.sub_(mean[:, None])
        if with_gradient and scale != 1:  # here, as small kernels would fall below float32's range, and be slow
            by_p = by_p.mul_(scale)
        if with_gradient and from_logits:
            torch.mul(p, by_p, out=gradient)
        elif with_gradient:
            gradient.copy_(by_p)
    # energy = sum_i rest_i + p_i . by_p_i / 2, pixel by pixel: where neighbours agree two equal sums cancel exactly
    energy = scale * torch.add(rest, mean, alpha=0.5).sum()
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


def _fake(
    input, features, source, destination, compatibility, from_logits, weights, sigmas, radius, mean, with_gradient, impl
):  # fmt: skip
    dtype, gated = accumulation_dtype(input.dtype), source is not None or destination is not None
    n, _, height, width = input.shape
    channels = sum(feature.shape[1] for feature in features) + 2 * gated
    gradient = _empty_gradient(input, source, destination, compatibility, weights, radius, mean, with_gradient)
    return input.new_empty((), dtype=dtype), gradient, input.new_empty(n, channels, height, width, dtype=dtype)


class _PairwiseEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, features, source, destination, compatibility, *settings):
        with torch._C._AutoDispatchBelowAutograd():
            energy, gradient, constants = pairwise_energy(
                input, features, source, destination, compatibility, *settings
            )
        ctx.from_logits, *ctx.settings, ctx.mean, ctx.with_gradient, ctx.impl = settings
        ctx.channels = [feature.shape[1] for feature in features]
        ctx.gated = source is not None, destination is not None
        ctx.dtype = input.dtype
        saved = input if ctx.from_logits or any(ctx.gated) else None
        ctx.save_for_backward(gradient, saved, compatibility, constants)
        ctx.mark_non_differentiable(constants)
        ctx.set_materialize_grads(False)
        return energy, gradient, constants

    @staticmethod
    def backward(ctx, grad_energy, grad_gradient, _):
        if not ctx.with_gradient:
            raise RuntimeError("pairwise_energy was called with_gradient=False, which leaves nothing to differentiate")
        return _differentiate(ctx, grad_energy, grad_gradient), *[None] * 11


def _differentiate(ctx, grad_energy: Tensor | None, grad_gradient: Tensor | None) -> Tensor | None:
    gradient, input, compatibility, constants = ctx.saved_tensors
    unit = _pixels(gradient) if ctx.mean and gradient.dtype == torch.float16 else 1
    factor = grad_energy if grad_energy is None or unit == 1 else grad_energy / unit
    if grad_gradient is None:
        if factor is None:
            return None
        if torch.is_grad_enabled() or not (holds_values(gradient) and holds_values(factor)):
            return (factor * gradient.to(factor.dtype)).to(ctx.dtype)
        # one pass, computed in float32: in halves a small factor would be rounded
        return torch.mul(gradient, factor.view(1, 1, 1, 1), out=torch.empty_like(gradient, dtype=ctx.dtype))

    *features, gates = constants.split([*ctx.channels, 2 * any(ctx.gated)], dim=1)
    source, destination = (gates[:, place] if given else None for place, given in enumerate(ctx.gated))
    inverse = inverse_mass(source, destination, gradient) if ctx.mean else None
    if any(ctx.gated):
        _, input, features, source, destination = prepare(input, features, source, destination, ctx.from_logits)
    mean = ctx.mean and inverse is None

    def linear(p: Tensor) -> Tensor:
        pairs = (features, source, destination, compatibility, False, *ctx.settings, mean, True, ctx.impl)
        product = pairwise_energy(p, *pairs)[1]
        return product if inverse is None else inverse * product

    v = grad_gradient.to(accumulation_dtype(gradient.dtype)) * unit
    if ctx.from_logits:
        # gradient = J L p with the Jacobian J = diag(p) - p p^T of softmax; both factors depend on the logits
        p = torch.softmax(input, dim=1, dtype=v.dtype)
        towards = linear(p)
        mean_towards, mean_v = ((p * other).sum(1, keepdim=True) for other in (towards, v))
        again = linear(_through_softmax(p, v)) + v * (towards - mean_towards) - towards * mean_v
        again = _through_softmax(p, again)
    else:
        again = linear(v)
    if factor is not None:
        again = again + factor * gradient.to(factor.dtype)
    return again.to(ctx.dtype)


def _autocast(*arguments):
    # any dtype will do, and what the operator is made of is not to be cast
    with torch.autocast(arguments[0].device.type, enabled=False):
        return pairwise_energy(*arguments)


_library = torch.library.Library("gcrf_triton", "FRAGMENT")  # its layers are thinner than those of custom_op
_library.define("pairwise_energy" + torch.library.infer_schema(compute, mutates_args=()))
_library.impl("pairwise_energy", compute, "CompositeExplicitAutograd")
_library.impl("pairwise_energy", _PairwiseEnergy.apply, "Autograd")
torch.library.register_fake("gcrf_triton::pairwise_energy", _fake, lib=_library)
for _device_type in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("pairwise_energy", _autocast, f"Autocast{_device_type}")
pairwise_energy = torch.ops.gcrf_triton.pairwise_energy.default  # `compute`, differentiable


@torch.library.custom_op("gcrf_triton::area_average", mutates_args=())
def area_average(image: Tensor, height: int, width: int) -> Tensor:
    """Average [N, F, h, w] down to [N, F, height, width]; opaque, as compilers fail on it where sizes are dynamic."""
    return torch.nn.functional.adaptive_avg_pool2d(image, (height, width))


@area_average.register_fake
def _(image, height, width):
    return image.new_empty(*image.shape[:2], height, width)
