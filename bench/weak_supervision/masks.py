"""The Gated CRF loss of dense masks, and the mass of its kernel, over the training images of a collection."""

from __future__ import annotations

import dataclasses
import statistics

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gcrf_triton import gated_crf_loss

from ..measuring.progress import write_line
from .collection import Collection
from .data import Labeller, check
from .labels import UNLABELLED
from .losses import crf_arguments, kernel_mass, to_grid
from .samples import shorten
from .settings import Settings

IMAGES = 60


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Means over images."""

    mass: float
    loss: float  # of the dense masks


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
