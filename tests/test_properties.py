"""Promise: whatever the combination of settings, the loss and its gradient are those of the unfold."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import KERNELS, make_problem, value_and_gradient


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 19), st.integers(1, 19)),
    kernels=st.lists(
        st.sampled_from([kernel for kernels in KERNELS.values() for kernel in kernels]), min_size=1, max_size=3
    ),
    radius=st.integers(1, 7),
    gates=st.sampled_from(["", "s", "d", "sd"]),
    compatibility=st.booleans(),
    from_logits=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_any_combination(shape, kernels, radius, gates, compatibility, from_logits, reduction, seed):
    compatibility = compatibility and shape[1] > 1
    problem = make_problem(shape, kernels, radius, gates, compatibility, seed=seed)

    def unfolded(problem):
        if from_logits:
            problem.probabilities = problem.probabilities.softmax(1)
        return problem.unfolded()

    value, gradient = value_and_gradient(problem, lambda p: p.loss(reduction=reduction, from_logits=from_logits))
    expected_value, expected_gradient = value_and_gradient(problem, unfolded)
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
