"""Promise: a closed gate closes exactly, hides what is under it, and any dtype of mask will do."""

import pytest
import torch
from problems import make_problem, value_and_gradient

pytestmark = pytest.mark.engines("torch", "triton")


@pytest.mark.parametrize("gates", ["s", "d", "sd"])
def test_closed_everywhere_is_exactly_zero(gates):
    problem = make_problem((2, 3, 6, 7), gates=gates)
    for name in ("source", "destination"):
        if getattr(problem, name) is not None:
            setattr(problem, name, torch.zeros(2, 6, 7, dtype=torch.bool))
    for reduction in ("mean", "sum", "none"):
        value, gradient = value_and_gradient(problem, lambda p, reduction=reduction: p.loss(reduction=reduction))
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gates", ["s", "d", "sd"])
def test_closed_pixels_get_no_energy_as_destinations_and_no_gradient_under_both(gates, reduction):
    problem = make_problem((1, 3, 9, 9), gates=gates)
    closed = torch.zeros(1, 9, 9, dtype=torch.bool)
    closed[:, 2:5, 3:7] = True
    for name in ("source", "destination"):
        if getattr(problem, name) is not None:
            setattr(problem, name, ~closed)
    energies = problem.loss(reduction="none")
    assert "d" not in gates or not energies[closed].any()
    _, gradient = value_and_gradient(problem, lambda p: p.loss(reduction=reduction))
    assert gates != "sd" or not gradient.transpose(0, 1)[:, closed].any()


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("under", ["features", "prediction", "both"])
@pytest.mark.parametrize("gates", ["s", "d", "sd"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_under_a_closed_gate_never_leaks(poison, gates, under, from_logits):
    problem = make_problem((2, 3, 9, 8), gates=gates)
    closed = torch.zeros(2, 9, 8, dtype=torch.bool)
    closed[0, 3:5, 2:6] = True
    gate = (~closed).to(torch.float64)
    problem.source = gate if "s" in gates else None
    problem.destination = gate if "d" in gates else None
    expected = make_problem((2, 3, 9, 8))
    expected.source, expected.destination = gate, gate  # the pixels are taken out altogether
    if under != "prediction":
        problem.features["rgb"].masked_fill_(closed[:, None], poison)
    if under != "features":
        problem.probabilities.masked_fill_(closed[:, None], poison)
    for reduction in ("mean", "none"):
        value, gradient = value_and_gradient(
            problem, lambda p, r=reduction: p.loss(reduction=r, from_logits=from_logits)
        )
        expected_value, expected_gradient = value_and_gradient(
            expected, lambda p, r=reduction: p.loss(reduction=r, from_logits=from_logits)
        )
        torch.testing.assert_close(value, expected_value)
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_nan_under_open_gates_is_not_hidden():
    problem = make_problem((1, 3, 6, 6), gates="s")
    problem.source = torch.ones(1, 6, 6)
    problem.features["rgb"][0, 0, 3, 3] = float("nan")
    assert problem.loss().isnan()


def test_a_logit_of_minus_infinity_is_a_probability_of_zero():
    problem = make_problem((1, 3, 6, 6))
    problem.source = torch.ones(1, 6, 6)
    problem.source[0, 2] = 0
    problem.probabilities[:, 1] = -float("inf")
    value = problem.loss(from_logits=True)
    problem.probabilities = problem.probabilities.softmax(1)
    torch.testing.assert_close(value, problem.loss())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channel", [False, True])
def test_masks_of_any_dtype(dtype, channel):
    problem = make_problem((2, 3, 6, 7))
    mask = torch.rand(2, 6, 7) > 0.4
    problem.source = mask.double()
    expected = problem.loss()
    problem.source = mask[:, None].to(dtype) if channel else mask.to(dtype)
    assert problem.loss() == expected


def test_soft_gates_are_weights():
    problem = make_problem((1, 3, 8, 8), gates="sd")
    one = problem.loss(reduction="sum")
    problem.source = 0.5 * problem.source
    torch.testing.assert_close(problem.loss(reduction="sum"), 0.5 * one)
