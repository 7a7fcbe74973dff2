"""Images, dense masks and weak labels: where they lie, how they are read, checked, split and augmented."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import label as number_regions
from torch import Tensor
from tqdm import tqdm

from .labels import (
    UNLABELLED,
    draw,
    make_clicks,
    make_scribbles,
    read_clicks,
    read_scribbles,
    reason,
    write_clicks,
    write_scribbles,
)
from .settings import Settings

ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
ACDC_UNLABELLED = 4
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
Labeller = Callable[[str, int, int], np.ndarray]  # name, height, width -> labels [H, W] uint8, 255 = unlabelled


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
        return scribbles

    def group(self, name: str) -> str:
        """Slices of one volume are scored together."""
        return name.split("_slice_")[0]

    def held_out(self, names: Sequence[str], share: float) -> set[str]:
        """The slices of the last patients."""
        patients = sorted({name.split("_")[0] for name in names})
        last = set(patients[len(patients) - round(share * len(patients)) :])
        return {name for name in names if name.split("_")[0] in last}

    def _read(self, name: str, key: str) -> np.ndarray:
        path = self.root / "slices" / name
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
            if pattern.count("{name}") != 1:
                raise ValueError(f"{argument}: expected a pattern with one {{name}}, got {pattern!r}")
        if train_list:
            self.lists = {"train": read_list(root / train_list), "test": read_list(root / test_list)}
        else:
            before, after = images.split("{name}")
            names = sorted(str(p.relative_to(root))[len(before) :] for p in root.glob(images.format(name="*")))
            names = [name.removesuffix(after) for name in names]
            test = names[4::5]
            self.lists = {"train": [name for name in names if name not in set(test)], "test": test}
        if not self.lists["train"] or not self.lists["test"]:
            raise ValueError(f"{root}: expected images as {images}, got {sum(map(len, self.lists.values()))}")
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
        path = self._path(self.masks, name, 1)
        image = open_picture(path)
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


def image_and_mask(name: str) -> list[str]:
    """The two paths of a line of SBD's lists; none for a name, which may have a space in it."""
    columns = name.split()
    return columns if len(columns) == 2 and all("/" in column for column in columns) else []


def stem(name: str) -> str:
    """What weak labels call an image."""
    path = Path(image_and_mask(name)[0] if image_and_mask(name) else name)
    return path.stem if path.suffix in (".h5", ".jpg", ".jpeg", ".png") else path.name


def seeded(*numbers: int | str) -> np.random.Generator:
    """A generator that depends on these alone."""
    return np.random.default_rng([zlib.crc32(n.encode()) if isinstance(n, str) else n for n in numbers])


def weak_labeller(
    collection: Collection,
    kind: str,
    sources: Sequence[Path],
    thickness: float,
    keep: float,
    seed: int,
) -> Labeller:
    """Labels by name of the image, of one kind: dense, scribbles or clicks.

    Args:
        sources: a folder of XML scribbles, or JSON files of clicks; none for ACDC's own scribbles, or dense masks.
        thickness: of strokes and discs of clicks, in pixels of the image.
        keep: share of the labelled regions that are kept, drawn by `seed`.
    """
    if kind == "dense":

        def read(name: str, height: int, width: int) -> np.ndarray:
            return collection.read_mask(name)

    elif kind == "scribbles" and sources:
        if len(sources) > 1 or not sources[0].is_dir():
            raise ValueError(f"labels_from: expected one folder of XML scribbles, got {', '.join(map(str, sources))}")

        def read(name: str, height: int, width: int) -> np.ndarray:
            path = sources[0] / f"{stem(name)}.xml"
            return drawn(path, read_scribbles(path, collection.class_names), height, width, thickness)

    elif kind == "clicks":
        clicks = read_clicks(sources, collection.class_names)

        def read(name: str, height: int, width: int) -> np.ndarray:
            if stem(name) not in clicks:
                raise ValueError(f"{sources[0]}: expected clicks for {stem(name)}, got none")
            return drawn(f"{sources[0]}: {stem(name)}", clicks[stem(name)], height, width, thickness)

    else:
        read = collection.read_scribbles

    if keep == 1:
        return read
    return lambda name, height, width: keep_regions(read(name, height, width), keep, seeded(seed, name))


def drawn(where: object, strokes: list, height: int, width: int, thickness: float) -> np.ndarray:
    try:
        return draw(strokes, height, width, thickness)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def keep_regions(labels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Keep each connected region of labels [H, W] with this probability, and at least one."""
    numbered = np.zeros(labels.shape, np.int32)
    for number in np.unique(labels[labels != UNLABELLED]):
        regions, _ = number_regions(labels == number)
        numbered += np.where(regions > 0, regions + numbered.max(), 0)
    kept = random.random(numbered.max() + 1) < share
    kept[0] = False
    if len(kept) > 1 and not kept.any():
        kept[random.integers(1, len(kept))] = True
    return np.where(kept[numbered], labels, UNLABELLED).astype(np.uint8)


def save_labels(collection: Collection, names: Iterable[str], kind: str, seed: int, out: Path) -> None:
    """Make clicks (a JSON file) or scribbles (a folder of XML files) from dense masks, all of them or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    if kind == "clicks":
        write_clicks(part, {stem(name): make_clicks(collection.read_mask(name)) for name in names})
    else:
        part.mkdir(exist_ok=True)
        for name in tqdm(names, desc="making scribbles", unit="image", leave=False, disable=None):
            strokes = make_scribbles(collection.read_mask(name), seeded(seed, name))
            write_scribbles(part / f"{stem(name)}.xml", strokes, collection.class_names)
    part.replace(out)


def check(collection: Collection, labeller: Labeller, names: Sequence[str]) -> tuple[dict[str, str], np.ndarray]:
    """Read everything once: what is wrong, in one line, by the name of the image; labelled pixels of each class [C]."""
    broken, pixels = {}, np.zeros(len(collection.class_names), np.int64)
    for name in tqdm(names, desc="checking files", unit="image", leave=False, disable=None):
        try:
            image = collection.read_image(name)
            height, width = image.shape[1:]
            if not (image.min() >= 0 and image.max() <= 1):  # nor NaN
                lowest, highest = image.aminmax()
                raise ValueError(f"{name}: expected an image in [0, 1], got {lowest:g} to {highest:g}")
            labels = labeller(name, height, width)
            if labels.shape != (height, width):
                found = f"{labels.shape[1]} x {labels.shape[0]}"
                raise ValueError(f"{name}: expected labels of {width} x {height} pixels as the image, got {found}")
            known = labels[labels != UNLABELLED]
            if known.size and known.max() >= len(collection.class_names):
                raise ValueError(f"{name}: expected {len(collection.class_names)} classes, got class {known.max()}")
            pixels += np.bincount(known, minlength=len(pixels))
        except ValueError as error:
            broken[name] = str(error)
    return broken, pixels


@dataclass
class Data:
    """What a training reads."""

    collection: Collection
    labeller: Labeller
    training: list[str]
    testing: list[str]
    pixels: np.ndarray  # labelled in training, of each class [C]


def open_collection(settings: Settings) -> Collection:
    """The images and masks that the settings name."""
    if not settings.root:
        raise ValueError("root: expected the folder of the data, got none")
    root = Path(settings.root)
    if settings.data == "acdc":
        return Slices(root)
    class_names = VOC_CLASSES if settings.class_names == "voc" else read_list(root / settings.class_names)
    return Pictures(root, settings.images, settings.masks, class_names, settings.train_list, settings.test_list)


def open_data(settings: Settings, made_labels: Path, on_broken: str = "stop") -> Data:
    """Lists, weak labels (made from dense masks where there are none) and a look at every file.

    Raises:
        ValueError: naming every broken file, one a line, where `on_broken` is "stop"; "skip" leaves them out.
    """
    collection = open_collection(settings)
    training, testing = collection.lists["train"], collection.lists["test"]
    apart = collection.held_out(training, settings.held_out)
    if settings.evaluate_on == "held-out":
        testing = [name for name in training if name in apart]
        training = [name for name in training if name not in apart]

    def dense(name: str, height: int, width: int) -> np.ndarray:
        return collection.read_mask(name)

    def stop_at_broken() -> None:
        if broken and on_broken == "stop":
            count = f"{len(broken)} broken of {len(training) + len(testing)} images"
            raise ValueError("\n".join([*broken.values(), count]))

    broken, _ = check(collection, dense, testing)
    sources = [Path(source) for source in settings.labels_from.split(",") if source]
    drawn_by_people = isinstance(collection, Slices) and settings.labels == "scribbles"
    if settings.labels != "dense" and not sources and not drawn_by_people:
        made = made_labels / f"{settings.data}-{settings.labels}-{settings.label_seed}"
        sources = [made.with_suffix(".json") if settings.labels == "clicks" else made]
        if not sources[0].exists():
            names = collection.lists["train"]
            broken |= check(collection, dense, names)[0]
            stop_at_broken()
            usable = [name for name in names if name not in broken]
            save_labels(collection, usable, settings.labels, settings.label_seed, sources[0])
    labeller = weak_labeller(
        collection, settings.labels, sources, settings.thickness, settings.keep, settings.label_seed
    )
    more, pixels = check(collection, labeller, [name for name in training if name not in broken])
    broken |= more
    stop_at_broken()
    for message in broken.values():
        tqdm.write(f"left out: {message}")
    training, testing = ([name for name in names if name not in broken] for names in (training, testing))
    if not training or not testing:
        raise ValueError(f"{settings.root}: expected images to train and test on, got {len(training)}, {len(testing)}")
    return Data(collection, labeller, training, testing, pixels)
