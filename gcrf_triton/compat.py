"""The official module's name, call and numbers, for code that holds a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .advice import advise_on_features, advise_on_probabilities
from .checks import (
    check_image,
    check_prediction,
    check_radius,
    check_reverse_mode,
    check_tensor,
    parse_kernels,
    prepare_compatibility,
    prepare_feature,
    prepare_gate,
    shape,
)
from .op import energy_of_pairs
from .problem import Energy, Problem, Window
from .tensors import accumulation_dtype, ordered_sum

Downsampler = Callable[[Tensor, tuple[int, int]], Tensor]


class ModelLossSemsegGatedCRF(torch.nn.Module):
    """Drop-in replacement of the official `ModelLossSemsegGatedCRF`: same call, same value, same gradient.

    As there, masks are averaged down to the prediction and count where the average is at least 1, and without a source
    mask the pixels outside the image count as neighbours with features 0 and a prediction of 0, which adds

        1/D sum_i d_i n_i sum_m w_m exp(-1/2 sum_f |f_i|^2 / sigma_mf^2)      n_i: positions of i's window outside

    to the loss, a constant. Unlike there, arguments are never written to, a compatibility matrix works, sizes need not
    be multiples, images may be uint8, masks any dtype, and a NaN under a closed mask stays there. Kernel weights are
    not negative, and the batch size of all tensors is the same.
    """

    def forward(
        self,
        y_hat_softmax: Tensor,
        kernels_desc: Sequence[Mapping[str, float]],
        kernels_radius: int,
        sample: Mapping[str, Any] | Tensor,
        height_input: int,
        width_input: int,
        mask_src: Tensor | None = None,
        mask_dst: Tensor | None = None,
        compatibility: Tensor | None = None,
        custom_modality_downsamplers: Mapping[str, Downsampler] | None = None,
        out_kernels_vis: bool = False,
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar} and, if asked, "kernels_vis" [N, 1, height_input, width_input].

        Args:
            y_hat_softmax: class probabilities [N, C, H, W].
            kernels_desc, kernels_radius, compatibility: `kernels`, `radius`, `compatibility` of `gated_crf_loss`; here
                numbers may be scalars of any kind, 0-dimensional tensors among them, and weights and the radius 0.
            sample: its `features`, of any size and with any other entries; or the image itself, for every modality.
            height_input, width_input: size of the visualisation; the loss does not depend on it.
            mask_src, mask_dst: source and destination masks [N, 1, h, w].
            custom_modality_downsamplers: name -> function(tensor, (H, W)), "mask" too; the default averages areas.
            out_kernels_vis: also draw the kernels of every (2 radius + 1)th pixel side by side.
        """
        prediction = check_prediction("y_hat_softmax", y_hat_softmax)
        downsamplers = custom_modality_downsamplers or {}
        kernels = _with_numbers(kernels_desc)
        names, terms = parse_kernels("kernels_desc", kernels, zero_weights=True)
        kernels = [kernel for kernel in kernels if kernel["weight"]]
        radius = check_radius("kernels_radius", _number(kernels_radius), smallest=0)
        if not isinstance(sample, (Tensor, Mapping)):
            raise TypeError(f"sample: expected a mapping from names to tensors, got {type(sample).__name__}")
        images = dict.fromkeys(names, sample) if isinstance(sample, Tensor) else sample
        missing = [name for name in names if name not in images]
        if missing:
            raise ValueError(f"sample: kernels_desc uses {missing[0]!r}, got only {sorted(map(str, images)) or 'none'}")

        features, gates = {}, []
        for name in names:
            check_tensor(f"sample[{name!r}]", images[name], "[N, F, h, w]", 4)
            image = _resample(f"sample[{name!r}]", name, images[name], prediction, downsamplers)
            features[name] = prepare_feature(f"sample[{name!r}]", image, prediction)
        for argument, mask in (("mask_src", mask_src), ("mask_dst", mask_dst)):
            if mask is not None:
                mask = check_tensor(argument, mask, "[N, 1, h, w]", 4, prediction.device)
                if mask.shape[2:] != prediction.shape[2:]:
                    mask = _resample(argument, "mask", mask, prediction, downsamplers)
                mask = mask.to(accumulation_dtype(prediction.dtype))
                mask = mask.where(mask >= 1, 0.0)  # also where it is NaN
            gates.append(mask)
        source, destination = (
            prepare_gate(argument, gate, prediction)
            for argument, gate in zip(("mask_src", "mask_dst"), gates, strict=True)
        )
        if isinstance(compatibility, Tensor):
            compatibility = compatibility.to(prediction.device)
        mu = prepare_compatibility(compatibility, prediction)
        check_reverse_mode("y_hat_softmax", prediction, *features.values(), source, destination, mu)
        advise_on_probabilities("y_hat_softmax", prediction, "for logits pass their softmax")
        advise_on_features([f"sample[{name!r}]" for name in names], list(features.values()), terms)

        if kernels and radius:
            problem = Problem(list(features.values()), terms, Window(radius), source, destination)
            loss = energy_of_pairs(prediction, problem, Energy(mu, mean=True), per_pixel=False, impl="auto")
        else:
            loss = prediction[:0].sum(dtype=accumulation_dtype(prediction.dtype))  # 0, with a gradient of 0
        constant = source is None and compatibility is None and len(kernels) > 0
        if not constant and not out_kernels_vis:
            return {"loss": loss}
        for gate in gates:
            if gate is not None:  # what is not finite under it left the loss, and is drawn as 0
                features = {name: image.where(image.isfinite() | (gate > 0), 0.0) for name, image in features.items()}
        weights = [term.weight for term in terms]
        described = [_scaled_features(kernel, features, prediction) for kernel in kernels]
        if constant:
            loss = loss + _border_constant(described, weights, radius, gates[1])
        if not out_kernels_vis:
            return {"loss": loss}
        drawing = _draw_kernels(prediction, described, weights, radius, *gates)
        return {"loss": loss, "kernels_vis": F.interpolate(drawing, (height_input, width_input), mode="nearest")}


def _number(value: Any) -> Any:
    # of a scalar of PyTorch or NumPy; anything else as it is, for checks to name
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _with_numbers(kernels: Any) -> Any:
    if not isinstance(kernels, Sequence):
        return kernels
    return [
        {name: _number(value) for name, value in kernel.items()} if isinstance(kernel, Mapping) else kernel
        for kernel in kernels
    ]


def _resample(
    argument: str, name: str, tensor: Tensor, like: Tensor, downsamplers: Mapping[str, Downsampler]
) -> Tensor:
    # the caller's own function sees the tensor as it is
    size, dtype = (like.shape[2], like.shape[3]), accumulation_dtype(like.dtype)
    if name in downsamplers:
        tensor = downsamplers[name](tensor, size)
        if not isinstance(tensor, Tensor) or tensor.shape[2:] != size:
            found = shape(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"custom_modality_downsamplers[{name!r}]: expected [N, F, {size[0]}, {size[1]}], got {found}"
            )
    if name == "mask":
        tensor = check_tensor(argument, tensor, "[N, 1, h, w]", 4, like.device).to(dtype)
    else:
        tensor = check_image(argument, tensor, like.device)
        tensor = tensor.to(dtype) / (255 if tensor.dtype == torch.uint8 else 1)
    return tensor if tensor.shape[2:] == size else F.adaptive_avg_pool2d(tensor, size)


def _scaled_features(kernel: Mapping[str, float], features: Mapping[str, Tensor], like: Tensor) -> Tensor:
    # every modality of a kernel divided by its sigma, xy as absolute coordinates [N, F, H, W]
    n, _, height, width = like.shape
    dtype = accumulation_dtype(like.dtype)
    y, x = (torch.arange(length, dtype=dtype, device=like.device) for length in (height, width))
    coordinates = torch.stack(torch.broadcast_tensors(x, y[:, None])).expand(n, 2, height, width)
    modalities = [(name, sigma) for name, sigma in kernel.items() if name != "weight"]
    return torch.cat([(coordinates if name == "xy" else features[name]) / sigma for name, sigma in modalities], dim=1)


def _border_constant(
    described: Sequence[Tensor], weights: Sequence[float], radius: int, destination: Tensor | None
) -> Tensor:
    # 1/D sum_i d_i n_i sum_m w_m exp(-|f_i|^2 / 2)
    height, width = described[0].shape[2:]
    y, x = (_positions_inside(length, radius, described[0].device) for length in (height, width))
    outside = (2 * radius + 1) ** 2 - y[:, None] * x  # n_i [H, W]
    gate = torch.ones_like(described[0][:, :1]) if destination is None else destination
    gate = gate * outside
    similarity = torch.zeros_like(gate)
    for weight, feature in zip(weights, described, strict=True):
        similarity = similarity + weight * (-0.5 * feature.square().sum(1, keepdim=True)).exp()
    total = ordered_sum((gate * similarity).where(gate > 0, 0.0)[:, 0])
    return total / (max(gate.numel(), 1) if destination is None else ordered_sum(destination[:, 0]).clamp(min=1))


def _positions_inside(length: int, radius: int, device: torch.device) -> Tensor:
    # how many of i - radius ... i + radius lie in 0 ... length - 1, for every i
    i = torch.arange(length, dtype=torch.int64, device=device)
    return 1 + i.clamp(max=radius) + i.flip(0).clamp(max=radius)


def _draw_kernels(
    prediction: Tensor,
    described: Sequence[Tensor],
    weights: Sequence[float],
    radius: int,
    source: Tensor | None,
    destination: Tensor | None,
) -> Tensor:
    # every (2 radius + 1)th pixel's window, where its pixels are [N, 1, H, W]
    n, _, height, width = prediction.shape
    drawing = prediction.new_zeros(n, 1, height, width, dtype=accumulation_dtype(prediction.dtype))
    if min(height, width) <= radius or not n:
        return drawing
    diameter = 2 * radius + 1
    windows_y, windows_x = ((length + radius) // diameter for length in (height, width))

    def windows(image: Tensor) -> Tensor:
        flat = F.unfold(F.pad(image, (0, radius, 0, radius)), diameter, stride=diameter)
        return flat.view(n, image.shape[1], diameter, diameter, windows_y, windows_x)

    total = torch.zeros_like(windows(drawing))
    for weight, feature in zip(weights, described, strict=True):
        window = windows(feature)
        difference = window - window[:, :, radius, radius, None, None]
        total = total + weight * (-0.5 * difference.square().sum(1, keepdim=True)).exp()
    total[:, :, radius, radius] = 0
    if source is not None:
        total = total * windows(source)
    if destination is not None:
        total = total * destination[:, :, None, None, radius::diameter, radius::diameter]
    total = total.permute(0, 1, 4, 2, 5, 3).reshape(n, 1, windows_y * diameter, windows_x * diameter)
    total = total[:, :, :height, :width]
    return F.pad(total, (0, width - total.shape[3], 0, height - total.shape[2]))
