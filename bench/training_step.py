"""`python -m bench.training_step`: what part of a training step of a segmentation network the loss takes.

A step of the FCN with a ResNet-50 of torchvision, from random weights, on 8 images of 512 x 512 pixels and 21 classes:
forward pass, partial cross entropy, backward pass, and a step of the optimizer. It takes turns with the same step plus
a tenth of the loss, and the ratios of turns are what counts. In float32, where matrix products may round to TF32 as is
usual, and under autocast to bfloat16. Needs torchvision; `--quick` has a network of one layer and does not.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from bench.measuring.measure import percentiles
from bench.measuring.surroundings import (
    RESULTS,
    chosen_device,
    device_name,
    driver_version,
    revision,
    synchronize,
    version,
)
from gcrf_triton import gated_crf_loss, partial_cross_entropy
from gcrf_triton.engines import triton_version

SHAPE = (8, 3, 512, 512)
CLASSES = 21
LABELLED = 0.02  # of the pixels
WEIGHT = 0.1


class Segmentation(torch.nn.Module):
    """Image to logits of the same size, by a network of torchvision that returns a dictionary."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)["out"]


def make_network(quick: bool, device: torch.device) -> torch.nn.Module:
    """Image to logits of the same size; ValueError without torchvision."""
    if quick:
        return torch.nn.Conv2d(3, CLASSES, 3, padding=1).to(device)
    try:
        from torchvision.models.segmentation import fcn_resnet50
    except ImportError as error:
        raise ValueError(f"expected torchvision, whose network this is, got none ({error})") from None
    return Segmentation(fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)).to(device)


def make_step(
    network: torch.nn.Module, shape: Sequence[int], half: bool, device: torch.device
) -> Callable[[bool], None]:
    """One training step, with the loss or without."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    image = interpolate(torch.rand(shape[0], 3, 16, 16, generator=generator), size=tuple(shape[2:]), mode="bilinear")
    image = (image + 0.05 * torch.rand(tuple(shape), generator=generator)).clamp(0, 1).to(device)
    labels = torch.randint(CLASSES, (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) > LABELLED] = 255
    labels = labels.to(device)

    def step(with_loss: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = network(image)
            loss = partial_cross_entropy(logits, labels)
            if with_loss:
                loss = loss + WEIGHT * gated_crf_loss(logits, {"rgb": image}, from_logits=True)
        loss.backward()
        optimizer.step()

    return step


def take_turns(step: Callable[[bool], None], turns: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with the loss, one after another; the first two of each are left out."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 2):
        for with_loss in (False, True):
            synchronize(device)
            start = time.perf_counter()
            step(with_loss)
            synchronize(device)
            if turn >= 2:
                seconds[with_loss].append(time.perf_counter() - start)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, and images of 32 x 32 pixels")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.csv", help="CSV file to append to")
    options = parser.parse_args(arguments)
    device = chosen_device(None)
    shape = (2, 3, 32, 32) if options.quick else SHAPE
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        network = make_network(options.quick, device)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for half in (False, True):
        seconds = take_turns(make_step(network, shape, half, device), options.turns, device)
        shares = [100 * (more / less - 1) for less, more in zip(*seconds, strict=True)]
        row = {"network": "one layer" if options.quick else "fcn_resnet50", "shape": "x".join(map(str, shape))}
        row |= {"classes": CLASSES, "precision": "bfloat16" if half else "TF32" if device.type == "cuda" else "float32"}
        row |= {"turns": options.turns}
        for name, values in zip(("seconds_without", "seconds_with"), seconds, strict=True):
            row[name] = f"{percentiles(values)[0]:.5g}"
        for point, value in zip(("median", "p20", "p80"), percentiles(shares), strict=True):
            row[f"percent_more_{point}"] = f"{value:.3g}"
        row |= {"device": device_name(device), "driver": driver_version(device), "torch": torch.__version__}
        row |= {"triton": triton_version(), "torchvision": version("torchvision"), "revision": revision()}
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        more = "{percent_more_median} % ({percent_more_p20} to {percent_more_p80})".format(**row)
        milliseconds = (f"{1e3 * float(row[name]):.1f}" for name in ("seconds_without", "seconds_with"))
        print(f"{row['network']} {row['shape']} {row['precision']}: {' -> '.join(milliseconds)} ms, {more}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
