"""What users call: the Gated CRF loss, its module form and partial cross entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .advice import advise_on_features, advise_on_logits, advise_on_probabilities
from .checks import (
    Kernel,
    assert_labels,
    check_compatibility,
    check_labels,
    check_prediction,
    check_reverse_mode,
    check_settings,
    check_weight,
    expected_labels,
    parse_kernels,
    prepare_compatibility,
    prepare_feature,
    prepare_gate,
)
from .messages import warn_caller
from .op import energy_of_pairs
from .problem import Energy, Problem, Window
from .tensors import accumulation_dtype, ordered_sum, readable

Reduction = Literal["mean", "sum", "none"]
KERNELS: tuple[Kernel, ...] = ({"weight": 1.0, "xy": 6.0, "rgb": 0.1},)


def gated_crf_loss(
    input: Tensor,
    features: Mapping[str, Tensor],
    kernels: Sequence[Kernel] = KERNELS,
    radius: int = 5,
    *,
    source: Tensor | None = None,
    destination: Tensor | None = None,
    compatibility: Tensor | None = None,
    from_logits: bool = False,
    reduction: Reduction = "mean",
    impl: str = "auto",
) -> Tensor:
    """Penalise different predictions for nearby pixels of similar features: the Gated CRF loss, exactly.

        loss = 1/D sum_i sum_j d_i s_j k_ij (1 - p_i . p_j)      j != i, in the (2 radius + 1)^2 window and in the image
        k_ij = sum_m w_m exp(-1/2 sum_f |f_i - f_j|^2 / sigma_mf^2)

    s and d are the source and destination gates. D is the sum of d if it is given, else the sum of s if it is given,
    else N H W, and never below 1. A compatibility matrix mu turns the last factor into p_i^T mu' p_j, where mu' is
    C - 1 times mu with its rows divided by their sums.

    Args:
        input: class probabilities [N, C, H, W], or logits with `from_logits`; float64, float32, float16 or bfloat16,
            any strides. Sums are kept in float32, in float64 for float64. A foreground's probability p alone is not a
            prediction of two classes: that is [1 - p, p].
        features: name -> [N, F, h, w], floating or uint8 (which is scaled to [0, 1]); h >= H and w >= W, larger ones
            are area-averaged down to H x W. Constants: no gradient flows to them. Names no kernel uses are left alone.
        kernels: mappings with a "weight" w and a standard deviation sigma a modality: "xy" in pixels of the input, any
            other in units of the feature of that name. The default's rgb 0.1 is 25 grey levels of an image in [0, 1],
            and about 6 of one normalised by mean and standard deviation, as in the paper.
        radius: half width of the window in pixels of the input.
        source: [N, H, W] or [N, 1, H, W], bool, integer or floating, >= 0, a weight (a mask of 255 weighs 255). Pixels
            with 0 attract nobody.
        destination: the same; pixels with 0 are not attracted. Predictions and features that are not finite under a
            closed gate take their pixel out of the sum.
        compatibility: [C, C], >= 0 with a zero diagonal; None is the Potts model above.
        from_logits: apply softmax over the classes first.
        reduction: "mean" as above, "sum" without 1/D, or "none": the energy [N, H, W] of every destination pixel.
        impl: "triton" (tensor-core tiles; GPUs), "torch" (any device) or "auto", which is Triton on the GPUs it can run
            on, else PyTorch.

    Returns:
        A scalar, or [N, H, W], in the accumulation dtype. Differentiable with respect to `input` in reverse mode, any
        number of times, by torch.autograd (torch.func has no rule for it). One pass over the pairs gives the loss and
        its gradient; of the radius, memory only sees a margin of that many pixels.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given. Values (not shapes or types)
            are checked on the CPU only, and not while compiling: reading them waits for a device and breaks a graph.
            On NVIDIA GPUs, an assertion on the device names the argument that has negative values.
        NotImplementedError: for forward-mode derivatives, and inside the transforms of torch.func.

    Warns:
        UserWarning: for logits of one class, and, on the CPU, once for a line that calls and from some of the pixels,
            for probabilities that are outside [0, 1], do not sum to 1 over the classes, or have one channel, for logits
            that do sum to 1, and for a sigma so small that nearly no neighbours are similar.

    Source: Obukhov, Georgoulis, Dai, Van Gool, Gated CRF Loss for Weakly Supervised Semantic Image Segmentation,
    arXiv 1906.04651.
    """
    input = check_prediction("input", input)
    radius = check_settings(radius, from_logits, reduction, impl)
    names, terms = parse_kernels("kernels", kernels)
    if not isinstance(features, Mapping):
        raise TypeError(f"features: expected a mapping from names to tensors, got {type(features).__name__}")
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(f"features: kernels use {missing[0]!r}, got only {sorted(map(str, features)) or 'none'}")

    full_names = [f"features[{name!r}]" for name in names]
    prepared = [prepare_feature(full, features[name], input) for full, name in zip(full_names, names, strict=True)]
    source = prepare_gate("source", source, input)
    destination = prepare_gate("destination", destination, input)
    mu = prepare_compatibility(compatibility, input)
    check_reverse_mode("input", input, *prepared, source, destination, mu)
    if from_logits:
        advise_on_logits("input", input, "for probabilities leave out from_logits=True")
    else:
        advise_on_probabilities("input", input, "for logits pass from_logits=True")
    advise_on_features(full_names, prepared, terms)
    problem = Problem(prepared, terms, Window(radius), source, destination)
    energy = Energy(mu, from_logits, mean=reduction == "mean")
    return energy_of_pairs(input, problem, energy, reduction == "none", impl)


class GatedCRFLoss(torch.nn.Module):
    """`gated_crf_loss` as a module: settings at construction, tensors in the call; `compatibility` is a buffer."""

    compatibility: Tensor | None

    def __init__(
        self,
        kernels: Sequence[Kernel] = KERNELS,
        radius: int = 5,
        *,
        compatibility: Tensor | None = None,
        from_logits: bool = False,
        reduction: Reduction = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_settings(radius, from_logits, reduction, impl)
        parse_kernels("kernels", kernels)
        if compatibility is not None:
            check_compatibility(compatibility)
        self.kernels, self.radius = tuple(dict(kernel) for kernel in kernels), radius
        self.register_buffer("compatibility", compatibility)
        self.from_logits, self.reduction, self.impl = from_logits, reduction, impl

    def forward(
        self,
        input: Tensor,
        features: Mapping[str, Tensor],
        source: Tensor | None = None,
        destination: Tensor | None = None,
    ) -> Tensor:
        return gated_crf_loss(
            input,
            features,
            self.kernels,
            self.radius,
            source=source,
            destination=destination,
            compatibility=self.compatibility,
            from_logits=self.from_logits,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        settings = ("kernels", "radius", "from_logits", "reduction", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)


def partial_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, weight: Tensor | None = None
) -> Tensor:
    """Cross entropy averaged over the labelled pixels; 0, with a zero gradient, where there are none.

        loss = sum_i w_{y_i} (-log softmax(z_i)_{y_i}) / sum_i w_{y_i}      over pixels i with y_i != ignore_index

    Args:
        logits: z [N, C, H, W], floating; computed in float32, in float64 for float64. The only differentiable argument.
        labels: y [N, H, W], any integer dtype, each in [0, C) or `ignore_index`.
        ignore_index: the label of unlabelled pixels.
        weight: w [C], >= 0; None is 1 for every class.

    Raises:
        TypeError, ValueError: naming the argument; label values are checked on the CPU only, and not while compiling.
            On NVIDIA GPUs, an assertion on the device names labels out of range.

    Warns:
        UserWarning: for logits of one class, for 255 as both a class and `ignore_index`, and, on the CPU, for logits
            that sum to 1 over the classes, as after softmax.
    """
    logits = check_prediction("logits", logits)
    labels, classes = check_labels(labels, logits, ignore_index), logits.shape[1]
    dtype = accumulation_dtype(logits.dtype)
    weight = weight if weight is None else check_weight(weight, logits).to(dtype)
    if ignore_index == 255 < classes:
        warn_caller(
            f"ignore_index: expected a label that is no class, got 255 for {classes} classes: pixels of class 255 "
            "count as unlabelled"
        )
    advise_on_logits("logits", logits, "pass what the network returns before its softmax")

    labelled = labels != ignore_index
    assert_labels(labels, labelled, classes, ignore_index)
    logarithms = torch.log_softmax(logits, dim=1, dtype=dtype) if readable(logits) else None
    if logarithms is None or logarithms.detach()[:, 0].sum().isnan():
        # whatever is under no label stays there, in the gradient too
        logarithms = torch.log_softmax(logits.masked_fill(~labelled[:, None], 0), dim=1, dtype=dtype)
    try:
        errors = F.nll_loss(logarithms, labels, weight, ignore_index=ignore_index, reduction="none")  # [N, H, W]
    except IndexError:
        found = labels[labelled & ((labels < 0) | (labels >= classes))].unique().tolist()[:8]
        raise ValueError(f"{expected_labels(classes, ignore_index)}, got {found}") from None
    total = labelled.sum() if weight is None else ordered_sum(weight[labels.where(labelled, 0)] * labelled)
    return ordered_sum(errors) / total.where(total > 0, 1)
