"""What the package asks of tensors, whatever they mean: the dtype of sums, readable values, orders of summation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of a dtype are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def holds_values(tensor: Tensor) -> bool:
    """Whether values lie in the tensor itself: not while compiling, nor in fake tensors and wrappers of torch.func."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    wrapped = is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) and not wrapped


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and holds_values(tensor)


def can_assert(tensor: Tensor) -> bool:
    """Whether a GPU can be left to stop at wrong values, with a message; builds for AMD may leave that out."""
    return tensor.is_cuda and holds_values(tensor)


def ordered_sum(values: Tensor) -> Tensor:
    """Sum [N, H, W] dimension by dimension: the same bits on any number of threads."""
    return values.sum(2).sum(1).sum()


@torch.library.custom_op("gcrf_triton::area_average", mutates_args=())
def area_average(image: Tensor, height: int, width: int) -> Tensor:
    """Average [N, F, h, w] down to [N, F, height, width]; opaque, as compilers fail on it where sizes are dynamic."""
    return torch.nn.functional.adaptive_avg_pool2d(image, (height, width))


@area_average.register_fake
def _(image, height, width):
    return image.new_empty(*image.shape[:2], height, width)
