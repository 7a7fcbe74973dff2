"""Promise: in every dtype the error against float64 is at most that of the unfolded PyTorch code, plus rounding."""

import pytest
import torch
from problems import KERNELS, make_problem, value_and_gradient

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["", "sd"])
@pytest.mark.parametrize("kernels", ["rgb-xy", "official pair", "two modalities"])
@pytest.mark.parametrize("classes", [2, 21])
def test_error_budget(classes, kernels, gates, dtype):
    rounded = make_problem((2, classes, 31, 23), KERNELS[kernels], 5, gates).to(dtype)  # rounding inputs costs nobody
    exact_value, exact_gradient = value_and_gradient(rounded.to(torch.float64), lambda p: p.loss(reduction="sum"))
    value, gradient = value_and_gradient(rounded, lambda p: p.loss(reduction="sum"))
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    eager_value, eager_gradient = value_and_gradient(rounded.to(torch.float32), lambda p: p.unfolded())

    band = 4 * torch.finfo(torch.float32).eps
    assert abs(value - exact_value) <= abs(eager_value - exact_value) + band * exact_value
    stored = torch.finfo(dtype).eps  # the gradient is handed over in the input's dtype
    error, eager_error = ((g.double() - exact_gradient).abs() for g in (gradient, eager_gradient))
    assert error.max() <= eager_error.max() + (band + stored) * exact_gradient.abs().max()
    assert error.mean() <= eager_error.mean() + (band + stored) * exact_gradient.abs().mean()


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3, 1.0])
def test_error_budget_over_sigma(sigma):
    kernels = ({"weight": 1.0, "xy": 6.0, "rgb": sigma},)
    problem = make_problem((1, 4, 40, 40), kernels, 5, dtype=torch.float32)
    exact_value, exact_gradient = value_and_gradient(problem.to(torch.float64), lambda p: p.loss())
    value, gradient = value_and_gradient(problem, lambda p: p.loss())
    assert abs(value - exact_value) <= 1e-5 * exact_value
    assert (gradient - exact_gradient).norm() <= 1e-5 * exact_gradient.norm()


def agreeing_logits(margin):
    logits = torch.randn(1, 21, 64, 64)
    logits[:, 3] += margin  # at 14 the loss is a few millionths of the two sums it is the difference of
    return logits


@pytest.mark.parametrize("gates", ["", "s"])
@pytest.mark.parametrize("margin", [5, 10, 14, 20])
def test_near_agreement_from_logits(margin, gates):
    problem = make_problem((1, 21, 64, 64), radius=5, gates=gates, dtype=torch.float32)
    problem.probabilities = agreeing_logits(margin)
    exact_value, exact_gradient = value_and_gradient(problem.to(torch.float64), lambda p: p.loss(from_logits=True))
    value, gradient = value_and_gradient(problem, lambda p: p.loss(from_logits=True))
    assert abs(value - exact_value) <= 2e-6 * exact_value
    assert (gradient - exact_gradient).norm() <= 2e-6 * exact_gradient.norm()
    energies = problem.loss(from_logits=True, reduction="none")
    exact = problem.to(torch.float64).loss(from_logits=True, reduction="none")
    assert (energies - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("margin, tolerance", [(5, 1e-6), (10, 1e-4), (14, 1e-3)])
def test_near_agreement_of_probabilities(margin, tolerance):
    problem = make_problem((1, 21, 64, 64), radius=5, dtype=torch.float32)
    problem.probabilities = agreeing_logits(margin).softmax(1)  # which do not sum to exactly 1 any more
    exact = problem.to(torch.float64).loss(reduction="sum")
    assert abs(problem.loss(reduction="sum") - exact) <= tolerance * exact


def test_a_loss_without_gradient_is_as_accurate():
    problem = make_problem((2, 5, 33, 21), radius=5, gates="s", dtype=torch.float32)
    exact = problem.to(torch.float64).loss()
    with torch.no_grad():
        assert abs(problem.loss() - exact) <= 1e-6 * exact
