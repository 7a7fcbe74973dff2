"""The plan of a launch: where features, gates, values and pixels lie, and in how many chunks, without launching it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .constants import (
    COLUMN_UNIT,
    KEYS,
    LARGEST_COLUMNS,
    LOG2_LARGEST_AFFINITY,
    MARGIN_UNIT,
    SET_SIZE,
    SLOTS,
    STRIDE_UNIT,
    SUMMARY_UNIT,
    round_up,
)
from .problem import Energy, Problem, Term, feature_factor
from .tuning import Config

Kind = Literal["values", "probabilities", "logits"]


class Limits(NamedTuple):
    """How much is worked on at a time."""

    workspace: int = 36 * 2**20  # bytes of records: they stay in the second-level cache of a large GPU
    parts: int = 128  # of an image, each looked over by one program of `prepare`
    prepared: int = 1024  # pixels that such a program reads at a time


LIMITS = Limits()
MOST_PROGRAMS = 2**15  # along the second and third axis of a grid, of which CUDA allows 2^16 - 1


class Description(NamedTuple):
    """What the configuration and the plan of a problem depend on."""

    shape: tuple[int, ...]  # [N, C, H, W] of the values
    dtype: torch.dtype
    kind: Kind  # what is multiplied: values as they are, probabilities and a column of ones, or the softmax of logits
    channels: tuple[int, ...]  # of every feature
    terms: tuple[Term, ...]
    radius: int
    gated: bool
    mean: bool  # the energy is divided by the sum of a gate, or by the number of pixels

    @property
    def columns(self) -> int:
        """Value columns, with that of ones."""
        return self.shape[1] + (self.kind == "probabilities")


def describe(values: Tensor, problem: Problem, energy: Energy | None = None) -> Description:
    """Describe the product of a problem with values [N, C, H, W], or their energy, which has no matrix."""
    kind: Kind = "values" if energy is None else "logits" if energy.from_logits else "probabilities"
    return Description(
        shape=tuple(values.shape),
        dtype=values.dtype,
        kind=kind,
        channels=problem.channel_counts(),
        terms=problem.terms,
        radius=int(problem.window.within(*values.shape[2:]).radius),
        gated=problem.has_gates(),
        mean=energy is not None and energy.mean,
    )


class FeatureSets(NamedTuple):
    """For each term, the feature channels it depends on, SET_SIZE at a time; one after another they are `channels`.

    a term on        its channels            its sets    the first of them
    rgb              0 1 2                   1           0
    position only                            0           1
    rgb, depth       0 1 2   3 -1 -1         2           1
    """

    channels: tuple[int, ...]  # counted over all features; -1 fills a set up
    factors: tuple[float, ...]  # one a channel: g = factor feature makes the term 2^-(g_i - g_j)^2
    sizes: tuple[int, ...]  # sets, one a term

    @property
    def first(self) -> tuple[int, ...]:
        """The first set of every term."""
        return _starts(self.sizes)


@functools.lru_cache(maxsize=1024)
def make_feature_sets(channels: tuple[int, ...], terms: tuple[Term, ...]) -> FeatureSets:
    """Sets of features with so many channels each."""
    places: list[tuple[int, float]] = []
    sizes = []
    for term in terms:
        sigmas = [sigma for sigma, count in zip(term.sigmas, channels, strict=True) for _ in range(count)]
        used = [(place, feature_factor(sigma)) for place, sigma in enumerate(sigmas) if sigma < math.inf]
        sizes.append(-(-len(used) // SET_SIZE))
        places += used + [(-1, 0.0)] * (SET_SIZE * sizes[-1] - len(used))
    return FeatureSets(tuple(place for place, _ in places), tuple(factor for _, factor in places), tuple(sizes))


class Record(NamedTuple):
    """The halves that a pixel has in memory.

        | set 0 | set 1 | ... | gates | block 0 | block 1 | ... | block 0 | block 1 | ... |
        0       SLOTS         gates   high                      low                       size
                              if gated, SLOTS                   if split: what values lack in halves

    A block has a power of two of value columns. Records lie in planes, so that what a tile reads at a time lies
    together: a row of a padded image has the first piece of all its pixels, then the second, and so on. The SIZE halves
    from START on of pixel x lie pitch START + x SIZE from the start of the row (`kernels.records.piece_at`).
    """

    sets: int
    gated: bool
    blocks: tuple[int, ...]
    split: bool

    @property
    def gates(self) -> int:
        return self.sets * SLOTS

    @property
    def high(self) -> int:
        return self.gates + self.gated * SLOTS

    @property
    def low(self) -> int:
        return self.high + sum(self.blocks)

    @property
    def size(self) -> int:
        return self.low + self.split * sum(self.blocks)


def column_blocks(columns: int) -> tuple[int, ...]:
    """Powers of two, largest first, that add up to the columns, rounded up to COLUMN_UNITs."""
    sizes = (LARGEST_COLUMNS >> bit for bit in range(LARGEST_COLUMNS.bit_length()))
    return tuple(size for size in sizes if round_up(columns, COLUMN_UNIT) & size)


class TileLayout(NamedTuple):
    """How the tiles of an image and their halos lie in its padded rows; here tiles are 4 x 4, the radius is 1.

        |<------------------------- pitch ------------------------->|
        |<-- margin -->|<------ width ------>|
         . . . . . . h  h h h h h . . . . . .  . . . . . . . . . . .    radius rows above the image
         . . . . . . h  T T T T h . . . . . .  . . . . . . . . . . .    T: the first tile
         . . . . . . h  T T T T h . . . . . .  . . . . . . . . . . .    h: its halo, with the tile itself
         . . . . . . h  T T T T h . . . . . .  . . . . . . . . . . .
         . . . . . . h  T T T T h . . . . . .  . . . . . . . . . . .
         . . . . . . h  h h h h h . . . . . .  . . . . . . . . . . .

    The margin is the radius, rounded up to MARGIN_UNITs (here 8, not to scale). The pitch, in STRIDE_UNITs, holds what
    the last tile reads of its halo, KEYS pixels at a time.
    """

    tiles_y: int
    tiles_x: int
    margin: int
    pitch: int
    table: int  # entries of the terms along y: those of every row of a halo for every pixel of a tile, padding included


def make_tile_layout(height: int, width: int, radius: int, config: Config) -> TileLayout:
    """The layout of an image of this size."""
    tiles_y, tiles_x = -(-height // config.tile_y), -(-width // config.tile_x)
    margin, halo = round_up(radius, MARGIN_UNIT), round_up(config.tile_x + 2 * radius, KEYS)
    pitch = round_up((tiles_x - 1) * config.tile_x + margin - radius + halo, STRIDE_UNIT)
    reach = radius + config.pixels // config.tile_x + 1
    return TileLayout(tiles_y, tiles_x, margin, pitch, 1 << (2 * reach - 1).bit_length())


class Scales(NamedTuple):
    """The power of two by which affinities fit halves, and what undoes it."""

    log2_weights: tuple[float, ...]  # with that power
    undo: float  # with gates also the 1/2 of S


def make_scales(weights: Sequence[float], gated: bool) -> Scales:
    """What brings affinities below 2^LOG2_LARGEST_AFFINITY, with gates times s d' + d s' of gates scaled below 1."""
    log2_gates = int(gated)  # s d' + d s' < 2
    exponent = LOG2_LARGEST_AFFINITY - math.ceil(math.log2(sum(weights))) - log2_gates
    log2_half = int(gated)  # the 1/2 of S_ij
    return Scales(tuple(math.log2(weight) + exponent for weight in weights), 2.0 ** (-exponent - log2_half))


class Chunk(NamedTuple):
    """What is packed and multiplied at a time: rows of tiles of some images."""

    first_image: int
    images: int
    top_tile: int
    tiles_y: int


class Chunks(NamedTuple):
    """How a batch is cut into chunks: into as few as can be, all of about one size."""

    batch: int
    tiles_y: int
    images: int  # of a chunk, at most
    chunk_tiles_y: int

    def each(self) -> Iterator[Chunk]:
        """The chunks, one after another."""
        for image in range(0, self.batch, self.images):
            for tile in range(0, self.tiles_y, self.chunk_tiles_y):
                images, tiles_y = min(self.images, self.batch - image), min(self.chunk_tiles_y, self.tiles_y - tile)
                yield Chunk(image, images, tile, tiles_y)


def make_chunks(batch: int, tiles_y: int, tile_y: int, radius: int, row_bytes: int, workspace: int) -> Chunks:
    """Chunks whose padded rows fit the workspace; images that do not are cut, down to one row of tiles."""
    image_bytes = (tiles_y * tile_y + 2 * radius) * row_bytes
    if image_bytes <= workspace:
        return Chunks(batch, tiles_y, _share(batch, min(workspace // image_bytes, MOST_PROGRAMS)), tiles_y)
    return Chunks(batch, tiles_y, 1, _share(tiles_y, max(1, (workspace // row_bytes - 2 * radius) // tile_y)))


@dataclass(frozen=True)
class Plan:
    """What all launches for problems of one description have in common."""

    config: Config
    limits: Limits
    radius: int
    record: Record
    tiles: TileLayout
    chunks: Chunks
    parts: int  # of an image's summary
    summary_rows: int  # smallest and largest of every channel, three of the gates, one of the values
    prepare_arguments: dict[str, Any]
    pack_arguments: dict[str, Any]
    tile_arguments: dict[str, Any]

    def chunk_rows(self, tiles_y: int) -> int:
        """Padded rows of so many rows of tiles."""
        return tiles_y * self.config.tile_y + 2 * self.radius

    def image_halves(self) -> int:
        """Of the records of an image, or of its part in a chunk."""
        return self.chunk_rows(self.chunks.chunk_tiles_y) * self.tiles.pitch * self.record.size


@functools.lru_cache(maxsize=1024)
def make_plan(description: Description, config: Config, limits: Limits) -> Plan:
    """The plan for a description and a configuration."""
    batch, _, height, width = description.shape
    sets = make_feature_sets(description.channels, description.terms)
    split = description.dtype == torch.float32
    record = Record(sum(sets.sizes), description.gated, column_blocks(description.columns), split)
    tiles = make_tile_layout(height, width, description.radius, config)
    row_bytes = torch.float16.itemsize * tiles.pitch * record.size
    summary = {
        "SUMMARY_ROWS": 2 * sum(description.channels) + 3 * description.gated + (description.kind != "logits"),
        "PARTS": limits.parts,
    }
    parts = min(limits.parts, round_up(-(-height * width // limits.prepared), SUMMARY_UNIT))
    common = _common_arguments(description, sets, record, tiles)
    return Plan(
        config=config,
        limits=limits,
        radius=description.radius,
        record=record,
        tiles=tiles,
        chunks=make_chunks(batch, tiles.tiles_y, config.tile_y, description.radius, row_bytes, limits.workspace),
        parts=parts,
        summary_rows=summary["SUMMARY_ROWS"],
        prepare_arguments=summary | _prepare_arguments(description, limits),
        pack_arguments=common | summary | _pack_arguments(description, sets, parts, config),
        tile_arguments=common | _tile_arguments(description, sets, tiles, config),
    )


def _common_arguments(description: Description, sets: FeatureSets, record: Record, tiles: TileLayout) -> dict[str, Any]:
    return {
        "xy": tuple(term.xy_rate() for term in description.terms),
        "factors": sets.factors,
        "pitch": tiles.pitch // STRIDE_UNIT,
        "KIND": description.kind,
        "COLUMNS": description.shape[1],
        "TERM_SETS": sets.sizes,
        "N_SETS": record.sets,
        "GATED": record.gated,
        "SPLIT": record.split,
        "BLOCKS": record.blocks,
        "BLOCK_START": _starts(record.blocks),
        "GATES": record.gates,
        "HIGH": record.high,
        "LOW": record.low,
        "RECORD": record.size,
        "RADIUS": description.radius,
        "MARGIN": tiles.margin,
        "TABLE": tiles.table,
    }


def _prepare_arguments(description: Description, limits: Limits) -> dict[str, Any]:
    places = [(feature, channel) for feature, count in enumerate(description.channels) for channel in range(count)]
    return {
        "FEATURE": tuple(feature for feature, _ in places),
        "OWN_CHANNEL": tuple(channel for _, channel in places),
        "FEATURE_CHANNELS": description.channels,
        "SCANNED": 0 if description.kind == "logits" else description.shape[1],
        "PIXELS": limits.prepared,
        "num_warps": 8,
        "num_stages": 1,
    }


def _pack_arguments(description: Description, sets: FeatureSets, parts: int, config: Config) -> dict[str, Any]:
    return {
        "images": description.shape[0],
        "parts": parts // SUMMARY_UNIT,
        "CHANNELS": sum(description.channels),
        "CHANNEL": sets.channels,
        "MEAN": description.mean,
        "PIXELS": config.pack,
        "num_warps": 1,
        "num_stages": 1,
    }


def _tile_arguments(description: Description, sets: FeatureSets, tiles: TileLayout, config: Config) -> dict[str, Any]:
    batch, _, height, width = description.shape
    factor = 1 / (batch * height * width) if description.mean and not description.gated else 1.0
    scales = make_scales([factor * term.weight for term in description.terms], description.gated)
    return {
        "log2_weights": scales.log2_weights,
        "affinity_scale": scales.undo,
        "tiles_y": tiles.tiles_y,
        "FIRST_SETS": sets.first,
        "TILE_Y": config.tile_y,
        "TILE_X": config.tile_x,
        "UNROLL": config.unroll,
        "PIXELS": config.pixels,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(sizes, initial=0))[:-1]


def _share(whole: int, most: int) -> int:
    # of equal shares that are at most so large
    return -(-whole // -(-whole // most))
