"""What arguments have to be: each check names the argument as its caller does, says what came, and may convert it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from .engines import check_impl
from .problem import Term
from .tensors import accumulation_dtype, area_average, can_assert, readable

Kernel = Mapping[str, float]
SMALLEST, LARGEST = 1e-12, 1e12  # sigmas and weights whose squares and products float32 can hold
UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_tensor(name: str, tensor: Tensor, form: str, dim: int, device: torch.device | None = None) -> Tensor:
    """Return the tensor as a plain one; raise unless it is dense, of `dim` dimensions, and on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {form}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}")
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected {form}, got {shape(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected on {device} as the prediction, got on {tensor.device}")
    # fake tensors and the like have a __torch_dispatch__ of their own and hold no values
    if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor)
    return tensor


def check_prediction(name: str, prediction: Tensor) -> Tensor:
    """Return the prediction; raise unless it is [N, C, H, W] of a dtype the loss is computed in."""
    prediction = check_tensor(name, prediction, "[N, C, H, W]", 4)
    if prediction.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {prediction.dtype}")
    if 0 in prediction.shape[1:]:
        raise ValueError(f"{name}: expected at least one class and one pixel, got {shape(prediction)}")
    return prediction


def check_reverse_mode(name: str, input: Tensor, *constants: Tensor | None) -> None:
    """Raise for derivatives and batches that the operator has no rule for."""
    if torch.compiler.is_compiling():
        return
    if unpack_dual(input).tangent is not None:
        raise NotImplementedError(f"{name}: expected no forward-mode tangent: derivatives are in reverse mode only")
    if any(tensor is not None and is_functorch_wrapped_tensor(tensor) for tensor in (input, *constants)):
        raise NotImplementedError(
            f"{name}: expected no transform of torch.func (grad, vmap, ...), got a tensor inside one; "
            "torch.autograd differentiates the loss, and batches go in as they are"
        )


def check_settings(radius: int, from_logits: bool, reduction: str, impl: str) -> int:
    """Return the radius; raise for settings of the loss that do not exist."""
    if not isinstance(from_logits, bool):
        raise TypeError(f"from_logits: expected a bool, got {type(from_logits).__name__}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    check_impl(impl)
    return check_radius("radius", radius)


def check_radius(name: str, radius: int, smallest: int = 1) -> int:
    """Return the radius as an int that kernels can hold."""
    if isinstance(radius, bool) or not isinstance(radius, Integral):
        raise TypeError(f"{name}: expected an int, got {type(radius).__name__}")
    if radius < smallest:
        raise ValueError(f"{name}: expected at least {smallest}, got {radius}")
    return min(int(radius), 2**31 - 1)


def parse_kernels(
    argument: str, kernels: Sequence[Kernel], zero_weights: bool = False
) -> tuple[list[str], tuple[Term, ...]]:
    """The names of the features that kernels use, and the kernels as terms.

    Kernels of weight 0 are an error, or dropped.
    """
    if not isinstance(kernels, Sequence) or isinstance(kernels, str):
        raise TypeError(f"{argument}: expected a sequence of mappings, got {type(kernels).__name__}")
    if not kernels:
        raise ValueError(f"{argument}: expected at least one kernel, got none")
    for m, kernel in enumerate(kernels):
        if not isinstance(kernel, Mapping):
            raise TypeError(f"{argument}[{m}]: expected a mapping, got {type(kernel).__name__}")
        if "weight" not in kernel or len(kernel) < 2:
            raise ValueError(f"{argument}[{m}]: expected a 'weight' and at least one modality, got {dict(kernel)}")
        for name, value in kernel.items():
            if not isinstance(name, str):
                raise TypeError(f"{argument}[{m}]: expected names of modalities, got {name!r}")
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{argument}[{m}][{name!r}]: expected a number, got {type(value).__name__}")
            zero = zero_weights and name == "weight"
            if not SMALLEST <= value <= LARGEST and not (zero and value == 0):
                raise ValueError(
                    f"{argument}[{m}][{name!r}]: expected a number from {SMALLEST} to {LARGEST}{' or 0' * zero}, "
                    f"got {value}"
                )
    kernels = [kernel for kernel in kernels if kernel["weight"]]
    names = list(dict.fromkeys(name for kernel in kernels for name in kernel if name not in ("weight", "xy")))

    def sigma(kernel: Kernel, name: str) -> float:
        return float(kernel.get(name, math.inf))

    terms = [
        Term(float(kernel["weight"]), sigma(kernel, "xy"), tuple(sigma(kernel, name) for name in names))
        for kernel in kernels
    ]
    return names, tuple(terms)


def check_image(name: str, image: Tensor, device: torch.device) -> Tensor:
    """Return what a feature is made of; raise unless it is constant and floating, or uint8."""
    image = check_tensor(name, image, "[N, F, h, w]", 4, device)
    _check_constant(name, image)
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise TypeError(f"{name}: expected floating point or uint8, got {image.dtype}")
    return image


def prepare_feature(name: str, feature: Tensor, input: Tensor) -> Tensor:
    """Return the feature [N, F, H, W] at the resolution of the input."""
    feature = check_image(name, feature, input.device)
    height, width = input.shape[2:]
    if not feature.shape[1]:
        raise ValueError(f"{name}: expected at least one channel, got {shape(feature)}")
    if feature.shape[0] != input.shape[0] or feature.shape[2] < height or feature.shape[3] < width:
        raise ValueError(
            f"{name}: expected [{input.shape[0]}, F, h, w] with h >= {height} and w >= {width} for an input of "
            f"{shape(input)}, got {shape(feature)}"
        )
    if feature.shape[2:] == input.shape[2:]:
        return feature
    scaled = feature.to(accumulation_dtype(input.dtype))
    return area_average(scaled / 255 if feature.dtype == torch.uint8 else scaled, height, width)


def prepare_gate(name: str, gate: Tensor | None, input: Tensor) -> Tensor | None:
    """Return the gate as [N, H, W]."""
    if gate is None:
        return None
    dim = gate.dim() if isinstance(gate, Tensor) and gate.dim() == 3 else 4
    gate = check_tensor(name, gate, "[N, H, W] or [N, 1, H, W]", dim, input.device)
    _check_constant(name, gate)
    if gate.is_complex():
        raise TypeError(f"{name}: expected bool, integer or floating point, got {gate.dtype}")
    n, _, height, width = input.shape
    if gate.shape not in ((n, height, width), (n, 1, height, width)):
        raise ValueError(f"{name}: expected [{n}, {height}, {width}], with or without a channel, got {shape(gate)}")
    gate = gate.reshape(n, height, width)
    check_values(name, gate)
    return gate


def prepare_compatibility(mu: Tensor | None, input: Tensor) -> Tensor | None:
    """Return C - 1 times the matrix with its rows divided by their sums."""
    if mu is None:
        return None
    mu = check_compatibility(mu, input.device)
    classes = input.shape[1]
    if mu.shape != (classes, classes):
        raise ValueError(f"compatibility: expected [{classes}, {classes}] for {classes} classes, got {shape(mu)}")
    return (classes - 1) * F.normalize(mu.to(accumulation_dtype(input.dtype)), p=1, dim=1)


def check_compatibility(mu: Tensor, device: torch.device | None = None) -> Tensor:
    """Return the matrix; raise unless it is square, constant and >= 0 with a zero diagonal."""
    mu = check_tensor("compatibility", mu, "[C, C]", 2, device)
    _check_constant("compatibility", mu)
    if mu.shape[0] != mu.shape[1]:
        raise ValueError(f"compatibility: expected [C, C], got {shape(mu)}")
    if mu.is_complex():
        raise TypeError(f"compatibility: expected real values, got {mu.dtype}")
    check_values("compatibility", mu)
    if readable(mu):
        if mu.diagonal().any():
            raise ValueError(f"compatibility: expected a zero diagonal, got {mu.diagonal().tolist()}")
    elif can_assert(mu):
        torch._assert_async(~mu.diagonal().any(), "compatibility: expected a zero diagonal")
    return mu


def check_weight(weight: Tensor, logits: Tensor) -> Tensor:
    """Return the classes' weights; raise unless they are C constants >= 0."""
    weight = check_tensor("weight", weight, "[C]", 1, logits.device)
    _check_constant("weight", weight)
    if weight.shape[0] != logits.shape[1] or weight.is_complex():
        raise ValueError(f"weight: expected [{logits.shape[1]}] real numbers, got {weight.dtype} {shape(weight)}")
    check_values("weight", weight)
    return weight


def check_values(name: str, tensor: Tensor) -> None:
    """Raise unless all values are finite and >= 0; a GPU is only asked whether they are >= 0."""
    if tensor.dtype in UNSIGNED or not tensor.numel():
        return
    if readable(tensor):
        lowest, highest = (bound.item() for bound in tensor.aminmax())
        if not 0 <= lowest <= highest < math.inf:
            wrong = ~((tensor >= 0) & tensor.isfinite())
            raise ValueError(f"{name}: expected finite values >= 0, got {tensor[wrong][0].item()}")
    elif can_assert(tensor):
        torch._assert_async(tensor.amin() >= 0, f"{name}: expected values >= 0")


def check_labels(labels: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Return the labels as int64; raise unless they are integers of the size of the logits."""
    labels = check_tensor("labels", labels, "[N, H, W]", 3, logits.device)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer tensor, got {labels.dtype}")
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        same_batch = labels.shape[0] == logits.shape[0]
        hint = "; interpolate the logits to the labels, not the other way round" if same_batch else ""
        raise ValueError(f"labels: expected {shape(logits[:, 0])} as in logits, got {shape(labels)}{hint}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    return labels.long()


def assert_labels(labels: Tensor, labelled: Tensor, classes: int, ignore_index: int) -> None:
    """Leave a GPU to stop at labels out of range; PyTorch's own loss finds them on a CPU."""
    if can_assert(labels) and labels.numel():
        lowest, highest = labels.where(labelled, 0).aminmax()
        torch._assert_async((lowest >= 0) & (highest < classes), expected_labels(classes, ignore_index))


def expected_labels(classes: int, ignore_index: int) -> str:
    """The message about labels out of range, without what came."""
    return f"labels: expected 0 to {classes - 1} or ignore_index={ignore_index}"


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a constant, got one that requires grad and would get none: pass .detach()")


def shape(tensor: Tensor) -> list[int]:
    """A tensor's shape as messages show it."""
    return list(tensor.shape)
