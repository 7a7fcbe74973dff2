"""The pairwise operator in Triton: no window in memory, loss and gradient in one pass over the pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from . import kernels
from .tuning import LARGEST_COLUMNS, Config, Key, choose_config

HALF_LOG2_E = 0.5 * math.log2(math.e)  # exp(-x / 2) = exp2(-HALF_LOG2_E x)
WORKSPACE = 36 * 2**20  # bytes of packed records at a time: they stay in the cache of a large GPU
LARGEST_KERNEL = 14  # log2, as a half; halves end at 2^16
LARGEST_SETS = 6
CHANNELS = 3  # of a set of features
PARTS = 128  # of an image, which different programs look over, at most
PREPARED = 1024  # pixels at a time
RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def unavailable(device: torch.device) -> str | None:
    """Say why Triton cannot run on a device, or None if it can."""
    if triton.knobs.runtime.interpret:
        return None
    try:
        active = triton.runtime.driver.active.get_active_torch_device()
    except Exception as error:  # whatever a backend's search for its driver ends in
        return f"Triton found no GPU driver ({error})"
    return None if active.type == device.type else f"Triton runs on {active.type} here"


def fits(values: Tensor, columns: int, features: Sequence[Tensor], sigmas: Sequence[float]) -> bool:
    """Whether tiles can multiply so many value columns, of values' dtype: not in float64, nor past the registers.

    Nor where Triton does not compile for the tensor cores: on Turing, where without them offsets take fewer
    instructions, and before 3.9 on AMD's gfx11.
    """
    sets = channel_slots(channel_counts(features), tuple(sigmas))[2]
    products = not device_and_arch(values.device)[1].startswith(("sm_7",) if RECENT else ("sm_7", "gfx11"))
    return values.dtype != torch.float64 and products and columns <= LARGEST_COLUMNS and sum(sets) <= LARGEST_SETS


def potts_energy(
    input: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    mean: bool,
    from_logits: bool,
    gradient: Tensor,
    unit: float,
) -> tuple[Tensor, Tensor]:
    """Energy and constants of `op.pairwise_energy` without a matrix, and its gradient times `unit`, unless empty."""
    mode = "logits" if from_logits else "probabilities"
    pairs = (features, source, destination, weights, sigmas, radius)
    energies, constants = _sum_tiles(mode, input, *pairs, mean, gradient, unit)
    return energies.sum(), constants


def apply_pairwise(
    columns: Sequence[Tensor],
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    both_ends: bool = True,
) -> Tensor:
    """`torch_engine.apply_pairwise`, by tiles, or by offsets where they cannot.

    Both ends of a pair cost no more than one: with `both_ends=False` the result is halved, which leaves sums over all
    pairs as they are there.
    """
    values = columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=1)
    radius = min(radius, max(values.shape[2:]) - 1)
    if values.numel() == 0 or radius < 1:
        return torch.zeros_like(values)
    pairs = (features, source, destination, weights, sigmas, radius)
    if fits(values, 1, features, sigmas):
        result = torch.empty_like(values)
        for first in range(0, values.shape[1], LARGEST_COLUMNS):
            part = slice(first, first + LARGEST_COLUMNS)
            _sum_tiles("product", values[:, part], *pairs, False, result[:, part])
    else:
        result = _sum_offsets(values.contiguous(), *pairs)
    return result if both_ends else 0.5 * result


def channel_counts(features: Sequence[Tensor]) -> tuple[int, ...]:
    """How many channels each of the features [N, F, H, W] has."""
    return tuple(feature.shape[1] for feature in features)


@functools.lru_cache(maxsize=1024)
def channel_slots(
    counts: tuple[int, ...], sigmas: tuple[float, ...]
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """The channels that kernels look at, in sets of three (-1 fills them up), their factors, and sets of every kernel.

    Channels are counted over all features. By its factor multiplied, the square of a difference is what the exponent to
    base 2 loses.
    """
    width = 1 + len(counts)
    channels: list[int] = []
    factors: list[float] = []
    sets = []
    for row in range(0, len(sigmas), width):
        used = [sigma for sigma, count in zip(sigmas[row + 1 : row + width], counts, strict=True) for _ in range(count)]
        mine = [(channel, math.sqrt(HALF_LOG2_E) / sigma) for channel, sigma in enumerate(used) if sigma]
        sets.append(-(-len(mine) // CHANNELS))
        mine += [(-1, 0.0)] * (CHANNELS * sets[-1] - len(mine))
        channels += [channel for channel, _ in mine]
        factors += [factor for _, factor in mine]
    return tuple(channels), tuple(factors), tuple(sets)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all launches for problems of one description have in common."""

    weights: tuple[float, ...]  # log2, brought up to the range of halves
    xy: tuple[float, ...]
    factors: tuple[float, ...]
    kernel_scale: float  # what brings them back
    tiles_y: int
    tiles_x: int
    images: int  # that are packed at a time, or a part of one
    tile_rows: int  # of an image
    pitch: int
    record: int  # halves
    rows: int  # of the summary
    parts: int
    prepare: dict[str, Any]  # constants of the kernels
    pack: dict[str, Any]
    sum_tile: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    split: bool,
    counts: tuple[int, ...],
    gated: bool,
    weights: tuple[float, ...],
    sigmas: tuple[float, ...],
    radius: int,
    mean: bool,
    mode: str,
    config: Config,
    workspace: int,
) -> Plan:
    batch, count, height, width = shape
    channels, factors, sets = channel_slots(counts, sigmas)
    blocks = _column_blocks(count + (mode == "probabilities"))
    # kernels, times s d' + d s' < 2 of scaled gates, end below 2^LARGEST_KERNEL
    exponent = LARGEST_KERNEL - math.ceil(math.log2(sum(weights))) - gated
    margin = -(-radius // 8) * 8
    tiles_x, tiles_y = -(-width // config.tile_x), -(-height // config.tile_y)
    halo = -(-(config.tile_x + 2 * radius) // 16) * 16
    pitch = -(-((tiles_x - 1) * config.tile_x + margin - radius + halo) // 16) * 16
    rows = 1 << (2 * (radius + config.pixels // config.tile_x + 1) - 1).bit_length()
    record = (sum(sets) + gated) * 16 + sum(blocks) * (1 + split)
    images, tile_rows = _chunk(batch, tiles_y, config.tile_y, 2 * radius, pitch * record * 2, workspace)
    shared: dict[str, Any] = {"COUNT": count, "SPLIT": split, "GATED": gated, "N_SETS": sum(sets), "RECORD": record}
    shared |= {"RADIUS": radius, "MARGIN": margin, "ROWS": rows, "BLOCKS": blocks}
    shared |= {"FIRST": tuple(itertools.accumulate(blocks, initial=0))[:-1]}
    places = [(feature, channel, count) for feature, count in enumerate(counts) for channel in range(count)]
    prepare: dict[str, Any] = {
        name: tuple(place[part] for place in places) for part, name in enumerate(("FEATURE", "CHANNEL", "CHANNELS"))
    }
    pack = shared | {"K": sum(counts), "CHANNEL": channels, "LINEAR": tuple(not count for count in sets)}
    pack |= {"MEAN": mean, "SOFTMAX": mode == "logits", "ONES": mode == "probabilities", "PARTS": PARTS}
    sum_tile = shared | {"MODE": mode, "SETS": sets, "FIRST_SET": tuple(itertools.accumulate(sets, initial=0))[:-1]}
    sum_tile |= {"TILE_Y": config.tile_y, "TILE_X": config.tile_x, "UNROLL": config.unroll}
    return Plan(
        tuple(math.log2(weight) + exponent for weight in weights),
        tuple(HALF_LOG2_E / sigma**2 if sigma else 0.0 for sigma in sigmas[:: 1 + len(counts)]),
        factors,
        2.0 ** (-exponent - gated),
        tiles_y,
        tiles_x,
        images,
        tile_rows,
        pitch,
        record,
        2 * sum(counts) + 3 * gated + (mode != "logits"),
        min(PARTS, -(-height * width // (4 * PREPARED)) * 4),  # so that summaries are loaded four values at a time
        prepare
        | {"COUNT": 0 if mode == "logits" else count, "PARTS": PARTS, "PIXELS": PREPARED}
        | {"num_warps": 8, "num_stages": 1},
        pack | {"PIXELS": config.pack, "num_warps": 1, "num_stages": 1},
        sum_tile | {"PIXELS": config.pixels, "num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def _sum_tiles(
    mode: str,
    values: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    mean: bool,
    result: Tensor,
    result_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    # Fills the result, unless it is empty, and returns the energies of the tiles and the constants.
    device, shape = values.device, tuple(values.shape)
    batch, _, height, width = shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    gated, split, radius = source is not None or destination is not None, values.dtype == torch.float32, int(radius)
    counts, sigmas = channel_counts(features), tuple(sigmas)
    with _current(device):
        config = choose_config(problem_key(values, features, sigmas, radius, gated, mode))
    common = (shape, split, counts, gated, tuple(weights), sigmas, radius, mean, mode)
    plan = _plan(*common, config, WORKSPACE)
    padded_height = plan.tile_rows * config.tile_y + 2 * radius
    constants = empty(batch, sum(counts) + 2 * gated, height, width)
    summary = empty(batch, plan.rows, plan.prepare["PARTS"])
    scales = empty(batch, 3)
    along_y = empty(len(weights), plan.pack["ROWS"])
    partners = empty(3, 16, 16, dtype=torch.float16)
    energies = empty(batch * plan.tiles_y * plan.tiles_x if mode != "product" else 0)
    records = empty(plan.images, padded_height, plan.record * plan.pitch, dtype=torch.float16)
    layout, result_layout = _layout(values), _layout(result if result.dim() == 4 else values)
    wide = max(_reach(values), _reach(result), records[0].numel()) >= 2**31
    offset = tl.int64 if wide else tl.int32
    with _current(device), _naming(config, device):
        kernels.prepare[(batch, plan.parts)](
            tuple(feature.contiguous() for feature in features),
            values if source is None else _bytes(source),
            values if destination is None else _bytes(destination),
            values,
            constants,
            summary,
            height,
            width,
            *values.stride(),
            SOURCE=source is not None,
            DESTINATION=destination is not None,
            **plan.prepare,
        )
        for first, last, top, bottom in _chunks(batch, plan.tiles_y, plan.images, plan.tile_rows):
            top_row, chunk_height = top * config.tile_y, (bottom - top) * config.tile_y + 2 * radius
            kernels.pack[(-(-chunk_height * plan.pitch // config.pack), last - first)](
                values,
                constants,
                summary,
                plan.factors,
                plan.xy,
                records,
                along_y,
                partners,
                scales,
                first,
                batch,
                plan.parts // 4,
                height,
                width // layout.unit,
                top_row,
                chunk_height,
                plan.pitch // 16,
                *layout.strides,
                ORDER=layout.order,
                UNIT=layout.unit,
                OFFSET=offset,
                **plan.pack,
            )
            kernels.sum_tile[(plan.tiles_x, bottom - top, last - first)](
                records,
                along_y,
                partners,
                scales,
                result,
                energies,
                plan.weights,
                plan.xy,
                plan.factors,
                plan.kernel_scale,
                result_scale,
                first,
                height,
                width // result_layout.unit,
                top_row,
                chunk_height,
                plan.pitch // 16,
                plan.tiles_y,
                *result_layout.strides,
                ORDER=result_layout.order,
                UNIT=result_layout.unit,
                OFFSET=offset,
                RESULT=result.numel() > 0,
                **plan.sum_tile,
            )
    return energies, constants


class Layout(NamedTuple):
    """Strides [N, C, H, W] in units, which stride is 1, and the unit: so that Triton compiles once for all sizes."""

    strides: tuple[int, ...]
    order: str
    unit: int


def _layout(tensor: Tensor) -> Layout:
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    n, c, y, x = strides
    order = "columns" if x == 1 or (x == 0 and c != 1) else "channels" if c == 1 else ""
    across = {"columns": (n, c, y), "channels": (n, y, x), "": ()}[order]
    aligned = across and tensor.shape[3] % 16 == 0 and tensor.data_ptr() % 16 == 0
    if aligned and not any(stride % 16 for stride in across):
        return Layout(tuple(stride // 16 for stride in strides), order, 16)
    return Layout(strides, order, 1)


def _bytes(gate: Tensor) -> Tensor:
    # contiguous, and of a dtype that Triton loads
    gate = gate.contiguous()
    return gate.view(torch.uint8) if gate.dtype == torch.bool else gate


def problem_key(
    values: Tensor, features: Sequence[Tensor], sigmas: Sequence[float], radius: int, gated: bool, mode: str
) -> Key:
    """What the configuration of a problem is chosen by; `mode` as for `kernels.sum_tile`."""
    _, _, sets = channel_slots(channel_counts(features), tuple(sigmas))
    batch, count, height, width = values.shape
    dtype = str(values.dtype).removeprefix("torch.")
    columns = -(-(count + (mode == "probabilities")) // 8) * 8
    size = round(math.log2(batch * height * width))
    return Key(*device_and_arch(values.device), columns, sets, gated, radius, dtype, size)


@functools.cache
def device_and_arch(device: torch.device) -> tuple[str, str]:
    if triton.knobs.runtime.interpret or device.type == "meta":
        return device.type, device.type
    with _current(device):
        arch = triton.runtime.driver.active.get_current_target().arch
    name = device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    if isinstance(arch, int):
        return name, f"sm_{arch}"
    return name, arch if isinstance(arch, str) else device.type  # Intel's is a dictionary of properties


def _column_blocks(columns: int) -> tuple[int, ...]:
    # powers of two that add up to the columns, rounded up to eights
    rest = -(-columns // 8) * 8
    return tuple(size for size in (64, 32, 16, 8) if rest & size)


def _reach(tensor: Tensor) -> int:
    # how far apart the elements of an image lie
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _chunk(batch: int, tiles_y: int, tile_y: int, margin: int, row_bytes: int, workspace: int) -> tuple[int, int]:
    # how many images, and rows of tiles of them, are packed at a time: as few times as can be, about as many each time
    image_bytes = (tiles_y * tile_y + margin) * row_bytes
    if image_bytes <= workspace:
        return _share(batch, min(workspace // image_bytes, 2**15)), tiles_y
    return 1, _share(tiles_y, max(1, (workspace // row_bytes - margin) // tile_y))


def _share(whole: int, most: int) -> int:
    return -(-whole // -(-whole // most))


def _chunks(batch: int, tiles_y: int, images: int, tile_rows: int) -> Iterator[tuple[int, int, int, int]]:
    for first in range(0, batch, images):
        for top in range(0, tiles_y, tile_rows):
            yield first, min(first + images, batch), top, min(top + tile_rows, tiles_y)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device and its current stream
    if device.type in ("cpu", "meta"):
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@contextlib.contextmanager
def _naming(config: Config, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (TritonError, RuntimeError) as error:
        raise RuntimeError(
            f"{config} cannot run on {' '.join(device_and_arch(device))}: {type(error).__name__}: {error}\n"
            "gcrf_triton.tuning.use_config chooses another configuration, and impl='torch' needs none"
        ) from error


def _sum_offsets(
    values: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
) -> Tensor:
    batch, columns, height, width = values.shape
    device, dtype, row = values.device, values.dtype, 1 + len(features)
    offset = torch.arange(-radius, radius + 1, dtype=dtype, device=device)
    squared = offset**2 + offset[:, None] ** 2
    log2_kernels = torch.stack(
        [
            math.log2(weight) - squared * (HALF_LOG2_E / sigma**2 if sigma else 0.0)
            for weight, sigma in zip(weights, sigmas[::row], strict=True)
        ]
    )
    log2_kernels[:, radius, radius] = -math.inf
    # filled on the device, as a copy from the host would wait for it
    factors = [math.sqrt(HALF_LOG2_E) / sigma if sigma else 0.0 for place, sigma in enumerate(sigmas) if place % row]
    device_factors = [torch.full((1,), factor, dtype=dtype, device=device) for factor in factors]
    result = torch.empty_like(values)
    pixels, block = 128, min(triton.next_power_of_2(columns), 16)
    with _current(device):
        for first in range(0, batch, 2**15):
            part = slice(first, first + 2**15)
            kernels.sum_offsets[(triton.cdiv(height * width, pixels), triton.cdiv(columns, block), len(values[part]))](
                values[part],
                tuple(feature[part].contiguous() for feature in features),
                torch.cat(device_factors) if factors else values,
                values if source is None else source[part].contiguous(),
                values if destination is None else destination[part].contiguous(),
                log2_kernels,
                result[part],
                columns,
                height * width,
                height,
                width,
                CHANNELS=tuple(feature.shape[1] for feature in features),
                KERNELS=len(weights),
                USED=tuple(factor != 0 for factor in factors),
                GATED=source is not None,
                RADIUS=radius,
                COLUMNS=block,
                OFFSET=tl.int64 if height * width >= 2**30 else tl.int32,
                PIXELS=pixels,
            )
    return result
