"""What is compared: the loss of this package, what people run instead, and what they could write in PyTorch alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.cases import Case
from gcrf_triton import gated_crf_loss
from gcrf_triton.op import select_engine
from reference import gated_crf_unfold

Loss = Callable[[Tensor, Tensor, Case], Tensor]
Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
MODES = ("forward", "forward+backward")
ENGINES = ("triton-engine", "torch-engine")


def torch_engine(probabilities: Tensor, image: Tensor, case: Case) -> Tensor:
    return gated_crf_loss(probabilities, {"rgb": image}, case.kernels, case.radius, impl="torch")


def triton_engine(probabilities: Tensor, image: Tensor, case: Case) -> Tensor:
    return gated_crf_loss(probabilities, {"rgb": image}, case.kernels, case.radius, impl="triton")


def unfold(probabilities: Tensor, image: Tensor, case: Case) -> Tensor:
    n, _, height, width = probabilities.shape
    return gated_crf_unfold(probabilities, {"rgb": image}, case.kernels, case.radius) / (n * height * width)


def official(probabilities: Tensor, image: Tensor, case: Case) -> Tensor:
    from pymic.loss.seg.gatedcrf import GatedCRFLoss

    mask = torch.ones_like(image[:, :1], dtype=torch.float32)  # without one it also counts neighbours outside the image
    arguments = (probabilities, case.kernels, case.radius, {"rgb": image}, *image.shape[2:])
    return GatedCRFLoss()(*arguments, mask_src=mask)["loss"]


def offsets(probabilities: Tensor, image: Tensor, case: Case) -> Tensor:
    """A loop over half the offsets of the window, which meets every pair once; its two ends are slices."""
    n, _, height, width = probabilities.shape
    energy = probabilities.new_zeros(())
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
            agreement = (probabilities[here] * probabilities[there]).sum(1)
            energy = energy + 2 * (kernel * (1 - agreement)).sum()
    return energy / (n * height * width)


LOSSES: dict[str, Loss] = {
    "triton-engine": triton_engine,
    "torch-engine": torch_engine,
    "offsets": offsets,
    "unfold": unfold,
    "unfold-compiled": unfold,
    "official": official,
}
IMPLEMENTATIONS = (*LOSSES, "copy")


def own_engine(device: torch.device) -> str:
    """The implementation that users of the package get on a device."""
    return f"{select_engine('auto', device)}-engine"


def why_not(name: str, device: torch.device) -> str | None:
    """One line about why an implementation cannot be timed on a device, or None if it can."""
    if name == "official" and importlib.util.find_spec("pymic") is None:
        return "PyMIC is not installed (pip install --no-deps pymic==0.6.2)"
    if name == "triton-engine":
        if device.type == "cpu":
            return "Triton has no CPU to run on, and its interpreter is not for timing"
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return "TRITON_INTERPRET=1 would time the interpreter"
        try:
            select_engine("triton", device)
        except ValueError as error:
            return str(error)
    if name == "unfold-compiled":
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
        return lambda probabilities, image: (probabilities.clone(),)
    loss = LOSSES[name]
    if name == "unfold-compiled":
        torch.compiler.reset()  # or after some shapes it would give up compiling
        loss = torch.compile(loss, dynamic=False)

    def forward(probabilities: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(probabilities, image, case),)

    def forward_and_backward(probabilities: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        probabilities = probabilities.detach().requires_grad_()
        value = loss(probabilities, image, case)
        return value.detach(), *torch.autograd.grad(value, probabilities)

    return forward if mode == "forward" else forward_and_backward


def make_inputs(case: Case, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Softmax of noise [N, C, H, W], and images in [0, 1] with smooth areas, edges and a little noise [N, F, H, W]."""
    generator = torch.Generator().manual_seed(0)
    n, classes, height, width = case.shape
    coarse = torch.rand(n, case.channels, 1 + height // 16, 1 + width // 16, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    image = (image + 0.05 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    noise = torch.randn(case.shape, generator=generator)
    probabilities = noise.softmax(1) if classes > 1 else noise.sigmoid()
    dtype = getattr(torch, case.dtype)
    return probabilities.to(device, dtype), image.to(device, torch.promote_types(dtype, torch.float32))


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
    if name == "offsets":
        return 13 * prediction + n * height * width * wide * (offsets_of_window // 2)  # kernels, kept for the gradient
    return prediction if name == "copy" else 8 * prediction * wide // size


def all_names(wanted: Sequence[str] | None, device: torch.device) -> list[str]:
    """Implementations to try: those asked for, else all that do not first compile for long on this device."""
    if wanted:
        return list(wanted)
    return [
        name for name in IMPLEMENTATIONS if device.type != "cpu" or name not in ("triton-engine", "unfold-compiled")
    ]
