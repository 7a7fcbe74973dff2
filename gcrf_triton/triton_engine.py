"""The pairwise operator in Triton: no window in memory, loss and gradient in one pass over the pairs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from . import kernels
from .tuning import LARGEST_COLUMNS, Config, Key, choose_config

HALF_LOG2_E = 0.5 * math.log2(math.e)  # exp(-x / 2) = exp2(-HALF_LOG2_E x)
WORKSPACE = 2**25  # bytes of packed records at a time: they stay in the cache of a large GPU
LARGEST_KERNEL = 14  # log2, as a half; halves end at 2^16
LARGEST_SETS = 6
CHANNELS = 3  # of a set of features
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
    """Whether tiles do a problem: not in float64, with few enough columns and features for the registers.

    Nor where Triton does not compile for the tensor cores: on Turing, where without them offsets take fewer
    instructions, and before 3.9 on AMD's gfx11.
    """
    _, sets = _feature_slots(features, sigmas)
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
    from_logits: bool,
    gradient: Tensor,
) -> Tensor:
    """Energy of all pairs, as `op.pairwise_energy` without a matrix, and its gradient, unless that is empty."""
    radius = min(radius, max(input.shape[2:]) - 1)
    if input.numel() == 0 or radius < 1:
        gradient.zero_()
        return input.new_zeros((), dtype=torch.float32)
    mode = "logits" if from_logits else "probabilities"
    pairs = (features, source, destination, weights, sigmas, radius)
    return _sum_tiles(mode, input, *pairs, gradient).sum()


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
            _sum_tiles("product", values[:, part], *pairs, result[:, part])
    else:
        result = _sum_offsets(values.contiguous(), *pairs)
    return result if both_ends else 0.5 * result


def _feature_slots(
    features: Sequence[Tensor], sigmas: Sequence[float]
) -> tuple[list[tuple[int, int, float]], tuple[int, ...]]:
    # the channels that kernels look at, (feature, channel, factor), in sets of three (-1 fills them up), and how many
    # sets each kernel has
    slots: list[tuple[int, int, float]] = []
    sets = []
    for row in _factors(features, sigmas):
        channels = [(f, channel, row[f]) for f in range(len(row)) if row[f] for channel in range(features[f].shape[1])]
        sets.append(triton.cdiv(len(channels), CHANNELS))
        slots += channels + [(-1, 0, 0.0)] * (CHANNELS * sets[-1] - len(channels))
    return slots, tuple(sets)


def _factors(features: Sequence[Tensor], sigmas: Sequence[float]) -> list[list[float]]:
    # one row a kernel, one factor of a feature, so that exponents to base 2 lose the square of the difference
    width = 1 + len(features)
    factors = [math.sqrt(HALF_LOG2_E) / sigma if sigma else 0.0 for sigma in sigmas]
    return [factors[row + 1 : row + width] for row in range(0, len(sigmas), width)]


def _sum_tiles(
    mode: str,
    values: Tensor,
    features: Sequence[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    weights: Sequence[float],
    sigmas: Sequence[float],
    radius: int,
    result: Tensor,
) -> Tensor:
    # Fills the result, unless it is empty, and returns the energies of the tiles.
    batch, count, height, width = values.shape
    device, gated, split = values.device, source is not None, values.dtype == torch.float32
    slots, sets = _feature_slots(features, sigmas)
    blocks = _column_blocks(count + (mode == "probabilities"))
    columns = sum(blocks)
    with _current(device):
        config = choose_config(problem_key(values, features, sigmas, radius, gated, mode))
    xy = tuple(HALF_LOG2_E / sigma**2 if sigma else 0.0 for sigma in sigmas[:: 1 + len(features)])
    # kernels, times s d' + d s' < 2 of scaled gates, end below 2^LARGEST_KERNEL
    kernel_exponent = LARGEST_KERNEL - math.ceil(math.log2(sum(weights))) - gated

    margin = triton.cdiv(radius, 8) * 8
    tiles_x, tiles_y = triton.cdiv(width, config.tile_x), triton.cdiv(height, config.tile_y)
    halo = triton.cdiv(config.tile_x + 2 * radius, 16) * 16
    pitch = triton.cdiv((tiles_x - 1) * config.tile_x + margin - radius + halo, 16) * 16
    rows = triton.next_power_of_2(2 * (radius + config.pixels // config.tile_x + 1))
    record = (sum(sets) + gated) * 16 + columns * (1 + split)

    features = [feature.contiguous() for feature in features]
    gates = [gate.contiguous() for gate in (source, destination) if gate is not None]
    largest_value = _largest([values]) if mode != "logits" else values
    spans = _spans(features, gates) if features else values
    largest_gates = _largest(gates) if gated else values
    along_y = torch.empty(len(weights), rows, dtype=torch.float32, device=device)
    partners = torch.empty(3, 16, 16, dtype=torch.float16, device=device)
    energies = torch.empty(batch * tiles_y * tiles_x if mode != "product" else 0, dtype=torch.float32, device=device)
    images, tile_rows = _chunk(batch, tiles_y, config.tile_y, 2 * radius, pitch * record * 2)
    padded_height = tile_rows * config.tile_y + 2 * radius
    records = torch.empty(images, padded_height, pitch, record, dtype=torch.float16, device=device)
    wide = max(_reach(values), _reach(result), records[0].numel()) >= 2**31
    shared = {"SPLIT": split, "GATED": gated, "N_SETS": sum(sets), "RECORD": record, "RADIUS": radius, "MARGIN": margin}
    shared |= {"BLOCKS": blocks, "FIRST": tuple(itertools.accumulate(blocks, initial=0))[:-1]}
    shared |= {"ROWS": rows, "COUNT": count, "OFFSET": tl.int64 if wide else tl.int32}
    done = 0
    with _current(device), _naming(config, device):
        for first, last, top, bottom in _chunks(batch, tiles_y, images, tile_rows):
            part = slice(first, last)
            tile_grid = (tiles_x, bottom - top, last - first)
            top_row, chunk_height = top * config.tile_y, (bottom - top) * config.tile_y + 2 * radius
            kernels.pack[(triton.cdiv(chunk_height * pitch, config.pack), last - first)](
                values[part],
                largest_value,
                tuple(feature[part] for feature in features),
                spans[:, :, first:] if features else values,
                batch,
                tuple(factor for _, _, factor in slots),
                gates[0][part] if gated else values,
                gates[1][part] if gated else values,
                largest_gates,
                xy,
                records,
                along_y,
                partners,
                height,
                width,
                top_row,
                chunk_height,
                pitch,
                *values.stride(),
                FEATURE=tuple(feature for feature, _, _ in slots),
                CHANNEL=tuple(channel for _, channel, _ in slots),
                CHANNELS=tuple(feature.shape[1] for feature in features),
                LINEAR=tuple(count == 0 for count in sets),
                SOFTMAX=mode == "logits",
                ONES=mode == "probabilities",
                PIXELS=config.pack,
                num_warps=1,
                num_stages=1,
                **shared,
            )
            kernels.sum_tile[tile_grid](
                records,
                largest_value,
                largest_gates,
                along_y,
                partners,
                result[part],
                energies[done:],
                tuple(math.log2(weight) + kernel_exponent for weight in weights),
                xy,
                2.0 ** (-kernel_exponent - gated),
                height,
                width,
                top_row,
                chunk_height,
                pitch,
                *(result.stride() if result.dim() == 4 else (0, 0, 0, 0)),
                MODE=mode,
                RESULT=result.numel() > 0,
                SETS=sets,
                FIRST_SET=tuple(itertools.accumulate(sets, initial=0))[:-1],
                TILE_Y=config.tile_y,
                TILE_X=config.tile_x,
                PIXELS=config.pixels,
                UNROLL=config.unroll,
                num_warps=config.num_warps,
                num_stages=1,
                **shared,
            )
            done += math.prod(tile_grid) if mode != "product" else 0
    return energies


def problem_key(
    values: Tensor, features: Sequence[Tensor], sigmas: Sequence[float], radius: int, gated: bool, mode: str
) -> Key:
    """What the configuration of a problem is chosen by; `mode` as for `kernels.sum_tile`."""
    _, sets = _feature_slots(features, sigmas)
    pixels = values.shape[0] * values.shape[2] * values.shape[3]
    dtype = str(values.dtype).removeprefix("torch.")
    columns = triton.cdiv(values.shape[1] + (mode == "probabilities"), 8) * 8
    return Key(*device_and_arch(values.device), columns, sets, gated, radius, dtype, round(math.log2(pixels)))


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
    rest = triton.cdiv(columns, 8) * 8
    return tuple(size for size in (64, 32, 16, 8) if rest & size)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    # the largest magnitude of each, on the device
    return torch.stack([torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float32) for tensor in tensors])


def _spans(features: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
    # between which values a feature of an image lies where a gate is open [features, 2, N]
    spans = []
    for feature in features:
        low = high = feature
        if gates:
            closed = (gates[0] == 0) & (gates[1] == 0)
            low, high = (feature.masked_fill(closed[:, None], end) for end in (torch.inf, -torch.inf))
        low, high = low.flatten(1).amin(1), high.flatten(1).amax(1)
        spans.append(torch.stack([low, high]).masked_fill(low > high, 0))
    return torch.stack(spans)


def _reach(tensor: Tensor) -> int:
    # how far apart the elements of an image lie
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _chunk(batch: int, tiles_y: int, tile_y: int, margin: int, row_bytes: int) -> tuple[int, int]:
    # how many images, and rows of tiles of them, are packed at a time
    image_bytes = (tiles_y * tile_y + margin) * row_bytes
    if image_bytes <= WORKSPACE:
        return min(batch, WORKSPACE // image_bytes, 2**15), tiles_y
    return 1, max(1, (WORKSPACE // row_bytes - margin) // tile_y)


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
    factors = list(itertools.chain(*_factors(features, sigmas)))
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
