"""The operator that PyTorch sees, `torch.ops.gcrf_triton.pairwise_energy`: schema, engines and derivatives."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import torch_engine
from .energy import differentiate_gradient, energies_of_pixels, energy_of_products
from .engines import select_engine, triton_engine
from .planning import describe
from .problem import (
    Arguments,
    Energy,
    Mode,
    Problem,
    Window,
    copy_constants,
    flatten,
    hide_not_finite,
    problem_of_copies,
)
from .tensors import accumulation_dtype, holds_values, readable
from .threads import AdaptiveThreads, limit_threads

GROUP_VALUES = 700_000  # elements of the predictions of a group of images, whose temporaries then fit the cache
HALF_LIMIT = 2**14  # of the sum of affinities, twice which bounds a gradient without a matrix; float16 ends at 2^16


def energy_of_pairs(input: Tensor, problem: Problem, energy: Energy, per_pixel: bool, impl: str) -> Tensor:
    """The energy of an input, summed, or `per_pixel`, the energies [N, H, W] of all destination pixels."""
    if not per_pixel:
        with_gradient = torch.is_grad_enabled() and input.requires_grad
        mode = Mode.ENERGY_AND_GRADIENT if with_gradient else Mode.ENERGY
        return pairwise_energy(*flatten(input, problem, energy, mode, impl))[0]
    dtype = accumulation_dtype(input.dtype)
    _, problem = copy_constants(problem, dtype, input)
    input, problem = hide_not_finite(problem, input, energy.from_logits)
    p = torch.softmax(input, dim=1, dtype=dtype) if energy.from_logits else input.to(dtype)
    s = torch.ones_like(p[:, :1]) if problem.source is None else problem.source[:, None]
    # the gradient of a problem without gates is -2 times a product, and differentiable
    columns, affinities = torch.cat([p * s, s], dim=1), problem.without_gates()
    gradient = pairwise_energy(*flatten(columns, affinities, Energy(), Mode.ENERGY_AND_GRADIENT, impl))[1]
    return energies_of_pixels(p, -0.5 * gradient, problem.destination, energy)


def compute(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Energy of all pairs of a local window, its gradient, and a copy of what is constant.

    The `arguments` are those of `problem.Arguments`; `Problem` and `Energy` have the equations. The gradient is that by
    p, from logits that by the logits. From probabilities it is linear in p with a symmetric matrix, so that its own
    derivative is that matrix again. Where a prediction or a feature is not finite under a closed gate, its pixel leaves
    the sum, but not D.

    Returns:
        A scalar in the accumulation dtype. The gradient [N, C, H, W], empty without one, in the dtype and memory format
        of the input; in float32 where float16 might not hold it; that of a mean in float16 is stored times N H W, and
        backward divides by it. And what further derivatives need, the features and with gates both of them,
        [N, K, H, W] in the accumulation dtype. Differentiable in `input` any number of times.
    """
    flat = Arguments(*arguments)
    input, problem, energy, mode = flat.input, flat.problem(), flat.energy(), flat.mode()
    dtype, gradient = accumulation_dtype(input.dtype), _allocate_gradient(input, problem, energy, mode)
    gradient_scale = float(_gradient_scale(gradient, input, energy.mean))
    engine = triton_engine() if select_engine(flat.impl, input.device) == "triton" else None
    if engine and input.numel() and energy.is_potts():
        description = describe(input, problem, energy)
        if description.radius and engine.can_tile(description, input.device):
            value, copies = engine.potts_energy(input, problem, description, mode, gradient, gradient_scale)
            return value, gradient, copies

    with limit_threads(input.device):  # operations too short for several threads, which may have to wait for a core
        inverse = problem.inverse_divisor(dtype) if energy.mean else None
        copies, problem = copy_constants(problem, dtype, input)
        input, problem = hide_not_finite(problem, input, energy.from_logits)
    factor = 1 / max(_pixels(input), 1) if energy.mean and inverse is None else 1.0
    if inverse is not None:
        problem, energy, factor = _divided(problem, energy, inverse)
    value, scale = input.new_zeros((), dtype=dtype), factor * gradient_scale
    if engine:
        unlimited = AdaptiveThreads(input.device, threads=1)  # which sets no limit
        value += energy_of_products(engine.apply_pairwise, input, problem, energy, mode, gradient, scale, unlimited)
        return value / gradient_scale, gradient, copies
    threads = AdaptiveThreads(input.device, torch.get_num_threads())
    multiply = functools.partial(torch_engine.apply_pairwise, threads=threads)
    with limit_threads(input.device):
        for few in _groups(*input.shape):
            value += energy_of_products(
                multiply, input[few], problem.of_images(few), energy, mode, gradient[few], scale, threads
            )
    return value / gradient_scale, gradient, copies


def _pixels(input: Tensor) -> int:
    return input.shape[0] * input.shape[2] * input.shape[3]


def _divided(problem: Problem, energy: Energy, inverse: Tensor) -> tuple[Problem, Energy, float]:
    # an energy divided by D: by a factor if 1 / D can be read, else through a tensor that the energy is linear in
    if readable(inverse):
        return problem, energy, inverse.item()
    if energy.compatibility is not None:
        return problem, energy._replace(compatibility=inverse * energy.compatibility), 1.0
    source, destination = problem.source, problem.destination
    if destination is not None:
        destination = inverse * destination
    elif source is not None:
        source = inverse * source
    return problem._replace(source=source, destination=destination), energy, 1.0


def _groups(images: int, *shape: int) -> list[slice]:
    # slices of about equally many images, which have GROUP_VALUES at most, or are one
    groups = -(-images // max(GROUP_VALUES // max(math.prod(shape), 1), 1))
    return [slice(images * group // groups, images * (group + 1) // groups) for group in range(groups)]


def _allocate_gradient(input: Tensor, problem: Problem, energy: Energy, mode: Mode) -> Tensor:
    dtype = input.dtype
    if dtype == torch.float16:  # neither how large a matrix and gates are is known, nor how small the sum of a gate
        gates = (problem.source, problem.destination)
        weighted = any(gate is not None and (energy.mean or gate.dtype != torch.bool) for gate in gates)
        affinities = sum(term.weight for term in problem.terms) * problem.window.size()
        if energy.compatibility is not None or weighted or affinities > HALF_LIMIT:
            dtype = torch.float32
    if mode is Mode.ENERGY:
        return input.new_empty(0, dtype=dtype)
    return torch.empty_like(input, dtype=dtype)


def _gradient_scale(gradient: Tensor, input: Tensor, mean: bool) -> int:
    # what the operator's gradient is multiplied by
    return _pixels(input) if mean and gradient.dtype == torch.float16 else 1


def _fake(*arguments):
    flat = Arguments(*arguments)
    input, problem, dtype = flat.input, flat.problem(), accumulation_dtype(flat.input.dtype)
    n, _, height, width = input.shape
    channels = sum(problem.channel_counts()) + 2 * problem.has_gates()
    gradient = _allocate_gradient(input, problem, flat.energy(), flat.mode())
    return input.new_empty((), dtype=dtype), gradient, input.new_empty(n, channels, height, width, dtype=dtype)


class _PairwiseEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            value, gradient, copies = pairwise_energy(*arguments)
        flat = Arguments(*arguments)
        ctx.given = flat.source is not None, flat.destination is not None
        ctx.channels = tuple(feature.shape[1] for feature in flat.features)
        ctx.dtype = flat.input.dtype
        saved = flat.input if flat.from_logits or any(ctx.given) else None
        ctx.save_for_backward(gradient, saved, flat.compatibility, copies)
        ctx.terms, ctx.window, ctx.energy = (
            flat.terms(),
            Window(flat.radius),
            flat._replace(compatibility=None).energy(),
        )
        ctx.with_gradient, ctx.impl = flat.with_gradient, flat.impl
        ctx.mark_non_differentiable(copies)
        ctx.set_materialize_grads(False)
        return value, gradient, copies

    @staticmethod
    def backward(ctx, grad_energy, grad_gradient, _):
        if not ctx.with_gradient:
            raise RuntimeError("pairwise_energy was called with_gradient=False, which leaves nothing to differentiate")
        return _differentiate(ctx, grad_energy, grad_gradient), *[None] * (len(Arguments._fields) - 1)


def _differentiate(ctx, grad_energy: Tensor | None, grad_gradient: Tensor | None) -> Tensor | None:
    gradient, input, compatibility, copies = ctx.saved_tensors
    gradient_scale = _gradient_scale(gradient, gradient, ctx.energy.mean)
    factor = grad_energy if grad_energy is None or gradient_scale == 1 else grad_energy / gradient_scale
    if grad_gradient is None:
        if factor is None:
            return None
        if torch.is_grad_enabled() or not (holds_values(gradient) and holds_values(factor)):
            return (factor * gradient.to(factor.dtype)).to(ctx.dtype)
        # one pass, computed in float32: in halves a small factor would be rounded
        return torch.mul(gradient, factor.view(1, 1, 1, 1), out=torch.empty_like(gradient, dtype=ctx.dtype))

    problem = problem_of_copies(copies, ctx.channels, ctx.given, Problem((), ctx.terms, ctx.window))
    energy = ctx.energy._replace(compatibility=compatibility)
    inverse = problem.inverse_divisor(accumulation_dtype(gradient.dtype)) if energy.mean else None
    if problem.has_gates():
        input, problem = hide_not_finite(problem, input, energy.from_logits)
    linear = energy._replace(from_logits=False, mean=energy.mean and inverse is None)

    def gradient_by_p(p: Tensor) -> Tensor:
        product = pairwise_energy(*flatten(p, problem, linear, Mode.ENERGY_AND_GRADIENT, ctx.impl))[1]
        return product if inverse is None else inverse * product

    v = grad_gradient.to(accumulation_dtype(gradient.dtype)) * gradient_scale
    again = differentiate_gradient(gradient_by_p, input, v, energy)
    if factor is not None:
        again = again + factor * gradient.to(factor.dtype)
    return again.to(ctx.dtype)


def _autocast(*arguments):
    # any dtype will do, and what the operator is made of is not to be cast
    with torch.autocast(arguments[0].device.type, enabled=False):
        return pairwise_energy(*arguments)


_library = torch.library.Library("gcrf_triton", "FRAGMENT")  # its layers are thinner than those of custom_op
_library.define(
    "pairwise_energy(Tensor input, Tensor[] features, Tensor? source, Tensor? destination, Tensor? compatibility, "
    "bool from_logits, float[] weights, float[] sigmas, SymInt radius, bool mean, bool with_gradient, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.impl("pairwise_energy", compute, "CompositeExplicitAutograd")
_library.impl("pairwise_energy", _PairwiseEnergy.apply, "Autograd")
torch.library.register_fake("gcrf_triton::pairwise_energy", _fake, lib=_library)
for _device_type in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("pairwise_energy", _autocast, f"Autocast{_device_type}")
pairwise_energy = torch.ops.gcrf_triton.pairwise_energy.default  # `compute`, differentiable
