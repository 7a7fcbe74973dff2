"""Every setting of a training, its default by data set, and its option on the command line."""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields


def option(
    default: object, help: str, choices: Sequence[str] | None = None, least: float = -math.inf, most: float = math.inf
) -> typing.Any:
    """A field with what `--help` says about it, and the numbers that it can be."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


SMALLEST = 1e-6  # sigma
GATES = ("none", "source", "destination", "both")
CLASS_WEIGHTS = ("none", "log")


@dataclass(frozen=True)
class Settings:
    """One training."""

    data: str = option("acdc", "what to train on", ("acdc", "msrc", "voc", "folder"))
    root: str = option("", "folder of the data")
    images: str = option("JPEGImages/{name}.jpg", "pattern of images under the root")
    masks: str = option("SegmentationClass/{name}.png", "pattern of dense masks under the root")
    train_list: str = option("", "names for training, a file under the root; none: four fifths of all images")
    test_list: str = option("", "names for testing")
    class_names: str = option("classes.txt", "names of the classes, a file under the root; or voc, cityscapes")
    labels: str = option("scribbles", "what is trained on", ("clicks", "scribbles", "dense"))
    labels_from: str = option("", "JSON files of clicks, comma-separated, or a folder of XML; none: made from masks")
    thickness: float = option(3.0, "of strokes and discs of clicks, pixels of the image", least=0)
    keep: float = option(1.0, "share of clicks or strokes that are kept", least=0, most=1)
    label_seed: int = option(0, "of strokes made from masks and of those kept", least=0)
    side: int = option(0, "longest side in training, pixels; 0: that of the image", least=0)
    crop: int = option(192, "side of the crops, pixels", least=1)
    smallest: float = option(0.8, "smallest random scale", least=0.01)
    largest: float = option(1.25, "largest random scale", least=0.01)
    network: str = option("unet", "unet, lite0, lite0-full, or module:function of the number of classes")
    loss: str = option("gcrf", "partial cross entropy alone, or with the Gated CRF loss", ("pce", "gcrf"))
    class_weights: str = option("none", "of cross entropy; log: 1 / log(1.1 + share of the labels)", CLASS_WEIGHTS)
    steps: int = option(2400, "optimiser steps", least=1)
    batch: int = option(4, "crops a step, of all processes together", least=1)
    accumulate: int = option(1, "parts a step's batch is computed in", least=1)
    optimizer: str = option("adam", "adam (decoupled weight decay) or sgd (momentum 0.9)", ("adam", "sgd"))
    learning_rate: float = option(3e-3, "at the start; it falls to 0", least=0)
    power: float = option(0.9, "of the polynomial by which it falls")
    weight_decay: float = option(0.0, "of the optimiser", least=0)
    weight: float = option(0.03, "of the Gated CRF loss", least=0)
    delay: float = option(0.05, "share of the steps before the Gated CRF loss starts", least=0, most=1)
    ramp: float = option(0.2, "share of the steps over which its weight then rises", least=0)
    kernels: str = option("rgb+xy", "kernels, comma-separated, each of weight 1")
    sigma: float = option(0.1, "sigma of rgb on [0, 1]: 0.1 is 25 grey levels", least=SMALLEST)
    xy: float = option(6.0, "sigma of xy, pixels of the loss's grid", least=SMALLEST)
    radius: int = option(5, "of the window, pixels of the loss's grid", least=1)
    loss_stride: str = option("native", "grid of the loss: native (the network's), full, or every so many pixels")
    gates: str = option("both", "source: inside the image; destination: unlabelled", GATES)
    amp: str = option("none", "autocast to this", ("none", "bfloat16", "float16"))
    seed: int = option(0, "of weights, order and augmentation", least=0)
    evaluate_on: str = option("test", "the test list, or training names held apart", ("test", "held-out"))
    held_out: float = option(0.2, "share of the training names that held-out takes", least=0, most=0.5)
    evaluations: int = option(4, "evaluations during training", least=1)
    workers: int = option(0, "processes that read ahead", least=0)
    checkpoint_every: int = option(200, "steps; 0: none", least=0)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, least, most = getattr(self, entry.name), entry.metadata["least"], entry.metadata["most"]
            if isinstance(value, int | float) and not least <= value <= most:
                wanted = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
                raise ValueError(f"{entry.name}: expected {wanted}, got {value}")
        if self.smallest > self.largest:
            raise ValueError(f"smallest: expected at most largest={self.largest}, got {self.smallest}")
        if not all(set(kernel.split("+")) <= {"rgb", "xy"} for kernel in self.kernels.split(",")):
            raise ValueError(f"kernels: expected rgb and xy, joined by + and commas, got {self.kernels!r}")
        stride = self.loss_stride
        if stride not in ("native", "full") and not (stride.isdecimal() and int(stride)):
            raise ValueError(f"loss_stride: expected native, full or a number of pixels, got {stride!r}")


PRESETS: dict[str, dict[str, object]] = {
    "acdc": {},
    "msrc": {
        "labels": "clicks",
        "network": "lite0",
        "train_list": "ImageSets/Segmentation/train.txt",
        "test_list": "ImageSets/Segmentation/val.txt",
        "side": 192,
        "crop": 128,
        "smallest": 0.75,
        "largest": 1.5,
        "thickness": 5.0,
        "batch": 8,
        "steps": 1500,
        "learning_rate": 1e-3,
        "weight": 0.01,
        "gates": "source",
    },
    "voc": {  # what the official code trains clicks with
        "labels": "clicks",
        "class_names": "voc",
        "masks": "SegmentationClassAug/{name}.png",
        "train_list": "ImageSets/Segmentation/trainaug.txt",
        "test_list": "ImageSets/Segmentation/val.txt",
        "network": "lite0",
        "crop": 256,
        "smallest": 0.5,
        "largest": 2.0,
        "thickness": 1.0,
        "class_weights": "log",
        "batch": 48,
        "steps": 90000,
        "optimizer": "sgd",
        "learning_rate": 0.007,
        "weight_decay": 1e-4,
        "weight": 0.1,
        "sigma": 0.0225,  # 0.1 of an image divided by its standard deviation, about 0.225
        "delay": 0.005,
        "ramp": 0.0,
        "gates": "source",
    },
    "folder": {
        "labels": "clicks",
        "images": "images/{name}.jpg",
        "masks": "masks/{name}.png",
        "network": "lite0",
        "crop": 320,
        "batch": 8,
        "learning_rate": 1e-3,
        "weight": 0.01,
        "gates": "source",
    },
}


def preset(data: str, **changes: object) -> Settings:
    """The settings of a data set, with changes."""
    return Settings(**{"data": data} | PRESETS[data] | changes)


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """An option for every setting, or for those named, without defaults: these depend on the data."""
    kinds = typing.get_type_hints(Settings)
    for entry in fields(Settings):
        if names is None or entry.name in names:
            parser.add_argument(
                f"--{entry.name.replace('_', '-')}",
                type=kinds[entry.name],
                default=argparse.SUPPRESS,
                choices=entry.metadata["choices"],
                help=f"{entry.metadata['help']} ({str(entry.default) or 'none'})".replace("%", "%%"),
            )
