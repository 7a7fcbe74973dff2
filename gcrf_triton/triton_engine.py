"""The pairwise operator in Triton: no window in memory, loss and gradient in one pass over the pairs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from . import kernels, planning
from .constants import COLUMN_UNIT, LARGEST_COLUMNS, LARGEST_SETS, SLOTS, STRIDE_UNIT, round_up
from .kernels.records import STRIDES
from .planning import MOST_PROGRAMS, Chunk, Description, Plan, describe, make_feature_sets, make_plan
from .problem import Mode, Problem, Term, feature_factor
from .tuning import Key, choose_config

TRITON_AT_LEAST_3_9 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def unavailable(device: torch.device) -> str | None:
    """Say why Triton cannot run on a device, or None if it can."""
    if triton.knobs.runtime.interpret:
        return None
    try:
        active = triton.runtime.driver.active.get_active_torch_device()
    except Exception as error:  # whatever a backend's search for its driver ends in
        return f"Triton found no GPU driver ({error})"
    return None if active.type == device.type else f"Triton runs on {active.type} here"


def can_tile(description: Description, device: torch.device) -> bool:
    """Whether tiles can do a problem; products may have any number of columns, as they can be taken in parts.

    Not in float64, nor past the registers. Nor where Triton does not compile for the tensor cores: on Turing, where
    without them offsets take fewer instructions, and before 3.9 on AMD's gfx11.
    """
    without = ("sm_7",) if TRITON_AT_LEAST_3_9 else ("sm_7", "gfx11")
    sets = make_feature_sets(description.channels, description.terms).sizes
    fits = sum(sets) <= LARGEST_SETS and (description.kind == "values" or description.columns <= LARGEST_COLUMNS)
    compiles = description.dtype != torch.float64 and not device_and_arch(device)[1].startswith(without)
    return fits and compiles


def potts_energy(
    input: Tensor, problem: Problem, description: Description, mode: Mode, gradient: Tensor, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """The energy of an input and copies of what is constant, as of `op.compute`; fills the gradient, times a scale."""
    energies, copies = _sum_tiles(input, problem, description, mode, gradient, gradient_scale)
    return energies.sum(), copies


def apply_pairwise(columns: Sequence[Tensor], problem: Problem, mode: Mode = Mode.PRODUCT) -> Tensor:
    """`torch_engine.apply_pairwise`, by tiles, or by offsets where they cannot.

    This engine always computes all of S v; for the energy alone it returns half, as that engine adds every pair once.
    """
    values = columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=1)
    description = describe(values, problem)
    if values.numel() == 0 or description.radius < 1:
        return torch.zeros_like(values)
    if can_tile(description, values.device):
        product = torch.empty_like(values)
        for start in range(0, values.shape[1], LARGEST_COLUMNS):
            few = slice(start, start + LARGEST_COLUMNS)
            _sum_tiles(values[:, few], problem, describe(values[:, few], problem), Mode.PRODUCT, product[:, few])
    else:
        product = _sum_offsets(values.contiguous(), problem)
    return 0.5 * product if mode is Mode.ENERGY else product


class Buffers(NamedTuple):
    """What the kernels of one problem hand on to each other.

    copies          [N, K, H, W]: the channels of all features, then, with any gate, s and d
    summary         [N, rows, parts]: the smallest and the largest of every channel; with any gate the largest s, the
                    largest d, and the sum of d (of s without it); but for logits the largest value
    image_scales    [N, 3]: of gates, divided by D for a mean; of values; 1 where features are as they are
    along_y         [terms, table]: the part along y of every term
    partners        [3, SLOTS, SLOTS]: what a pixel's own slots are multiplied by
    records         [images, rows, halves of a row]: those of a chunk
    energies        [N, tiles_y, tiles_x]
    """

    copies: Tensor
    summary: Tensor
    image_scales: Tensor
    along_y: Tensor
    partners: Tensor
    records: Tensor
    energies: Tensor


def _allocate(description: Description, plan: Plan, device: torch.device) -> Buffers:
    batch, _, height, width = description.shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    tiles, chunks = plan.tiles, plan.chunks
    return Buffers(
        copies=empty(batch, sum(description.channels) + 2 * description.gated, height, width),
        summary=empty(batch, plan.summary_rows, plan.limits.parts),
        image_scales=empty(batch, 3),
        along_y=empty(len(description.terms), tiles.table),
        partners=empty(3, SLOTS, SLOTS, dtype=torch.float16),
        energies=empty(batch * tiles.tiles_y * tiles.tiles_x if description.kind != "values" else 0),
        records=empty(
            chunks.images,
            plan.chunk_rows(chunks.chunk_tiles_y),
            plan.record.size * tiles.pitch,
            dtype=torch.float16,
        ),
    )


def _sum_tiles(
    values: Tensor, problem: Problem, description: Description, mode: Mode, result: Tensor, result_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    # Fills the result, a product or a gradient, if it is wanted, and returns the energies of the tiles and the copies.
    device = values.device
    config = choose_config(problem_key(description, device))
    plan = make_plan(description, config, planning.LIMITS)
    buffers = _allocate(description, plan, device)
    layout, result_layout = _layout(values), _layout(values if mode is Mode.ENERGY else result)
    wide = max(layout.extent, result_layout.extent, plan.image_halves()) >= 2**31
    of_values = layout.arguments | {"values": values, "OFFSET": tl.int64 if wide else tl.int32}
    of_result = result_layout.arguments | {"result": result, "result_scale": result_scale}
    of_result |= {"RESULT": mode is not Mode.ENERGY, "OFFSET": of_values["OFFSET"]}
    with _current(device):
        try:
            _launch_prepare(values, problem, plan, buffers)
            for chunk in plan.chunks.each():
                of_chunk = _chunk_arguments(plan, buffers, chunk)
                pixels = of_chunk["chunk_height"] * plan.tiles.pitch
                kernels.pack[(-(-pixels // plan.config.pack), chunk.images)](
                    copies=buffers.copies, summary=buffers.summary, **of_chunk, **of_values, **plan.pack_arguments
                )
                kernels.sum_tile[(plan.tiles.tiles_x, chunk.tiles_y, chunk.images)](
                    energies=buffers.energies, **of_chunk, **of_result, **plan.tile_arguments
                )
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (TritonError, RuntimeError) as error:
            raise RuntimeError(
                f"{config} cannot run on {' '.join(device_and_arch(device))}: {type(error).__name__}: {error}\n"
                "gcrf_triton.tuning.use_config chooses another configuration, and impl='torch' needs none"
            ) from error
    return buffers.energies, buffers.copies


def _launch_prepare(values: Tensor, problem: Problem, plan: Plan, buffers: Buffers) -> None:
    source, destination = problem.source, problem.destination
    kernels.prepare[(len(values), plan.parts)](
        features=tuple(feature.contiguous() for feature in problem.features),
        source=values if source is None else _as_bytes(source),
        destination=values if destination is None else _as_bytes(destination),
        values=values,
        copies=buffers.copies,
        summary=buffers.summary,
        height=values.shape[2],
        width=values.shape[3],
        SOURCE=source is not None,
        DESTINATION=destination is not None,
        **dict(zip(STRIDES, values.stride(), strict=True)),
        **plan.prepare_arguments,
    )


def _chunk_arguments(plan: Plan, buffers: Buffers, chunk: Chunk) -> dict[str, Any]:
    return {
        "records": buffers.records,
        "along_y": buffers.along_y,
        "partners": buffers.partners,
        "image_scales": buffers.image_scales,
        "first_image": chunk.first_image,
        "top_row": chunk.top_tile * plan.config.tile_y,
        "chunk_height": plan.chunk_rows(chunk.tiles_y),
    }


class Layout(NamedTuple):
    """How values or a result [N, C, H, W] lie in memory."""

    arguments: dict[str, Any]  # of a kernel: size and strides in UNITs, and ORDER, which names the stride that is 1
    extent: int  # how far apart the elements of an image lie


def _layout(tensor: Tensor) -> Layout:
    return _layout_of(tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0)


@functools.lru_cache(maxsize=1024)
def _layout_of(shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool) -> Layout:
    # in units of STRIDE_UNIT where all sizes and strides allow it, so that kernels compile once for all such sizes
    extent = sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
    n, c, y, x = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    order = "x" if x == 1 or (x == 0 and c != 1) else "c" if c == 1 else ""
    in_units = (*{"x": (n, c, y), "c": (n, y, x), "": (1,)}[order], shape[3])
    unit = STRIDE_UNIT if aligned and not any(size % STRIDE_UNIT for size in in_units) else 1
    arguments: dict[str, Any] = dict(zip(STRIDES, (stride // unit for stride in (n, c, y, x)), strict=True))
    return Layout(arguments | {"height": shape[2], "width": shape[3] // unit, "ORDER": order, "UNIT": unit}, extent)


def _as_bytes(gate: Tensor) -> Tensor:
    # contiguous, and of a dtype that Triton loads
    gate = gate.contiguous()
    return gate.view(torch.uint8) if gate.dtype == torch.bool else gate


def problem_key(description: Description, device: torch.device) -> Key:
    """What the configuration of a problem is chosen by."""
    batch, _, height, width = description.shape
    return Key(
        *device_and_arch(device),
        columns=round_up(description.columns, COLUMN_UNIT),
        sets=make_feature_sets(description.channels, description.terms).sizes,
        gated=description.gated,
        radius=description.radius,
        dtype=str(description.dtype).removeprefix("torch."),
        log2_pixels=round(math.log2(batch * height * width)),
    )


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


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device and its current stream
    if device.type in ("cpu", "meta"):
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def _sum_offsets(values: Tensor, problem: Problem) -> Tensor:
    batch, columns, height, width = values.shape
    device, dtype, radius = values.device, values.dtype, problem.window.within(height, width).radius
    # filled on the device, as a copy from the host would wait for it
    factors = [feature_factor(sigma) for term in problem.terms for sigma in term.sigmas]
    device_factors = [torch.full((1,), factor, dtype=dtype, device=device) for factor in factors]
    log2_terms = _log2_terms(problem.terms, radius, values)
    result = torch.empty_like(values)
    pixels, block = 128, min(triton.next_power_of_2(columns), 16)
    # without gates, values stand for them, which are not looked at
    source, destination = problem.both_gates(dtype, values) if problem.has_gates() else (values, values)
    with _current(device):
        for start in range(0, batch, MOST_PROGRAMS):
            few = slice(start, start + MOST_PROGRAMS)
            kernels.sum_offsets[(triton.cdiv(height * width, pixels), triton.cdiv(columns, block), len(values[few]))](
                values=values[few],
                features=tuple(feature[few].contiguous() for feature in problem.features),
                factors=torch.cat(device_factors) if factors else values,
                source=source[few].contiguous(),
                destination=destination[few].contiguous(),
                log2_terms=log2_terms,
                result=result[few],
                columns=columns,
                plane=height * width,
                height=height,
                width=width,
                FEATURE_CHANNELS=problem.channel_counts(),
                TERMS=len(problem.terms),
                USED=tuple(factor != 0 for factor in factors),
                GATED=problem.has_gates(),
                RADIUS=radius,
                BLOCK=block,
                OFFSET=tl.int64 if height * width >= 2**30 else tl.int32,
                PIXELS=pixels,
            )
    return result


def _log2_terms(terms: Sequence[Term], radius: int, like: Tensor) -> Tensor:
    # log2 of the weight and the xy part of every term and offset [terms, 2 radius + 1, 2 radius + 1]
    offset = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    squared = offset**2 + offset[:, None] ** 2
    table = torch.stack([math.log2(term.weight) - squared * term.xy_rate() for term in terms])
    table[:, radius, radius] = -math.inf  # a pixel does not meet itself
    return table
