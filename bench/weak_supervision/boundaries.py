"""How strong the Gated CRF loss is on a data set, and the weight that follows, before any training.

    python -m bench.weak_supervision.boundaries --data acdc --root ACDC

For kernels and grids, from images with dense masks (a few dozen are enough):

- mass: the mean sum of a pixel's kernel, which is the loss where no two predictions agree;
- crossing: the share of it that joins pixels of different classes. A kernel that knew the classes would have 0; `xy`,
  which knows only distance, is what colour has to beat;
- masks: the loss of the dense masks, mass x crossing. This, times the weight, is what the truth costs in training;
- weight: 0.3 over the mass, where to start; the README has the evidence and its limits.

Any setting of `python -m bench.weak_supervision` can be given; images have the size that they are trained at.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gcrf_triton import gated_crf_loss

from ..measuring.progress import write_line
from .collection import Collection, open_collection
from .data import Labeller, check
from .labels import UNLABELLED
from .losses import crf_arguments, kernel_mass, to_grid
from .samples import shorten
from .settings import Settings, add_options, preset

STRENGTH = 0.3  # weight x mass
SIGMAS = (0.02, 0.03, 0.06, 0.1, 0.2, 0.3)
GRIDS = ("full", "4")
IMAGES = 60


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Means over images."""

    mass: float
    loss: float  # of the dense masks


def main(arguments: list[str] | None = None) -> None:
    """Print a line for every kernel on every grid."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision.boundaries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    try:
        settings = preset(options.pop("data", "acdc"), **options)
        collection = open_collection(settings)
        print(f"{settings.data}, radius {settings.radius}, xy {settings.xy:g}")
        print(f"{'kernel':>12}{'grid':>8}{'mass':>8}{'crossing':>10}{'masks':>8}{'weight':>8}")
        for grid in GRIDS:
            for sigma in (*SIGMAS, None):
                colour = {"kernels": "xy"} if sigma is None else {"kernels": "rgb+xy", "sigma": sigma}
                found = loss_of_masks(collection, dataclasses.replace(settings, loss_stride=grid, **colour))
                title = "xy" if sigma is None else f"sigma {sigma:g}"
                line = f"{title:>12}{grid:>8}{found.mass:8.1f}{found.loss / found.mass:10.2%}{found.loss:8.3f}"
                print(f"{line}{STRENGTH / found.mass:8.2g}", flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


@torch.no_grad()
def loss_of_masks(collection: Collection, settings: Settings) -> Boundaries:
    """Kernel mass and the Gated CRF loss of dense masks, over training images; void is gated out on both sides.

    Images and masks that `data.check` finds broken are left out.
    """
    names = collection.lists["train"]
    names = names[:: -(-len(names) // IMAGES)]
    broken, _ = check(collection, Labeller(collection, "dense"), names)
    found = []
    for name in tqdm(
        [name for name in names if name not in broken], desc="masks", unit="image", leave=False, disable=None
    ):
        mask = torch.from_numpy(collection.read_mask(name))
        image, mask = shorten(collection.read_image(name), mask, settings.side, thin=False)
        classes = F.one_hot(torch.where(mask == UNLABELLED, 0, mask).long(), len(collection.class_names))
        truth = to_grid(classes.permute(2, 0, 1)[None].float(), settings.loss_stride, mask.shape)
        unlabelled, known = torch.full_like(mask, UNLABELLED)[None], (mask != UNLABELLED)[None]
        gated = dataclasses.replace(settings, gates="both")
        arguments = crf_arguments(image[None], unlabelled, known, truth.shape[2:], gated)
        found.append((kernel_mass(arguments, truth.shape[2:]).item(), gated_crf_loss(truth, **arguments).item()))
    for message in broken.values():
        write_line(f"left out: {message}")
    mass, loss = map(statistics.fmean, zip(*found, strict=True)) if found else (0.0, 0.0)
    if mass == 0:
        raise ValueError(f"masks: expected labelled pixels in the {len(found)} that were read, got void alone")
    return Boundaries(mass, loss)


if __name__ == "__main__":
    main()
