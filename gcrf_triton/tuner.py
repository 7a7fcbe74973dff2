"""Finding the fastest configuration of the Triton engine for a problem: by measuring on a GPU, else by counting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import tuning
from .checks import parse_kernels
from .engines import select_engine, triton_engine, triton_is_installed, triton_version
from .loss import gated_crf_loss
from .planning import describe
from .problem import Energy, Problem, Window

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    names, terms = parse_kernels("kernels", kernels)
    channels = [3] * len(names) if channels is None else channels
    if len(channels) != len(names) or min(channels, default=1) < 1:
        raise ValueError(f"channels: expected {len(names)} numbers from 1, for {names}, got {list(channels)}")
    if min(shape) < 1:
        raise ValueError(f"shape: expected four numbers from 1, got {list(shape)}")
    if radius < 1:
        raise ValueError(f"radius: expected at least 1, got {radius}")
    if not triton_is_installed():
        raise ValueError("tune: expected Triton, whose configurations these are, got none (pip install triton)")
    measured = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if measured else torch.device("meta")
    if measured and select_engine("auto", torch.device(str(device))) != "triton":
        raise ValueError(f"device: expected one the Triton engine runs on, got {device}")
    logits = torch.empty(n, classes, height, width, dtype=dtype, device=device)
    features = {
        name: torch.empty(n, count, height, width, device=device) for name, count in zip(names, channels, strict=True)
    }
    gate = torch.ones(n, height, width, device=device) if gated else None
    problem = Problem(list(features.values()), terms, Window(radius), gate, gate)
    description = describe(logits, problem, Energy(from_logits=True))
    if not triton_engine().can_tile(description, logits.device):
        raise ValueError("shape, kernels: expected what a tile can do, got too many classes or channels to tune for")
    key = triton_engine().problem_key(description, logits.device)

    def milliseconds(config: tuning.Config) -> float:
        return _measure(config, logits, features, kernels, radius, gate)

    cost = milliseconds if measured else lambda config: tuning.estimated_instructions(config, key)
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
