"""Train a small network from scribbles on one photograph, with and without the Gated CRF loss.

    python -m bench.demo
    python -m bench.demo --image photo.jpg --scribbles strokes.png [--truth mask.png]

The first form takes a PASCAL VOC photograph with dense masks. The second takes your own picture and strokes of the same
size: a palette or greyscale PNG whose values are classes, 255 where nobody drew, or a colour picture with one class a
distinct colour, black or transparent where nobody drew. A truth follows the same rule with the same classes.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcrf_triton import gated_crf_loss, partial_cross_entropy

from ..measuring.progress import bar, write_line
from ..weak_supervision.networks import UNet
from .example import Example, labelled_share, mean_iou, read_example, reduce_example, score, voc_example
from .report import Run, draw_curves, draw_panel, print_table, save_mask, write_csv

METHODS: dict[str, Mapping[str, float] | None] = {
    "partial CE": None,
    # 0.63: the same sum of kernels over the VOC photograph as with rgb, 57 a pixel
    "partial CE + xy-only control": {"weight": 0.63, "xy": 6.0},
    "partial CE + Gated CRF": {"weight": 1.0, "xy": 6.0, "rgb": 0.1},
}
RADIUS = 5
WIDTHS = (16, 32, 64)
LEARNING_RATE = 1e-2


def main(arguments: list[str] | None = None) -> None:
    """Train every method with every seed; print a table and write pictures, a mask and a CSV."""
    options = parse_arguments(arguments)
    try:
        prepare_folder(options.out)
        example = read_example(options.image, options.scribbles, options.truth) if options.image else voc_example()
        image, labels = reduce_example(example, options.side)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_line(
        f"{example.name}: {example.photo.width} x {example.photo.height} pixels, trained at "
        f"{image.shape[3]} x {image.shape[2]}, {len(example.class_names)} classes, strokes on "
        f"{labelled_share(example):.1%} of the pixels, {options.steps} steps"
    )
    runs = [
        train(example, image, labels, method, seed, options)
        for seed in range(options.seed, options.seed + options.seeds)
        for method in METHODS
    ]
    print_table(runs)
    print("One picture shows what the loss does, not how it generalises.")
    first = {run.method: run for run in runs if run.seed == options.seed}
    draw_panel(example, first, options.out / "demo.png")
    draw_curves(first, options.out / "demo_curves.png")
    save_mask(example, first["partial CE + Gated CRF"].mask, options.out / "demo_mask.png")
    settings = {
        "command": options.command,
        "training_size": f"{image.shape[3]} x {image.shape[2]}",
        "network": f"U-Net {'-'.join(map(str, WIDTHS))}",
        "optimizer": f"Adam, learning rate {LEARNING_RATE}, polynomial decay 0.9",
        "steps": options.steps,
        "weight": options.weight,
        "radius": RADIUS,
    }
    write_csv(example, runs, settings, options.out / "demo.csv")
    print(f"wrote demo.png, demo_curves.png, demo_mask.png and demo.csv to {options.out}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, help="your own photograph")
    parser.add_argument("--scribbles", type=Path, help="its strokes, of the same size")
    parser.add_argument("--truth", type=Path, help="its dense mask, for the scores only")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    parser.add_argument("--side", type=positive, default=500, help="longest side in training (%(default)s)")
    parser.add_argument("--steps", type=positive, default=150, help="steps of each training (%(default)s)")
    parser.add_argument("--weight", type=float, default=0.01, help="of the Gated CRF loss (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=1, help="how many seeds to run (%(default)s)")
    options = parser.parse_args(arguments)
    if (options.image is None) != (options.scribbles is None) or (options.truth and not options.image):
        parser.error("--image and --scribbles go together, and --truth with both")
    options.command = shlex.join(["python", "-m", "bench.demo", *(sys.argv[1:] if arguments is None else arguments)])
    return options


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def prepare_folder(folder: Path) -> None:
    """Make sure that results can be written before anything is trained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: expected a folder to write to, got {error.strerror}") from error


class CoordinateUNet(UNet):
    """A small U-Net: logits [N, C, H, W] from RGB and normalised coordinates."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, inputs=5, widths=WIDTHS)

    def forward(self, image: Tensor) -> Tensor:
        n, _, height, width = image.shape
        y = torch.linspace(-1, 1, height)[:, None].expand(n, 1, height, width)
        x = torch.linspace(-1, 1, width).expand(n, 1, height, width)
        return super().forward(torch.cat([2 * image - 1, x, y], dim=1))


def train(example: Example, image: Tensor, labels: Tensor, method: str, seed: int, options: argparse.Namespace) -> Run:
    """Train one network by one method and score it."""
    kernel = METHODS[method]
    torch.manual_seed(seed)
    network = CoordinateUNet(len(example.class_names))
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.steps, power=0.9)
    losses, curve, seconds = [], [], []
    peak_memory(reset=True)
    for step in bar(range(1, options.steps + 1), f"{method}, seed {seed}", options.steps, "step"):
        start = time.perf_counter()
        logits = network(image)
        loss = partial = partial_cross_entropy(logits, labels)
        if kernel is not None:
            gated = gated_crf_loss(logits, {"rgb": image}, [kernel], RADIUS, from_logits=True)
            loss = partial + options.weight * gated
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(partial.item())
        seconds.append(time.perf_counter() - start)
        if step % max(options.steps // 15, 1) == 0 and example.truth is not None:
            curve.append((step, mean_iou(score(example, predict(network, image, example)))))
    memory, seconds_per_step = peak_memory(), statistics.median(seconds)
    share = 0.0 if kernel is None else time_loss(logits.detach(), image, kernel) / seconds_per_step
    mask = predict(network, image, example)
    iou, boundary_iou = score(example, mask), score(example, mask, boundary_only=True)
    return Run(method, seed, kernel, mask, iou, boundary_iou, losses, curve, seconds_per_step, share, memory)


def predict(network: nn.Module, image: Tensor, example: Example) -> np.ndarray:
    """The most likely class of every pixel of the photograph, [H, W] uint8."""
    network.eval()
    with torch.no_grad():
        logits = F.interpolate(network(image), (example.photo.height, example.photo.width), mode="bilinear")
    network.train()
    return logits[0].argmax(0).byte().numpy()


def time_loss(logits: Tensor, image: Tensor, kernel: Mapping[str, float]) -> float:
    """Median seconds of the Gated CRF loss alone, forward and backward."""
    seconds = []
    for _ in range(7):
        logits.requires_grad_().grad = None
        start = time.perf_counter()
        gated_crf_loss(logits, {"rgb": image}, [kernel], RADIUS, from_logits=True).backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_memory(reset: bool = False) -> float:
    """MiB resident in the process at the peak since the last reset; NaN outside Linux."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    except OSError:
        return math.nan


if __name__ == "__main__":
    main()
