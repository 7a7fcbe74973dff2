"""The pairwise operator in PyTorch: tiles of pixels, half a window of offsets, both ends of a pair at once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

HALF_LOG2_E = 0.5 * math.log2(math.e)  # exp(-x / 2) = exp2(-HALF_LOG2_E x)
TILE_VALUES = 250_000  # of a tile: they stay in one core's cache, and an operation on them outlasts its own start
SMALLEST_TILE, LARGEST_TILE = 2048, 32768  # pixels
VECTORS = 32  # elements of a step of PyTorch's vectorised loops, at the most
GRAIN = 32768  # elements below which PyTorch gives a thread no share
LARGEST_TEAM = 8  # about as many as have a share of a tile
SHARED_PIXELS = VECTORS * LARGEST_TEAM  # every thread of a team that has a power of two of them gets whole vectors
STEPS_ALONE = 3
PATIENCE = 2  # steps
OFFSETS = 11  # at a time, so that memory does not grow with the window


def apply_pairwise(
    columns: Sequence[Tensor],
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    both_ends: bool = True,
    pace: Pace | None = None,
) -> Tensor:
    """Multiply value columns by the gated pairwise kernel of a local window.

        product_i = sum_j S_ij v_j,    S_ij = k_ij (s_j d_i + s_i d_j) / 2    (a gate that is not given is 1)
        k_ij = sum_m w_m exp(-1/2 sum_f |f_i - f_j|^2 / sigma_mf^2),    j != i, in the window of i and in the image

    Args:
        columns: tensors [N, v, H, W] of one floating dtype; stacked they are the V value columns.
        features: tensors [N, F, H, W] of that dtype.
        source, destination: gates [N, H, W] of that dtype.
        weights: w_m, one a kernel.
        sigmas: a row of 1 + len(features) a kernel, flattened, xy (in pixels) first; 0 where a kernel has no such term.
        radius: half width of the window in pixels.
        both_ends: False counts each pair at one of its ends only: half the work, and enough for a sum over all pairs.
        pace: sees to it that operations on the CPU use several threads where that helps; None leaves them to PyTorch.

    Returns:
        [N, V, H, W]. The order of summation depends on the shapes alone, so results repeat bit by bit.
    """
    like = columns[0]
    if like.numel() == 0:
        return torch.cat(list(columns), dim=1)
    batch, _, height, width = like.shape
    reach_y, reach_x = min(radius, height - 1), min(radius, width - 1)
    # Everything lies as [rows, flat pixels]. reach_x zero columns right of and reach_y zero rows below each image
    # turn an offset (dy, dx) into one shift for the whole batch, and give what lies outside an image the value 0.
    padded = (batch, height + reach_y, width + reach_x)
    pixels = math.prod(padded)
    rows = sum(column.shape[1] for column in columns)
    farthest = reach_y * padded[2] + reach_x  # shift
    scale = 1 if like.device.type == "cpu" else 2  # other devices take longer to start an operation
    tiles = max(1, round(pixels / min(max(scale * TILE_VALUES // rows, SMALLEST_TILE), scale * LARGEST_TILE)))
    # An operation rounds its vectors and what is left over differently.
    unit = SHARED_PIXELS if rows * _aligned(pixels, VECTORS) > GRAIN else VECTORS
    end = _aligned(pixels - farthest, unit)  # after the last pixel of the last image
    tile = _aligned(-(-end // tiles), unit)
    flat_pixels = _aligned(end + farthest, VECTORS)

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        rows = [tensor.shape[1] for tensor in tensors]
        flat = like.new_zeros(sum(rows), flat_pixels)
        images = flat[:, :pixels].view(sum(rows), *padded)[:, :, :height, :width]
        for target, tensor in zip(images.split(rows), tensors, strict=True):
            target.copy_(tensor.transpose(0, 1))
        return flat

    pace = pace or Pace(like.device, threads=1)
    with pace.lead(rows * pixels):
        values = flatten(columns)
        sums = torch.zeros_like(values)
        given = [gate[:, None] for gate in (source, destination) if gate is not None]
        gates = flatten([*given[:-1], 0.5 * given[-1]]) if given else None
        flat_features = flatten(features)
    _accumulate(
        values,
        sums,
        flat_features,
        gates,
        list(_offset_rows(reach_y, reach_x, padded[2], weights, sigmas[:: 1 + len(features)], like)),
        _coefficients([feature.shape[1] for feature in features], sigmas, len(weights)),
        both_ends,
        [slice(start, min(start + tile, end)) for start in range(0, end, tile)],
        pace,
    )
    return sums[:, :pixels].view(-1, *padded)[:, :, :height, :width].transpose(0, 1)


def _aligned(pixels: int, unit: int) -> int:
    return -(-pixels // unit) * unit


@functools.cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


def limit_threads(device: torch.device, threads: int = 1) -> AbstractContextManager:
    """Context in which the calling thread's operations on the CPU use so many threads; no other thread sees it."""
    if device.type != "cpu":
        return nullcontext()
    torch.get_num_threads()  # PyTorch sets a new thread's own limit on its first use: before ours, not after
    return _openmp().limit(limits=threads)


class Pace:
    """Lets a loop of short operations use several threads for as long as that is faster.

    A team of threads that have nothing else to do makes them faster. But when another process wants the cores, each of
    the hundreds of operations waits for a thread that does not get to run, and one thread alone is much faster. So one
    thread sets the pace, the team is tried against it, and sent away for good when it has taken longer in all.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device, self.threads = device, threads if device.type == "cpu" else 1
        self.alone, self.steps, self.behind = math.inf, 0, 0.0
        self.team = ExitStack()

    def lead(self, elements: int) -> ExitStack:
        """Context of operations on at least so many elements."""
        # A power of two, and never more than PyTorch gives a share: these divide SHARED_PIXELS into whole vectors.
        self.share = 1 << max(min(self.threads, LARGEST_TEAM, -(-elements // GRAIN)), 1).bit_length() - 1
        if self.steps >= STEPS_ALONE:
            self._call_team()
        return self.team

    def step(self, seconds: float) -> None:
        """Note how long a pixel took, and decide who takes the next."""
        self.steps += 1
        if self.steps <= STEPS_ALONE:
            self.alone = min(self.alone, seconds)
            if self.steps == STEPS_ALONE:
                self._call_team()
        elif self.threads > 1:
            self.behind += seconds - self.alone
            if self.behind > PATIENCE * self.alone:
                self.threads = 1
                self.team.close()

    def _call_team(self) -> None:
        if self.threads > 1 and self.share > 1:
            self.team.enter_context(limit_threads(self.device, self.share))


def _offset_rows(
    reach_y: int, reach_x: int, pitch: int, weights: Sequence[float], sigmas_xy: Sequence[float], like: Tensor
) -> Iterator[tuple[int, Tensor]]:
    # The half window by rows, a few offsets at a time: the shift of the first one, and log2(w_m) plus the xy term of
    # each [M, n, 1].
    rows, columns = (
        torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device) for reach in (reach_y, reach_x)
    )
    squared = rows[reach_y:, None] ** 2 + columns**2
    terms = [
        math.log2(weight) - squared * (HALF_LOG2_E / sigma**2 if sigma else 0.0)
        for weight, sigma in zip(weights, sigmas_xy, strict=True)
    ]
    table = torch.stack(terms)[..., None]  # [M, dy, dx, 1]
    for dy in range(reach_y + 1):
        for first in range(-reach_x if dy else 1, reach_x + 1, OFFSETS):
            yield dy * pitch + first, table[:, dy, reach_x + first :][:, :OFFSETS]


def _coefficients(channels: Sequence[int], sigmas: Sequence[float], kernels: int) -> list[list[float]]:
    # One row a kernel, one factor of the squared difference a feature channel; 0 where the kernel does not look at it.
    factors = [-HALF_LOG2_E / sigma**2 if sigma else 0.0 for sigma in sigmas]
    table = [factors[m * (1 + len(channels)) + 1 :][: len(channels)] for m in range(kernels)]
    return [[factor for factor, count in zip(row, channels, strict=True) for _ in range(count)] for row in table]


def _accumulate(
    values: Tensor,
    sums: Tensor,
    features: Tensor,
    gates: Tensor | None,
    offset_rows: list[tuple[int, Tensor]],
    coefficients: list[list[float]],
    both_ends: bool,
    tiles: list[slice],
    pace: Pace,
) -> None:
    most = max((len(log2_kernel[0]) for _, log2_kernel in offset_rows), default=0)
    buffers = values.new_empty(len(coefficients) + 1, most, tiles[0].stop)
    for own in tiles:
        tile = own.stop - own.start
        own_values, own_sums = values[:, own], sums[:, own]
        for shift, log2_kernel in offset_rows:
            n = log2_kernel.shape[1]
            other = functools.partial(_shifted, first=own.start + shift, count=n, length=tile)
            with pace.lead(min(n, len(values)) * tile):
                kernel = _kernel(features, own, other, log2_kernel, coefficients, buffers[:, :n, :tile])
                if gates is not None:
                    own_gates, (*other_source, other_gate) = gates[:, own], other(gates).unbind(1)
                    gate = buffers[-1, :n, :tile]
                    if other_source:
                        torch.mul(other_source[0], own_gates[1], out=gate).addcmul_(other_gate, own_gates[0])
                    else:
                        torch.add(other_gate, own_gates[0], out=gate)
                    kernel.mul_(gate)
                for weight, other_values, other_sums in zip(kernel, other(values), other(sums), strict=True):
                    start = time.perf_counter()
                    own_sums.addcmul_(weight, other_values)
                    if both_ends:
                        other_sums.addcmul_(weight, own_values)
                    pace.step((time.perf_counter() - start) / tile)


def _shifted(rows: Tensor, first: int, count: int, length: int) -> Tensor:
    # [..., pixels] -> [count, ..., length]: windows that start at first, first + 1, ...
    return rows.as_strided((count, *rows.shape[:-1], length), (1, *rows.stride()), rows.storage_offset() + first)


def _kernel(
    features: Tensor,
    own: slice,
    other: Callable[[Tensor], Tensor],
    log2_kernel: Tensor,
    coefficients: list[list[float]],
    buffers: Tensor,
) -> Tensor:
    # sum_m k_m of a tile's pixels and their n others [n, tile], in buffers [M + 1, n, tile], the last for differences
    exponents = list(log2_kernel)
    for channel, feature in enumerate(features):
        difference = torch.sub(other(feature), feature[own], out=buffers[-1])
        for m, row in enumerate(coefficients):
            if row[channel]:
                torch.addcmul(exponents[m], difference, difference, value=row[channel], out=buffers[m])
                exponents[m] = buffers[m]
    smallest = math.log2(torch.finfo(features.dtype).tiny)  # smaller ones become 0: processors are slow with them
    per_pixel = [
        torch.threshold_(exponent, smallest, -math.inf).exp2_()
        for exponent, row in zip(exponents, coefficients, strict=True)
        if any(row)
    ]
    constant = [exponent.exp2() for exponent, row in zip(exponents, coefficients, strict=True) if not any(row)]
    kernel = per_pixel.pop(0) if per_pixel else buffers[0].zero_()
    for term in per_pixel + constant:
        kernel.add_(term)
    return kernel
