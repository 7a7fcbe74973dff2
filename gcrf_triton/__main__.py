"""`python -m gcrf_triton`: what is installed, and what `impl="auto"` does with it."""

import importlib.metadata
import platform

import torch

from . import __version__
from .op import select_engine


def main() -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    rows = {
        "gcrf_triton": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": triton,
        "device": f"cpu, {torch.get_num_threads()} threads" if device is None else str(device),
        "impl='auto'": select_engine("auto"),
        "configurations": "none: this engine needs no tuning",
        "cache": "none",
    }
    for name, value in rows.items():
        print(f"{name:15} {value}")


if __name__ == "__main__":
    main()
