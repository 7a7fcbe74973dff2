"""What share of a kernel joins pixels of different classes: whether the loss can help, before any training.

    python -m bench.weak_supervision.boundaries --data acdc --root ACDC

The Gated CRF loss of the dense masks, over that of predictions that agree nowhere. A kernel that knew the classes would
have 0; `xy`, which knows only distance, is what colour has to beat. Any setting of `python -m bench.weak_supervision`
can be given; images have the size that they are trained at.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gcrf_triton import gated_crf_loss

from .data import Collection, open_collection
from .labels import UNLABELLED
from .losses import crf_arguments, kernel_mass, to_grid
from .samples import shorten
from .settings import Settings, add_options, preset

SIGMAS = (0.02, 0.03, 0.06, 0.1, 0.2, 0.3)
GRIDS = ("full", "4")
IMAGES = 100


def main(arguments: list[str] | None = None) -> None:
    """Print mass and crossing share of every kernel on every grid."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision.boundaries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    try:
        settings = preset(options.pop("data", "acdc"), gates="source", **options)
        collection = open_collection(settings)
        names = collection.lists["train"]
        names = names[:: max(len(names) // IMAGES, 1)]
        print(f"{settings.data}, {len(names)} training images, radius {settings.radius}, xy {settings.xy:g}")
        print(f"{'kernel':>12}{'grid':>8}{'mass':>8}{'crossing':>10}")
        for grid in GRIDS:
            for sigma in (*SIGMAS, None):
                kernels = "xy" if sigma is None else "rgb+xy"
                changed = dataclasses.replace(
                    settings, loss_stride=grid, kernels=kernels, sigma=sigma or settings.sigma
                )
                mass, crossing = crossing_share(collection, names, changed)
                title = "xy" if sigma is None else f"sigma {sigma:g}"
                print(f"{title:>12}{grid:>8}{mass:8.1f}{crossing:10.2%}", flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


@torch.no_grad()
def crossing_share(collection: Collection, names: Sequence[str], settings: Settings) -> tuple[float, float]:
    """Mean mass of the kernel, and the mean share of it that joins pixels of different classes."""
    masses, shares = [], []
    for name in tqdm(names, unit="image", leave=False, disable=None):
        mask = torch.from_numpy(collection.read_mask(name))
        image, mask = shorten(collection.read_image(name), mask, settings.side, thin=False)
        classes = F.one_hot(torch.where(mask == UNLABELLED, 0, mask).long(), len(collection.class_names))
        truth = to_grid(classes.permute(2, 0, 1)[None].float(), settings.loss_stride, mask.shape)
        known = (mask != UNLABELLED)[None]  # void neither attracts nor is attracted
        settings = dataclasses.replace(settings, gates="both")
        grid = truth.shape[2:]
        arguments = crf_arguments(image[None], torch.full_like(mask, UNLABELLED)[None], known, grid, settings)
        mass = kernel_mass(arguments, grid).item()
        masses.append(mass)
        shares.append(gated_crf_loss(truth, **arguments).item() / mass)
    return statistics.fmean(masses), statistics.fmean(shares)


if __name__ == "__main__":
    main()
