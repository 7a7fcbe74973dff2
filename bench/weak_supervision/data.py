"""Images, dense masks and weak labels: where they lie, how they are read, checked, split and augmented."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import label as number_regions
from torch import Tensor
from torch.utils.data import Dataset, Sampler
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
        self.root = root
        self.lists = {split: read_list(root / f"{split}.txt") for split in ("train", "test")}

    def read_image(self, name: str) -> Tensor:
        """[1, H, W] float32 in [0, 1]."""
        return torch.from_numpy(self._read(name, "image").astype(np.float32))[None].clamp(0, 1)

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
            with h5py.File(path) as file:
                values = file[key][:]
        except (OSError, KeyError) as error:
            raise ValueError(f"{path}: expected HDF5 with {key!r}, got {reason(error)}") from error
        if values.ndim != 2:
            raise ValueError(f"{path}: expected {key!r} [H, W], got {list(values.shape)}")
        return values


class Pictures:
    """Photographs and palette masks under patterns such as `JPEGImages/{name}.jpg`, in the lists of PASCAL VOC and SBD.

    A line of a list is a name, or an image and its mask as paths from the root. Without lists every image counts, and
    each fifth is for testing.
    """

    def __init__(
        self, root: Path, images: str, masks: str, class_names: Sequence[str], train_list: str, test_list: str
    ) -> None:
        self.root, self.images, self.masks, self.class_names = root, images, masks, tuple(class_names)
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
        columns = name.split()
        if len(columns) == 2:
            return self.root / columns[column].lstrip("/")
        return self.root / pattern.format(name=name)


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


def stem(name: str) -> str:
    """What weak labels call an image."""
    return Path(name.split()[0]).stem


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
        (folder,) = sources

        def read(name: str, height: int, width: int) -> np.ndarray:
            path = folder / f"{stem(name)}.xml"
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
    """Make clicks (a JSON file) or scribbles (a folder of XML files) from dense masks."""
    if kind == "clicks":
        out.parent.mkdir(parents=True, exist_ok=True)
        write_clicks(out, {stem(name): make_clicks(collection.read_mask(name)) for name in names})
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        strokes = make_scribbles(collection.read_mask(name), seeded(seed, name))
        write_scribbles(out / f"{stem(name)}.xml", strokes, collection.class_names)


def check(collection: Collection, labeller: Labeller, names: Sequence[str]) -> dict[str, str]:
    """Read everything once: what is wrong, in one line, by the name of the image."""
    broken = {}
    for name in tqdm(names, desc="checking files", unit="image", leave=False, disable=None):
        try:
            height, width = collection.read_image(name).shape[1:]
            labels = labeller(name, height, width)
            if labels.shape != (height, width):
                found = f"{labels.shape[1]} x {labels.shape[0]}"
                raise ValueError(f"{name}: expected labels of {width} x {height} pixels as the image, got {found}")
            known = labels[labels != UNLABELLED]
            if known.size and known.max() >= len(collection.class_names):
                raise ValueError(f"{name}: expected {len(collection.class_names)} classes, got class {known.max()}")
        except ValueError as error:
            broken[name] = str(error)
    return broken


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


def reduce(image: Tensor, labels: Tensor, side: int, thin: bool) -> tuple[Tensor, Tensor]:
    """Scale down to a longest side; 0 leaves as it is."""
    longest = max(labels.shape)
    return resize(image, labels, side / longest, thin) if 0 < side < longest else (image, labels)


class TrainingSet(Dataset):
    """Augmented samples by (epoch, place): what comes back depends on these and the seed alone."""

    def __init__(
        self,
        collection: Collection,
        labeller: Labeller,
        names: Sequence[str],
        side: int,
        augmentation: Augmentation,
        seed: int,
        thin: bool,
    ) -> None:
        self.collection, self.labeller, self.names = collection, labeller, list(names)
        self.side, self.augmentation, self.seed, self.thin = side, augmentation, seed, thin

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = key
        name = self.names[place]
        image = self.collection.read_image(name)
        labels = torch.from_numpy(self.labeller(name, *image.shape[1:]))
        image, labels = reduce(image, labels, self.side, self.thin)
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
        return epoch, int(seeded(self.seed, epoch).permutation(self.samples)[place])
