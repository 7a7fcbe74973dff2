"""Random inputs of the loss, and its value and gradient by other means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gcrf_triton import gated_crf_loss
from reference import gated_crf_unfold

RGB_XY = ({"weight": 1.0, "xy": 6.0, "rgb": 0.1},)
KERNELS = {
    "rgb-xy": RGB_XY,
    "xy": ({"weight": 0.7, "xy": 3.0},),
    "rgb": ({"weight": 2.0, "rgb": 0.2},),
    "official pair": ({"weight": 0.9, "xy": 6.0, "rgb": 0.1}, {"weight": 0.1, "xy": 6.0}),
    "two modalities": ({"weight": 0.5, "rgb": 0.2, "depth": 0.5}, {"weight": 0.2, "depth": 0.3, "xy": 2.0}),
}
SHAPES = [(1, 2, 1, 1), (2, 3, 1, 7), (1, 2, 7, 1), (1, 3, 2, 3), (2, 4, 5, 11), (1, 1, 6, 6), (1, 2, 17, 13)]


@dataclass
class Problem:
    probabilities: Tensor
    features: Mapping[str, Tensor]
    kernels: Sequence[Mapping[str, float]] = RGB_XY
    radius: int = 5
    source: Tensor | None = None
    destination: Tensor | None = None
    compatibility: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return replace(
            self,
            probabilities=cast(self.probabilities),
            features={name: cast(feature) for name, feature in self.features.items()},
            source=cast(self.source),
            destination=cast(self.destination),
            compatibility=cast(self.compatibility),
        )

    def loss(self, **settings) -> Tensor:
        return gated_crf_loss(
            self.probabilities,
            self.features,
            self.kernels,
            self.radius,
            source=self.source,
            destination=self.destination,
            compatibility=self.compatibility,
            **settings,
        )

    def unfolded(self) -> Tensor:
        return gated_crf_unfold(
            self.probabilities,
            self.features,
            self.kernels,
            self.radius,
            self.source,
            self.destination,
            self.compatibility,
        )


def make_problem(
    shape: tuple[int, int, int, int],
    kernels: Sequence[Mapping[str, float]] = RGB_XY,
    radius: int = 2,
    gates: str = "",
    compatibility: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A smooth picture with noise, soft probabilities, soft gates where `gates` names them ("s", "d", "sd")."""
    generator = torch.Generator().manual_seed(seed)
    n, classes, height, width = shape

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    ramp = (
        torch.linspace(0, 1, width, dtype=torch.float64) * torch.linspace(1, 0.5, height, dtype=torch.float64)[:, None]
    )

    def gate(name: str) -> Tensor | None:
        return random(n, height, width) * (random(n, height, width) > 0.3) if name in gates else None

    problem = Problem(
        probabilities=(3 * random(n, classes, height, width)).softmax(1),
        features={"rgb": 0.3 * random(n, 3, height, width) + 0.5 * ramp, "depth": random(n, 1, height, width)},
        kernels=kernels,
        radius=radius,
        source=gate("s"),
        destination=gate("d"),
        compatibility=random(classes, classes).fill_diagonal_(0) + 0.1 * (1 - torch.eye(classes))
        if compatibility
        else None,
    )
    return problem.to(dtype)


def value_and_gradient(problem: Problem, function) -> tuple[Tensor, Tensor]:
    """`function(problem)` summed, and its gradient with respect to the probabilities."""
    probabilities = problem.probabilities.detach().clone().requires_grad_()
    value = function(replace(problem, probabilities=probabilities)).sum()
    (gradient,) = torch.autograd.grad(value, probabilities)
    return value.detach(), gradient
