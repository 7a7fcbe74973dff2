"""`python -m bench.demo`: what it writes, what it takes and how it refuses."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.demo import __main__ as demo
from bench.demo import example as examples

ROOT = Path(demo.__file__).parents[2]
WIDTH, HEIGHT = 40, 30


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A photograph of two halves, with its truth, and strokes of the classes 3 and 7."""
    pixels = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, WIDTH // 2 :] += 150
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    truth = np.full((HEIGHT, WIDTH), 3, np.uint8)
    truth[:, WIDTH // 2 :] = 7
    Image.fromarray(truth).save(tmp_path / "truth.png")
    Image.fromarray(keep_strokes(truth, 255)).save(tmp_path / "strokes.png")
    return tmp_path


def keep_strokes(truth: np.ndarray, elsewhere: int) -> np.ndarray:
    """The truth in two rectangles only."""
    strokes = np.full_like(truth, elsewhere)
    for columns in (slice(5, 10), slice(30, 35)):
        strokes[5:25, columns] = truth[5:25, columns]
    return strokes


def run(
    folder: Path, *arguments: str, image: str = "photo.png", scribbles: str = "strokes.png", steps: int = 2
) -> None:
    """Run the demo in this process on pictures of a folder."""
    pictures = ["--image", str(folder / image), "--scribbles", str(folder / scribbles)]
    demo.main([*pictures, "--out", str(folder / "out"), "--steps", str(steps), *arguments])


def refusal(folder: Path, *arguments: str, **pictures: str) -> str:
    """The message with which the demo ends, before it has trained anything."""
    with pytest.raises(SystemExit) as ended:
        run(folder, *arguments, **pictures)
    message = ended.value.code
    assert isinstance(message, str) and "\n" not in message
    assert not list(folder.glob("out/*"))
    return message


def test_photograph_with_truth(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--truth", str(folder / "truth.png"), "--seeds", "2", steps=20)
    with (folder / "out" / "demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [(name, seed) for seed in "01" for name in demo.METHODS]
    assert all(float(row["miou"]) > 0.75 for row in rows)
    assert all(float(row["iou_7"]) > 0.75 and row["training_size"] == "40 x 30" for row in rows)
    printed = capsys.readouterr().out
    assert "+-" in printed and "not how it generalises" in printed
    for name in ("demo.png", "demo_curves.png"):
        with Image.open(folder / "out" / name) as picture:
            assert picture.width > 500


def test_mask_keeps_the_values_of_the_strokes_and_the_size_of_the_picture(folder: Path) -> None:
    run(folder, "--side", "20", steps=10)
    with Image.open(folder / "out" / "demo_mask.png") as mask:
        assert mask.mode == "P" and mask.size == (WIDTH, HEIGHT)
        assert set(np.unique(np.array(mask))) <= {3, 7}


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_strokes_in_colours(folder: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    channels = np.zeros((HEIGHT, WIDTH, len(mode)), np.uint8)
    with Image.open(folder / "strokes.png") as strokes:
        classes = np.array(strokes)
    if mode == "RGBA":
        channels[..., 0] = 200  # hidden by a transparent pixel
        channels[classes != 255] = (0, 0, 255, 255)
        channels[classes == 7] = (0, 200, 0, 255)
    else:
        channels[classes == 3] = (0, 0, 255)
        channels[classes == 7] = (0, 200, 0)
    Image.fromarray(channels, mode).save(folder / "colours.png")
    run(folder, scribbles="colours.png", steps=10)
    assert "no truth" in capsys.readouterr().out
    with Image.open(folder / "out" / "demo_mask.png") as mask:
        assert set(map(tuple, np.asarray(mask.convert("RGB")).reshape(-1, 3).tolist())) <= {(0, 0, 255), (0, 200, 0)}


def test_built_in_scribbles_lie_on_their_classes() -> None:
    example = examples.voc_example()
    drawn = (example.scribbles != examples.UNLABELLED) & (example.truth != examples.UNLABELLED)
    assert 0.03 < examples.labelled_share(example) < 0.04
    assert set(np.unique(example.scribbles)) == {*range(len(example.class_names)), examples.UNLABELLED}
    assert (example.scribbles == example.truth)[drawn].mean() > 0.995


def test_same_seed_same_mask(folder: Path) -> None:
    masks = []
    for _ in range(2):
        run(folder, steps=5)
        masks.append((folder / "out" / "demo_mask.png").read_bytes())
    assert masks[0] == masks[1]


@pytest.mark.parametrize("name", ["missing.png", "text.png", "cut.png", "."])
def test_refuses_unreadable_pictures(folder: Path, name: str) -> None:
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:300])
    for pictures in ({"image": name}, {"scribbles": name}):
        message = refusal(folder, **pictures)
        assert str(folder / name) in message and "readable picture" in message
    assert "readable picture" in refusal(folder, "--truth", str(folder / name))


def test_refuses_strokes_of_another_size(folder: Path) -> None:
    Image.new("L", (20, 30)).save(folder / "small.png")
    message = refusal(folder, scribbles="small.png")
    assert "small.png: expected 40 x 30 pixels" in message and "got 20 x 30" in message


@pytest.mark.parametrize(("value", "count"), [(255, 0), (4, 1)])
def test_refuses_strokes_of_fewer_than_two_classes(folder: Path, value: int, count: int) -> None:
    Image.new("L", (WIDTH, HEIGHT), value).save(folder / "plain.png")
    message = refusal(folder, scribbles="plain.png")
    assert "plain.png: expected strokes of 2 to 64 classes" in message and f"got {count}" in message
    assert "what nobody drew is 255 in a palette or greyscale picture" in message


def test_refuses_blurred_colours(folder: Path) -> None:
    with Image.open(folder / "photo.png") as photo:
        photo.save(folder / "photo.jpg")
    for name, reason in (("photo.png", "antialiased brushes and JPEG"), ("photo.jpg", "got JPEG")):
        advice = "draw without antialiasing and save as PNG"
        assert reason in (message := refusal(folder, scribbles=name)) and advice in message
        assert reason in (message := refusal(folder, "--truth", str(folder / name))) and advice in message
    assert "expected strokes of 2 to 64 classes, got 1" in refusal(folder, scribbles="photo.png")


def coloured(canvas: tuple[int, int, int], *strokes: tuple[int, int, int]) -> np.ndarray:
    """Columns of colour on a canvas."""
    pixels = np.full((HEIGHT, WIDTH, 3), canvas, np.uint8)
    for number, colour in enumerate(strokes):
        pixels[:, number] = colour
    return pixels


def grey(canvas: int, *strokes: int) -> np.ndarray:
    return coloured((canvas,) * 3, *((value,) * 3 for value in strokes))[..., 0]


BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("pixels", "labelled", "most", "advice"),
    [
        (coloured(WHITE, RED, BLUE), "100.0%", "#ffffff on 95.0%", "black or transparent in a colour picture"),
        (coloured(WHITE, RED, BLACK), "97.5%", "#ffffff on 95.0%", "black or transparent in a colour picture"),
        (grey(4, 0, 1), "100.0%", "4 on 95.0%", "255 in a palette or greyscale picture"),
        (grey(0, *[1] * 15), "100.0%", "0 on 62.5%", "255 in a palette or greyscale picture"),
        (grey(0, 128, 255), "97.5%", "0 on 95.0%", "255 in a palette or greyscale picture"),
    ],
    ids=["white canvas", "black strokes on white", "4 is unlabelled", "mask of 0 and 1", "white strokes on black"],
)
def test_refuses_a_canvas_that_is_taken_for_labels(
    folder: Path, pixels: np.ndarray, labelled: str, most: str, advice: str
) -> None:
    Image.fromarray(pixels).save(folder / "canvas.png")
    message = refusal(folder, scribbles="canvas.png")
    assert "canvas.png: expected strokes on a part of the pixels" in message
    assert f"got labels on {labelled} of them ({most}, " in message
    assert f"if {most.split()[0]} is where nobody drew, it has to be {advice}" in message


def test_takes_strokes_on_most_of_the_pixels(folder: Path) -> None:
    Image.fromarray(coloured(RED, BLUE, *[BLACK] * 5)).save(folder / "heavy.png")
    example = examples.read_example(folder / "photo.png", folder / "heavy.png", None)
    assert example.class_names == ["#0000ff", "#ff0000"] and examples.labelled_share(example) == 0.875


def test_refuses_more_bits_than_labels_have(folder: Path) -> None:
    Image.fromarray(grey(255, 3, 7).astype(np.uint16)).save(folder / "deep.png")
    assert "deep.png: expected 8 bits a channel, got 16 or more" in refusal(folder, scribbles="deep.png")


def test_refuses_a_truth_of_other_classes(folder: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 9).save(folder / "other.png")
    message = refusal(folder, "--truth", str(folder / "other.png"))
    assert (
        "other.png: expected the classes of" in message and "strokes.png (3, 7), got 9; void has to be 255" in message
    )
    Image.new("L", (WIDTH, HEIGHT), 7).save(folder / "one.png")
    assert "one.png: expected at least 2 classes" in refusal(folder, "--truth", str(folder / "one.png"))


def test_refuses_strokes_that_vanish(folder: Path) -> None:
    strokes = np.full((HEIGHT, WIDTH), 255, np.uint8)
    strokes[:, :10] = 3
    strokes[0, 20] = 7
    Image.fromarray(strokes).save(folder / "thin.png")
    assert "lost class 7" in refusal(folder, "--side", "11", scribbles="thin.png")
    assert "at least 8 pixels" in refusal(folder, "--side", "5")


def test_refuses_a_folder_that_cannot_be_written(folder: Path) -> None:
    message = refusal(folder, "--out", str(folder / "photo.png" / "out"))
    assert str(folder / "photo.png" / "out") in message and "folder to write to" in message


def test_a_pipe_gets_a_line_as_a_training_starts(folder: Path) -> None:
    command = [sys.executable, "-m", "bench.demo", "--out", str(folder), "--steps", "300"]
    command += ["--image", str(folder / "photo.png"), "--scribbles", str(folder / "strokes.png")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=buffered, text=True, **pipes) as running:
        lines = running.stdout.readline(), running.stdout.readline()
        finished = (folder / "demo.csv").exists()
        running.kill()
    assert lines[0].startswith("photo.png: 40 x 30 pixels") and lines[1] == "partial CE, seed 0: 0 of 300 steps\n"
    assert not finished


def test_an_error_is_one_line_and_no_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "bench.demo", "--image", "missing.png", "--scribbles", str(folder / "strokes.png")]
    ended = subprocess.run([*command, "--out", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "error: missing.png: expected a readable picture, got No such file or directory"
    ]
