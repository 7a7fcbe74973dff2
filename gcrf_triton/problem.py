"""What is computed: which pairs count and how much, the energy that is made of them, and what is wanted of it."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import HALF_LOG2_E
from .tensors import accumulation_dtype, ordered_sum, readable


class Term(NamedTuple):
    """One Gaussian of the affinity. An infinite sigma: it does not depend on that modality."""

    weight: float
    sigma_xy: float  # pixels
    sigmas: tuple[float, ...]  # one a feature

    def xy_rate(self) -> float:
        """What the exponent to base 2 loses, times the squared distance in pixels."""
        return HALF_LOG2_E / self.sigma_xy**2

    def feature_rates(self) -> list[float]:
        """What the exponent to base 2 loses, times the squared difference of every feature."""
        return [HALF_LOG2_E / sigma**2 for sigma in self.sigmas]


def feature_factor(sigma: float) -> float:
    """What a feature is multiplied by, so that the exponent to base 2 loses squared differences as they are."""
    return math.sqrt(HALF_LOG2_E) / sigma


class Window(NamedTuple):
    """The pixels that a pixel meets: those that are at most `radius` away along every axis, and itself not."""

    radius: int

    def size(self) -> int:
        """Its pixels, with that in the middle."""
        return (2 * self.radius + 1) ** 2

    def within(self, height: int, width: int) -> Window:
        """The smallest window that meets the same pixels of an image."""
        return Window(min(self.radius, max(height, width, 1) - 1))

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """How far apart pixels of an image can be that meet, along y and x."""
        return min(self.radius, height - 1), min(self.radius, width - 1)


class Problem(NamedTuple):
    """The pairs of pixels, and what each counts: a symmetric matrix S over all pixels of an image.

        S_ij = k_ij (s_j d_i + s_i d_j) / 2      j != i, in the window of i and in the image
        k_ij = sum_m w_m exp(-1/2 |i - j|^2 / sigma_m^2 - 1/2 sum_f |f_i - f_j|^2 / sigma_mf^2)

    Features are [N, F, H, W]; the source and destination gates s and d are [N, H, W], and 1 where they are not given.
    The k_ij are called affinities.
    """

    features: Sequence[Tensor]
    terms: tuple[Term, ...]
    window: Window
    source: Tensor | None = None
    destination: Tensor | None = None

    def has_gates(self) -> bool:
        """Whether a gate is given."""
        return self.source is not None or self.destination is not None

    def channel_counts(self) -> tuple[int, ...]:
        """How many channels each of the features has."""
        return tuple(feature.shape[1] for feature in self.features)

    def of_images(self, some: slice) -> Problem:
        """The problem of some images of the batch."""
        source, destination = (gate if gate is None else gate[some] for gate in (self.source, self.destination))
        return self._replace(features=[each[some] for each in self.features], source=source, destination=destination)

    def without_gates(self) -> Problem:
        """The problem of the affinities alone."""
        return self._replace(source=None, destination=None)

    def both_gates(self, dtype: torch.dtype, like: Tensor) -> tuple[Tensor, Tensor]:
        """s and d; one that is not given is a 1 of this dtype, expanded for values `like` these."""
        source, destination = (
            like.new_ones(1, dtype=dtype).expand_as(like[:, 0]) if gate is None else gate
            for gate in (self.source, self.destination)
        )
        return source, destination

    def inverse_divisor(self, dtype: torch.dtype) -> Tensor | None:
        """1 / D of a mean with gates: D is the sum of d, of s if only that is given, and at least 1; else None."""
        gate = self.source if self.destination is None else self.destination
        return None if gate is None else 1 / ordered_sum(gate.to(dtype)).clamp(min=1)


class Energy(NamedTuple):
    """What a pair of predictions costs, and how costs are summed.

        energy = 1/D sum_ij d_i s_j k_ij (1 - p_i . p_j)      (p_i^T mu p_j with a compatibility matrix mu [C, C])

    From logits, p is their softmax over the classes. For a `mean`, D is that of `Problem.inverse_divisor`, or N H W
    without gates; else it is 1.
    """

    compatibility: Tensor | None = None
    from_logits: bool = False
    mean: bool = False

    def is_potts(self) -> bool:
        """Whether a pair costs 1 - p_i . p_j, which Triton's tiles can finish."""
        return self.compatibility is None

    def counts_mass(self) -> bool:
        """Whether a column of ones is multiplied with the p, for sum_j S_ij; logits need none, as p sums to 1."""
        return self.is_potts() and not self.from_logits


class Mode(enum.Enum):
    """What is wanted."""

    PRODUCT = "S v for value columns v"
    ENERGY = "the energy, without a gradient"
    ENERGY_AND_GRADIENT = "the energy and its gradient"


class Arguments(NamedTuple):
    """The arguments of `torch.ops.gcrf_triton.pairwise_energy`, whose schema has tensors, lists and numbers only."""

    input: Tensor
    features: Sequence[Tensor]
    source: Tensor | None
    destination: Tensor | None
    compatibility: Tensor | None
    from_logits: bool
    weights: Sequence[float]
    sigmas: Sequence[float]  # (sigma_xy, *sigmas) of every term, one after another, 0 for what is infinite
    radius: int
    mean: bool
    with_gradient: bool
    impl: str

    def terms(self) -> tuple[Term, ...]:
        return _unflattened(tuple(self.weights), tuple(self.sigmas), 1 + len(self.features))

    def problem(self) -> Problem:
        return Problem(self.features, self.terms(), Window(self.radius), self.source, self.destination)

    def energy(self) -> Energy:
        return Energy(self.compatibility, self.from_logits, self.mean)

    def mode(self) -> Mode:
        return Mode.ENERGY_AND_GRADIENT if self.with_gradient else Mode.ENERGY


@functools.lru_cache(maxsize=1024)
def _unflattened(weights: tuple[float, ...], sigmas: tuple[float, ...], width: int) -> tuple[Term, ...]:
    rows = [
        tuple(sigma or math.inf for sigma in sigmas[start : start + width]) for start in range(0, len(sigmas), width)
    ]
    return tuple(Term(weight, row[0], row[1:]) for weight, row in zip(weights, rows, strict=True))


def flatten(input: Tensor, problem: Problem, energy: Energy, mode: Mode, impl: str) -> Arguments:
    """The operator's arguments: what `Arguments.problem`, `energy` and `mode` make of them again."""
    sigmas = [sigma for term in problem.terms for sigma in (term.sigma_xy, *term.sigmas)]
    return Arguments(
        input=input,
        features=list(problem.features),
        source=problem.source,
        destination=problem.destination,
        compatibility=energy.compatibility,
        from_logits=energy.from_logits,
        weights=[term.weight for term in problem.terms],
        sigmas=[0.0 if sigma == math.inf else sigma for sigma in sigmas],
        radius=problem.window.radius,
        mean=energy.mean,
        with_gradient=mode is Mode.ENERGY_AND_GRADIENT,
        impl=impl,
    )


def copy_constants(problem: Problem, dtype: torch.dtype, like: Tensor) -> tuple[Tensor, Problem]:
    """Copy what a derivative needs later, with PyTorch alone, where Triton's kernels do not.

    Returns the copies [N, K, H, W] in a dtype, for values `like` these: the channels of all features, those of uint8
    scaled to [0, 1], and with any gate both s and d. And the problem of the copies.
    """
    parts = [like.new_empty(like.shape[0], 0, *like.shape[2:], dtype=dtype)]
    for feature in problem.features:
        parts.append(feature.to(dtype) / 255 if feature.dtype == torch.uint8 else feature.to(dtype))
    if problem.has_gates():
        parts += [gate.to(dtype)[:, None] for gate in problem.both_gates(dtype, like)]
    copies = torch.cat(parts, dim=1)
    given = problem.source is not None, problem.destination is not None
    return copies, problem_of_copies(copies, problem.channel_counts(), given, problem)


def problem_of_copies(copies: Tensor, channels: Sequence[int], given: tuple[bool, bool], problem: Problem) -> Problem:
    """A problem with features and given gates that are views of what `copy_constants` copied."""
    features = copies[:, : sum(channels)].split(list(channels), dim=1)
    source, destination = (copies[:, place - 2] if gate else None for place, gate in enumerate(given))
    return problem._replace(features=features, source=source, destination=destination)


def hide_not_finite(problem: Problem, input: Tensor, from_logits: bool) -> tuple[Tensor, Problem]:
    """Take pixels out of the sum whose prediction or features are not finite, where a gate is closed.

    Returns the input and the problem, whose features have the dtype of sums, with 0 for all that such a pixel has.
    """
    if not problem.has_gates():
        return input, problem
    values = input.detach()
    dtype = accumulation_dtype(input.dtype)
    # a sum is finite only if all its terms are
    if readable(values) and all(tensor.sum(dtype=dtype).isfinite() for tensor in (values, *problem.features)):
        return input, problem
    finite = values.amax(1).isfinite() if from_logits else values.isfinite().all(1)  # a logit of -inf is a 0
    for feature in problem.features:
        finite = finite & feature.isfinite().all(1)
    s, d = problem.both_gates(dtype, input)
    hidden = ~finite & ((s == 0) | (d == 0))  # [N, H, W]
    s, d = (gate.masked_fill(hidden, 0) for gate in (s, d))
    features = [feature.masked_fill(hidden[:, None], 0) for feature in problem.features]
    return input.masked_fill(hidden[:, None], 0), problem._replace(features=features, source=s, destination=d)
