"""Promise: in float16 no gradient becomes infinite, nor any sum on the way to it, where its own value is finite."""

import math

import pytest
import torch

from gcrf_triton import gated_crf_loss
from gcrf_triton.op import HALF_LIMIT, pairwise_energy

pytestmark = pytest.mark.engines("torch", "triton")


def worst_case(classes, weight, radius, side):
    """Pixels of one colour and one class: every kernel is its weight, and every term of the gradient has one sign."""
    prediction = torch.zeros(1, classes, side, side)
    prediction[:, 0] = 1
    return prediction, {"rgb": torch.full((1, 3, side, side), 0.5)}, [{"weight": weight, "rgb": 0.1}], radius


def towards_the_first(classes):
    """A matrix whose rows have everything in class 0, and that of class 0 in class 1."""
    matrix = torch.zeros(classes, classes)
    matrix[1:, 0] = 1
    matrix[0, 1] = 1
    return matrix


def assert_finite_and_right(prediction, features, kernels, radius, **settings):
    gradients = []
    for dtype in (torch.float16, torch.float64):
        x = prediction.to(dtype).requires_grad_()
        gated_crf_loss(x, features, kernels, radius, **settings).backward()
        gradients.append(x.grad.double())
    found, expected = gradients
    if expected.abs().max() < torch.finfo(torch.float16).max:
        assert found.isfinite().all()
        smallest = torch.finfo(torch.float16).smallest_normal * 2.0**-10
        assert (found - expected).norm() <= 2e-3 * expected.norm() + smallest * found.numel() ** 0.5
    return expected.abs().max()


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("gates", ["", "sd"])
@pytest.mark.parametrize(
    "classes, weight, radius, side", [(150, 2.0, 2, 5), (21, 14.0, 2, 5), (4, 100.0, 2, 5), (21, 1.0, 20, 7)]
)
def test_a_matrix_that_favours_one_class(classes, weight, radius, side, gates, from_logits):
    problem = worst_case(classes, weight, radius, side)
    gate = torch.ones(1, side, side, dtype=torch.bool)
    settings = {"source": gate, "destination": gate} if gates else {}
    settings |= {"compatibility": towards_the_first(classes), "from_logits": from_logits}
    largest = assert_finite_and_right(*problem, **settings)
    assert from_logits or largest > 0.1  # one of what is infinite where it is kept times the number of pixels


@pytest.mark.parametrize("gate", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("share", [0.5, 1, 1.01, 2, 8])
def test_kernels_about_the_limit(share, reduction, gate):
    radius, side = 3, 9
    weight = share * HALF_LIMIT / (2 * radius + 1) ** 2
    settings = {}
    if gate is not None:
        amount = 1 if gate == torch.bool else 1e-3
        settings = dict.fromkeys(("source", "destination"), torch.full((1, side, side), amount).to(gate))
    largest = assert_finite_and_right(*worst_case(2, weight, radius, side), reduction=reduction, **settings)
    assert largest > 0


def test_the_limit_is_that_of_the_worst_case():
    radius, side = 3, 9
    prediction, features, _, _ = worst_case(2, 1.0, radius, side)
    weight = HALF_LIMIT / (2 * radius + 1) ** 2
    for factor, dtype in ((1, torch.float16), (1.01, torch.float32)):
        pairs = (prediction.half(), [features["rgb"]], None, None, None, False, [factor * weight], [0.0, 0.1], radius)
        gradient = pairwise_energy(*pairs, True, True, "torch")[1]
        assert gradient.dtype == dtype and gradient.isfinite().all()
        assert gradient.abs().max() > (HALF_LIMIT if dtype == torch.float16 else 1)


@pytest.mark.parametrize("gates", ["s", "sd"])
def test_gates_of_any_size(gates):
    for amount in (1e-6, 1.0, 255.0, 6e4):
        gate = torch.full((1, 6, 6), amount)
        settings = {"source": gate} | ({"destination": gate} if gates == "sd" else {})
        assert_finite_and_right(*worst_case(3, 1.0, 2, 6), **settings)


def test_per_pixel_energies_are_not_halves():
    x = worst_case(3, 2.0**20, 2, 6)[0].half().requires_grad_()
    energies = gated_crf_loss(x, *worst_case(3, 2.0**20, 2, 6)[1:], reduction="none")
    assert energies.dtype == torch.float32 and energies.isfinite().all()
    (gradient,) = torch.autograd.grad(energies.sum() * 2.0**-20, x)
    assert gradient.isfinite().all() and math.isclose(gradient.abs().max(), 48, rel_tol=1e-3)
