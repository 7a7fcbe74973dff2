"""The problems that are measured: named ones, those of real use and four smaller, and sweeps of one quantity."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

Kernels = tuple[Mapping[str, float], ...]
RGB_XY: Kernels = ({"weight": 1.0, "xy": 6.0, "rgb": 0.1},)
OFFICIAL_PAIR: Kernels = ({"weight": 0.9, "xy": 6.0, "rgb": 0.1}, {"weight": 0.1, "xy": 6.0})
PYMIC_PAIR: Kernels = ({"weight": 1.0, "xy": 5.0, "rgb": 0.1}, {"weight": 1.0, "xy": 3.0})
QUICK_SIDE, QUICK_ELEMENTS = 64, 2**18  # of sweeps, of the predictions of named cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss: prediction [N, C, H, W] in a dtype, image of so many channels, kernels and radius.

    `gates` is whether a source and a destination gate close a third of the pixels each; `logits` whether the
    prediction is one of logits, the softmax of which is part of the step.
    """

    name: str
    shape: tuple[int, int, int, int]
    kernels: Kernels = RGB_XY
    radius: int = 5
    channels: int = 3
    dtype: str = "float32"
    sweep: str = ""
    gates: bool = False
    logits: bool = False

    def describe(self) -> dict[str, str | int]:
        """What a row of results says about the case."""
        return {
            "case": self.name,
            "sweep": self.sweep,
            "shape": "x".join(map(str, self.shape)),
            "radius": self.radius,
            "kernels": json.dumps(self.kernels),
            "dtype": self.dtype,
            "channels": self.channels,
            "gates": "yes" if self.gates else "no",
            "input": "logits" if self.logits else "probabilities",
        }


NAMED = (
    Case("official-clicks", (48, 21, 64, 64)),
    Case("official-two-kernels", (48, 21, 64, 64), OFFICIAL_PAIR),
    Case("voc-crop", (12, 21, 128, 128)),
    Case("voc-full", (1, 21, 513, 513)),
    Case("voc-full-batch", (8, 21, 512, 512)),
    Case("cityscapes", (4, 19, 128, 256)),
    Case("cityscapes-full", (1, 19, 1024, 2048)),
    Case("wsl4mis", (12, 4, 256, 256), channels=1),
    Case("pymic", (12, 4, 224, 224), PYMIC_PAIR, channels=1),
    Case("saliency", (16, 1, 80, 80)),
    Case("ade20k", (2, 150, 128, 128)),
    Case("small-crop", (1, 21, 128, 128)),
    Case("small-clicks", (4, 21, 64, 64)),
    Case("small-slice", (1, 4, 256, 256)),
    Case("two-crops", (2, 21, 256, 256)),
)
SWEEPS = ("pixels", "radius", "classes", "batch", "dtype", "kernels")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def named(names: Sequence[str], quick: bool = False) -> list[Case]:
    """The cases of these names; quick ones have few pixels, and of those that become the same case only the first."""
    chosen = [case for case in NAMED if case.name in names]
    if not quick:
        return chosen
    small = [dataclasses.replace(case, shape=_quick_shape(*case.shape)) for case in chosen]
    alike = [dataclasses.replace(case, name="") for case in small]
    return [case for place, case in enumerate(small) if alike.index(alike[place]) == place]


def _quick_shape(n: int, classes: int, height: int, width: int) -> tuple[int, int, int, int]:
    while n * max(classes, 8) * height * width > QUICK_ELEMENTS:  # windows of the image count too
        n, height, width = (n // 2, height, width) if n > 1 else (1, height // 2, width // 2)
    return n, classes, height, width


def sweep(quantity: str, quick: bool = False) -> list[Case]:
    """Cases that differ in one quantity of SWEEPS alone."""
    side = QUICK_SIDE if quick else 192

    def vary(values, quick_values, settings) -> list[Case]:
        base = Case("", (1, 21, side, side), sweep=quantity)
        return [
            dataclasses.replace(base, name=f"{quantity}-{value}", **settings(value))
            for value in (quick_values if quick else values)
        ]

    if quantity == "pixels":
        sides, quick_sides = (32, 64, 128, 256, 512, 1024, 2048), (16, 32, 64, 128)
        return vary(sides, quick_sides, lambda value: {"shape": (1, 21, value, value)})
    if quantity == "radius":
        return vary((1, 2, 3, 5, 8, 11, 16), (1, 3, 5, 9), lambda value: {"radius": value})
    if quantity == "classes":
        counts, quick_counts = (1, 2, 4, 8, 21, 64, 150), (1, 4, 21, 64)
        return vary(counts, quick_counts, lambda value: {"shape": (1, value, side, side)})
    if quantity == "batch":
        return vary((1, 2, 4, 8, 16, 32), (1, 4), lambda value: {"shape": (value, 21, 64, 64)})
    if quantity == "dtype":
        return vary(DTYPES, ("float32", "bfloat16"), lambda value: {"dtype": value})
    if quantity == "kernels":
        kernels = (*PYMIC_PAIR, {"weight": 0.5, "rgb": 0.3}, {"weight": 0.5, "xy": 2.0, "rgb": 0.2})
        return vary((1, 2, 3, 4), (1, 2), lambda value: {"kernels": kernels[:value]})
    raise ValueError(f"sweep: expected one of {', '.join(SWEEPS)}, got {quantity!r}")
