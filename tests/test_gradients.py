"""Promise: every derivative with respect to the input, from one pass, with memory independent of the window."""

import weakref

import pytest
import torch
from problems import KERNELS, make_problem
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from gcrf_triton.energy import energy_of_products
from gcrf_triton.problem import Energy, Mode, Problem, Term, Window
from gcrf_triton.threads import AdaptiveThreads
from gcrf_triton.torch_engine import apply_pairwise

pytestmark = pytest.mark.engines("torch", "triton")


def loss_of(problem, **settings):
    def function(probabilities):
        problem.probabilities = probabilities
        return problem.loss(**settings)

    return function


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("compatibility", [False, True], ids=["potts", "matrix"])
@pytest.mark.parametrize("gates", ["", "s", "sd"])
@pytest.mark.engines("torch")
def test_first_and_second_derivatives(gates, compatibility, reduction):
    problem = make_problem((2, 3, 4, 5), KERNELS["official pair"], radius=2, gates=gates, compatibility=compatibility)
    function = loss_of(problem, reduction=reduction)
    probabilities = problem.probabilities.requires_grad_()
    assert torch.autograd.gradcheck(function, probabilities)
    assert torch.autograd.gradgradcheck(function, probabilities)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("compatibility", [False, True], ids=["potts", "matrix"])
@pytest.mark.engines("triton")
def test_first_and_second_derivatives_in_the_interpreter(compatibility, reduction):
    problem = make_problem((1, 2, 3, 4), KERNELS["official pair"], 1, "sd", compatibility)
    function = loss_of(problem, reduction=reduction)
    probabilities = problem.probabilities.requires_grad_()
    assert torch.autograd.gradcheck(function, probabilities, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, probabilities, fast_mode=True)


def test_derivatives_through_logits(engine):
    problem = make_problem((1, 3, 4, 5), radius=2, gates="s")
    function = loss_of(problem, from_logits=True)
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    quick = {"fast_mode": engine == "triton"}
    assert torch.autograd.gradcheck(function, logits, **quick)
    assert torch.autograd.gradgradcheck(function, logits, **quick)


def test_the_third_derivative_of_a_quadratic_is_zero():
    problem = make_problem((1, 2, 3, 4), radius=2)
    x = problem.probabilities.requires_grad_()
    (first,) = torch.autograd.grad(problem.loss(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    assert second.abs().max() > 0
    (third,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    assert not third.requires_grad or not torch.autograd.grad(third.sum(), x, allow_unused=True)[0]


def test_backward_twice():
    problem = make_problem((1, 3, 6, 7), gates="s")
    x = problem.probabilities.requires_grad_()
    loss = problem.loss()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_saved_bytes_do_not_depend_on_the_radius():
    def saved(radius):
        problem = make_problem((1, 4, 20, 20), radius=radius, gates="s", dtype=torch.float32)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        problem.probabilities.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = problem.loss()
        assert loss.requires_grad
        return sum(storages.values())

    assert saved(1) == saved(9) <= 4 * 400 * (2 * 4 + 2 * (3 + 2))


class LargestStorage(TorchDispatchMode):
    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return output


@pytest.mark.engines("torch")
def test_no_window_is_ever_unfolded():
    # inside the operator the largest tensor is 5 value columns with zeros around; an unfold would be 4 x 121 columns
    def largest(radius):
        values, image = torch.rand(1, 5, 500, 500), torch.rand(1, 3, 500, 500)
        with LargestStorage() as mode:
            apply_pairwise([values], Problem([image], (Term(1.0, 6.0, (0.1,)),), Window(radius)))
        return mode.nbytes

    columns = 4 * 5 * 500**2
    assert columns < largest(5) <= 1.5 * columns
    assert columns < largest(30) <= 1.5 * columns


@pytest.mark.engines("torch")
@pytest.mark.parametrize("from_logits", [False, True])
def test_columns_are_gone_when_a_matrix_is_applied_to_their_products(from_logits, monkeypatch):
    seen, alive, einsum = [], [], torch.einsum

    def multiply(columns, problem, mode):
        seen.extend(weakref.ref(column) for column in columns)
        return torch.cat(columns, dim=1)

    def apply_matrix(*arguments):
        alive.extend(column() is not None for column in seen)
        return einsum(*arguments)

    monkeypatch.setattr(torch, "einsum", apply_matrix)
    p, gate = torch.rand(1, 3, 4, 5), torch.rand(1, 4, 5)
    problem = Problem([], (Term(1.0, 2.0, ()),), Window(1), gate, gate)
    energy, threads = Energy(1 - torch.eye(3), from_logits), AdaptiveThreads(p.device, 1)
    energy_of_products(multiply, p, problem, energy, Mode.ENERGY_AND_GRADIENT, torch.empty_like(p), 1.0, threads)
    assert alive == [False] * 4


def test_forward_mode_is_refused():
    problem = make_problem((1, 3, 6, 7))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse mode only"):
        problem.probabilities = forward_ad.make_dual(problem.probabilities, torch.ones(1, 3, 6, 7).double())
        problem.loss()


def test_an_expanded_gradient():
    problem = make_problem((2, 3, 6, 7))
    x = problem.probabilities.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(reduction="none").sum(), x)
    (expected,) = torch.autograd.grad(problem.loss(reduction="sum"), x)
    torch.testing.assert_close(gradient, expected)


def test_no_gradient_where_none_is_wanted():
    problem = make_problem((1, 3, 6, 7))
    expected = problem.loss()
    assert not expected.requires_grad
    problem.probabilities.requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(problem.loss(), expected)
    with torch.inference_mode():
        torch.testing.assert_close(problem.loss(), expected)
