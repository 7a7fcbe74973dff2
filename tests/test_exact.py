"""Promise: the loss is the equation, to the rounding of float64, whatever the shape, window, kernels and gates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import KERNELS, SHAPES, make_problem, value_and_gradient

from gcrf_triton import op, torch_engine
from reference import gated_crf_energies

pytestmark = pytest.mark.engines("torch", "triton")


def loops(problem):
    arrays = [
        None if tensor is None else tensor.numpy()
        for tensor in (problem.source, problem.destination, problem.compatibility)
    ]
    features = {name: feature.numpy() for name, feature in problem.features.items()}
    energies = gated_crf_energies(problem.probabilities.numpy(), features, problem.kernels, problem.radius, *arrays)
    return torch.from_numpy(energies)


@pytest.mark.parametrize("gates", ["", "s", "d", "sd"])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_energies_are_those_of_the_loops(kernels, gates):
    problem = make_problem((2, 3, 5, 8), kernels, radius=2, gates=gates)
    torch.testing.assert_close(problem.loss(reduction="none"), loops(problem), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_sizes_and_windows_beyond_the_image(shape, radius):
    problem = make_problem(shape, radius=radius, gates="s")
    expected = loops(problem)
    torch.testing.assert_close(problem.loss(reduction="none"), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(problem.loss(reduction="sum"), expected.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gates", ["", "s", "d", "sd"])
def test_compatibility(gates):
    problem = make_problem((2, 4, 5, 6), KERNELS["official pair"], radius=2, gates=gates, compatibility=True)
    expected = loops(problem)
    torch.testing.assert_close(problem.loss(reduction="none"), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(problem.loss(reduction="sum"), expected.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.engines("torch")
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("compatibility", [False, True], ids=["potts", "matrix"])
@pytest.mark.parametrize("gates", ["", "s", "sd"])
def test_groups_of_images(gates, compatibility, from_logits, monkeypatch):
    problem = make_problem((7, 3, 5, 6), gates=gates, compatibility=compatibility)
    monkeypatch.setattr(op, "GROUP_VALUES", 269)  # of 90 an image
    sizes = []

    def apply(columns, *arguments, **settings):
        sizes.append(len(columns[0]))
        return apply_pairwise(columns, *arguments, **settings)

    apply_pairwise = torch_engine.apply_pairwise
    monkeypatch.setattr(torch_engine, "apply_pairwise", apply)
    found = value_and_gradient(problem, lambda p: p.loss(reduction="sum", from_logits=from_logits))
    assert sizes == [1, 2, 2, 2]

    def unfolded(problem):
        p = problem.probabilities
        return replace(problem, probabilities=p.softmax(1) if from_logits else p).unfolded()

    for value, expected in zip(found, value_and_gradient(problem, unfolded), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_potts_as_a_matrix_is_the_default():
    problem = make_problem((1, 5, 9, 7), gates="sd")
    potts = 1 - torch.eye(5, dtype=torch.float64)
    expected = problem.loss()
    problem.compatibility = 3 * potts
    torch.testing.assert_close(problem.loss(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("compatibility", [False, True], ids=["potts", "matrix"])
@pytest.mark.parametrize("gates", ["", "s", "d", "sd"])
@pytest.mark.parametrize("kernels", ["official pair", "two modalities"])
def test_gradient_is_that_of_the_unfold(kernels, gates, compatibility, reduction):
    problem = make_problem((2, 3, 14, 9), KERNELS[kernels], radius=2, gates=gates, compatibility=compatibility)
    value, gradient = value_and_gradient(problem, lambda problem: problem.loss(reduction=reduction))
    expected_value, expected_gradient = value_and_gradient(problem, lambda problem: problem.unfolded())
    denominator = 1.0
    if reduction == "mean":
        gate = problem.source if problem.destination is None else problem.destination
        denominator = 2 * 14 * 9 if gate is None else gate.sum()
    torch.testing.assert_close(value, expected_value / denominator, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, expected_gradient / denominator, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("height, width", [(120, 150), (5, 3000), (3000, 5)])
def test_many_tiles_and_blocks(height, width, engine):
    if engine == "triton":  # in the interpreter
        height, width = height // 10 + 1, width // 10 + 1
    problem = make_problem((2, 2, height, width), radius=3, gates="d")
    value, gradient = value_and_gradient(problem, lambda problem: problem.loss(reduction="sum"))
    expected_value, expected_gradient = value_and_gradient(problem, lambda problem: problem.unfolded())
    torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_logits_are_probabilities_after_softmax():
    problem = make_problem((2, 3, 8, 9), gates="s")
    logits = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    problem.probabilities = logits.softmax(1)
    expected = problem.loss()
    problem.probabilities = logits
    torch.testing.assert_close(problem.loss(from_logits=True), expected)


def test_features_are_averaged_over_areas():
    problem = make_problem((2, 3, 7, 9))
    large = torch.rand(2, 3, 23, 40, dtype=torch.float64)
    averaged = torch.zeros(2, 3, 7, 9, dtype=torch.float64)
    for y in range(7):
        for x in range(9):
            rows, columns = slice(y * 23 // 7, -(-(y + 1) * 23 // 7)), slice(x * 40 // 9, -(-(x + 1) * 40 // 9))
            averaged[:, :, y, x] = large[:, :, rows, columns].mean((2, 3))
    problem.features = {"rgb": averaged}
    expected = problem.loss()
    problem.features = {"rgb": large}
    torch.testing.assert_close(problem.loss(), expected)


def test_bytes_are_scaled_to_one():
    problem = make_problem((1, 3, 7, 9), dtype=torch.float32)
    grey_levels = torch.randint(0, 256, (1, 3, 14, 9), dtype=torch.uint8)
    problem.features = {"rgb": grey_levels.float() / 255}
    expected = problem.loss()
    problem.features = {"rgb": grey_levels}
    torch.testing.assert_close(problem.loss(), expected)


def test_denominators():
    problem = make_problem((2, 3, 6, 5), gates="sd")
    total = problem.loss(reduction="sum")
    torch.testing.assert_close(problem.loss(), total / problem.destination.sum())
    problem.destination = None
    torch.testing.assert_close(problem.loss(), problem.loss(reduction="sum") / problem.source.sum())
    problem.source = None
    torch.testing.assert_close(problem.loss(), problem.loss(reduction="sum") / 60)
    problem.source = torch.zeros(2, 6, 5)
    problem.source[0, 0, 0] = 0.25  # less than one pixel: D is 1
    torch.testing.assert_close(problem.loss(), problem.loss(reduction="sum"))


@pytest.mark.engines("torch")
def test_kernels_too_small_for_normal_numbers_are_zero():  # processors take many times as long with others
    problem = make_problem((1, 2, 1, 2), ({"weight": 1.0, "rgb": 0.1},), dtype=torch.float32)
    problem.probabilities = torch.eye(2)[None, :, None]
    losses = []
    for difference in (1.3, 1.4):  # kernels of 2e-37 and 3e-43
        problem.features = {"rgb": torch.tensor([0, difference])[None, None, None]}
        losses.append(problem.loss(reduction="sum"))
    assert losses[0] > 0 and losses[1] == 0


def test_unused_features_are_left_alone():
    problem = make_problem((1, 3, 6, 5))
    expected = problem.loss()
    problem.features = {**problem.features, "name": "photograph.jpg"}
    assert problem.loss() == expected


def test_empty_batch():
    input = torch.zeros(0, 3, 6, 5, requires_grad=True)
    problem = make_problem((1, 3, 6, 5))
    problem.probabilities, problem.features = input, {"rgb": torch.zeros(0, 3, 6, 5)}
    loss = problem.loss()
    loss.backward()
    assert loss == 0 and input.grad.shape == input.shape
    assert problem.loss(reduction="none").shape == (0, 6, 5)


def test_constant_agreement_costs_nothing():
    problem = make_problem((1, 3, 16, 16), dtype=torch.float32)
    problem.probabilities = torch.zeros(1, 3, 16, 16)
    problem.probabilities[:, 1] = 1
    assert problem.loss() == 0
    assert not np.any(problem.loss(reduction="none").numpy())
