"""What users call: the Gated CRF loss, its module form and partial cross entropy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .op import accumulation_dtype, area_average, check_impl, ordered_sum, pairwise_energy, prepare, readable

Kernel = Mapping[str, float]
Reduction = Literal["mean", "sum", "none"]
SMALLEST, LARGEST = 1e-12, 1e12  # sigmas and weights whose squares and products float32 can hold
TOLERANCE = 0.01  # of probabilities
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
            and about 6 of one normalised by mean and standard deviation, as in the paper. In Triton tiles a
            feature may span 8000 sigmas; far beyond, the loss is NaN.
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
        NotImplementedError: for forward-mode derivatives.

    Warns:
        UserWarning: for logits of one class, and, on the CPU, for an input outside [0, 1] without `from_logits`.

    Source: Obukhov, Georgoulis, Dai, Van Gool, Gated CRF Loss for Weakly Supervised Semantic Image Segmentation,
    arXiv 1906.04651.
    """
    check_prediction("input", input)
    if not torch.compiler.is_compiling() and unpack_dual(input).tangent is not None:
        raise NotImplementedError("input: expected no forward-mode tangent: derivatives are in reverse mode only")
    names, weights, sigmas = _check_settings(kernels, radius, from_logits, reduction, impl)
    _warn_of_misunderstanding(input, from_logits)
    radius = min(int(radius), 2**31 - 1)
    if not isinstance(features, Mapping):
        raise TypeError(f"features: expected a mapping from names to tensors, got {type(features).__name__}")
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(f"features: kernels use {missing[0]!r}, got only {sorted(map(str, features)) or 'none'}")

    guides = [_prepare_feature(f"features[{name!r}]", features[name], input) for name in names]
    source = _prepare_gate("source", source, input)
    destination = _prepare_gate("destination", destination, input)
    mu = _prepare_compatibility(compatibility, input)
    if reduction == "none":
        return _energies(input, guides, source, destination, mu, from_logits, weights, sigmas, radius, impl)
    mean, with_gradient = reduction == "mean", torch.is_grad_enabled() and input.requires_grad
    return pairwise_energy(
        input, guides, source, destination, mu, from_logits, weights, sigmas, radius, mean, with_gradient, impl
    )[0]


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
        _check_settings(kernels, radius, from_logits, reduction, impl)
        if compatibility is not None:
            _check_compatibility(compatibility)
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
        TypeError, ValueError: naming the argument; label values are checked on the CPU only.
    """
    check_prediction("logits", logits)
    check_tensor("labels", labels, "[N, H, W]", 3, logits.device)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer tensor, got {labels.dtype}")
    classes = logits.shape[1]
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        same_batch = labels.shape[0] == logits.shape[0]
        hint = "; interpolate the logits to the labels, not the other way round" if same_batch else ""
        raise ValueError(f"labels: expected {_shape(logits[:, 0])} as in logits, got {_shape(labels)}{hint}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if weight is not None:
        check_tensor("weight", weight, "[C]", 1, logits.device)
        _check_constant("weight", weight)
        if weight.shape[0] != classes or weight.is_complex():
            raise ValueError(f"weight: expected [{classes}] real numbers, got {weight.dtype} {_shape(weight)}")
        _check_values("weight", weight)
    labels = labels.long()
    labelled = labels != ignore_index
    if readable(labels):
        wrong = labels[labelled & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            found = wrong.unique().tolist()[:8]
            raise ValueError(f"labels: expected 0 to {classes - 1} or ignore_index={ignore_index}, got {found}")

    dtype = accumulation_dtype(logits.dtype)
    labels = labels.where(labelled, 0)
    seen = logits.masked_fill(~labelled[:, None], 0)  # whatever is under no label stays there
    errors = -torch.log_softmax(seen, dim=1, dtype=dtype).gather(1, labels[:, None])[:, 0]  # [N, H, W]
    mass = labelled.to(dtype) if weight is None else weight.to(dtype)[labels] * labelled
    total = ordered_sum(mass)
    return ordered_sum(errors * mass) / total.where(total > 0, 1.0)


def _energies(
    input: Tensor,
    features: list[Tensor],
    source: Tensor | None,
    destination: Tensor | None,
    mu: Tensor | None,
    from_logits: bool,
    weights: list[float],
    sigmas: list[float],
    radius: int,
    impl: str,
) -> Tensor:
    # e_i = d_i (sum_j k_ij s_j - p_i . sum_j k_ij s_j p_j) [N, H, W]: the ungated operator on the columns [s p | s]
    _, input, features, source, destination = prepare(input, features, source, destination, from_logits)
    dtype, classes = accumulation_dtype(input.dtype), input.shape[1]
    probabilities = torch.softmax(input, dim=1, dtype=dtype) if from_logits else input.to(dtype)
    mass = torch.ones_like(probabilities[:, :1]) if source is None else source[:, None]
    columns = torch.cat([probabilities * mass, mass], dim=1)
    pairs = (features, None, None, None, False, weights, sigmas, radius)
    _, gradient, _ = pairwise_energy(columns, *pairs, False, True, impl)
    sums = -0.5 * gradient
    if mu is None and from_logits:
        # softmax sums to 1, so 1 - p_i . p_j = p_i^T (1 - I) p_j: a sum of positive terms, exact where pixels agree
        mu = 1 - torch.eye(classes, dtype=dtype, device=input.device)
    if mu is None:
        energies = sums[:, -1] - (probabilities * sums[:, :-1]).sum(1)
    else:
        towards = torch.stack([(row[:, None, None] * sums[:, :-1]).sum(1) for row in mu], dim=1)
        energies = (probabilities * towards).sum(1)
    return energies if destination is None else destination * energies


def _check_settings(
    kernels: Sequence[Kernel], radius: int, from_logits: bool, reduction: str, impl: str
) -> tuple[list[str], list[float], list[float]]:
    if not isinstance(from_logits, bool):
        raise TypeError(f"from_logits: expected a bool, got {type(from_logits).__name__}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    check_impl(impl)
    if isinstance(radius, bool) or not isinstance(radius, Integral):
        raise TypeError(f"radius: expected an int, got {type(radius).__name__}")
    if radius < 1:
        raise ValueError(f"radius: expected at least 1, got {radius}")
    return parse_kernels(kernels)


def parse_kernels(kernels: Sequence[Kernel]) -> tuple[list[str], list[float], list[float]]:
    """Names of the features, weights, and one row [xy, *names] of sigmas a kernel, flattened, 0 where it has none."""
    if not isinstance(kernels, Sequence) or isinstance(kernels, str):
        raise TypeError(f"kernels: expected a sequence of mappings, got {type(kernels).__name__}")
    if not kernels:
        raise ValueError("kernels: expected at least one kernel, got none")
    for m, kernel in enumerate(kernels):
        if not isinstance(kernel, Mapping):
            raise TypeError(f"kernels[{m}]: expected a mapping, got {type(kernel).__name__}")
        if "weight" not in kernel or len(kernel) < 2:
            raise ValueError(f"kernels[{m}]: expected a 'weight' and at least one modality, got {dict(kernel)}")
        for name, value in kernel.items():
            if not isinstance(name, str):
                raise TypeError(f"kernels[{m}]: expected names of modalities, got {name!r}")
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"kernels[{m}][{name!r}]: expected a number, got {type(value).__name__}")
            if not SMALLEST <= value <= LARGEST:
                raise ValueError(f"kernels[{m}][{name!r}]: expected a number from {SMALLEST} to {LARGEST}, got {value}")
    names = list(dict.fromkeys(name for kernel in kernels for name in kernel if name not in ("weight", "xy")))
    weights = [float(kernel["weight"]) for kernel in kernels]
    return names, weights, [float(kernel.get(name, 0)) for kernel in kernels for name in ("xy", *names)]


def _prepare_feature(name: str, feature: Tensor, input: Tensor) -> Tensor:
    check_tensor(name, feature, "[N, F, h, w]", 4, input.device)
    _check_constant(name, feature)
    if not feature.is_floating_point() and feature.dtype != torch.uint8:
        raise TypeError(f"{name}: expected floating point or uint8, got {feature.dtype}")
    height, width = input.shape[2:]
    if not feature.shape[1]:
        raise ValueError(f"{name}: expected at least one channel, got {_shape(feature)}")
    if feature.shape[0] != input.shape[0] or feature.shape[2] < height or feature.shape[3] < width:
        raise ValueError(
            f"{name}: expected [{input.shape[0]}, F, h, w] with h >= {height} and w >= {width} for an input of "
            f"{_shape(input)}, got {_shape(feature)}"
        )
    if feature.shape[2:] == input.shape[2:]:
        return feature
    scaled = feature.to(accumulation_dtype(input.dtype))
    return area_average(scaled / 255 if feature.dtype == torch.uint8 else scaled, height, width)


def _prepare_gate(name: str, gate: Tensor | None, input: Tensor) -> Tensor | None:
    if gate is None:
        return None
    if not isinstance(gate, Tensor) or gate.dim() != 3:
        check_tensor(name, gate, "[N, H, W] or [N, 1, H, W]", 4, input.device)
    check_tensor(name, gate, "[N, H, W] or [N, 1, H, W]", gate.dim(), input.device)
    _check_constant(name, gate)
    if gate.is_complex():
        raise TypeError(f"{name}: expected bool, integer or floating point, got {gate.dtype}")
    n, _, height, width = input.shape
    if gate.shape not in ((n, height, width), (n, 1, height, width)):
        raise ValueError(f"{name}: expected [{n}, {height}, {width}], with or without a channel, got {_shape(gate)}")
    gate = gate.reshape(n, height, width)
    _check_values(name, gate)
    return gate


def _prepare_compatibility(mu: Tensor | None, input: Tensor) -> Tensor | None:
    if mu is None:
        return None
    _check_compatibility(mu, input.device)
    classes = input.shape[1]
    if mu.shape != (classes, classes):
        raise ValueError(f"compatibility: expected [{classes}, {classes}] for {classes} classes, got {_shape(mu)}")
    return (classes - 1) * F.normalize(mu.to(accumulation_dtype(input.dtype)), p=1, dim=1)


def _check_compatibility(mu: Tensor, device: torch.device | None = None) -> None:
    check_tensor("compatibility", mu, "[C, C]", 2, device)
    _check_constant("compatibility", mu)
    if mu.shape[0] != mu.shape[1]:
        raise ValueError(f"compatibility: expected [C, C], got {_shape(mu)}")
    if mu.is_complex():
        raise TypeError(f"compatibility: expected real values, got {mu.dtype}")
    _check_values("compatibility", mu)
    if readable(mu) and mu.diagonal().any():
        raise ValueError(f"compatibility: expected a zero diagonal, got {mu.diagonal().tolist()}")


def check_prediction(name: str, prediction: Tensor) -> None:
    """Raise unless `prediction` is [N, C, H, W] of a dtype the loss is computed in."""
    check_tensor(name, prediction, "[N, C, H, W]", 4)
    if prediction.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {prediction.dtype}")
    if 0 in prediction.shape[1:]:
        raise ValueError(f"{name}: expected at least one class and one pixel, got {_shape(prediction)}")


def _warn_of_misunderstanding(input: Tensor, from_logits: bool) -> None:
    if from_logits and input.shape[1] == 1 and not torch.compiler.is_compiling():
        warnings.warn(
            "input: expected logits of classes, got one, of which softmax makes 1: the loss is 0", stacklevel=3
        )
    elif not from_logits and readable(input) and input.numel():
        lowest, highest = input.detach().aminmax()
        if lowest < -TOLERANCE or highest > 1 + TOLERANCE:
            found = f"{lowest.item():g} to {highest.item():g}"
            warnings.warn(f"input: expected probabilities, got {found}; for logits pass from_logits=True", stacklevel=3)


def _check_values(name: str, tensor: Tensor) -> None:
    # finite and not negative
    if readable(tensor) and (wrong := ~((tensor >= 0) & tensor.isfinite())).any():
        raise ValueError(f"{name}: expected finite values >= 0, got {tensor[wrong][0].item()}")


def check_tensor(name: str, tensor: Tensor, form: str, dim: int, device: torch.device | None = None) -> None:
    """Raise unless `tensor` is one of `dim` dimensions on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {form}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}")
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected {form}, got {_shape(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected on {device} as the prediction, got on {tensor.device}")


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a constant, got one that requires grad and would get none: pass .detach()")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
