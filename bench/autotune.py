"""`python -m bench.autotune`: the best configuration of the Triton engine for every named case, and what it is worth.

On a GPU the tuner measures all configurations, and the best ones go into the device's file in gcrf_triton/configs,
which the package ships. Without a GPU they are ranked by the clocks of `bench.static_cost` for a target; that file goes
to bench/results, says that nothing was measured, and is not used by the package.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench.machine_code import model
from bench.machine_code.compiling import TARGETS
from bench.measuring.cases import NAMED, Case, named
from bench.measuring.progress import write_line
from bench.measuring.surroundings import RESULTS, has_gpu
from gcrf_triton import tuning
from gcrf_triton.checks import parse_kernels
from gcrf_triton.constants import LARGEST_COLUMNS
from gcrf_triton.engines import triton_version
from gcrf_triton.tuner import DTYPES, find_configuration

MEASURED = "milliseconds of loss and gradient, measured"
MODELLED = "clocks a pixel that the busiest unit needs, modelled from compiled code: nothing was measured"

Costs = dict[tuning.Config, float]


def problems(cases: Sequence[Case], dtypes: Sequence[str], gates: Sequence[bool]) -> Iterator[tuple[Case, bool]]:
    """Cases in every dtype, with and without gates; of many classes those that one pass takes."""
    for case, dtype, gated in itertools.product(cases, dtypes, gates):
        n, classes, height, width = case.shape
        shape = (n, min(classes, LARGEST_COLUMNS), height, width)
        yield dataclasses.replace(case, shape=shape, dtype=dtype), gated


def measured_costs(case: Case, gated: bool) -> tuple[tuning.Key, Costs]:
    """Milliseconds of every configuration on the GPU, of which the user's cache keeps the best; failures are named."""
    channels = [case.channels] * len(parse_kernels("kernels", case.kernels)[0])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return find_configuration(case.shape, DTYPES[case.dtype], case.radius, case.kernels, channels, gated)
    finally:
        for line in printed.getvalue().splitlines():
            if line.strip().startswith("failed"):
                write_line(line)


def modelled_costs(case: Case, gated: bool, target: str) -> tuple[tuning.Key, Costs]:
    """Modelled clocks a pixel of every configuration for a target."""
    classes = case.shape[1]
    problem = {"shape": case.shape, "kernels": case.kernels, "channels": {"rgb": case.channels}}
    key = model.problem_key(target, case.dtype, classes, case.radius, gated, **problem)
    costs = {}
    for config in tuning.space(key):
        *_, together = model.rows_of(target, case.dtype, classes, case.radius, gated, config, **problem)
        costs[config] = together["bound_clocks"]
    return key, costs


def summary(key: tuning.Key, costs: Costs) -> dict[str, float]:
    """Cost of the best, the heuristic's and the worst configuration."""
    by_counting = costs.get(tuning.heuristic(key), math.nan)  # unless it could not run
    return {"best": min(costs.values()), "heuristic": by_counting, "worst": max(costs.values())}


def read(path: Path, ranked_by: str) -> dict:
    """What a file has, if it was ranked alike, or nothing; ValueError if it is no file of configurations."""
    content = {"schema": tuning.SCHEMA, "ranked_by": ranked_by, "entries": {}, "costs": {}}
    if path.exists() and path.stat().st_size:
        try:
            old = json.loads(path.read_text())
            if (old["schema"], old["ranked_by"]) == (tuning.SCHEMA, ranked_by):
                content = old
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"--out: expected a file of configurations, got {path} ({reason})") from None
    return content


def write(path: Path, content: dict, key: tuning.Key, costs: Costs) -> None:
    """Put the best configuration of a problem into a file, beside those it has of others."""
    content |= {"torch": torch.__version__, "triton": triton_version()}
    content["entries"][str(key)] = dataclasses.asdict(min(costs, key=costs.__getitem__))
    content["costs"][str(key)] = {name: round(cost, 4) for name, cost in summary(key, costs).items()}
    path.write_text(json.dumps(content, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.autotune", description=str(__doc__).splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in NAMED], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--gates", default="both", choices=["no", "yes", "both"])
    parser.add_argument("--target", default="sm_90", choices=TARGETS, metavar="TARGET", help="without a GPU")
    parser.add_argument("--out", type=Path, help="JSON file; what it has of other problems stays")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parse(arguments)
    measured = has_gpu()
    try:
        known = [case.name for case in NAMED]
        if unknown := [name for name in options.cases if name not in known]:
            raise ValueError(f"--cases: expected names of {', '.join(known)}, got {unknown[0]!r}")
        if not measured and (options.target.startswith("gfx") or options.target == "sm_75"):
            raise ValueError(f"--target: expected one whose tiles have a modelled cost, got {options.target}")
        if importlib.util.find_spec("triton") is None:
            raise ValueError("Triton is not installed, without which there is nothing to tune")
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            raise ValueError("TRITON_INTERPRET=1 leaves nothing to tune: unset it")
        name = torch.get_device_module().get_device_name() if measured else options.target
        path = options.out or (tuning.shipped_file(name) if measured else RESULTS / f"configs-{name}.json")
        ranked_by = MEASURED if measured else MODELLED
        content = read(path, ranked_by) | {"device": name}
        if not options.out:
            path.parent.mkdir(exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:  # it could be written, and will be when there is something to write
            path.unlink()
        gates = {"no": (False,), "yes": (True,), "both": (False, True)}[options.gates]
        print(f"{name}: {ranked_by}")
        write_line(f"{'case':22}{'dtype':9}{'gates':6}{'best':>9}{'heuristic':>11}{'worst':>9}  best configuration")
        for case, gated in tqdm(list(problems(named(options.cases), options.dtypes, gates)), disable=None):
            try:
                key, costs = measured_costs(case, gated) if measured else modelled_costs(case, gated, options.target)
            except ValueError as error:  # none of them can run, for want of memory perhaps
                write_line(f"{case.name:22}{case.dtype:9}{'yes' if gated else 'no':6} left out: {error}")
                continue
            write(path, content, key, costs)
            worth = summary(key, costs)
            line = f"{worth['best']:9.3f}{worth['heuristic']:11.3f}{worth['worst']:9.3f}"
            best = min(costs, key=costs.__getitem__)
            write_line(f"{case.name:22}{case.dtype:9}{'yes' if gated else 'no':6}{line}  {best}")
    except KeyboardInterrupt:
        print(f"interrupted: what was found is kept in {path}", file=sys.stderr)
        return 130
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --out: cannot write {error.filename}: {error.strerror}\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{len(content['entries'])} problems are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
