"""Promise: the two references, written independently of each other, agree."""

import pytest
import torch
from problems import KERNELS, make_problem
from test_exact import loops


@pytest.mark.parametrize("compatibility", [False, True])
@pytest.mark.parametrize("gates", ["", "s", "d", "sd"])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_loops_and_unfold_agree(kernels, gates, compatibility):
    problem = make_problem((2, 3, 4, 6), kernels, radius=2, gates=gates, compatibility=compatibility)
    torch.testing.assert_close(problem.unfolded(), loops(problem).sum(), rtol=1e-12, atol=1e-12)


def test_two_pixels_by_hand():
    problem = make_problem((1, 2, 1, 2))
    problem.probabilities = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]], dtype=torch.float64)
    problem.features = {"rgb": torch.tensor([[[[0.5, 0.6]]] * 3], dtype=torch.float64).view(1, 3, 1, 2)}
    kernel = torch.tensor(-0.5 / 36 - 1.5, dtype=torch.float64).exp()
    torch.testing.assert_close(loops(problem).sum(), 2 * kernel * (1 - 0.9 * 0.2 - 0.1 * 0.8))
