"""What a training reads: weak labels of a collection's images, every file checked."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import label as number_regions
from tqdm import tqdm

from ..measuring.progress import bar, write_line
from .collection import Collection, Slices, fingerprint, open_collection, stem
from .labels import (
    UNLABELLED,
    Stroke,
    click_of,
    draw,
    make_clicks,
    make_scribbles,
    read_clicks,
    read_scribbles,
    write_clicks,
    write_scribbles,
)
from .settings import Settings


def seeded(*numbers: int | str) -> np.random.Generator:
    """A generator that depends on these alone."""
    return np.random.default_rng([zlib.crc32(n.encode()) if isinstance(n, str) else n for n in numbers])


class Labeller:
    """Labels [H, W] uint8 of one kind, 255 where there are none, by name, height and width of the image.

    Args:
        kind: dense, scribbles or clicks.
        sources: a folder of XML scribbles, or JSON files of clicks; none for ACDC's own scribbles, or dense masks.
        thickness: of strokes and discs of clicks, in pixels of the image.
        keep: share of the labelled regions that are kept, drawn by `seed`.
    """

    def __init__(
        self,
        collection: Collection,
        kind: str,
        sources: Sequence[Path] = (),
        thickness: float = 1.0,
        keep: float = 1.0,
        seed: int = 0,
    ) -> None:
        if kind == "scribbles" and sources and (len(sources) > 1 or not sources[0].is_dir()):
            raise ValueError(f"labels_from: expected one folder of XML scribbles, got {', '.join(map(str, sources))}")
        self.collection, self.kind, self.sources = collection, kind, sources
        self.thickness, self.keep, self.seed = thickness, keep, seed
        self.clicks = read_clicks(sources) if kind == "clicks" else {}

    def __call__(self, name: str, height: int, width: int) -> np.ndarray:
        labels = self._read(name, height, width)
        return labels if self.keep == 1 else keep_regions(labels, self.keep, seeded(self.seed, name))

    def _read(self, name: str, height: int, width: int) -> np.ndarray:
        if self.kind == "dense":
            return self.collection.read_mask(name)
        class_names, short = self.collection.class_names, stem(name)
        if self.kind == "clicks":
            if short not in self.clicks:
                raise ValueError(f"{', '.join(map(str, self.sources))}: expected clicks for {short}, got none")
            labels = np.full((height, width), UNLABELLED, np.uint8)
            for path in self.sources:
                points = [point for file, point in self.clicks[short] if file == path]
                strokes = [click_of(point, class_names, f"{path}: {short}") for point in points]
                more = drawn(f"{path}: {short}", filter(None, strokes), height, width, self.thickness)
                labels = np.where(more == UNLABELLED, labels, more)
            return labels
        if not self.sources:
            return self.collection.read_scribbles(name, height, width)
        path = self.sources[0] / f"{short}.xml"
        return drawn(path, read_scribbles(path, class_names), height, width, self.thickness)


def drawn(where: object, strokes: Iterable[Stroke], height: int, width: int, thickness: float) -> np.ndarray:
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


def save_labels(collection: Collection, names: Sequence[str], kind: str, seed: int, out: Path) -> None:
    """Make clicks (a JSON file) or scribbles (a folder of XML files) from dense masks, all of them or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    if kind == "clicks":
        clicks = {stem(name): make_clicks(collection.read_mask(name)) for name in names}
        write_clicks(part, clicks, collection.class_names)
    else:
        part.mkdir(exist_ok=True)
        for name in bar(names, "making scribbles", len(names), "image"):
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
    left_out: int  # broken images


def open_data(settings: Settings, made_labels: Path, on_broken: str = "stop") -> Data:
    """Lists, weak labels (made from dense masks where there are none) and a look at every file.

    Raises:
        ValueError: naming every broken file, one a line, where `on_broken` is "stop"; "skip" leaves them out.
    """
    collection = open_collection(settings)
    training, testing = collection.lists["train"], collection.lists["test"]
    if settings.evaluate_on == "held-out":
        apart = collection.held_out(training, settings.held_out)
        if not apart:
            raise ValueError(f"held_out: expected a share of {len(training)} images, got {settings.held_out:g}: none")
        testing = [name for name in training if name in apart]
        training = [name for name in training if name not in apart]
    dense = Labeller(collection, "dense")

    def stop_at_broken() -> None:
        if broken and on_broken == "stop":
            count = f"{len(broken)} broken of {len(training) + len(testing)} images"
            raise ValueError("\n".join([*broken.values(), count]))

    broken, _ = check(collection, dense, testing)
    sources = [Path(source) for source in settings.labels_from.split(",") if source]
    drawn_by_people = isinstance(collection, Slices) and settings.labels == "scribbles"
    if settings.labels != "dense" and not sources and not drawn_by_people:
        made = made_labels / f"{settings.data}-{settings.labels}-{settings.label_seed}-{fingerprint(collection)}"
        sources = [made.with_suffix(".json") if settings.labels == "clicks" else made]
        if not sources[0].exists():
            names = collection.lists["train"]
            broken |= check(collection, dense, names)[0]
            stop_at_broken()
            usable = [name for name in names if name not in broken]
            save_labels(collection, usable, settings.labels, settings.label_seed, sources[0])
    labeller = Labeller(collection, settings.labels, sources, settings.thickness, settings.keep, settings.label_seed)
    more, pixels = check(collection, labeller, [name for name in training if name not in broken])
    broken |= more
    stop_at_broken()
    for message in broken.values():
        write_line(f"left out: {message}")
    training, testing = ([name for name in names if name not in broken] for names in (training, testing))
    if not training or not testing:
        raise ValueError(f"{settings.root}: expected images to train and test on, got {len(training)}, {len(testing)}")
    if not pixels.any():
        raise ValueError(f"{settings.labels_from or settings.root}: expected labelled pixels to train on, got none")
    if not pixels.all():
        missing = [name for name, count in zip(collection.class_names, pixels, strict=True) if not count]
        write_line(f"no labels to train on: {', '.join(missing)}")
    return Data(collection, labeller, training, testing, pixels, len(broken))
