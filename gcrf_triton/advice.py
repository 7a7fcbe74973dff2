"""Warnings about arguments that are allowed, but probably not what the caller means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .messages import warn_caller
from .problem import Term
from .tensors import accumulation_dtype, readable

TOLERANCE = 0.01  # of probabilities and their sums
MOST_SEEN = (8, 16, 16)  # images, rows, columns looked at: 0.14 of 22 ms for 1 x 21 x 128 x 128
MANY_SIGMAS = 200  # that images span where they were not scaled as their sigma
SIMILAR = 0.01  # as neighbours with different values are at least, on average
EQUAL = 0.5  # part of the neighbours that have one value in drawings and label maps


def advise_on_probabilities(name: str, prediction: Tensor, remedy: str) -> None:
    """Warn of what cannot be probabilities of classes; `remedy` is for logits. On the CPU, from some of the pixels."""
    if not readable(prediction):
        return
    some = _some_pixels(prediction)
    if not some.numel():
        return
    lowest, highest = (bound.item() for bound in some.aminmax())
    if lowest < -TOLERANCE or highest > 1 + TOLERANCE:
        warn_caller(
            "{name}: expected probabilities, got {lowest:g} to {highest:g}; {remedy}",
            name=name,
            lowest=lowest,
            highest=highest,
            remedy=remedy,
        )
    elif len(some) == 1 and highest > 0:
        warn_caller(
            "{name}: expected probabilities of two classes or more, got one channel, whose loss is lowest where all is "
            "foreground; for the probability p of a foreground pass torch.cat([1 - p, p], dim=1)",
            name=name,
        )
    elif len(some) > 1:
        sums = some.sum(0)
        sums = sums[sums > 0]  # a prediction of 0 measures the mass of a kernel, or fills up an image
        if ((sums - 1).abs() > TOLERANCE).any():
            lowest, highest = (bound.item() for bound in sums.aminmax())
            warn_caller(
                "{name}: expected probabilities that sum to 1 over the classes, got sums from {lowest:g} to "
                "{highest:g}; classes that overlap are problems [1 - p, p] of their own",
                name=name,
                lowest=lowest,
                highest=highest,
            )


def advise_on_logits(name: str, logits: Tensor, remedy: str) -> None:
    """Warn of logits of one class, and, on the CPU, of what has been through softmax, from some of the pixels."""
    if logits.shape[1] == 1 and not torch.compiler.is_compiling():
        warn_caller("{name}: expected logits of classes, got one, of which softmax makes 1: the loss is 0", name=name)
    if not readable(logits) or logits.shape[1] < 2 or not logits.numel():
        return
    some = _some_pixels(logits)
    if some.amin() >= 0 and ((some.sum(0) - 1).abs() <= TOLERANCE).all():
        warn_caller("{name}: expected logits, got what sums to 1 over the classes; {remedy}", name=name, remedy=remedy)


def advise_on_features(names: Sequence[str], features: Sequence[Tensor], terms: Sequence[Term]) -> None:
    """Warn of sigmas so small that nearly no neighbours are similar. On the CPU, from some of the pixels."""
    for place, (name, feature) in enumerate(zip(names, features, strict=True)):
        sigma = min(term.sigmas[place] for term in terms)
        if not readable(feature) or not feature[..., 1:].numel():
            continue
        scale = 255 if feature.dtype == torch.uint8 else 1
        own = _some_pixels(feature[..., :-1]) / scale
        lowest, highest = (bound.item() for bound in own.aminmax())
        if not highest - lowest > MANY_SIGMAS * sigma:
            continue
        difference = own - _some_pixels(feature[..., 1:]) / scale
        apart = difference[difference != 0]
        if len(apart) > EQUAL * difference.numel() and (-0.5 * (apart / sigma).square()).exp().mean() < SIMILAR:
            warn_caller(
                "{name}: expected neighbours that differ by about sigma, got values from {lowest:g} to {highest:g} "
                "and a sigma of {sigma:g}, for which nearly no pixels are similar; scale one of them",
                name=name,
                lowest=lowest,
                highest=highest,
                sigma=sigma,
            )


def _some_pixels(image: Tensor) -> Tensor:
    # [N, C, H, W] -> [C, some pixels of all images]
    steps = (-(-size // most) for size, most in zip((len(image), *image.shape[2:]), MOST_SEEN, strict=True))
    images, rows, columns = (slice(None, None, max(step, 1)) for step in steps)
    return image.detach()[images, :, rows, columns].transpose(0, 1).flatten(1).to(accumulation_dtype(image.dtype))
