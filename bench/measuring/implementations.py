"""What is compared: the loss of this package, what people run instead, and what they could write in PyTorch alone."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.measuring.cases import Case
from gcrf_triton import gated_crf_loss
from gcrf_triton.engines import select_engine
from reference import gated_crf_unfold

Loss = Callable[[Tensor, Tensor, Case, Tensor | None, Tensor | None], Tensor]  # of probabilities, image, case, gates
Step = Callable[..., tuple[Tensor, ...]]  # of prediction, image and, where the case has them, source and destination
MODES = ("forward", "forward+backward")
ENGINES = ("triton-engine", "torch-engine")
GATE = 2 / 3  # of the pixels are open
warnings.filterwarnings("ignore", "input: expected probabilities of two classes or more", UserWarning)  # timed as it is


def of_engine(impl: str, from_logits: bool = False) -> Loss:
    def engine(p: Tensor, image: Tensor, case: Case, source: Tensor | None, destination: Tensor | None) -> Tensor:
        settings = {"source": source, "destination": destination, "from_logits": from_logits, "impl": impl}
        return gated_crf_loss(p, {"rgb": image}, case.kernels, case.radius, **settings)

    return engine


def unfold(p: Tensor, image: Tensor, case: Case, source: Tensor | None, destination: Tensor | None) -> Tensor:
    energy = gated_crf_unfold(p, {"rgb": image}, case.kernels, case.radius, source, destination)
    return energy / pixels(p, destination)


def official(p: Tensor, image: Tensor, case: Case, source: Tensor | None, destination: Tensor | None) -> Tensor:
    from pymic.loss.seg.gatedcrf import GatedCRFLoss

    # without a source mask it also counts neighbours outside the image
    source = torch.ones_like(image[:, 0]) if source is None else source
    masks = {"mask_src": source, "mask_dst": destination}
    masks = {name: None if mask is None else mask[:, None].float() for name, mask in masks.items()}
    return GatedCRFLoss()(p, case.kernels, case.radius, {"rgb": image}, *image.shape[2:], **masks)["loss"]


def offsets(p: Tensor, image: Tensor, case: Case, source: Tensor | None, destination: Tensor | None) -> Tensor:
    """A loop over half the offsets of the window, which meets every pair once; its two ends are slices."""
    height, width = p.shape[2:]
    energy = p.new_zeros(())
    for dy in range(min(case.radius, height - 1) + 1):
        for dx in range(-min(case.radius, width - 1), min(case.radius, width - 1) + 1):
            if dy == 0 and dx <= 0:
                continue
            here = (..., slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
            there = (..., slice(dy, height), slice(max(dx, 0), width - max(-dx, 0)))
            distances = {"rgb": (image[here] - image[there]).square().sum(1)}  # [N, H - dy, W - |dx|]
            distances["xy"] = image.new_full((), dx**2 + dy**2)
            kernel = image.new_zeros(())
            for description in case.kernels:
                sigmas = [(name, sigma) for name, sigma in description.items() if name != "weight"]
                exponent = sum(distances[name] / sigma**2 for name, sigma in sigmas)
                kernel = kernel + description["weight"] * torch.exp(-0.5 * exponent)
            gates = 2
            if source is not None and destination is not None:
                gates = source[here] * destination[there] + source[there] * destination[here]
            agreement = (p[here] * p[there]).sum(1)
            energy = energy + (gates * kernel * (1 - agreement)).sum()
    return energy / pixels(p, destination)


def flex(p: Tensor, image: Tensor, case: Case, source: Tensor | None, destination: Tensor | None) -> Tensor:
    from bench.measuring.flex import FlexEnergy

    return FlexEnergy.apply(p, image, case, source, destination) / pixels(p, destination)


def pixels(p: Tensor, destination: Tensor | None) -> Tensor | int:
    """What the loss is divided by."""
    return p[:, 0].numel() if destination is None else destination.sum().clamp(min=1)


LOSSES: dict[str, Loss] = {
    "triton-engine": of_engine("triton"),
    "triton-engine-again": of_engine("triton"),  # what differs less than these two is noise
    "torch-engine": of_engine("torch"),
    "offsets": offsets,
    "offsets-compiled": offsets,
    "flex": flex,
    "unfold": unfold,
    "unfold-compiled": unfold,
    "official": official,
}
IMPLEMENTATIONS = (*LOSSES, "copy")
ON_A_CPU = ("torch-engine", "offsets", "unfold", "official", "copy")  # without compiling for long


def compiles(name: str) -> bool:
    """Whether `torch.compile` is part of an implementation."""
    return name == "flex" or name.endswith("-compiled")


def own_engine(device: torch.device) -> str:
    """The implementation that users of the package get on a device."""
    return f"{select_engine('auto', device)}-engine"


def why_not(name: str, device: torch.device) -> str | None:
    """One line about why an implementation cannot be timed on a device, or None if it can."""
    if name == "official" and importlib.util.find_spec("pymic") is None:
        return "PyMIC is not installed (pip install --no-deps pymic==0.6.2)"
    if name.startswith("triton-engine"):
        if device.type == "cpu":
            return "Triton has no CPU to run on, and its interpreter is not for timing"
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return "TRITON_INTERPRET=1 would time the interpreter"
        try:
            select_engine("triton", device)
        except ValueError as error:
            return str(error)
    if name == "flex" and device.type == "cpu":
        return "PyTorch does not compile FlexAttention for a CPU with the sums of scores that it needs"
    if compiles(name):
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # a missing compiler or header, whichever way it shows
            return f"torch.compile fails here: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def make_step(name: str, case: Case, mode: str) -> Step:
    """One step of an implementation: the loss, and in mode "forward+backward" the gradient."""
    if name == "copy":  # reads a prediction and writes as much: what no loss with a gradient can do without
        return lambda prediction, *others: (prediction.clone(),)
    loss, activate = LOSSES[name], torch.nn.Identity()
    if case.logits and "-engine" in name:
        loss = of_engine(name.split("-")[0], from_logits=True)
    elif case.logits:
        activate = torch.nn.Softmax(dim=1)
    if name.endswith("-compiled"):
        loss = torch.compile(loss, dynamic=False)

    def value(prediction: Tensor, image: Tensor, source: Tensor | None = None, destination: Tensor | None = None):
        return loss(activate(prediction), image, case, source, destination)

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (value(*inputs),)

    def forward_and_backward(prediction: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        prediction = prediction.detach().requires_grad_()
        found = value(prediction, *others)
        return found.detach(), *torch.autograd.grad(found, prediction)

    return forward if mode == "forward" else forward_and_backward


def make_inputs(case: Case, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Noise or its softmax [N, C, H, W], images in [0, 1] with areas, edges and noise [N, F, H, W], gates [N, H, W]."""
    generator = torch.Generator().manual_seed(0)
    n, classes, height, width = case.shape
    coarse = torch.rand(n, case.channels, 1 + height // 16, 1 + width // 16, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    image = (image + 0.05 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    prediction = torch.randn(case.shape, generator=generator)
    if not case.logits:
        prediction = prediction.softmax(1) if classes > 1 else prediction.sigmoid()
    dtype = getattr(torch, case.dtype)
    guide = torch.promote_types(dtype, torch.float32)
    gates = [
        (torch.rand(n, height, width, generator=generator) < GATE).to(device, guide) for _ in range(2 * case.gates)
    ]
    return prediction.to(device, dtype), image.to(device, guide), *gates


def bytes_needed(name: str, case: Case) -> int:
    """About how much memory a step allocates at its peak, from the tensors an implementation holds at that time."""
    n, classes, height, width = case.shape
    offsets_of_window = (2 * case.radius + 1) ** 2
    size = getattr(torch, case.dtype).itemsize
    wide = max(size, 4)
    prediction = n * classes * height * width * size
    if name in ("unfold", "official", "unfold-compiled"):
        # windows of the prediction and their product with the kernel, or three times those of the features
        values = max(classes * (size + wide), 3 * (2 + case.channels) * wide)
        whole = n * height * width * offsets_of_window * values
        return whole // 10 if name == "unfold-compiled" else whole  # which it fuses for the most part
    if name in ("offsets", "offsets-compiled"):
        return 13 * prediction + n * height * width * wide * (offsets_of_window // 2)  # kernels, kept for the gradient
    return prediction if name == "copy" else 8 * prediction * wide // size


def all_names(wanted: Sequence[str] | None, device: torch.device) -> list[str]:
    """Implementations to try: those asked for, else all that do not first compile for long on this device."""
    if wanted:
        return list(wanted)
    return list(ON_A_CPU if device.type == "cpu" else IMPLEMENTATIONS)
