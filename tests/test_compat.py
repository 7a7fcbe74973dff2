"""Promise: the drop-in class gives the official numbers, and differs only where the official class fails."""

import importlib.util
import inspect
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import make_problem

from gcrf_triton.compat import ModelLossSemsegGatedCRF

KERNELS = {
    "one": [{"weight": 1.0, "xy": 6.0, "rgb": 0.1}],
    "two": [{"weight": 0.9, "xy": 6.0, "rgb": 0.1}, {"weight": 0.1, "xy": 3.0}],
    "rgb": [{"weight": 2.0, "rgb": 0.3}],
}


def zero_padded_loss(y, kernels, radius, image, source=None, destination=None):
    """What the official module computes: windows padded with zeros, coordinates and all, and no test for the inside."""
    n, _, height, width = y.shape
    window = 2 * radius + 1

    def windows(t):
        return F.unfold(t, window, padding=radius).view(n, t.shape[1], window**2, height, width)

    x, row = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    xy = torch.stack([x, row]).to(y.dtype).expand(n, 2, height, width)
    total = 0
    for kernel in kernels:
        parts = [(xy if name == "xy" else image) / sigma for name, sigma in kernel.items() if name != "weight"]
        feature = torch.cat(parts, 1)
        similarity = (-0.5 * (windows(feature) - feature[:, :, None]).square().sum(1, keepdim=True)).exp()
        similarity[:, :, window**2 // 2] = 0
        total = total + kernel["weight"] * similarity
    denominator = n * height * width
    if source is not None:
        total, denominator = total * windows(source), source.sum().clamp(min=1)
    if destination is not None:
        total, denominator = total * destination[:, :, None], destination.sum().clamp(min=1)
    return (total.sum() - (total * windows(y)).sum(2).mul(y).sum()) / denominator, total


def random_case(size, channels, scale, source, destination):
    height, width = size
    y = torch.randn(2, 4, height, width).softmax(1)
    image = torch.rand(2, channels, scale * height, scale * width)
    masks = [
        (torch.rand(2, 1, scale * height, scale * width) > 0.3).float() if on else None for on in (source, destination)
    ]
    return y, image, masks


CASES = list(itertools.product([(12, 16), (7, 5), (3, 4), (1, 1)], [1, 3], [1, 2], [0, 1], [0, 1], KERNELS, [1, 5]))


@pytest.mark.parametrize("size, channels, scale, source, destination, kernels, radius", CASES)
def test_value_and_gradient(size, channels, scale, source, destination, kernels, radius):
    y, image, masks = random_case(size, channels, scale, source, destination)
    y = y.double().requires_grad_()
    small = [None if mask is None else (F.adaptive_avg_pool2d(mask, size) >= 1).double() for mask in masks]
    expected, _ = zero_padded_loss(y, KERNELS[kernels], radius, F.adaptive_avg_pool2d(image.double(), size), *small)
    sample = {"rgb": image, "name": "a.jpg"}
    loss = ModelLossSemsegGatedCRF()(y, KERNELS[kernels], radius, sample, *image.shape[2:], *masks)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    gradients = (torch.autograd.grad(value, y)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


@pytest.mark.skipif(importlib.util.find_spec("pymic") is None, reason="needs pip install --no-deps pymic==0.6.2")
@pytest.mark.parametrize("size, channels, scale, source, destination, kernels, radius", CASES)
def test_against_the_copy_in_pymic(size, channels, scale, source, destination, kernels, radius):
    from pymic.loss.seg.gatedcrf import GatedCRFLoss as Official

    y, image, masks = random_case(size, channels, scale, source, destination)
    results = []
    for module in (Official(), ModelLossSemsegGatedCRF()):
        p = y.clone().requires_grad_()
        arguments = [None if mask is None else mask.clone() for mask in masks]
        sample = {"rgb": image.clone()}
        out = module(p, KERNELS[kernels], radius, sample, *image.shape[2:], *arguments, out_kernels_vis=True)
        out["loss"].backward()
        results.append((out["loss"].detach(), p.grad, out["kernels_vis"]))
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm() + 1e-9


@pytest.mark.parametrize("destination", [False, True])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("size", [(12, 16), (23, 11), (11, 12), (5, 40)])
def test_kernels_vis(size, source, destination):
    y, image, masks = random_case(size, 3, 1, source, destination)
    radius, side = 5, 11
    _, kernels = zero_padded_loss(y, KERNELS["two"], radius, image, *masks)
    expected = torch.zeros(2, 1, *size)
    for row in range(size[0]):
        for column in range(size[1]):
            centre = (row // side * side + radius, column // side * side + radius)
            if centre[0] < size[0] and centre[1] < size[1]:
                place = (row % side) * side + column % side
                expected[:, :, row, column] = kernels[:, :, place, centre[0], centre[1]]
    expected = F.interpolate(expected, (2 * size[0], 3 * size[1]), mode="nearest")
    out = ModelLossSemsegGatedCRF()(
        y, KERNELS["two"], radius, {"rgb": image}, 2 * size[0], 3 * size[1], *masks, out_kernels_vis=True
    )
    torch.testing.assert_close(out["kernels_vis"], expected)
    assert set(out) == {"loss", "kernels_vis"}


def test_soft_masks_are_thresholded_at_one():
    y, image, _ = random_case((6, 6), 3, 1, 0, 0)
    soft = torch.rand(2, 1, 6, 6)
    soft[:, :, 2:4] = 1
    soft[:, :, 5, 5] = float("nan")
    hard = (soft >= 1).float()
    module = ModelLossSemsegGatedCRF()
    for mask in ((soft, None), (None, soft), (soft, soft)):
        found = module(y, KERNELS["two"], 3, {"rgb": image}, 6, 6, *mask)["loss"]
        expected = module(y, KERNELS["two"], 3, {"rgb": image}, 6, 6, *(None if m is None else hard for m in mask))[
            "loss"
        ]
        assert torch.equal(found, expected)


def test_nothing_is_written():
    y, image, masks = random_case((6, 6), 3, 1, 1, 1)
    masks[0][0, 0, 0, 0], masks[1][0, 0, 1, 1] = float("nan"), 0.5
    before = [tensor.clone() for tensor in (y, image, *masks)]
    keep = {"rgb": lambda tensor, size: tensor}  # a downsampler that returns its argument
    ModelLossSemsegGatedCRF()(y, KERNELS["one"], 3, {"rgb": image}, 6, 6, *masks, custom_modality_downsamplers=keep)
    for tensor, copy in zip((y, image, *masks), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_custom_downsamplers():
    y, image, masks = random_case((6, 6), 3, 2, 1, 0)

    def nearest(tensor, size):
        return F.interpolate(tensor, size, mode="nearest")

    custom = {"rgb": nearest, "mask": nearest}
    module = ModelLossSemsegGatedCRF()
    found = module(y, KERNELS["two"], 3, {"rgb": image}, 12, 12, masks[0], custom_modality_downsamplers=custom)["loss"]
    expected = module(y, KERNELS["two"], 3, {"rgb": nearest(image, (6, 6))}, 6, 6, nearest(masks[0], (6, 6)))["loss"]
    assert torch.equal(found, expected)


def test_compatibility_works():
    problem = make_problem((2, 3, 6, 7), KERNELS["two"], 3, compatibility=True)
    found = ModelLossSemsegGatedCRF()(
        problem.probabilities, KERNELS["two"], 3, problem.features, 6, 7, compatibility=problem.compatibility
    )["loss"]
    torch.testing.assert_close(found, problem.loss())


def test_bytes_uneven_sizes_and_boolean_masks_are_accepted():
    y, _, _ = random_case((6, 7), 3, 1, 0, 0)
    image = torch.randint(0, 256, (2, 3, 13, 17), dtype=torch.uint8)
    mask = torch.rand(2, 1, 13, 17) > 0.1
    module = ModelLossSemsegGatedCRF()
    found = module(y, KERNELS["one"], 3, {"rgb": image}, 13, 17, mask)["loss"]
    expected = module(y, KERNELS["one"], 3, {"rgb": image.float() / 255}, 13, 17, mask.float())["loss"]
    torch.testing.assert_close(found, expected)


def test_custom_downsamplers_see_the_tensor_as_it_is():
    y, _, _ = random_case((6, 7), 3, 1, 0, 0)
    grey_levels = torch.randint(0, 256, (2, 3, 12, 14), dtype=torch.uint8)
    module = ModelLossSemsegGatedCRF()
    for custom in (lambda t, size: t[:, :, ::2, ::2], lambda t, size: t[:, :, ::2, ::2].float() / 255):
        found = module(y, KERNELS["one"], 3, grey_levels, 12, 14, custom_modality_downsamplers={"rgb": custom})["loss"]
        expected = module(y, KERNELS["one"], 3, grey_levels[:, :, ::2, ::2], 6, 7)["loss"]
        torch.testing.assert_close(found, expected)


def test_empty_batch():
    out = ModelLossSemsegGatedCRF()(
        torch.zeros(0, 3, 6, 7), KERNELS["two"], 2, torch.zeros(0, 3, 6, 7), 6, 7, out_kernels_vis=True
    )
    assert out["loss"] == 0 and out["kernels_vis"].shape == (0, 1, 6, 7)


def test_compiles_into_one_graph():
    y, image, masks = random_case((6, 7), 3, 2, 1, 1)
    module = ModelLossSemsegGatedCRF()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    arguments = (y, KERNELS["two"], 2, {"rgb": image}, 12, 14, *masks)
    torch.testing.assert_close(compiled(*arguments), module(*arguments))


def test_the_image_itself_for_a_sample():
    y, image, _ = random_case((6, 7), 1, 1, 0, 0)
    module = ModelLossSemsegGatedCRF()
    expected = module(y, KERNELS["two"], 3, {"rgb": image}, 6, 7)["loss"]
    assert torch.equal(module(y, KERNELS["two"], 3, image, 6, 7)["loss"], expected)


def test_a_nan_under_a_closed_mask_stays_there():
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    image[:, :, 2, 2] = float("nan")
    mask = torch.ones(2, 1, 6, 7)
    mask[:, :, 2, 2] = 0
    for masks in ((mask, None), (None, mask), (mask, mask)):
        out = ModelLossSemsegGatedCRF()(y, KERNELS["two"], 1, {"rgb": image}, 6, 7, *masks, out_kernels_vis=True)
        assert out["loss"].isfinite() and out["kernels_vis"].isfinite().all()


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "y_hat_softmax", {"y_hat_softmax": None}),
        (ValueError, "y_hat_softmax", {"y_hat_softmax": torch.rand(3, 6, 7)}),
        (ValueError, "sample: kernels_desc uses 'rgb', got only", {"sample": {"image": torch.rand(2, 3, 6, 7)}}),
        (TypeError, r"sample\['rgb'\]", {"sample": {"rgb": "a.jpg"}}),
        (ValueError, r"mask_src: expected \[N, 1, h, w\]", {"mask_src": torch.ones(2, 6, 7)}),
        (TypeError, "sample: expected a mapping", {"sample": None}),
        (TypeError, "sample: expected a mapping", {"sample": ["rgb"]}),
        (ValueError, r"sample\['rgb'\]: expected \[2, F", {"sample": {"rgb": torch.rand(1, 3, 6, 7)}}),
        (ValueError, r"sample\['rgb'\].*detach", {"sample": {"rgb": torch.rand(2, 3, 6, 7, requires_grad=True)}}),
        (ValueError, r"mask_dst: expected \[2, 6, 7\]", {"mask_dst": torch.ones(2, 2, 6, 7)}),
        (ValueError, r"kernels_desc\[0\]: expected a 'weight'", {"kernels_desc": [{"rgb": 0.1, "xy": 6.0}]}),
        (TypeError, "kernels_desc: expected a sequence", {"kernels_desc": None}),
        (ValueError, "kernels_radius: expected at least 0", {"kernels_radius": -1}),
        (TypeError, "kernels_radius: expected an int", {"kernels_radius": 5.0}),
        (TypeError, "compatibility: expected a tensor", {"compatibility": [[0, 1], [1, 0]]}),
        (
            ValueError,
            r"custom_modality_downsamplers\['rgb'\]: expected \[N, F, 6, 7\], got \[2, 3, 3, 7\]",
            {"custom_modality_downsamplers": {"rgb": lambda tensor, size: tensor[:, :, ::2]}},
        ),
    ],
)
def test_wrong_arguments(error, message, change):
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    arguments = {
        "y_hat_softmax": y,
        "kernels_desc": KERNELS["one"],
        "kernels_radius": 3,
        "sample": {"rgb": image},
        "height_input": 6,
        "width_input": 7,
    }
    with pytest.raises(error, match=message):
        ModelLossSemsegGatedCRF()(**{**arguments, **change})


def call(y, image, kernels=KERNELS["one"], radius=3, *masks, **options):
    return ModelLossSemsegGatedCRF()(y, kernels, radius, {"rgb": image}, *y.shape[2:], *masks, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.bool], ids=str)
def test_images_of_other_integers_are_refused(dtype):
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    with pytest.raises(TypeError, match=rf"sample\['rgb'\]: expected floating point or uint8, got {dtype}"):
        call(y, (255 * image).to(dtype))
    downsamplers = {"rgb": lambda tensor, size: tensor}
    with pytest.raises(TypeError, match=rf"sample\['rgb'\]: expected floating point or uint8, got {dtype}"):
        call(y, (255 * image).to(dtype), custom_modality_downsamplers=downsamplers)
    downsamplers = {"rgb": lambda tensor, size: tensor.double()}
    assert call(y, (255 * image).to(dtype), custom_modality_downsamplers=downsamplers)["loss"].isfinite()


def test_uint8_images_are_scaled():
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    bytes_ = (255 * image).byte()
    torch.testing.assert_close(call(y, bytes_)["loss"], call(y, bytes_.to(y.dtype) / 255)["loss"])


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0.0), np.float32(0)], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_weight_0_are_left_out(masked, nothing):
    y, image, masks = random_case((6, 7), 3, 1, 1, 1)
    masks = masks if masked else ()
    one = KERNELS["one"]
    switched_off = {"weight": nothing, "xy": 3.0, "depth": 0.1}  # its image need not be there
    for kernels in ([*one, switched_off], [switched_off, *one]):
        for name, value in call(y, image, one, 3, *masks, out_kernels_vis=True).items():
            assert torch.equal(call(y, image, kernels, 3, *masks, out_kernels_vis=True)[name], value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernels, radius", [([{"weight": 0.0, "xy": 6.0, "rgb": 0.1}], 3), (KERNELS["two"], 0)])
def test_what_leaves_no_pair_is_a_loss_of_0(kernels, radius, masked):
    y, image, masks = random_case((6, 7), 3, 1, 1, 1)
    y = y.float().requires_grad_()
    out = call(y, image, kernels, radius, *(masks if masked else ()), out_kernels_vis=True)
    out["loss"].backward()
    assert out["loss"] == 0 and out["loss"].dtype == torch.float32 and not y.grad.any()
    assert out["kernels_vis"].shape == (2, 1, 6, 7) and not out["kernels_vis"].any()
    with pytest.raises(ValueError, match=r"mask_src: expected \[2, 6, 7\]"):
        call(y, image, kernels, radius, torch.ones(2, 2, 6, 7))


def test_radius_0_is_0_in_the_official_formula_too():
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    assert zero_padded_loss(y, KERNELS["two"], 0, image)[0] == call(y, image, KERNELS["two"], 0)["loss"] == 0


@pytest.mark.parametrize(
    "scalar", [torch.tensor, np.float32, np.array, lambda number: torch.tensor(number, dtype=torch.float16)]
)
def test_numbers_may_be_scalars_of_any_kind(scalar):
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    exact = [{"weight": 0.5, "xy": 6.0, "rgb": 0.125}]  # in any dtype
    scalars = [{name: scalar(value) for name, value in exact[0].items()}]
    for radius in (3, torch.tensor(3), np.int32(3)):
        assert torch.equal(call(y, image, scalars, radius)["loss"], call(y, image, exact, 3)["loss"])
    with pytest.raises(TypeError, match=r"kernels_desc\[0\]\['xy'\]: expected a number, got Tensor"):
        call(y, image, [{"weight": 1.0, "xy": torch.tensor([6.0, 6.0])}])
    with pytest.raises(ValueError, match=r"kernels_desc\[0\]\['weight'\]: expected a number .* or 0, got -1"):
        call(y, image, [{"weight": -1, "xy": 6.0}])


def test_warnings_name_its_arguments_and_the_line_that_calls():
    y, image, _ = random_case((6, 7), 3, 1, 0, 0)
    expected = {
        "y_hat_softmax: expected probabilities, got .* to .*; for logits pass their softmax": (4 * y, image),
        "y_hat_softmax: expected probabilities that sum to 1": (0.5 * y, image),
        "y_hat_softmax: expected probabilities of two classes or more, got one channel": (y[:, :1], image),
        r"sample\['rgb'\]: expected neighbours that differ by about sigma": (y, 255 * image),
    }
    for message, arguments in expected.items():
        with pytest.warns(UserWarning) as caught:
            ModelLossSemsegGatedCRF()(arguments[0], KERNELS["one"], 3, {"rgb": arguments[1]}, 6, 7)
        line = inspect.currentframe().f_lineno - 1
        (found,) = caught
        assert re.search(message, str(found.message)) and "from_logits" not in str(found.message)
        assert found.filename == __file__ and found.lineno == line
