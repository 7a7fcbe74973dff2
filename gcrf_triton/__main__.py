"""`python -m gcrf_triton`: what is installed, and what `impl="auto"` does with it; `... tune`: configurations."""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, tuning
from .engines import select_engine, triton_version
from .loss import KERNELS
from .tuner import DTYPES, find_configuration


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gcrf_triton", description="What is installed, and what it does.")
    commands = parser.add_subparsers(dest="command")
    tune = commands.add_parser("tune", help="find the fastest configuration of the Triton engine for a problem")
    tune.add_argument("--shape", type=int, nargs=4, default=[1, 21, 512, 512], metavar=("N", "C", "H", "W"))
    tune.add_argument("--dtype", default="float32", choices=DTYPES)
    tune.add_argument("--radius", type=int, default=5)
    tune.add_argument("--kernels", type=_json, default=KERNELS, help="as JSON; default: the loss's")
    tune.add_argument(
        "--channels", type=int, nargs="+", default=[3], help="of each modality the kernels name, in order"
    )
    tune.add_argument("--gates", action="store_true", help="with a source and a destination gate")
    options = parser.parse_args(arguments)
    if options.command is None:
        describe()
        return
    try:
        find_configuration(
            options.shape, DTYPES[options.dtype], options.radius, options.kernels, options.channels, options.gates
        )
    except (TypeError, ValueError) as error:
        tune.error(str(error))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from None


def describe() -> None:
    """Print versions, the device, the engine and where configurations come from."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    folder = tuning.cache_folder()
    shipped = sorted(path.stem for path in tuning.shipped_file("any").parent.glob("*.json"))
    rows = {
        "gcrf_triton": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": triton_version() or "not installed",
        "device": f"cpu, {torch.get_num_threads()} threads" if device is None else str(device),
        "impl='auto'": select_engine("auto", device or torch.device("cpu")),
        "configurations": f"shipped for {', '.join(shipped) or 'no device yet'}; others are chosen by counting",
        "cache": f"{folder}, {_count_tuned(folder)}",
    }
    for name, value in rows.items():
        print(f"{name:15} {value}")


def _count_tuned(folder: pathlib.Path) -> str:
    try:
        return f"{len(list(folder.glob('*/*.json')))} tuned problems"
    except OSError as error:
        return f"not readable ({error.strerror})"


if __name__ == "__main__":
    main()
