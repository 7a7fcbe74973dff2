"""`python -m gcrf_triton`: what is installed, and what `impl="auto"` does with it; `... tune`: configurations."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import __version__, tuning
from .checks import parse_kernels
from .loss import KERNELS, gated_crf_loss
from .op import select_engine

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def triton_version() -> str:
    """Of the module, as packages of several names bring it; "" where there is none."""
    if importlib.util.find_spec("triton") is None:
        return ""
    return importlib.import_module("triton").__version__


def _count_tuned(folder: pathlib.Path) -> str:
    try:
        return f"{len(list(folder.glob('*/*.json')))} tuned problems"
    except OSError as error:
        return f"not readable ({error.strerror})"


def find_configuration(
    shape: Sequence[int],
    dtype: torch.dtype,
    radius: int,
    kernels: Sequence[Mapping[str, float]],
    channels: Sequence[int] | None,
    gated: bool,
) -> tuple[tuning.Key, dict[tuning.Config, float]]:
    """Print what the configurations of a problem cost, which is returned too, and keep the best of measured ones."""
    n, classes, height, width = shape
    names, _, sigmas = parse_kernels("kernels", kernels)
    channels = [3] * len(names) if channels is None else channels
    if len(channels) != len(names) or min(channels, default=1) < 1:
        raise ValueError(f"channels: expected {len(names)} numbers from 1, for {names}, got {list(channels)}")
    if min(shape) < 1:
        raise ValueError(f"shape: expected four numbers from 1, got {list(shape)}")
    if radius < 1:
        raise ValueError(f"radius: expected at least 1, got {radius}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("tune: expected Triton, whose configurations these are, got none (pip install triton)")
    radius = min(radius, max(height, width) - 1)
    measured = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if measured else torch.device("meta")
    if measured and select_engine("auto", torch.device(str(device))) != "triton":
        raise ValueError(f"device: expected one the Triton engine runs on, got {device}")
    from . import triton_engine

    logits = torch.empty(n, classes, height, width, dtype=dtype, device=device)
    features = {
        name: torch.empty(n, count, height, width, device=device) for name, count in zip(names, channels, strict=True)
    }
    gate = torch.ones(n, height, width, device=device) if gated else None
    if not triton_engine.fits(logits, classes, list(features.values()), sigmas):
        raise ValueError("shape, kernels: expected what a tile can do, got too many classes or channels to tune for")
    key = triton_engine.problem_key(logits, list(features.values()), sigmas, radius, gated, "logits")

    def milliseconds(config: tuning.Config) -> float:
        return _measure(config, logits, features, kernels, radius, gate)

    cost = milliseconds if measured else lambda config: tuning.count(config, key)
    costs = {}
    print(key)
    print("milliseconds of loss and gradient" if measured else "rough instructions a pixel: counted, not measured")
    for config in tuning.space(key):
        try:
            costs[config] = cost(config)
        except RuntimeError as error:
            print(f"{'failed':>12}  {config}: {error}")
            continue
        print(f"{costs[config]:12.3f}  {config}")
    if not costs:
        raise ValueError("shape, kernels: expected a problem that some configuration can run, got one that none can")
    best = min(costs, key=costs.__getitem__)
    print(f"best: {best}")
    if measured:
        path = tuning.remember(key, best, milliseconds=costs[best], torch=torch.__version__, triton=triton_version())
        print(f"kept in {path}")
    else:
        print("no GPU here: nothing was measured and nothing is kept")
    return key, costs


def _measure(
    config: tuning.Config,
    logits: Tensor,
    features: Mapping[str, Tensor],
    kernels: Sequence[Mapping[str, float]],
    radius: int,
    gate: Tensor | None,
) -> float:
    from triton.testing import do_bench, do_bench_cudagraph

    logits = logits.detach().normal_().requires_grad_()  # a leaf of its own: in place, the next one's would be refused
    for feature in features.values():
        feature.uniform_()

    def step() -> None:
        # computes the gradient too, which backward only multiplies
        gated_crf_loss(
            logits, features, kernels, radius, source=gate, destination=gate, from_logits=True, impl="triton"
        )

    # without what Python takes to launch, which is the same for all and more than many a problem takes itself
    bench = do_bench_cudagraph if logits.device.type == "cuda" else do_bench
    with tuning.use_config(config), torch.enable_grad():
        return float(bench(step, return_mode="median"))


if __name__ == "__main__":
    main()
