"""`python -m bench.weak_supervision.experiment`: tables, sweeps, and what the Gated CRF loss weighs before training."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from bench.weak_supervision import boundaries, costs, experiment, report
from bench.weak_supervision.collection import open_collection
from bench.weak_supervision.masks import loss_of_masks
from bench.weak_supervision.settings import preset

NETWORK = "tests.test_weak_supervision:stride_two"
pytestmark = pytest.mark.usefixtures("one_thread")


def experiment_arguments(acdc: Path, msrc: Path, out: Path) -> list[str]:
    data = ["--acdc", str(acdc), "--msrc", str(msrc), "--out", str(out), "--network", NETWORK]
    return [*data, "--steps", "2", "--crop", "24", "--batch", "2", "--evaluations", "1"]


def test_experiment(
    acdc: Path, msrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = experiment_arguments(acdc, msrc, tmp_path / "out")
    experiment.main([*arguments, "--seeds", "2"])
    with (tmp_path / "out" / "msrc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[:5]] == [
        *("msrc-clicks-pce-steps=2-0", "msrc-clicks-gcrf-steps=2-0", "msrc-dense-pce-steps=2-0"),
        *("msrc-scribbles-pce-steps=2-0", "msrc-scribbles-gcrf-steps=2-0"),
    ]
    assert len(rows) == 10 and {row["evaluate_on"] for row in rows} == {"test"}
    assert str(tmp_path) not in (tmp_path / "out" / "msrc.csv").read_text()
    assert all((float(row["loss_share"]) > 0) == (row["loss"] == "gcrf") for row in rows)
    assert all(row["revision"] and row["iou bright"] and float(row["seconds_per_step"]) > 0 for row in rows)
    sizes = {}
    for name in ("acdc-panel.png", "acdc-predictions.png", "acdc-curves.png", "msrc-panel.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            sizes[name] = picture.size
    assert min(width for width, _ in sizes.values()) > 300
    assert sizes["acdc-predictions.png"][1] < sizes["acdc-panel.png"][1]
    printed = capsys.readouterr().out
    assert "\nmsrc-dense-pce-steps=2-0: 0 of 2 steps\nmsrc-dense-pce-steps=2-0: 2 of 2 steps, dice 0." in printed
    assert (
        " ± " in printed and "classes told, % | gap closed" in printed and "clicks: partial CE + Gated CRF" in printed
    )

    monkeypatch.setattr(experiment, "train", None)  # everything is there: nothing is trained again
    monkeypatch.setattr(experiment, "draw_curves", lambda *_: None)
    monkeypatch.setattr(experiment, "draw_panel", lambda *_, **__: None)
    experiment.main([*arguments, "--seeds", "2"])
    capsys.readouterr()
    changes = ["--weight", "0.5", "--report"]
    experiment.main([*arguments, *changes])  # only the loss has a weight
    assert "Gated CRF |" not in (printed := capsys.readouterr().out) and "dense CE" in printed
    names = [p.name for p in experiment.table_plans("acdc", "", *experiment.parse_arguments([*arguments, *changes]))]
    assert names[:3] == [
        "acdc-scribbles-pce-steps=2-0",
        "acdc-scribbles-gcrf-weight=0.5-steps=2-0",
        "acdc-dense-pce-steps=2-0",
    ]
    with pytest.raises(SystemExit, match=r"acdc.csv: expected acdc-scribbles-pce-steps=2-0 with crop=25, got 24"):
        experiment.main([*arguments, "--crop", "25"])
    next((acdc / "slices").iterdir()).unlink()
    with pytest.raises(
        SystemExit, match=r"acdc.csv: expected acdc-scribbles-pce-steps=2-0 with files=\w{8}, got \w{8};"
    ):
        experiment.main(arguments)
    (msrc / "classes.txt").write_text("dark\nlight\n")
    with pytest.raises(SystemExit, match=r"msrc.csv: expected a column 'iou light', got none; choose another --out"):
        experiment.main([*arguments[2:], "--class-weights", "log"])


def test_costs(
    acdc: Path, msrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"network": NETWORK, "crop": 24, "batch": 2}
    cases = {title: (data, more | changes) for title, (data, more) in costs.CASES.items()}
    monkeypatch.setattr(costs, "CASES", cases)
    data = ["--acdc", str(acdc), "--msrc", str(msrc)]
    costs.main([*data, "--turns", "2", "--csv", str(tmp_path / "a" / "costs.csv")])
    with (tmp_path / "a" / "costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == 2 * list(costs.CASES)
    assert all(float(row["loss_share"]) > 0 and float(row["seconds_per_step"]) > 0 for row in rows)
    printed = capsys.readouterr().out.splitlines()[3:]  # after progress and the head
    pattern = r"\| (acdc|msrc) \| .+ \| .+% \| .+% to .+% \| \d+ ms \| 2 \|"
    assert len(printed) == 4 and all(re.fullmatch(pattern, line) for line in printed)


@pytest.mark.parametrize("command", [costs, experiment, boundaries])
def test_what_cannot_be_run_is_said_in_one_line(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "msrc", "--root", "nowhere"] if command is boundaries else ["--msrc", "nowhere"]
    with pytest.raises(SystemExit, match=r"^error: nowhere/classes.txt: expected a list of names, got No such file"):
        command.main(arguments)


def test_the_experiment_is_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        experiment.main(["--acdc", "ACDC"])
    assert "expected one process" in capsys.readouterr().err


def test_sweeps_are_scored_on_what_is_held_apart(
    acdc: Path, msrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = experiment_arguments(acdc, msrc, tmp_path / "out")
    experiment.main([*arguments[:2], *arguments[4:], "--sweep", "sigma", "labels"])
    with (tmp_path / "out" / "acdc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["loss"] == "pce" and {row["evaluate_on"] for row in rows} == {"held-out"}
    assert rows[1]["labels"] == "dense" and {row["side"] for row in rows} == {"128"}
    assert [(row["sigma"], row["keep"]) for row in rows[2:6]] == [
        (sigma, "1.0") for sigma in ("0.03", "0.06", "0.1", "0.2")
    ]
    assert [(row["keep"], row["loss"]) for row in rows[6:]] == [
        (keep, loss) for keep in ("0.25", "0.5") for loss in ("gcrf", "pce")
    ]
    assert (tmp_path / "out" / "acdc-sweeps.png").exists()
    printed = capsys.readouterr().out
    assert "nan" not in printed and "dense CE" in printed
    options, changes = experiment.parse_arguments([*arguments, "--sweep", "radius"])
    radius = experiment.sweep_plans("acdc", str(acdc), options, changes, "radius")
    assert len({training.name for training in radius} - {row["run"] for row in rows}) == 3  # the rest is there
    length = experiment.sweep_plans("acdc", str(acdc), options, {}, "length")
    assert {training.settings.steps for training in length} == {600, 1200, 2400}  # a sweep's usual 1200 go unnamed
    assert {"acdc-dense-pce-held-out-0", "acdc-scribbles-pce-steps=2400-held-out-0"} < {p.name for p in length}


def test_transfer_trains_every_weight_with_every_kernel_and_grid(
    acdc: Path, msrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = experiment_arguments(acdc, msrc, tmp_path / "out")
    options, changes = experiment.parse_arguments([*arguments, "--sweep", "transfer"])
    names = [p.name for p in experiment.sweep_plans("msrc", str(msrc), options, changes, "transfer")]
    assert len(names) == len(set(names)) == 2 + 3 * 6 + 2  # stride 4 is the network's own
    assert (
        names[1] == "msrc-dense-pce-steps=2-held-out-0"
        and "msrc-clicks-gcrf-weight=0.1-sigma=0.3-steps=2-held-out-0" in names
    )
    monkeypatch.setattr(experiment, "TRANSFER_WEIGHTS", (1, 10))
    monkeypatch.setattr(experiment, "TRANSFER_CHANGES", ({}, {"radius": 2}))
    monkeypatch.setitem(experiment.SWEEPS, "weight", ("weight", (1, 10)))
    options.seeds = 2
    wanted = experiment.sweep_plans("acdc", str(acdc), options, changes, "transfer")
    options.out.mkdir()
    rows = experiment.run_all("acdc", wanted, options)
    assert {(row["side"], row["steps"], row["evaluate_on"]) for row in rows.values()} == {("128", "2", "held-out")}
    for row in rows.values():
        row["dice"] = {"pce": "0.5", "gcrf": "0.75" if row["seed"] == "1" else "0.55"}[row["loss"]]
    rows["acdc-scribbles-gcrf-radius=2-steps=2-held-out-0"]["dice"] = "0.45"
    points = experiment.strengths(wanted, rows, "dice")
    assert [(point.kernel, point.weight) for point in points] == [
        *(("preset", 0.03), ("preset", 0.3), ("radius 2", 0.03), ("radius 2", 0.3))
    ]
    assert [point.gain for point in points] == pytest.approx([1, 1, 2 / 3, 1])
    assert points[0].mass > 2 * points[2].mass and points[0].masks > 2 * points[2].masks > 0
    report.draw_transfer(points, tmp_path / "transfer.png")
    printed = capsys.readouterr().out
    assert "acdc: weight is 0.03 at the best of 4, explains" in printed
    assert "acdc: weight x loss of the dense masks is " in printed
    rows["acdc-scribbles-pce-steps=2-held-out-0"]["dice"] = "0.85"
    assert experiment.strengths(wanted, rows, "dice") == []


def test_variance_that_a_parabola_explains() -> None:
    strengths = [0.01, 0.1, 1.0, 10.0]
    assert report.variance_explained(strengths, [1.0, 4.0, 5.0, 4.0]) == pytest.approx(1)
    assert report.variance_explained(strengths, [1.0, -3.0, 3.0, -1.0]) == pytest.approx(0)  # the cubic part alone
    assert np.isnan(report.variance_explained(strengths[:3], [1.0, 2.0, 0.0]))


def test_loss_of_dense_masks(msrc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = preset("msrc", root=str(msrc), loss_stride="full", radius=2, xy=1e6, kernels="xy")
    collection = open_collection(settings)
    collection.lists["train"] = ["photo_0"]
    found = loss_of_masks(collection, settings)
    mask = collection.read_mask("photo_0")
    known, pairs, crossed = mask != 255, 0, 0
    for down in range(-2, 3):
        for right in range(-2, 3):
            if down or right:
                rows, columns = slice(max(down, 0), 36 + min(down, 0)), slice(max(right, 0), 48 + min(right, 0))
                there = slice(rows.start - down, rows.stop - down), slice(columns.start - right, columns.stop - right)
                both = known[rows, columns] & known[there]
                pairs += both.sum()
                crossed += (both & (mask[rows, columns] != mask[there])).sum()
    assert found.mass == pytest.approx(pairs / known.sum(), rel=1e-5)
    assert found.loss == pytest.approx(crossed / known.sum(), rel=1e-5)
    boundaries.main(["--data", "msrc", "--root", str(msrc)])
    lines = capsys.readouterr().out.splitlines()[2:]
    shares = [float(line.split()[-3].removesuffix("%")) for line in lines]
    assert len(shares) == 14 and shares[0] < 0.01 < 1 < shares[6]  # colour tells dark from bright
    mass, weight = (float(lines[6].split()[column]) for column in (2, -1))
    assert weight * mass == pytest.approx(boundaries.STRENGTH, rel=0.1)
    with pytest.raises(SystemExit, match="root: expected the folder"):
        boundaries.main(["--data", "msrc"])
    Image.new("L", (48, 36), 9).save(msrc / "SegmentationClass" / "photo_1.png")
    boundaries.main(["--data", "msrc", "--root", str(msrc)])
    assert "left out: photo_1: expected 2 classes, got class 9" in capsys.readouterr().out
