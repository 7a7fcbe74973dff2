"""The main figures of a folder of `bench.gpu`, in a few lines: what a terminal shows after every call."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bench.machine_code.model import CLOCKS
from bench.measuring import table
from bench.measuring.cases import RGB_XY

PROBLEM = ("case", "shape", "dtype", "gates", "radius", "kernels")
OTHERS = {  # column -> implementation
    "again": "triton-engine-again",
    "PyTorch": "torch-engine",
    "offsets": "offsets",
    "offsets*": "offsets-compiled",
    "Flex": "flex",
    "unfold": "unfold",
    "unfold*": "unfold-compiled",
    "official": "official",
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU: how many multiprocessors, and their highest clock."""

    name: str
    multiprocessors: int
    gigahertz: float

    def milliseconds(self, clocks: float, pixels: int) -> float:
        """From clocks a pixel and multiprocessor."""
        return clocks * pixels / self.multiprocessors / self.gigahertz / 1e6

    def clocks(self, milliseconds: float, pixels: int) -> float:
        """The inverse."""
        return milliseconds / self.milliseconds(1.0, pixels)


def summary(folder: Path, device: Device, endings: Mapping[str, str]) -> str:
    """Device and steps, then every problem measured from logits beside the model, with ratios, memory and errors."""
    rows = _read(folder / "measurements.csv")
    lines = [f"{device.name}, {device.multiprocessors} multiprocessors, {device.gigahertz:g} GHz at most"]
    if rows:
        lines.append(f"driver {rows[-1]['driver'] or 'none'}, PyTorch {rows[-1]['torch']}, Triton {rows[-1]['triton']}")
    lines += [f"{name}: {ending}" for name, ending in endings.items() if not ending.startswith("done")]
    if (folder / "tests.log").exists():
        lines.append(f"tests: {(folder / 'tests.log').read_text().splitlines()[-1]}")
    if copied := _terabytes_a_second(rows):
        lines.append(f"a copy moves {copied:.2f} TB/s, read and written")
    lines += ["", *_problems(rows, _modelled(folder / "static_cost.csv"), device)]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> list[dict[str, str]]:
    return table.read(path) if path.exists() and path.stat().st_size else []


def _modelled(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    # dtype, classes, radius, gates -> modelled clocks of both kernels
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "together"]
    return {(row["dtype"], row["classes"], row["radius"], row["gates"]): row for row in rows}


def _terabytes_a_second(rows: Sequence[table.Row]) -> float:
    # of the largest copy: small ones are written into a cache
    copies = [row for row in rows if row["implementation"] == "copy" and row["seconds_median"]]

    def moved(row: table.Row) -> int:
        return 2 * math.prod(map(int, row["shape"].split("x"))) * getattr(torch, row["dtype"]).itemsize

    largest = max(copies, key=moved, default=None)
    return moved(largest) / float(largest["seconds_median"]) / 1e12 if largest else 0.0


def _problems(
    rows: Sequence[table.Row], modelled: Mapping[tuple[str, ...], Mapping[str, str]], device: Device
) -> Iterator[str]:
    turns: dict[tuple[str, ...], list[table.Row]] = {}  # of one problem, side by side
    for row in rows:
        if row["input"] == "logits" and row["mode"] == "forward+backward":
            turns.setdefault((*(row[field] for field in PROBLEM), row["utc"]), []).append(row)
    problems: dict[tuple[str, ...], dict[str, table.Row]] = {}
    for key, found in sorted(turns.items(), key=lambda item: (len(item[1]), item[0][-1])):
        # where an implementation took turns more than once, those with most others count, and of such the last
        problems.setdefault(key[:-1], {}).update({row["implementation"]: row for row in found})
    if not problems:
        return
    yield "milliseconds from logits, forward and backward, and the model's; how many times as long others take"
    yield "(* compiled); megabytes; relative errors of loss and gradient"
    yield _line("case", "dtype", "gates", "ms", "model", *OTHERS, "MB", "official", "loss", "gradient")
    units = []
    for (name, shape, dtype, gates, radius, kernels), found in problems.items():
        own = found.get("triton-engine") or found.get("torch-engine")
        if own is None or not own["seconds_median"]:
            yield _line(name, dtype, gates, own["status"] if own else "no engine")
            continue
        n, classes, height, width = map(int, shape.split("x"))
        pixels, milliseconds = n * height * width, 1e3 * float(own["seconds_median"])
        model = modelled.get((dtype, str(classes), radius, gates)) if json.loads(kernels) == list(RGB_XY) else None
        bound = f"{device.milliseconds(float(model['bound_clocks']), pixels):.4f}" if model else "-"
        ratios = [_ratio(found.get(implementation)) for implementation in OTHERS.values()]
        memory = [_megabytes(row) for row in (own, found.get("official"))]
        errors = (own["loss_error"], own["gradient_error"])
        yield _line(name, dtype, gates, f"{milliseconds:.4f}", bound, *ratios, *memory, *errors)
        if model:
            clocks = [f"{unit} {float(model[f'{unit}_clocks']):.1f}" for unit in CLOCKS]
            measured = f"{device.clocks(milliseconds, pixels):.1f}" if own is found.get("triton-engine") else "-"
            units.append(f"{_line(name, dtype, gates, measured)}   {', '.join(clocks)}   {own['config']}")
    if units:
        of = next(iter(modelled.values()))["device"]
        yield from ("", f"clocks a pixel and multiprocessor: measured, and of every unit in the model of {of}", *units)


def _line(*columns: str) -> str:
    first, others = columns[:3], columns[3:]
    return "".join([f"{first[0]:<23}", *(f"{text:<9}" for text in first[1:]), *(f"{text:>9}" for text in others)])


def _ratio(row: table.Row | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['ratio_median']):.3g}" if row["ratio_median"] else row["status"].split(":")[0][:9]


def _megabytes(row: table.Row | None) -> str:
    return f"{int(row['peak_bytes']) / 1e6:.1f}" if row and row["peak_bytes"] else "-"
