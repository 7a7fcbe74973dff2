"""The pairwise operator in PyTorch: tiles of pixels, half a window of offsets, both pixels of a pair at once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import round_up
from .problem import Mode, Problem, Term
from .threads import GRAIN, VECTOR, WHOLE_SHARES, AdaptiveThreads

TILE_VALUES = 250_000  # elements of a tile: they stay in one core's cache, and outlast the start of an operation
SMALLEST_TILE, LARGEST_TILE = 2048, 32768  # pixels
OFFSETS = 11  # of one row of the window at a time, so that memory does not grow with the window


def apply_pairwise(
    columns: Sequence[Tensor], problem: Problem, mode: Mode = Mode.PRODUCT, threads: AdaptiveThreads | None = None
) -> Tensor:
    """Multiply value columns by the matrix S of a problem.

        product_i = sum_j S_ij v_j

    Args:
        columns: tensors [N, v, H, W] of one floating dtype; stacked they are the V value columns.
        problem: features and gates are of that dtype.
        mode: for the energy alone every pair is added at one of its pixels only, which takes half the time. Then only
            sum_i v_i . product_i means something, and is v^T S v / 2.
        threads: chooses how many threads operations on the CPU use; None leaves that to PyTorch.

    Returns:
        [N, V, H, W]. The order of summation depends on the shapes alone, so results repeat bit by bit.
    """
    like = columns[0]
    if like.numel() == 0:
        return torch.cat(list(columns), dim=1)
    batch, _, height, width = like.shape
    layout = FlatLayout(batch, height, width, *problem.window.reach(height, width))
    tiling = make_tiling(layout, sum(column.shape[1] for column in columns), like.device)
    threads = threads or AdaptiveThreads(like.device, threads=1)  # which sets no limit
    with threads.using(tiling.columns * layout.pixels):
        values = layout.flatten(columns, tiling.length, like)
        sums, gates = torch.zeros_like(values), _flat_gates(problem, layout, tiling.length, like)
        flat = Flat(values, sums, layout.flatten(problem.features, tiling.length, like), gates)
    offsets = list(_offsets(layout, problem.terms, like))
    coefficients = _coefficients(problem.channel_counts(), problem.terms)
    _accumulate(flat, tiling.tiles(), offsets, coefficients, mode is Mode.ENERGY, threads)
    return layout.unflatten(flat.sums)


@dataclass(frozen=True)
class FlatLayout:
    """How the images of a batch lie in one row of pixels.

        x x x x 0 0        width pixels, then reach_x zeros
        x x x x 0 0        height such rows
        0 0 0 0 0 0        reach_y rows of zeros, then the next image
        x x x x 0 0

    Pixel (n, y, x) lies at (n (height + reach_y) + y) (width + reach_x) + x, so that every offset (dy, dx) of the
    window is one shift for the whole batch, and what lies outside an image is 0.
    """

    batch: int
    height: int
    width: int
    reach_y: int
    reach_x: int

    @property
    def padded(self) -> tuple[int, int, int]:
        return self.batch, self.height + self.reach_y, self.width + self.reach_x

    @property
    def pixels(self) -> int:
        return math.prod(self.padded)

    def shift(self, dy: int, dx: int) -> int:
        """How much further a pixel's neighbour at an offset lies."""
        return dy * (self.width + self.reach_x) + dx

    def flatten(self, tensors: Sequence[Tensor], length: int, like: Tensor) -> Tensor:
        """Stack [N, v, H, W] tensors as [channels, length], in the dtype of `like`."""
        channels = [tensor.shape[1] for tensor in tensors]
        flat = like.new_zeros(sum(channels), length)
        for target, tensor in zip(self._images(flat).split(channels), tensors, strict=True):
            target.copy_(tensor.transpose(0, 1))
        return flat

    def unflatten(self, flat: Tensor) -> Tensor:
        """The [N, channels, H, W] that lie in [channels, length]."""
        return self._images(flat).transpose(0, 1)

    def _images(self, flat: Tensor) -> Tensor:
        return flat[:, : self.pixels].view(-1, *self.padded)[:, :, : self.height, : self.width]


class Tiling(NamedTuple):
    """The pixels that are worked on at a time."""

    columns: int  # value columns
    end: int  # of the tiles: behind the last pixel of the last image
    tile: int  # pixels
    length: int  # of a row: tiles, and what the largest offset reaches beyond

    def tiles(self) -> list[slice]:
        return [slice(start, min(start + self.tile, self.end)) for start in range(0, self.end, self.tile)]


def make_tiling(layout: FlatLayout, columns: int, device: torch.device) -> Tiling:
    """Tiles as large as fit into the cache, all of about one size and of whole vectors."""
    scale = 1 if device.type == "cpu" else 2  # other devices take longer to start an operation
    most = min(max(scale * TILE_VALUES // columns, SMALLEST_TILE), scale * LARGEST_TILE)
    tiles = max(1, round(layout.pixels / most))
    alignment = WHOLE_SHARES if columns * round_up(layout.pixels, VECTOR) > GRAIN else VECTOR
    farthest = layout.shift(layout.reach_y, layout.reach_x)
    end = round_up(layout.pixels - farthest, alignment)
    return Tiling(columns, end, round_up(-(-end // tiles), alignment), round_up(end + farthest, VECTOR))


class Flat(NamedTuple):
    """What tiles read and write, each [channels, length]."""

    values: Tensor
    sums: Tensor
    features: Tensor
    gates: Tensor | None  # s and d / 2, or d / 2 or s / 2 alone


def _flat_gates(problem: Problem, layout: FlatLayout, length: int, like: Tensor) -> Tensor | None:
    # the last one halved, for the 1/2 of S_ij
    given = [gate[:, None] for gate in (problem.source, problem.destination) if gate is not None]
    return layout.flatten([*given[:-1], 0.5 * given[-1]], length, like) if given else None


def _offsets(layout: FlatLayout, terms: Sequence[Term], like: Tensor) -> Iterator[tuple[int, Tensor]]:
    # Half of the window row by row, up to OFFSETS neighbouring offsets at a time: the shift of the first one, and
    # log2 of the weight and the xy part of every term [M, n, 1].
    reach_y, reach_x = layout.reach_y, layout.reach_x
    dy, dx = (torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device) for reach in (reach_y, reach_x))
    squared = dy[reach_y:, None] ** 2 + dx**2
    parts = [math.log2(term.weight) - squared * term.xy_rate() for term in terms]
    table = torch.stack(parts)[..., None]  # [M, dy, dx, 1]
    for y in range(reach_y + 1):
        for x in range(-reach_x if y else 1, reach_x + 1, OFFSETS):
            yield layout.shift(y, x), table[:, y, reach_x + x :][:, :OFFSETS]


def _coefficients(channels: Sequence[int], terms: Sequence[Term]) -> list[list[float]]:
    # of the squared difference of every feature channel in the exponent of every term; 0 where it does not depend on it
    rates = [term.feature_rates() for term in terms]
    return [[-rate for rate, count in zip(row, channels, strict=True) for _ in range(count)] for row in rates]


def _accumulate(
    flat: Flat,
    tiles: list[slice],
    offsets: list[tuple[int, Tensor]],
    coefficients: list[list[float]],
    at_one_pixel: bool,
    threads: AdaptiveThreads,
) -> None:
    most = max((len(log2_terms[0]) for _, log2_terms in offsets), default=0)
    scratch = flat.values.new_empty(len(coefficients) + 1, most, tiles[0].stop)
    for own in tiles:
        tile = own.stop - own.start
        own_values, own_sums = flat.values[:, own], flat.sums[:, own]
        for shift, log2_terms in offsets:
            n = log2_terms.shape[1]
            other = functools.partial(_shifted, start=own.start + shift, offsets=n, length=tile)
            with threads.using(min(n, len(flat.values)) * tile):
                affinity = _affinity(flat.features, own, other, log2_terms, coefficients, scratch[:, :n, :tile])
                if flat.gates is not None:
                    own_gates, (*other_source, other_gate) = flat.gates[:, own], other(flat.gates).unbind(1)
                    gate = scratch[-1, :n, :tile]
                    if other_source:
                        torch.mul(other_source[0], own_gates[1], out=gate).addcmul_(other_gate, own_gates[0])
                    else:
                        torch.add(other_gate, own_gates[0], out=gate)
                    affinity.mul_(gate)
                for weight, other_values, other_sums in zip(
                    affinity, other(flat.values), other(flat.sums), strict=True
                ):
                    start = time.perf_counter()
                    own_sums.addcmul_(weight, other_values)
                    if not at_one_pixel:
                        other_sums.addcmul_(weight, own_values)
                    threads.record((time.perf_counter() - start) / tile)


def _shifted(flat: Tensor, start: int, offsets: int, length: int) -> Tensor:
    # [..., pixels] -> [offsets, ..., length]: the pixels from start, from start + 1, ...
    return flat.as_strided((offsets, *flat.shape[:-1], length), (1, *flat.stride()), flat.storage_offset() + start)


def _affinity(
    features: Tensor,
    own: slice,
    other: Callable[[Tensor], Tensor],
    log2_terms: Tensor,
    coefficients: list[list[float]],
    scratch: Tensor,
) -> Tensor:
    # k_ij of a tile's pixels and their n others [n, tile], in scratch [M + 1, n, tile], whose last part is overwritten
    exponents = list(log2_terms)
    for channel, feature in enumerate(features):
        difference = torch.sub(other(feature), feature[own], out=scratch[-1])
        for m, row in enumerate(coefficients):
            if row[channel]:
                torch.addcmul(exponents[m], difference, difference, value=row[channel], out=scratch[m])
                exponents[m] = scratch[m]
    smallest = math.log2(torch.finfo(features.dtype).tiny)  # smaller ones become 0: processors are slow with them
    per_pixel = [
        torch.threshold_(exponent, smallest, -math.inf).exp2_()
        for exponent, row in zip(exponents, coefficients, strict=True)
        if any(row)
    ]
    per_offset = [exponent.exp2() for exponent, row in zip(exponents, coefficients, strict=True) if not any(row)]
    affinity = per_pixel.pop(0) if per_pixel else scratch[0].zero_()
    for term in per_pixel + per_offset:
        affinity.add_(term)
    return affinity
