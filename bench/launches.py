"""`python -m bench.launches`: what one step of the loss launches on a GPU, and how long it keeps the host.

Of one named case from logits, in float32 and float16, without and with gates: every kernel's launches and time on the
device, by PyTorch's profiler, and the time that the host takes to launch a step. `--steps N` instead runs N steps as
the range of a profiler from outside (`ncu --profile-from-start off`). Without a GPU it counts the operations of the
PyTorch engine.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.measuring.cases import DTYPES, NAMED, Case, named
from bench.measuring.implementations import make_inputs, make_step, own_engine
from bench.measuring.surroundings import chosen_device, synchronize

WARMING, REPEATS = 3, 10
MOST_LINES = 20


def make_own_step(case: Case, device: torch.device) -> Callable[[], object]:
    """A step of the engine that users get on a device, warmed up."""
    inputs = make_inputs(case, device)
    step = make_step(own_engine(device), case, "forward+backward")
    for _ in range(WARMING):
        step(*inputs)
    return lambda: step(*inputs)


def host_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Median time until a step is launched, which on a CPU is that of the step itself."""
    seconds = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def kernels_of(step: Callable[[], object], device: torch.device) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds a step of all kernels, those that take most time first."""
    activities = {ProfilerActivity.CPU} | torch.profiler.supported_activities()
    with profile(activities=activities) as profiled:
        for _ in range(REPEATS):
            step()
        synchronize(device)
    microseconds: dict[str, list[float]] = collections.defaultdict(list)
    for event in profiled.events():
        operation = event.name.startswith("aten::") and not event.cpu_children
        if operation if device.type == "cpu" else event.device_type != DeviceType.CPU:
            microseconds[event.name].append(event.time_range.elapsed_us())
    rows = [(name, len(times) / REPEATS, sum(times) / REPEATS) for name, times in microseconds.items()]
    return sorted(rows, key=lambda row: -row[2])


def run_for_a_profiler(step: Callable[[], object], steps: int, device: torch.device) -> None:
    """Steps in the range that CUDA tells profilers of."""
    synchronize(device)
    with torch.cuda.profiler.profile() if device.type == "cuda" else contextlib.nullcontext():
        for _ in range(steps):
            step()
        synchronize(device)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", default="voc-full", choices=[case.name for case in NAMED], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=DTYPES)
    parser.add_argument("--gates", default="both", choices=["no", "yes", "both"])
    parser.add_argument("--quick", action="store_true", help="the case with few pixels")
    parser.add_argument("--steps", type=int, help="run so many steps, for a profiler from outside")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    _, options = parse(arguments)
    device = chosen_device(None)
    (case,) = named([options.case], options.quick)
    gates = {"no": (False,), "yes": (True,), "both": (False, True)}[options.gates]
    for dtype, gated in itertools.product(options.dtypes, gates):
        step = make_own_step(dataclasses.replace(case, dtype=dtype, gates=gated, logits=True), device)
        if options.steps is not None:
            run_for_a_profiler(step, options.steps, device)
            continue
        host, kernels = host_seconds(step, device), kernels_of(step, device)
        launches, busy = (sum(row[column] for row in kernels) for column in (1, 2))
        what, where = ("operations", "in them") if device.type == "cpu" else ("launches", "on the device")
        problem = f"{case.name} {dtype}, {'gates' if gated else 'no gates'}"
        print(f"{problem}: {launches:g} {what}, {busy:.0f} us {where}, {1e6 * host:.0f} us of the host")
        for name, count, microseconds in kernels[:MOST_LINES]:
            print(f"{microseconds:12.1f} us  {count:5g} x  {name[:90]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
