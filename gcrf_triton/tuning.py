"""Configurations of the kernels, and which one a problem gets."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

from .constants import KEYS
from .messages import warn_caller

SCHEMA = 1
MOST_UNROLLED = 20  # steps: beyond, the code outgrows the instruction cache
REGISTERS = 172  # a thread may be estimated to need: the estimate is rough, and 255 the limit
STAGES = 3  # on NVIDIA: an H100 took 0.54 to 0.79 of the time of 1
MORE_REGISTERS = 212  # for NVIDIA and gfx942: loops estimated at so many were seen to spill 16 bytes at most


@dataclasses.dataclass(frozen=True)
class Config:
    """A way to launch the kernels; every one gives the same answer, up to rounding.

    Args:
        tile_y, tile_x: pixels that a program multiplies by their halo.
        pack: pixels that a program packs, a power of two.
        unroll: write out the steps through the halo instead of looping over them.
        num_warps: of a program that multiplies, a power of two.
        num_stages: of the steps' loads, as Triton counts them: with 1 a step waits for what it loads itself, with more
            the loads of later steps are under way meanwhile, in shared memory. Only loops have stages.

    Raises:
        TypeError, ValueError: for what cannot be launched.
    """

    tile_y: int = 5
    tile_x: int = 6
    pack: int = 128
    unroll: bool = False
    num_warps: int = 1
    num_stages: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, kind, value = field.name, type(field.default), getattr(self, field.name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        if min(self.tile_y, self.tile_x) < 1 or self.pixels > 128:
            raise ValueError(f"tile_y, tile_x: expected a tile of 1 to 128 pixels, got {self.tile_y} x {self.tile_x}")
        if (self.pixels - 1) // self.tile_x > self.tile_y:
            # the pixels that pad it lie below the tile, where the halo has one row at least
            raise ValueError(
                f"tile_y, tile_x: expected to fill {self.pixels} pixels, got {self.tile_y} x {self.tile_x}"
            )
        if self.pack not in (32, 64, 128, 256):
            raise ValueError(f"pack: expected 32, 64, 128 or 256, got {self.pack}")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"num_warps: expected 1, 2, 4 or 8, got {self.num_warps}")
        if self.num_stages not in (1, 2, 3, 4) or (self.unroll and self.num_stages > 1):
            raise ValueError(f"num_stages: expected 1 to 4, and 1 with unroll, got {self.num_stages}")

    @property
    def pixels(self) -> int:
        """Of a tile, padded to a power of two, and to at least a tensor core's 16."""
        return max(16, 1 << (self.tile_y * self.tile_x - 1).bit_length())

    def steps(self, radius: int) -> int:
        """Steps of a tile through its halo, KEYS pixels of a row each."""
        return (self.tile_y + 2 * radius) * -(-(self.tile_x + 2 * radius) // KEYS)


@dataclasses.dataclass(frozen=True)
class Key:
    """What a configuration is chosen by: device, value columns, sets of features of every term, and the rest."""

    device: str
    arch: str
    columns: int
    sets: tuple[int, ...]
    gated: bool
    radius: int
    dtype: str
    log2_pixels: int

    def __str__(self) -> str:
        sets = "+".join(map(str, self.sets))
        gates = "gates" if self.gated else "no gates"
        problem = f"{self.columns} columns, {sets} sets, {gates}, radius {self.radius}, {self.dtype}"
        return f"{self.arch}, {problem}, 2^{self.log2_pixels} pixels"


_forced: contextvars.ContextVar[Config | None] = contextvars.ContextVar("gcrf_triton_config", default=None)


@contextlib.contextmanager
def use_config(config: Config) -> Iterator[None]:
    """Context in which the Triton engine launches with `config`, whatever caches say."""
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_config(key: Key) -> Config:
    """That of `use_config`, else the user's cache, else what the package ships for the device, else by counting."""
    return _forced.get() or _stored(key) or heuristic(key)


def estimated_instructions(config: Config, key: Key) -> float:
    """Rough instructions a pixel: (steps (a pixels + b) + c pixels) / (tile_y tile_x), `pixels` with padding."""
    step = 3.2 * config.pixels + 66 if key.dtype == "float32" else 1.7 * config.pixels + 24
    division = 5 if config.tile_x & (config.tile_x - 1) else 0  # by what is no power of two
    return (config.steps(key.radius) * step + (28 + division) * config.pixels) / (config.tile_y * config.tile_x)


@functools.lru_cache(maxsize=1024)
def heuristic(key: Key) -> Config:
    """The cheapest tile by `estimated_instructions` whose sums, exponents and features fit the registers."""
    most = MORE_REGISTERS if key.arch.startswith(("sm_", "gfx942")) else REGISTERS
    fitting = [config for config in space(key) if _registers(config, key) <= most]
    stages = STAGES if key.arch.startswith("sm_") else 1

    def cost(config: Config) -> tuple[float, bool, int]:
        return estimated_instructions(config, key), config.unroll, abs(config.num_stages - stages)

    return min(fitting or space(key)[-1:], key=cost)


def space(key: Key) -> list[Config]:
    """The configurations worth trying, those that need most registers first."""
    nvidia = key.arch.startswith("sm_")  # where few pixels leave registers for more programs: 0.68 to 0.95 of the time
    pack = 32 if nvidia or key.columns > 48 else 64 if key.columns > 24 else 128
    configs = []
    most_stages = 4 if nvidia else 2  # elsewhere more spill
    for pixels in (32, 16):
        tiles = [Config(pixels // tile_x, tile_x, pack) for tile_x in range(1, pixels + 1)]
        tiles = [tile for tile in tiles if tile.pixels == pixels]
        for tile in sorted(tiles, key=lambda tile: estimated_instructions(tile, key))[:3]:
            configs += [dataclasses.replace(tile, num_stages=stages) for stages in range(1, most_stages + 1)]
            if tile.steps(key.radius) <= MOST_UNROLLED:
                configs.append(dataclasses.replace(tile, unroll=True))
    return configs


def _registers(config: Config, key: Key) -> float:
    # a warp's 32 threads hold the sums, and for every term exponents, for every set two operands, of their pixels
    per_pixel = key.columns + 16 * len(key.sets) + 24 * sum(key.sets) + 16 * key.gated
    return 60 + per_pixel * config.pixels / 32 / config.num_warps


def cache_folder() -> pathlib.Path:
    """Where tuned configurations are kept: GCRF_TRITON_CACHE, or gcrf_triton in the user's cache folder."""
    if chosen := os.environ.get("GCRF_TRITON_CACHE"):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gcrf_triton"


def shipped_file(device: str) -> pathlib.Path:
    """What the package brings for a device, if it exists."""
    return pathlib.Path(str(importlib.resources.files(__package__))) / "configs" / f"{_slug(device)}.json"


def cache_file(key: Key) -> pathlib.Path:
    """One file a problem, so that processes that tune at once cannot spoil each other's."""
    return cache_folder() / _slug(key.device) / f"{_slug(str(key))}.json"


def remember(key: Key, config: Config, **measurement: Any) -> pathlib.Path:
    """Keep a configuration in the user's cache, and what was measured with it."""
    path = cache_file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    content = {"schema": SCHEMA, "entries": {str(key): dataclasses.asdict(config)}} | measurement
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)  # readers see the old file or the new one
    _stored.cache_clear()
    return path


@functools.lru_cache(maxsize=1024)
def _stored(key: Key) -> Config | None:
    return _read(cache_file(key), key) or _read(shipped_file(key.device), key)


def _read(path: pathlib.Path, key: Key) -> Config | None:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']} instead of {SCHEMA}")
        entry = content["entries"].get(str(key))
        return None if entry is None else Config(**entry)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warn_caller(f"{path} holds no configurations of this version ({reason}) and is ignored")
        return None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9^+]+", "-", text.lower()).strip("-")
