"""Which engine runs: Triton's or PyTorch's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from .messages import warn_caller

IMPLS = ("auto", "triton", "torch")


def check_impl(impl: str) -> None:
    """ValueError unless `impl` is the name of an engine or "auto"."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def select_engine(impl: str, device: torch.device) -> str:
    """Name the engine, "triton" or "torch", that `impl` stands for on a device; ValueError if a named one cannot run.

    "auto" is what the environment variable GCRF_TRITON_IMPL names, else Triton on GPUs it can run on, else PyTorch.
    """
    check_impl(impl)
    if impl == "auto":
        impl = os.environ.get("GCRF_TRITON_IMPL") or "auto"
        if impl not in IMPLS:
            raise ValueError(f"GCRF_TRITON_IMPL: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "torch" or (impl == "auto" and device.type not in ("cuda", "xpu")):
        return "torch"
    reason = _triton_unavailable(device)
    if reason is None:
        return "triton"
    if impl == "auto":
        warn_caller(f"{reason}; the PyTorch engine, which is slower, takes its place")
        return "torch"
    raise ValueError(f"impl: 'triton' cannot run on {device}: {reason}; impl='torch' runs everywhere")


def _triton_unavailable(device: torch.device) -> str | None:
    if not _was_installed():
        return "Triton is not installed (pip install triton; it exists for Linux)"
    return triton_engine().unavailable(device)


def triton_is_installed() -> bool:
    """Whether there is a package of that name, which is not imported."""
    return importlib.util.find_spec("triton") is not None


_was_installed = functools.cache(triton_is_installed)  # a search of folders, at every call of a loss


def triton_version() -> str:
    """Of the module, as packages of several names bring it; "" where there is none."""
    return importlib.import_module("triton").__version__ if triton_is_installed() else ""


@functools.cache
def triton_engine() -> Any:
    """The module, imported when it is first needed, as Triton is optional."""
    return importlib.import_module(".triton_engine", __package__)
