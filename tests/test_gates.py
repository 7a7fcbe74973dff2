"""Promise: a closed gate closes exactly, hides what is under it, and any dtype of mask will do."""

import functools

import pytest
import torch
from problems import make_problem, value_and_gradient

from gcrf_triton import planning

pytestmark = [
    pytest.mark.engines("torch", "triton"),
    pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str),  # Triton's tiles have no float64
]


@pytest.mark.parametrize("gates", ["s", "d", "sd"])
def test_closed_everywhere_is_exactly_zero(dtype, gates):
    problem = make_problem((2, 3, 6, 7), gates=gates, dtype=dtype)
    for name in ("source", "destination"):
        if getattr(problem, name) is not None:
            setattr(problem, name, torch.zeros(2, 6, 7, dtype=torch.bool))
    for reduction in ("mean", "sum", "none"):
        value, gradient = value_and_gradient(problem, lambda p, reduction=reduction: p.loss(reduction=reduction))
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gates", ["s", "d", "sd"])
def test_closed_pixels_get_no_energy_as_destinations_and_no_gradient_under_both(dtype, gates, reduction):
    problem = make_problem((1, 3, 9, 9), gates=gates, dtype=dtype)
    closed = torch.zeros(1, 9, 9, dtype=torch.bool)
    closed[:, 2:5, 3:7] = True
    for name in ("source", "destination"):
        if getattr(problem, name) is not None:
            setattr(problem, name, ~closed)
    energies = problem.loss(reduction="none")
    assert "d" not in gates or not energies[closed].any()
    _, gradient = value_and_gradient(problem, lambda p: p.loss(reduction=reduction))
    assert gates != "sd" or not gradient.transpose(0, 1)[:, closed].any()


@functools.cache
def without_closed_pixels(dtype, engine, **settings):
    """Which pixels those are; value and gradient where they are taken out altogether, by the engine of the tests."""
    closed = torch.zeros(2, 9, 8, dtype=torch.bool)
    closed[0, 3:5, 2:6] = True
    problem = make_problem((2, 3, 9, 8), dtype=dtype)
    problem.source = problem.destination = (~closed).to(dtype)
    return closed, *value_and_gradient(problem, lambda p: p.loss(impl=engine, **settings))


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("under", ["features", "prediction", "both"])
@pytest.mark.parametrize("gates", ["s", "d", "sd"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_under_a_closed_gate_never_leaks(dtype, engine, poison, gates, under, from_logits, reduction):
    settings = {"reduction": reduction, "from_logits": from_logits}
    closed, expected_value, expected_gradient = without_closed_pixels(dtype, engine, **settings)
    problem = make_problem((2, 3, 9, 8), gates=gates, dtype=dtype)
    for name in ("source", "destination"):
        if getattr(problem, name) is not None:
            setattr(problem, name, (~closed).to(dtype))
    if under != "prediction":
        problem.features["rgb"].masked_fill_(closed[:, None], poison)
    if under != "features":
        problem.probabilities.masked_fill_(closed[:, None], poison)
    value, gradient = value_and_gradient(problem, lambda p: p.loss(**settings))
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("under", ["features", "prediction"])
def test_nor_in_a_second_derivative(dtype, under, from_logits):
    def second(problem):
        x = problem.probabilities = problem.probabilities.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(problem.loss(from_logits=from_logits), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    problem = make_problem((1, 3, 7, 6), gates="s", dtype=dtype)
    problem.source[0, 2:4, 1:3] = 0
    expected = make_problem((1, 3, 7, 6), gates="s", dtype=dtype)
    expected.source = problem.source
    expected.destination = torch.ones_like(problem.source)
    expected.destination[0, 2:4, 1:3] = 0
    poisoned = problem.features["rgb"] if under == "features" else problem.probabilities
    poisoned[0, :, 2:4, 1:3] = float("nan")
    found = second(problem)
    # D is the sum of s with one gate, of d with two
    ratio = expected.destination.sum() / problem.source.sum()
    torch.testing.assert_close(found, second(expected) * ratio**2, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("under", ["image", "source", "destination"])
def test_what_callers_change_later_does_not_reach_a_derivative(dtype, under):
    def second(change):
        problem = make_problem((1, 3, 7, 6), gates="sd", dtype=dtype)
        x = problem.probabilities.requires_grad_()
        loss = problem.loss(from_logits=True)
        if change:
            (problem.features["rgb"] if under == "image" else getattr(problem, under)).fill_(0.25)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), x)[0]

    for found, expected in zip(second(True), second(False), strict=True):
        assert torch.equal(found, expected)


def test_an_image_of_bytes_is_scaled(dtype):
    problem = make_problem((2, 3, 7, 6), gates="s", dtype=dtype)
    image = (255 * problem.features["rgb"]).to(torch.uint8)
    values = []
    for problem.features["rgb"] in (image, image.to(dtype) / 255):
        values.append(value_and_gradient(problem, lambda p: p.loss()))
    torch.testing.assert_close(values[0], values[1])


def test_a_nan_under_open_gates_is_not_hidden(dtype):
    problem = make_problem((1, 3, 6, 6), gates="s", dtype=dtype)
    problem.source = torch.ones(1, 6, 6)
    problem.features["rgb"][0, 0, 3, 3] = float("nan")
    assert problem.loss().isnan()


def test_a_logit_of_minus_infinity_is_a_probability_of_zero(dtype):
    problem = make_problem((1, 3, 6, 6), dtype=dtype)
    problem.source = torch.ones(1, 6, 6)
    problem.source[0, 2] = 0
    problem.probabilities[:, 1] = -float("inf")
    value = problem.loss(from_logits=True)
    problem.probabilities = problem.probabilities.softmax(1)
    torch.testing.assert_close(value, problem.loss())


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("channel", [False, True])
def test_masks_of_any_dtype(mask_dtype, channel, dtype):
    problem = make_problem((2, 3, 6, 7), dtype=dtype)
    mask = torch.rand(2, 6, 7) > 0.4
    problem.source = mask.double()
    expected = problem.loss()
    problem.source = mask[:, None].to(mask_dtype) if channel else mask.to(mask_dtype)
    assert problem.loss() == expected


def test_soft_gates_are_weights(dtype):
    problem = make_problem((1, 3, 8, 8), gates="sd", dtype=dtype)
    one = problem.loss(reduction="sum")
    problem.source = 0.5 * problem.source
    torch.testing.assert_close(problem.loss(reduction="sum"), 0.5 * one)


@pytest.mark.parametrize("gates, pixels", [("s", 8), ("sd", 8), ("d", 1024)])
def test_a_mean_is_over_the_gates_of_all_images_and_all_their_parts(dtype, gates, pixels, monkeypatch):
    """More images than are summed at once, whose pixels fill several parts or less than one."""
    monkeypatch.setattr(planning, "LIMITS", planning.LIMITS._replace(prepared=pixels))
    problem = make_problem((9, 2, 3, 5), radius=1, gates=gates, dtype=dtype)
    mass = getattr(problem, "destination" if "d" in gates else "source").double().sum()
    value, gradient = value_and_gradient(problem, lambda p: p.loss())
    total, total_gradient = value_and_gradient(problem, lambda p: p.loss(reduction="sum"))
    torch.testing.assert_close(mass * value.double(), total.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mass * gradient.double(), total_gradient.double(), rtol=1e-5, atol=1e-6)
