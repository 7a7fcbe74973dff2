"""Samples of training: scaled, flipped and cropped, with a gate of what is inside the image, in a repeatable order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .data import Data, seeded
from .labels import UNLABELLED
from .settings import Settings


@dataclass(frozen=True)
class Augmentation:
    """Random scale, flip and crop; `crop` is (height, width) in pixels."""

    crop: tuple[int, int]
    scales: tuple[float, float]
    flip: bool = True

    def __call__(
        self, image: Tensor, labels: Tensor, random: np.random.Generator, thin: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image [F, H, W] and labels [H, W] to those of the crop, and its validity [H, W]: False outside the image."""
        factor = np.exp(random.uniform(*np.log(self.scales)))
        image, labels = resize(image, labels, factor, thin)
        if self.flip and random.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        offsets = [random.integers(min(0, have - want), max(0, have - want) + 1) for have, want in self._sizes(image)]
        (top, bottom), (left, right) = (
            (-offset, offset + want - have) for offset, (have, want) in zip(offsets, self._sizes(image), strict=True)
        )
        border = (left, right, top, bottom)  # negative ones cut
        validity = torch.ones_like(labels, dtype=torch.bool)
        return (
            F.pad(image, border),
            F.pad(labels, border, value=UNLABELLED),
            F.pad(validity, border, value=False),
        )

    def _sizes(self, image: Tensor) -> list[tuple[int, int]]:
        return list(zip(image.shape[1:], self.crop, strict=True))


def resize(image: Tensor, labels: Tensor, factor: float, thin: bool) -> tuple[Tensor, Tensor]:
    """Scale image [F, H, W] and labels [H, W]; `thin` labels survive where picking pixels would lose them."""
    height, width = (max(round(length * factor), 1) for length in labels.shape)
    if (height, width) == tuple(labels.shape):
        return image, labels
    image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
    smaller = F.interpolate(labels[None, None], (height, width), mode="nearest-exact")[0, 0]
    if thin and factor < 1:
        y, x = (labels != UNLABELLED).nonzero(as_tuple=True)
        target = (y * height // labels.shape[0], x * width // labels.shape[1])
        empty = smaller[target] == UNLABELLED
        smaller[target[0][empty], target[1][empty]] = labels[y[empty], x[empty]]
    return image, smaller


def shorten(image: Tensor, labels: Tensor, side: int, thin: bool) -> tuple[Tensor, Tensor]:
    """Scale down to a longest side; 0 leaves as it is."""
    longest = max(labels.shape)
    return resize(image, labels, side / longest, thin) if 0 < side < longest else (image, labels)


class TrainingSet(Dataset):
    """Augmented samples by (epoch, place): what comes back depends on these and the seed alone."""

    def __init__(self, data: Data, settings: Settings) -> None:
        self.data, self.side, self.seed = data, settings.side, settings.seed
        self.augmentation = Augmentation((settings.crop, settings.crop), (settings.smallest, settings.largest))
        self.thin = settings.labels != "dense"

    def __len__(self) -> int:
        return len(self.data.training)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = key
        name = self.data.training[place]
        image = self.data.collection.read_image(name)
        labels = torch.from_numpy(self.data.labeller(name, *image.shape[1:]))
        image, labels = shorten(image, labels, self.side, self.thin)
        return self.augmentation(image, labels, seeded(self.seed, epoch, place), self.thin)


class Batches(Sampler):
    """Keys of the batches of one process, from a given step on; epochs follow each other without a seam."""

    def __init__(self, samples: int, batch: int, steps: range, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.samples, self.batch, self.steps, self.seed = samples, batch, steps, seed
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            places = range(step * self.batch + self.rank, (step + 1) * self.batch, self.processes)
            yield [self._key(place) for place in places]

    def _key(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.samples)
        return epoch, int(order(self.seed, epoch, self.samples)[place])


@functools.lru_cache(2)  # a batch may end one epoch and start the next
def order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """In which the samples of an epoch come."""
    return seeded(seed, epoch).permutation(samples)
