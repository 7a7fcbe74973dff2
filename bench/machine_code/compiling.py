"""Compiling recorded launches for a target, as Triton would at a real launch there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.machine_code.recording import Launch

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


def specialised(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and attributes of a launch's arguments: what Triton tells compiled kernels apart by."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif parameter.do_not_specialize:
            signature[parameter.name] = _width(value)
        else:
            signature[parameter.name] = _type(value, (place,), constants, attributes)
    return signature, constants, attributes


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a recorded launch for a target, specialised as at a real launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in launch.constants.items() if name.startswith("num_")}
    number = target.removeprefix("sm_")
    gpu = (
        GPUTarget("cuda", int(number), 32)
        if number != target
        else GPUTarget("hip", target, 64 - 32 * ("gfx1" in target))
    )
    return triton.compile(ASTSource(launch.kernel, *specialised(launch)), target=gpu, options=options)


def _type(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    # what Triton specialises an argument on: its type, divisibility by 16, and the integer 1
    names = {
        torch.uint8: "u8",
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
    }
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + names[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(item, (*path, place), constants, attributes) for place, item in enumerate(value))
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return _width(value)


def _width(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"
