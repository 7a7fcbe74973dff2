"""What a measurement runs in: the device and its driver, versions and the revision; and the folder of results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def chosen_device(name: str | None) -> torch.device:
    if name is None:
        available = torch.accelerator.is_available()
        name = str(torch.accelerator.current_accelerator()) if available else "cpu"
        name = name if name.startswith(("cuda", "xpu")) else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda", "xpu"):
        raise ValueError(f"--device: expected cpu, cuda or xpu, got {name!r}")
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device


def has_gpu() -> bool:
    """Whether there is a GPU of a kind that Triton runs on."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in ("cuda", "xpu")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    return processor()


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def driver_version(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    if device.type == "cuda" and torch.version.cuda and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
        return f"{lines[0] if lines else 'unknown'}, CUDA {torch.version.cuda}"
    properties = torch.get_device_module(device).get_device_properties(device)
    return str(torch.version.hip or getattr(properties, "driver_version", "unknown"))


def huge_pages(device: torch.device) -> str:
    """Whether Linux backs large allocations with pages of 2 MiB, which spares code that allocates much on a CPU.

    "always", "never", or "madvise" for whoever asks; "requested" if PyTorch does (THP_MEM_ALLOC_ENABLE=1).
    """
    found = None
    if device.type == "cpu" and HUGE_PAGES.exists():
        found = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    if found and found[1] == "madvise" and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        return "requested"
    return found[1] if found else ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def revision() -> str:
    if shutil.which("git") is None:
        return "unknown"
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip() or "unknown"
