"""Images and their dense masks: where they lie, how they are read, listed and told apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .labels import CITYSCAPES_CLASSES, UNLABELLED, reason
from .settings import Settings

ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
ACDC_UNLABELLED = 4
DRAW_ANEW = "draw without antialiasing and save as PNG"
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CLASSES = {"voc": VOC_CLASSES, "cityscapes": CITYSCAPES_CLASSES}


class Slices:
    """ACDC as WSL4MIS cuts it: `slices/*.h5` with image, label and scribble, and `train.txt` and `test.txt`."""

    class_names = ACDC_CLASSES

    def __init__(self, root: Path) -> None:
        try:
            from h5py import File
        except ImportError as error:
            raise ValueError("data: expected h5py for acdc, got none: pip install h5py") from error
        self.root, self.open = root, File
        self.lists = {split: read_list(root / f"{split}.txt") for split in ("train", "test")}

    def read_image(self, name: str) -> Tensor:
        """[1, H, W] float32 in [0, 1]."""
        return torch.from_numpy(self._read(name, "image").astype(np.float32))[None]

    def read_mask(self, name: str) -> np.ndarray:
        """[H, W] uint8."""
        return self._read(name, "label").astype(np.uint8)

    def read_scribbles(self, name: str, height: int, width: int) -> np.ndarray:
        """[H, W] uint8, drawn by people."""
        scribbles = self._read(name, "scribble").astype(np.uint8)
        scribbles[scribbles == ACDC_UNLABELLED] = UNLABELLED
        if (scribbles != UNLABELLED).all():
            unlabelled = f"{ACDC_UNLABELLED} or {UNLABELLED}"
            raise ValueError(f"{self.mask_path(name)}: expected {unlabelled} where nobody drew, got labels everywhere")
        return scribbles

    def group(self, name: str) -> str:
        """Slices of one volume are scored together."""
        return name.split("_slice_")[0]

    def held_out(self, names: Sequence[str], share: float) -> set[str]:
        """The slices of the last patients."""
        patients = sorted({name.split("_")[0] for name in names})
        last = set(patients[len(patients) - round(share * len(patients)) :])
        return {name for name in names if name.split("_")[0] in last}

    def mask_path(self, name: str) -> Path:
        """The file that holds a mask."""
        return self.root / "slices" / name

    def _read(self, name: str, key: str) -> np.ndarray:
        path = self.mask_path(name)
        try:
            with self.open(path) as file:
                values = file[key][:]
        except (OSError, KeyError) as error:
            raise ValueError(f"{path}: expected HDF5 with {key!r}, got {reason(error)}") from error
        if values.ndim != 2:
            raise ValueError(f"{path}: expected {key!r} [H, W], got {list(values.shape)}")
        return values


class Pictures:
    """Photographs and palette masks under patterns such as `JPEGImages/{name}.jpg`, in the lists of PASCAL VOC and SBD.

    A line of a list is a name, which may have folders in it (as Cityscapes needs: `leftImg8bit/{name}_leftImg8bit.png`
    and `train/aachen/aachen_000000_000019`), or an image and its mask as paths from the root. Without lists every image
    counts, and each fifth is for testing.
    """

    def __init__(
        self, root: Path, images: str, masks: str, class_names: Sequence[str], train_list: str, test_list: str
    ) -> None:
        self.root, self.images, self.masks, self.class_names = root, images, masks, tuple(class_names)
        for argument, pattern in (("images", images), ("masks", masks)):
            if pattern.count("{name}") != 1 or Path(pattern).is_absolute():
                raise ValueError(f"{argument}: expected a pattern under the root with one {{name}}, got {pattern!r}")
        if bool(train_list) != bool(test_list):
            given, missing = ("train_list", "test_list") if train_list else ("test_list", "train_list")
            raise ValueError(f"{missing}: expected a list as {given} has one, got none")
        if train_list:
            self.lists = {"train": read_list(root / train_list), "test": read_list(root / test_list)}
        else:
            before, after = images.split("{name}")
            names = sorted(str(p.relative_to(root))[len(before) :] for p in root.glob(images.format(name="*")))
            names = [name.removesuffix(after) for name in names]
            test = names[4::5]
            self.lists = {"train": [name for name in names if name not in set(test)], "test": test}
            if not test:
                raise ValueError(f"{root}: expected 5 images or more as {images}, got {len(names)}")
        stems: dict[str, str] = {}
        for name in (*self.lists["train"], *self.lists["test"]):
            if stems.setdefault(stem(name), name) != name:
                raise ValueError(f"{root}: expected file names that differ, got {stems[stem(name)]} and {name}")

    def read_image(self, name: str) -> Tensor:
        """[3, H, W] float32 in [0, 1]."""
        image = open_picture(self._path(self.images, name, 0)).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    def read_mask(self, name: str) -> np.ndarray:
        """[H, W] uint8, 255 = void."""
        path = self.mask_path(name)
        image = open_labels(path)
        if image.mode not in ("P", "L"):
            raise ValueError(f"{path}: expected a palette or greyscale mask, got mode {image.mode}")
        return np.array(image)

    def group(self, name: str) -> str:
        """Every image is scored for itself."""
        return name

    def held_out(self, names: Sequence[str], share: float) -> set[str]:
        """Runs of four neighbours in the list, which often show one scene, spread over all of it."""
        period = max(round(1 / share), 1) if share else len(names) + 1
        return {name for place, name in enumerate(names) if place // 4 % period == period - 1}

    def mask_path(self, name: str) -> Path:
        """The file that holds a mask."""
        return self._path(self.masks, name, 1)

    def _path(self, pattern: str, name: str, column: int) -> Path:
        paths = image_and_mask(name)
        return self.root / (paths[column].lstrip("/") if paths else pattern.format(name=name))


Collection = Slices | Pictures


def read_list(path: Path) -> list[str]:
    """One name a line."""
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{path}: expected a list of names, got {reason(error)}") from error


def open_picture(path: Path) -> Image.Image:
    """Read a picture in full."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a readable picture, got {reason(error)}") from error


def open_labels(path: Path) -> Image.Image:
    """Read a picture whose values stand for classes."""
    image = open_picture(path)
    if image.format == "JPEG":
        raise ValueError(f"{path}: expected exact values of classes, got JPEG, which blurs them: {DRAW_ANEW}")
    return image


def image_and_mask(name: str) -> list[str]:
    """The two paths of a line of SBD's lists; none for a name, which may have a space in it."""
    columns = name.split()
    return columns if len(columns) == 2 and all("/" in column for column in columns) else []


def stem(name: str) -> str:
    """What weak labels call an image."""
    path = Path(image_and_mask(name)[0] if image_and_mask(name) else name)
    return path.stem if path.suffix in (".h5", ".jpg", ".jpeg", ".png") else path.name


def open_collection(settings: Settings) -> Collection:
    """The images and masks that the settings name."""
    if not settings.root:
        raise ValueError("root: expected the folder of the data, got none")
    root = Path(settings.root)
    if settings.data == "acdc":
        return Slices(root)
    class_names = CLASSES.get(settings.class_names) or read_list(root / settings.class_names)
    return Pictures(root, settings.images, settings.masks, class_names, settings.train_list, settings.test_list)


def fingerprint(collection: Collection, labels_from: str = "") -> str:
    """Eight digits that differ where lists, classes, masks or weak labels do: of names, and of the sizes of files."""
    masks = [collection.mask_path(name) for names in collection.lists.values() for name in names]
    sources = [Path(source) for source in labels_from.split(",") if source]
    files = [file for source in sources for file in (sorted(source.iterdir()) if source.is_dir() else [source])]
    sizes = [path.stat().st_size if path.exists() else -1 for path in (*masks, *files)]
    return f"{zlib.crc32(repr((collection.lists, list(collection.class_names), sizes)).encode()):08x}"
