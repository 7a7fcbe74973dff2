"""`python -m bench.run`: time, memory and errors of the loss beside the code it replaces.

Measures named cases and sweeps (bench/measuring/cases.py) on a GPU if there is one, else on the CPU; appends rows to
one CSV a device in bench/results/. `--contended` does so while another process keeps an OpenMP job on every core,
`--warm` in memory that the process used and freed before. With `--compare` the new rows are compared with those of an
older file, and the exit status is 1 if an engine became slower or needs more memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import gcrf_triton
from bench.measuring import table
from bench.measuring.cases import DTYPES, NAMED, SWEEPS, Case, named, sweep
from bench.measuring.implementations import IMPLEMENTATIONS, MODES, all_names, one_line, own_engine, why_not
from bench.measuring.measure import Result, Settings, can_measure_memory, measure, percentiles
from bench.measuring.progress import write_line
from bench.measuring.surroundings import (
    RESULTS,
    chosen_device,
    device_name,
    driver_version,
    huge_pages,
    revision,
    version,
)
from gcrf_triton.engines import triton_version

OPENMP_JOB = "import torch; x = torch.ones(1 << 22)\nwhile True: x.mul_(1.0)"


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=str(__doc__).split("\n")[0])
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="named cases; alone or without names: no sweeps")
    parser.add_argument("--sweeps", nargs="*", metavar="NAME", help=f"of {', '.join(SWEEPS)}; alone: no named cases")
    parser.add_argument("--quick", action="store_true", help="small cases, minutes on two cores")
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="default: both for named cases, forward+backward for sweeps"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of every prediction")
    parser.add_argument("--gates", action="store_true", help="with a source and a destination gate")
    parser.add_argument("--logits", action="store_true", help="from logits, whose softmax is part of every step")
    parser.add_argument("--repeats", type=int, help="turns; default: 7 on a CPU, 50 on a GPU")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds of turns for an implementation of a case, of which there are at least 3 "
        "if one step takes less; default: 10, 1 with --quick",
    )
    parser.add_argument("--device", help="as PyTorch names it; default: the accelerator if there is one, else cpu")
    parser.add_argument("--cuda-graph", action="store_true", help="time steps as CUDA graphs, without launch overheads")
    parser.add_argument("--contended", action="store_true", help="beside another process's OpenMP job on every core")
    parser.add_argument("--warm", action="store_true", help="in memory that the process used and freed before")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, help="CSV file to append to; default: named after the device")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="exit with 1 if an engine became worse")
    parser.add_argument("--threshold", type=float, default=1.2, help="factor from which worse counts (1.2)")
    return parser, parser.parse_args(arguments)


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """Cases and sweeps asked for, or all of both; ValueError for an unknown name."""
    everything = arguments.cases is None and arguments.sweeps is None
    known = [case.name for case in NAMED]
    names = known if everything or arguments.cases == [] else arguments.cases or []
    quantities = list(SWEEPS) if everything or arguments.sweeps == [] else arguments.sweeps or []
    for option, given, possible in (("--cases", names, known), ("--sweeps", quantities, SWEEPS)):
        for name in given:
            if name not in possible:
                raise ValueError(f"{option}: expected names of {', '.join(possible)}, got {name!r}")
    cases = named(names, arguments.quick) + [
        case for quantity in quantities for case in sweep(quantity, arguments.quick)
    ]
    if arguments.logits:
        for case in [case for case in cases if case.shape[1] == 1]:
            print(f"{case.name} is left out: the softmax of one class is 1")
            cases.remove(case)
    same = {"gates": arguments.gates, "logits": arguments.logits}
    return [dataclasses.replace(case, dtype=arguments.dtype or case.dtype, **same) for case in cases]


@contextlib.contextmanager
def openmp_job(wanted: bool) -> Iterator[None]:
    """Keep an OpenMP team of another process on every core for the time of the context."""
    if not wanted:
        yield
        return
    job = subprocess.Popen([sys.executable, "-c", OPENMP_JOB])
    try:
        time.sleep(5)
        yield
    finally:
        job.kill()
        job.wait()


def surroundings(device: torch.device, arguments: argparse.Namespace) -> dict[str, str]:
    """What every row says about machine and versions."""
    return {
        "device": device_name(device),
        "driver": driver_version(device),
        "threads": str(torch.get_num_threads()),
        "contended": "yes" if arguments.contended else "no",
        "warm": "yes" if arguments.warm else "no",
        "cuda_graph": "yes" if arguments.cuda_graph else "no",
        "huge_pages": huge_pages(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "gcrf_triton": gcrf_triton.__version__,
        "pymic": version("pymic"),
        "revision": revision(),
    }


def row_of(case: Case, mode: str, name: str, result: Result, own: Result | None) -> dict[str, str]:
    """One row of the table, all but the surroundings; ratios are to the engine of its own in the same turns."""
    row = {field: str(value) for field, value in case.describe().items()}
    row |= dict.fromkeys(table.FIELDS[len(row) :], "")
    row |= {"mode": mode, "implementation": name, "status": result.status, "config": result.config}
    seconds = result.seconds if result.status in table.MEASURED else []
    own_seconds = own.seconds if own and own.status in table.MEASURED else []
    if own_seconds and len(seconds) == 1:  # taken before the turns
        own_seconds = [statistics.median(own_seconds)]
    ratios = [other / best for other, best in zip(seconds, own_seconds, strict=False)]
    for column, values in (("seconds", seconds), ("ratio", ratios)):
        if values:
            for point, value in zip(("median", "p20", "p80"), percentiles(values), strict=True):
                row[f"{column}_{point}"] = f"{value:.4g}"
    row["turns"] = str(len(seconds))
    row["peak_bytes"] = "" if result.peak_bytes is None else str(result.peak_bytes)
    for column, error in zip(("loss_error", "gradient_error"), result.errors, strict=False):
        row[column] = f"{error:.1e}"
    return row


def show(progress: tqdm, case: Case, mode: str, name: str) -> None:
    progress.set_postfix_str(f"{case.name} {mode} {name}")
    progress.update()


def print_row(row: Mapping[str, str]) -> None:
    seconds = f"{1e3 * float(row['seconds_median']):10.2f} ms" if row["seconds_median"] else f"{'-':>13}"
    ratios = [f"{float(row[f'ratio_{point}'] or 'nan'):.3g}" for point in ("median", "p20", "p80")]
    ratio = f"x{ratios[0]} ({ratios[1]}-{ratios[2]})" if row["ratio_median"] else "-"
    memory = f"{int(row['peak_bytes']) / 1e6:.1f} MB" if row["peak_bytes"] else "-"
    error = "".join(f" {row[name]}" for name in ("loss_error", "gradient_error"))
    problem = f"{row['case']:20} {row['shape']:>15} {row['mode']:16} {row['implementation']:19}"
    write_line(f"{problem} {seconds}  {ratio:24} {memory:>12} {error}  {row['status']}")


def print_comparison(new: Sequence[table.Row], old: Sequence[table.Row], threshold: float) -> int:
    """Print what `table.compare` finds; 1 if anything became worse than the threshold, 2 if nothing is alike."""
    changes = table.compare(new, old)
    if not changes:
        print(
            "--compare: expected rows of the same cases, device and threads, got none of the new rows", file=sys.stderr
        )
        return 2
    for row, quantity, factor in changes:
        verdict = "worse" if factor > threshold else "better" if factor < 1 / threshold else "same"
        print(
            f"{row['case']:20} {row['shape']:>15} {row['mode']:16} {row['implementation']:14} "
            f"{quantity:28} x{factor:.2f} {verdict}"
        )
    return int(any(factor > threshold for _, _, factor in changes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parse(arguments)
    try:
        cases = chosen_cases(options)
        if options.list:
            for case in cases:
                print("  ".join(f"{name}={value}" for name, value in case.describe().items() if value))
            return 0
        if options.repeats is not None and options.repeats < 1:
            raise ValueError(f"--repeats: expected at least 1, got {options.repeats}")
        if options.budget is not None and not options.budget > 0:
            raise ValueError(f"--budget: expected a number above 0, got {options.budget:g}")
        device = chosen_device(options.device)
        if options.cuda_graph and device.type != "cuda":
            raise ValueError(f"--cuda-graph: expected a CUDA device, got {device}")
        if options.warm and (device.type != "cpu" or platform.libc_ver()[0] != "glibc"):
            raise ValueError(f"--warm: expected the CPU of a system with glibc, got {device} of {platform.platform()}")
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
        path = options.out or RESULTS / f"{slug}.csv"
        table.check_writable(path)
        old = table.read(options.compare) if options.compare else []
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")

    memory = not (options.no_memory or options.contended or options.warm)
    if memory and not can_measure_memory(device):
        print("peak memory is not measured: it is read from /proc, which this system does not have")
        memory = False
    settings = Settings(
        options.repeats or (7 if device.type == "cpu" else 50),
        options.budget or (1.0 if options.quick else 10.0),
        memory,
        options.cuda_graph,
        options.warm,
    )
    reasons = {name: why_not(name, device) for name in all_names(options.implementations, device)}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}")
    names = [name for name, reason in reasons.items() if reason is None]
    own = own_engine(device)
    jobs = [
        (case, mode, [name for name in names if name != "copy" or mode != "forward"])
        for case in cases
        for mode in options.modes or (MODES[1:] if case.sweep else MODES)
    ]

    rows: list[dict[str, str]] = []
    try:
        common = surroundings(device, options)  # before rows make the repository dirty
        total = sum(len(names) for _, _, names in jobs)
        with tqdm(total=total, disable=None) as progress, openmp_job(options.contended):
            for case, mode, names in jobs:
                results = measure(case, mode, names, device, settings, functools.partial(show, progress, case, mode))
                utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                new = [
                    row_of(case, mode, name, result, results.get(own)) | common | {"utc": utc}
                    for name, result in results.items()
                ]
                table.append(new, path)
                rows += new
                for row in new:
                    print_row(row)
    except KeyboardInterrupt:
        print(f"interrupted: {len(rows)} rows are kept in {path}", file=sys.stderr)
        return 130
    except (torch.AcceleratorError, torch.OutOfMemoryError) as error:  # not even inputs can be put on the device
        print(f"stopped: {one_line(error)}: {len(rows)} rows are kept in {path}", file=sys.stderr)
        return 1
    print(f"{len(rows)} rows appended to {path}")
    return print_comparison(rows, old, options.threshold) if options.compare else 0


if __name__ == "__main__":
    sys.exit(main())
