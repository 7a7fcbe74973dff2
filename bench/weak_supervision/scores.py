"""Scores of predictions against dense masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import confusion_matrix

from .labels import UNLABELLED

BAND = 5  # pixels of the image to either side of a boundary


class Scores:
    """Confusion matrices [C, C]: of groups of images, of the band around all boundaries, and of all images when
    predictions choose among the classes that the image has. Void is left out."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names
        self.groups: dict[str, np.ndarray] = {}
        self.band = self.told = self._count(np.zeros(0, np.uint8), np.zeros(0, np.uint8))

    def add(self, group: str, truth: np.ndarray, logits: np.ndarray) -> None:
        """Count one image: truth [H, W], logits [C, H, W]."""
        prediction, known = logits.argmax(0), truth != UNLABELLED
        present = np.isin(np.arange(len(logits)), truth)
        told = np.where(present[:, None, None], logits, -np.inf).argmax(0)
        self.groups[group] = self.groups.get(group, 0) + self._count(truth[known], prediction[known])
        self.told = self.told + self._count(truth[known], told[known])
        known &= near_boundary(truth)
        self.band = self.band + self._count(truth[known], prediction[known])

    def summary(self) -> dict[str, float]:
        """Mean IoU, that of the band and with an image's classes told, Dice averaged over groups and foreground
        classes, and the IoU of each class."""
        iou, band, told = (overlap(counts, "iou") for counts in (sum(self.groups.values()), self.band, self.told))
        dice = np.array([overlap(counts, "dice") for counts in self.groups.values()])[:, 1:]
        scores = {"miou": np.nanmean(iou), "boundary_miou": np.nanmean(band), "miou_classes_told": np.nanmean(told)}
        scores["dice"] = np.nanmean(dice)
        scores |= {f"iou {name}": value for name, value in zip(self.class_names, iou, strict=True)}
        return {name: round(float(value), 5) for name, value in scores.items()}

    def _count(self, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        if not truth.size:
            return np.zeros((len(self.class_names),) * 2, np.int64)
        return confusion_matrix(truth, prediction, labels=range(len(self.class_names)))


def overlap(counts: np.ndarray, kind: str) -> np.ndarray:
    """Intersection over union or Dice of every class [C]; NaN for classes that are nowhere."""
    agreed, either = counts.diagonal(), counts.sum(0) + counts.sum(1)
    with np.errstate(invalid="ignore"):
        return 2 * agreed / either if kind == "dice" else agreed / (either - agreed)


def near_boundary(truth: np.ndarray) -> np.ndarray:
    """Pixels [H, W] within a few of a change between classes."""
    change = np.zeros(truth.shape, bool)
    change[:, 1:] |= truth[:, 1:] != truth[:, :-1]
    change[1:] |= truth[1:] != truth[:-1]
    return distance_transform_edt(~change) <= BAND if change.any() else change
