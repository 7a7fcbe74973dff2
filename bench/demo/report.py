"""What the demo leaves behind: a table, pictures, a mask and a CSV."""

from __future__ import annotations

import csv
import json
import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

import gcrf_triton

from ..measuring.surroundings import processor
from ..weak_supervision.scores import BAND
from .example import UNLABELLED, Example, labelled_share, mean_iou

CURVE_COLOURS = ("#6b7280", "#d97706", "#0f766e")


@dataclass
class Run:
    """One training: what it predicted, how well, and at what cost."""

    method: str
    seed: int
    kernel: Mapping[str, float] | None
    mask: np.ndarray  # [H, W] uint8
    iou: np.ndarray  # [C], NaN without a truth
    boundary_iou: np.ndarray  # [C], NaN without a truth
    partial_losses: list[float]
    curve: list[tuple[int, float]]  # step, mIoU
    seconds_per_step: float
    loss_share: float
    peak_memory: float


def print_table(runs: list[Run]) -> None:
    """One line a method: means over the seeds, with standard deviations of the scores."""
    print(f"\n{'':30}{'mIoU %':>14}{'boundary mIoU %':>18}{'s / step':>11}{'loss share':>12}{'peak MiB':>10}")
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        scores = spread([mean_iou(run.iou) for run in mine])
        boundary_scores = spread([mean_iou(run.boundary_iou) for run in mine])
        seconds, share, memory = np.mean([(run.seconds_per_step, run.loss_share, run.peak_memory) for run in mine], 0)
        print(f"{method:30}{scores:>14}{boundary_scores:>18}{seconds:>11.3f}{share:>12.0%}{memory:>10.0f}")
    print(f"boundary: within {BAND} pixels of one; s / step: median; loss share: Gated CRF forward and backward, timed")
    print("alone, over a step; peak MiB: resident in the process, of which an idle one has most\n")


def spread(scores: list[float]) -> str:
    """The mean in per cent, and the standard deviation of several."""
    if math.isnan(scores[0]):
        return "no truth"
    mean = f"{100 * statistics.mean(scores):.1f}"
    return mean if len(scores) == 1 else f"{mean} +- {100 * statistics.stdev(scores):.1f}"


def draw_panel(example: Example, runs: dict[str, Run], path: Path) -> None:
    """The photograph, its scribbles, the truth where known, and what every method made of them."""
    strokes = np.array(Image.fromarray(example.scribbles).filter(ImageFilter.MinFilter(3)))  # widened to be seen
    pictures = {
        "photograph": np.array(example.photo),
        f"scribbles, {labelled_share(example):.1%} of the pixels": paint(example, strokes, 1.0),
    }
    if example.truth is not None:
        pictures["truth (white: void)"] = paint(example, example.truth, 0.7)
    for run in runs.values():
        title = run.method if example.truth is None else f"{run.method}: {100 * mean_iou(run.iou):.1f} % mIoU"
        pictures[title] = paint(example, run.mask, 0.7)
    rows = math.ceil(len(pictures) / 3)
    figure = Figure((12, rows * (4 * example.photo.height / example.photo.width + 0.3)), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 3)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(picture, interpolation="antialiased")
        axis.set_title(title, fontsize=13)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)
    figure.savefig(path)
    with Image.open(path) as panel:
        small = panel.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def paint(example: Example, labels: np.ndarray, opacity: float) -> np.ndarray:
    """Classes in their colours over a paled photograph, [H, W, 3] uint8."""
    photo = 0.55 * np.array(example.photo) + 0.45 * 255
    known = labels != UNLABELLED
    photo[known] += opacity * (example.colours[labels[known]] - photo[known])
    if opacity < 1:
        photo[~known] = 255
    return photo.astype(np.uint8)


def draw_curves(runs: dict[str, Run], path: Path) -> None:
    """Partial cross entropy and, with a truth, mIoU over the steps."""
    scored = any(run.curve for run in runs.values())
    figure = Figure((10, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, 1 + scored, squeeze=False)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    for run, shade in zip(runs.values(), CURVE_COLOURS, strict=True):
        axes[0, 0].semilogy(range(1, len(run.partial_losses) + 1), run.partial_losses, color=shade, label=run.method)
        if scored:
            axes[0, 1].plot(*zip(*((step, 100 * value) for step, value in run.curve), strict=True), color=shade)
    axes[0, 0].set_title("partial cross entropy")
    axes[0, 0].legend(frameon=False)
    if scored:
        axes[0, 1].set_title("mIoU against the dense mask, %")
        axes[0, 1].set_ylim(0, 100)
    figure.savefig(path)


def save_mask(example: Example, mask: np.ndarray, path: Path) -> None:
    """A palette PNG with the values that the strokes had, or 0, 1, ... for strokes in colours."""
    image = Image.fromarray(np.array(example.values, np.uint8)[mask], "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[example.values] = example.colours
    image.putpalette(palette.tobytes())
    image.save(path)


def write_csv(example: Example, runs: list[Run], settings: Mapping[str, object], path: Path) -> None:
    """One row a seed and method, with scores, costs and every setting."""
    surroundings = {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "picture": example.name,
        "picture_size": "{} x {}".format(*example.photo.size),
        "labelled_share": round(labelled_share(example), 4),
        "boundary_band": BAND,
        "device": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcrf_triton": gcrf_triton.__version__,
    }
    rows = []
    for run in runs:
        scores = {"miou": round(mean_iou(run.iou), 4), "boundary_miou": round(mean_iou(run.boundary_iou), 4)}
        scores |= {f"iou_{name}": round(value, 4) for name, value in zip(example.class_names, run.iou, strict=True)}
        rows.append(
            {"method": run.method, "seed": run.seed, **scores}
            | {"seconds_per_step": round(run.seconds_per_step, 5), "loss_share": round(run.loss_share, 4)}
            | {"peak_memory_mib": round(run.peak_memory, 1), "kernel": json.dumps(run.kernel)}
            | settings
            | surroundings
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
