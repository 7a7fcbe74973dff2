"""Weak labels, the files they come in, and samples made from them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import label

from bench.weak_supervision.collection import VOC_CLASSES
from bench.weak_supervision.data import check, keep_regions, open_data, seeded
from bench.weak_supervision.labels import (
    CITYSCAPES_CLASSES,
    Stroke,
    class_number,
    click_of,
    draw,
    make_clicks,
    make_scribbles,
    read_clicks,
    read_scribbles,
    write_clicks,
    write_scribbles,
)
from bench.weak_supervision.samples import Augmentation, Batches, resize
from bench.weak_supervision.settings import Settings, preset

NAMES = ("background", "cow", "tree")


@pytest.fixture
def mask() -> np.ndarray:
    """Two cows of which one is a ring, a thin tree, void, and a speck."""
    mask = np.zeros((60, 80), np.uint8)
    y, x = np.mgrid[:60, :80]
    distance = np.hypot(y - 28, x - 25)
    mask[(distance < 22) & (distance > 10)] = 1
    mask[40:55, 55:75] = 1
    mask[3:30, 60:63] = 2
    mask[30, 60:63] = 255
    mask[2, 2] = 2
    return mask


def region_of(mask: np.ndarray, x: float, y: float) -> np.ndarray:
    numbered, _ = label(mask == mask[int(y), int(x)])
    return numbered == numbered[int(y), int(x)]


def test_one_click_inside_every_region(mask: np.ndarray) -> None:
    clicks = make_clicks(mask)
    assert sorted(click.label for click in clicks) == [0, 0, 1, 1, 2]  # also the background in the ring
    for click in clicks:
        ((x, y),) = click.points
        assert mask[int(y), int(x)] == click.label
    ((x, y),) = next(c.points for c in clicks if c.label == 1 and c.points[0][0] > 50)
    assert 62 <= x <= 67 and 47 <= y <= 48  # the middle of the rectangle
    assert len({region_of(mask, *click.points[0]).tobytes() for click in clicks}) == 5


def test_scribbles_stay_inside_their_regions_and_repeat(mask: np.ndarray) -> None:
    first, again, other = (make_scribbles(mask, np.random.default_rng(seed)) for seed in (0, 0, 5))
    assert first == again and first != other
    assert len(first) == 5
    drawn = draw(first, *mask.shape, thickness=1)
    assert (drawn[drawn != 255] == mask[drawn != 255]).all()
    ring = next(stroke for stroke in first if stroke.label == 1 and stroke.points[0][0] < 50)
    assert len(ring.points) > 20  # round the hole, not across it
    assert all(len(stroke.points) > 5 for stroke in first)


def test_files_keep_what_was_written(mask: np.ndarray, tmp_path: Path) -> None:
    strokes = make_scribbles(mask, np.random.default_rng(0))
    write_scribbles(tmp_path / "a.xml", strokes, NAMES)
    assert read_scribbles(tmp_path / "a.xml", NAMES) == strokes
    clicks = {"a": make_clicks(mask), "b": [Stroke(2, ((1.5, 2.25),))]}
    write_clicks(tmp_path / "clicks.json", clicks, NAMES)
    assert strokes_in([tmp_path / "clicks.json"], NAMES) == clicks


def test_formats_of_people(tmp_path: Path) -> None:
    (tmp_path / "scribble.xml").write_text(
        "<annotation><filename>2007_000032.jpg</filename><size><width>500</width></size>"
        "<polygon><point><X>12</X><Y>7</Y></point><point><X>20</X><Y>9</Y></point><tag>plane</tag></polygon>"
        "<polygon><tag>background</tag><point><X>3</X><Y>4</Y></point></polygon></annotation>"
    )
    assert read_scribbles(tmp_path / "scribble.xml", VOC_CLASSES) == [
        Stroke(1, ((12, 7), (20, 9))),
        Stroke(0, ((3, 4),)),
    ]
    (tmp_path / "objects.json").write_text(json.dumps({"a": [{"y": 3.5, "x": 2.5, "rank": 1, "cls": 16}]}))
    (tmp_path / "background.json").write_text(json.dumps({"a": [{"x": 9, "y": 1, "cls": 0}], "b": []}))
    clicks = strokes_in([tmp_path / "objects.json", tmp_path / "background.json"], VOC_CLASSES)
    assert clicks == {"a": [Stroke(16, ((2.5, 3.5),)), Stroke(0, ((9, 1),))], "b": []}
    (tmp_path / "named.json").write_text(json.dumps({"a": [{"cls": "cow", "x": 1, "y": 2}]}))
    assert strokes_in([tmp_path / "named.json"], NAMES) == {"a": [Stroke(1, ((1, 2),))]}


def test_clicks_of_cityscapes_are_label_ids(tmp_path: Path) -> None:
    points = [{"cls": number, "x": number, "y": 1} for number in (7, 26, 4, 33)]  # road, car, static, bicycle
    (tmp_path / "cityscapes.json").write_text(json.dumps({"aachen_0": points}))
    found = strokes_in([tmp_path / "cityscapes.json"], CITYSCAPES_CLASSES)
    assert found == {"aachen_0": [Stroke(0, ((7, 1),)), Stroke(13, ((26, 1),)), Stroke(18, ((33, 1),))]}
    write_clicks(tmp_path / "again.json", found, CITYSCAPES_CLASSES)
    assert strokes_in([tmp_path / "again.json"], CITYSCAPES_CLASSES) == found


def test_names_go_before_numbers() -> None:
    names = ("1", "2", "3")
    assert [class_number(tag, names, "") for tag in ("1", "3", 1, "0")] == [0, 2, 1, 0]


def strokes_in(paths: list[Path], class_names: Sequence[str]) -> dict[str, list[Stroke]]:
    return {
        name: [stroke for path, point in points if (stroke := click_of(point, class_names, path))]
        for name, points in read_clicks(paths).items()
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xml", "<annotation><poly", "expected scribbles as XML"),
        ("a.xml", "<annotation><polygon><tag>yak</tag></polygon></annotation>", "one of the 3 classes, got 'yak'"),
        ("a.xml", "<a><polygon><tag>cow</tag><point><X>1</X></point></polygon></a>", "expected numbers X and Y"),
        ("a.json", "{", "expected clicks as JSON"),
        ("a.json", "[1]", "expected image names with lists of x, y and cls"),
        ("a.json", '{"a": 3}', "expected image names with lists of x, y and cls"),
        ("a.json", '{"a": [{"x": 1, "cls": 0}]}', "expected a click with x, y and cls"),
        ("a.json", '{"a": [7]}', "expected a click with x, y and cls, got 7"),
        ("a.json", '{"a": [{"x": "abc", "y": 1, "cls": 0}]}', "expected numbers x and y, got 'abc' and 1"),
        ("a.xml", "<annotation><object><name>cow</name></object></annotation>", "got object and no polygon"),
        ("a.json", '{"a": [{"x": 1, "y": 1, "cls": 3}]}', "one of the 3 classes, got 3"),
    ],
)
def test_broken_labels_are_named_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as raised:
        read_scribbles(tmp_path / name, NAMES) if name == "a.xml" else strokes_in([tmp_path / name], NAMES)
    assert message in str(raised.value) and str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_drawing() -> None:
    drawn = draw([Stroke(1, ((10, 10),)), Stroke(2, ((2, 15), (17, 15)))], 20, 20, thickness=5)
    assert drawn[10, 10] == 1 and drawn[8, 10] == 1 and drawn[7, 10] == 255 and drawn[8, 8] == 255
    assert (drawn[13:18, 10] == 2).all() and drawn[18, 10] == 255
    assert (draw([Stroke(1, ((10, 10),))], 20, 20, thickness=1) != 255).sum() == 1
    with pytest.raises(ValueError, match=r"expected points within 20 x 30 pixels, got x=5, y=40"):
        draw([Stroke(1, ((5, 40),))], 30, 20, thickness=1)


def test_fewer_labels_are_whole_ones() -> None:
    strokes = [Stroke(1, ((10 * k + 5, 5),)) for k in range(9)]
    labels = draw(strokes, 10, 90, thickness=3)
    kept = keep_regions(labels, 0.5, seeded(0, "a"))
    assert np.array_equal(kept, keep_regions(labels, 0.5, seeded(0, "a")))
    _, count = label(kept != 255)
    assert 0 < count < 9 and (kept != 255).sum() == count * (labels != 255).sum() / 9
    assert (keep_regions(labels, 1e-9, seeded(0, "a")) != 255).sum() == (labels != 255).sum() / 9


def test_gate_and_labels_move_with_the_image() -> None:
    image = torch.rand(1, 30, 50, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    labels = (image[0] * 100).byte()
    augment = Augmentation((40, 40), (1, 1))
    seen = set()
    for seed in range(40):
        crop, moved, validity = augment(image, labels, np.random.default_rng(seed), thin=False)
        assert crop.shape == (1, 40, 40) and moved.shape == validity.shape == (40, 40)
        assert torch.equal((crop[0] * 100).byte()[validity], moved[validity])
        assert (crop[0] > 0).equal(validity) and (moved[~validity] == 255).all()
        assert validity.sum() == 30 * 40  # all rows and 40 of the 50 columns
        top, left = int(validity.any(1).nonzero()[0]), int((labels[0] == moved[validity.any(1)][0, 0]).nonzero()[0])
        seen.add((top, left))
    assert len(seen) > 25  # places and flips vary
    larger, _, validity = Augmentation((40, 40), (2, 2))(image, labels, np.random.default_rng(0), thin=False)
    assert validity.all() and larger.min() > 0


def test_thin_labels_survive_shrinking() -> None:
    labels = torch.full((64, 64), 255, dtype=torch.uint8)
    places = torch.arange(3, 64, 10)
    labels[places, places] = 1
    _, smaller = resize(torch.zeros(1, 64, 64), labels, 0.3, thin=True)
    assert smaller.shape == (19, 19) and (smaller == 1).sum() == len(places)
    _, lost = resize(torch.zeros(1, 64, 64), labels, 0.3, thin=False)
    assert (lost == 1).sum() < len(places)


def test_order_of_samples() -> None:
    batches = list(Batches(10, 4, range(5), seed=0))
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(epoch, place) for epoch in range(2) for place in range(10)]
    assert list(Batches(10, 4, range(3, 5), seed=0)) == batches[3:]
    parts = [list(Batches(10, 4, range(5), 0, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in batches]


@pytest.fixture
def folder(tmp_path: Path) -> Settings:
    """Twelve photographs without lists, five of them broken in different ways."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    for number in range(12):
        mask = np.zeros((20, 30), np.uint8)
        mask[5:15, 5 : 15 + number] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number:02}.png")
        Image.fromarray(mask * 200).save(tmp_path / "images" / f"{number:02}.jpg")
    (tmp_path / "images" / "00.jpg").write_bytes(b"not a picture")
    (tmp_path / "masks" / "01.png").unlink()
    Image.new("L", (31, 20)).save(tmp_path / "masks" / "02.png")
    Image.new("L", (30, 20), 7).save(tmp_path / "masks" / "03.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "masks" / "04.png")
    return preset("folder", root=str(tmp_path), labels="dense")


def test_all_broken_files_are_reported_then_it_stops_or_goes_on(
    folder: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as raised:
        open_data(folder, tmp_path)
    *lines, last = str(raised.value).splitlines()
    assert last == "5 broken of 12 images"
    expected = {
        "00": "00.jpg: expected a readable picture",
        "01": "01.png: expected a readable picture, got No such file",
        "02": "02: expected labels of 30 x 20 pixels as the image, got 31 x 20",
        "03": "03: expected 2 classes, got class 7",
        "04": "04.png: expected a palette or greyscale mask, got mode RGB",
    }
    assert len(lines) == 5
    assert all(any(message in line for line in lines) for message in expected.values())
    with pytest.raises(ValueError, match="5 broken of 12 images"):  # also before labels are made from masks
        open_data(preset("folder", root=folder.root, labels="clicks"), tmp_path / "made")
    data = open_data(folder, tmp_path, on_broken="skip")
    assert len(data.training) + len(data.testing) == 7 and not set(data.training) & set(data.testing)
    assert capsys.readouterr().out.count("left out:") == 5


def test_masks_in_jpeg_are_refused(folder: Settings, tmp_path: Path) -> None:
    with Image.open(tmp_path / "masks" / "06.png") as mask:
        mask.convert("L").save(tmp_path / "masks" / "06.jpg")
    masks = replace(folder, masks="masks/{name}.jpg")
    with pytest.raises(ValueError, match=r"06\.jpg: expected exact values of classes, got JPEG"):
        open_data(masks, tmp_path)


def test_scribbles_on_every_pixel_are_refused(acdc: Path, tmp_path: Path) -> None:
    with h5py.File(acdc / "slices" / "patient001_frame01_slice_0.h5", "a") as file:
        scribble = file["scribble"][:]
        file["scribble"][:] = np.where(scribble == 4, 0, scribble)
    with pytest.raises(ValueError, match=r"slice_0\.h5: expected 4 or 255 where nobody drew, got labels everywhere"):
        open_data(preset("acdc", root=str(acdc)), tmp_path)


def test_labels_are_made_once_saved_and_read_back(folder: Settings, tmp_path: Path) -> None:
    for name in ("00", "01", "02", "03", "04"):
        (tmp_path / "images" / f"{name}.jpg").unlink()
    for kind, suffix in (("clicks", ".json"), ("scribbles", "")):
        settings = preset("folder", root=str(tmp_path), labels=kind)
        data = open_data(settings, tmp_path / "made")
        (made,) = (tmp_path / "made").glob(f"folder-{kind}-0-????????{suffix}")
        again = open_data(replace(settings, labels_from=str(made)), tmp_path / "none")
        for name in data.training:
            labels, mask = data.labeller(name, 20, 30), data.collection.read_mask(name)
            assert np.array_equal(labels, again.labeller(name, 20, 30))
            assert (labels == mask)[labels != 255].mean() > 0.8 and set(np.unique(labels)) == {0, 1, 255}


def test_images_without_clicks_and_clicks_outside_are_reported(folder: Settings, tmp_path: Path) -> None:
    clicks = {f"{number:02}": [{"x": 10, "y": 10, "cls": 1}] for number in range(6, 12)}
    clicks["07"][0]["x"] = 300
    clicks["09"][0]["cls"] = 99
    (tmp_path / "clicks.json").write_text(json.dumps(clicks))
    (tmp_path / "ground.json").write_text(json.dumps({"10": [{"x": 1, "y": 400, "cls": 0}]}))
    sources = f"{tmp_path / 'clicks.json'},{tmp_path / 'ground.json'}"
    settings = preset("folder", root=str(tmp_path), labels="clicks", labels_from=sources)
    data = open_data(settings, tmp_path, on_broken="skip")
    broken, _ = check(data.collection, data.labeller, ["05", "07", "08", "09", "10"])
    assert list(broken) == ["05", "07", "09", "10"] and not set(broken) & set(data.training)
    assert "clicks.json" in broken["05"] and "ground.json: expected clicks for 05, got none" in broken["05"]
    assert "clicks.json: 07: expected points within 30 x 20 pixels, got x=300" in broken["07"]
    assert "clicks.json: 09: expected one of the 2 classes, got 99" in broken["09"]
    assert "ground.json: 10: expected points within 30 x 20 pixels, got x=1, y=400" in broken["10"]


def test_labels_of_no_pixel_are_refused_and_missing_classes_told(
    msrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = preset("msrc", root=str(msrc), labels_from=str(tmp_path / "clicks.json"))
    clicks = {f"photo_{number}": [] for number in range(14)}
    (tmp_path / "clicks.json").write_text(json.dumps(clicks))
    with pytest.raises(ValueError, match=r"clicks.json: expected labelled pixels to train on, got none"):
        open_data(settings, tmp_path)
    clicks["photo_3"].append({"x": 40, "y": 5, "cls": 1})
    (tmp_path / "clicks.json").write_text(json.dumps(clicks))
    assert open_data(settings, tmp_path).pixels[0] == 0
    assert capsys.readouterr().out == "no labels to train on: dark\n"


def test_labels_made_from_other_masks_are_not_taken(msrc: Path, tmp_path: Path) -> None:
    settings = preset("msrc", root=str(msrc), thickness=1.0)
    before = open_data(settings, tmp_path).labeller("photo_1", 36, 48)
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 2, (36, 48), np.uint8).repeat(2, 0)[:36])
    mask.save(msrc / "SegmentationClass" / "photo_1.png")
    after = open_data(settings, tmp_path).labeller("photo_1", 36, 48)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_list": "test.txt"}, "train_list: expected a list as test_list has one, got none"),
        ({"train_list": "train.txt"}, "test_list: expected a list as train_list has one, got none"),
        ({"images": "/photos/{name}.jpg"}, "images: expected a pattern under the root with one {name}"),
        ({"images": "photos/{name}.jpg"}, "expected 5 images or more as photos/{name}.jpg, got 0"),
        ({"evaluate_on": "held-out", "held_out": 0.0}, "held_out: expected a share of 10 images, got 0: none"),
    ],
)
def test_lists_that_split_nothing_are_refused(
    folder: Settings, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_data(replace(folder, **changes), tmp_path)


def test_labels_can_be_sent_to_other_processes(msrc: Path, tmp_path: Path) -> None:
    data = open_data(preset("msrc", root=str(msrc), keep=0.5), tmp_path)
    sent = pickle.loads(pickle.dumps(data))
    assert np.array_equal(sent.labeller("photo_2", 36, 48), data.labeller("photo_2", 36, 48))


def test_lists_of_sbd_name_images_and_masks(folder: Settings, tmp_path: Path) -> None:
    lines = [f"/images/{number:02}.jpg /masks/{number:02}.png" for number in range(5, 12)]
    (tmp_path / "train.txt").write_text("\n".join(lines[:5]))
    (tmp_path / "test.txt").write_text("\n".join(lines[5:]))
    settings = preset("folder", root=str(tmp_path), labels="clicks", train_list="train.txt", test_list="test.txt")
    data = open_data(settings, tmp_path / "made")
    assert (len(data.training), len(data.testing)) == (5, 2)
    assert data.labeller(data.training[0], 20, 30).min() == 0


def test_files_of_one_name_in_two_folders_are_refused(folder: Settings, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("north/street_1\nnorth/street_2")
    (tmp_path / "test.txt").write_text("south/street_2")
    with pytest.raises(ValueError, match="expected file names that differ, got north/street_2 and south/street_2"):
        open_data(replace(folder, train_list="train.txt", test_list="test.txt"), tmp_path)


def test_names_have_folders_spaces_and_dots(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit" / "train").mkdir(parents=True)
    (tmp_path / "gtFine" / "train").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    names = [f"aachen {number}.v2" for number in range(5)]
    for name in names:
        Image.new("RGB", (30, 20)).save(tmp_path / "leftImg8bit" / "train" / f"{name}_image.png")
        Image.new("L", (30, 20)).save(tmp_path / "gtFine" / "train" / f"{name}_labels.png")
    (tmp_path / "clicks.json").write_text(json.dumps({name: [{"cls": "car", "x": 4, "y": 5}] for name in names}))
    settings = preset(
        "folder",
        root=str(tmp_path),
        images="leftImg8bit/{name}_image.png",
        masks="gtFine/{name}_labels.png",
        labels="clicks",
        labels_from=str(tmp_path / "clicks.json"),
    )
    (tmp_path / "all.txt").write_text("\n".join(f"train/{name}" for name in names))
    listed = replace(settings, train_list="all.txt", test_list="all.txt")
    data = open_data(listed, tmp_path)
    assert data.training == [f"train/{name}" for name in names]
    assert data.labeller(data.training[0], 20, 30)[5, 4] == 1
