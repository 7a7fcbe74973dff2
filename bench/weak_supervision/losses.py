"""What is minimised: partial cross entropy, and the Gated CRF loss on the grid and with the gates of the settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcrf_triton import gated_crf_loss, partial_cross_entropy

from .labels import UNLABELLED
from .settings import Settings


def losses_of(
    network: nn.Module,
    image: Tensor,
    labels: Tensor,
    validity: Tensor,
    class_weights: Tensor,
    weight: float,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial cross entropy at the labels' resolution, Gated CRF loss (0 without weight), the logits that this had."""
    dtype = torch.float32 if settings.amp == "none" else getattr(torch, settings.amp)
    with torch.autocast(image.device.type, dtype, enabled=settings.amp != "none"):
        logits = network(as_input(image))
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"network: expected it to return logits [N, C, h, w], got {found}")
    logits = logits.float().contiguous()
    enlarged = logits
    if logits.shape[2:] != labels.shape[1:]:
        enlarged = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    partial = partial_cross_entropy(enlarged, labels, weight=class_weights)
    if settings.loss_stride == "full":
        logits = enlarged  # once for both
    if settings.loss == "pce" or weight == 0:
        return partial, torch.zeros_like(partial), logits
    return partial, crf(logits, image, labels, validity, settings), logits


def weights_of_classes(pixels: Sequence[int], kind: str) -> Tensor:
    """Weights [C] of cross entropy from the labelled pixels of each class: 1, or 1 / log(1.1 + share)."""
    counts = torch.as_tensor(pixels, dtype=torch.float32)
    return torch.ones_like(counts) if kind == "none" else 1 / (1.1 + counts / counts.sum().clamp(min=1)).log()


def as_input(image: Tensor) -> Tensor:
    """What networks take, from images [N, 1 or 3, H, W]."""
    return image.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def crf(logits: Tensor, image: Tensor, labels: Tensor, validity: Tensor, settings: Settings) -> Tensor:
    """The Gated CRF loss of logits [N, C, h, w] on the grid, and with the gates, of the settings."""
    logits = to_grid(logits, settings.loss_stride, image.shape[2:])
    arguments = crf_arguments(image, labels, validity, logits.shape[2:], settings)
    return gated_crf_loss(logits, from_logits=True, **arguments)


def to_grid(logits: Tensor, loss_stride: str, full: Sequence[int]) -> Tensor:
    """Logits on the network's own grid ("native"), that of the image [H, W] ("full") or one of a stride."""
    if loss_stride == "native":
        return logits
    stride = 1 if loss_stride == "full" else int(loss_stride)
    height, width = (-(-length // stride) for length in full)
    if (height, width) == tuple(logits.shape[2:]):
        return logits
    if height <= logits.shape[2]:
        return F.adaptive_avg_pool2d(logits, (height, width))
    return F.interpolate(logits, (height, width), mode="bilinear")


def crf_arguments(
    image: Tensor, labels: Tensor, validity: Tensor, grid: Sequence[int], settings: Settings
) -> dict[str, object]:
    """Features, kernels and gates [N, h, w]; a cell is valid if all of it is, and labelled if any of it is."""
    sigmas = {"rgb": settings.sigma, "xy": settings.xy}
    kernels = [
        {"weight": 1.0} | {name: sigmas[name] for name in kernel.split("+")} for kernel in settings.kernels.split(",")
    ]
    valid = ~shrink_any(~validity, grid)
    source = destination = None
    if settings.gates in ("source", "both"):
        source = valid
    if settings.gates in ("destination", "both"):
        destination = valid & ~shrink_any(labels != UNLABELLED, grid)
    return {
        "features": {"rgb": image},
        "kernels": kernels,
        "radius": settings.radius,
        "source": source,
        "destination": destination,
    }


def shrink_any(marked: Tensor, grid: Sequence[int]) -> Tensor:
    """[N, H, W] bool to a coarser grid, or the same: whether any pixel of a cell is marked."""
    if marked.shape[1:] == tuple(grid):
        return marked
    return F.adaptive_max_pool2d(marked[:, None].float(), tuple(grid))[:, 0] > 0


@torch.no_grad()
def kernel_mass(arguments: dict, grid: Sequence[int]) -> Tensor:
    """Mean over the pixels that count of their kernel's sum: the loss where no two predictions agree."""
    image = arguments["features"]["rgb"]
    disagreeing = image.new_zeros(len(image), 1, *grid)
    return gated_crf_loss(disagreeing, **arguments)


def ramp(progress: float, settings: Settings) -> float:
    """The share of the loss's weight after this share of the steps: 0 until the delay, then rising to 1."""
    since = progress - settings.delay
    if settings.loss == "pce" or since <= 0:
        return 0.0
    return min(since / settings.ramp, 1.0) if settings.ramp else 1.0


def time_loss(
    logits: Tensor, image: Tensor, labels: Tensor, validity: Tensor, settings: Settings
) -> tuple[float, float]:
    """Median seconds of the Gated CRF loss alone, forward and backward, and its kernel's mass; zeros without it."""
    if settings.loss == "pce":
        return 0.0, 0.0
    seconds = []
    for _ in range(7):
        logits.requires_grad_().grad = None
        start = time.perf_counter()
        crf(logits, image, labels, validity, settings).backward()
        logits.grad[0, 0, 0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    grid = to_grid(logits, settings.loss_stride, image.shape[2:]).shape[2:]
    return statistics.median(seconds), kernel_mass(crf_arguments(image, labels, validity, grid, settings), grid).item()
