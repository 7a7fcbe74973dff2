"""`python -m bench.static_cost`: what the Triton kernels cost, from compilation alone. Needs Triton, but no GPU.

The launches of one loss and its gradient are recorded on tensors without memory and compiled for a target, as Triton
would there, and the instructions of the machine code are counted: those that all warps execute, divided by the pixels
of the image. From them, a model: the clocks a pixel that every unit of a streaming multiprocessor needs if it never
waits. The unit that needs most sets the bound. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine_code.compiling import TARGETS
from bench.machine_code.model import CLOCKS, DTYPES, FIELDS, MACHINES, fits, gather_row, problem_key, rows_of
from gcrf_triton import tuning
from gcrf_triton.constants import LARGEST_COLUMNS


def cases(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of every problem that the command was asked for."""
    for target, classes, radius in itertools.product(options.targets, options.classes, options.radius):
        for dtype, gates in itertools.product(options.dtypes, (False, True) if options.gates == "both" else (False,)):
            problem = (target, dtype, classes, radius, gates)
            tiles = options.configs == "all" and target != "sm_75"  # which has none
            for config in tuning.space(problem_key(*problem)) if tiles else [None]:
                yield rows_of(*problem, config=config)
        if options.gather and target in MACHINES:
            yield [gather_row(target, classes, radius)]


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.static_cost", description=str(__doc__).splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS, metavar="TARGET")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=DTYPES)
    parser.add_argument("--classes", type=int, nargs="+", default=[21])
    parser.add_argument("--radius", type=int, nargs="+", default=[5])
    parser.add_argument("--gates", default="both", choices=["no", "both"])
    parser.add_argument("--configs", default="chosen", choices=["chosen", "all"], help="all that the tuner would try")
    parser.add_argument("--no-gather", dest="gather", action="store_false", help="leave the untiled baseline out")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parse(arguments)
    try:
        check(options)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    failed = False
    with open(options.csv or os.devnull, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        print(f"{'':36}registers  spills  shared  occupancy | clocks a pixel: {'  '.join(CLOCKS)} | bound")
        for rows in cases(options):
            for row in rows:
                print(_line(row), flush=True)
                writer.writerow({name: _show(row.get(name)) for name in FIELDS})
                failed |= row["kernel"] != "together" and not fits(row)
    if failed:
        sys.exit("some kernels spill or do not fit their target's shared memory")


def check(options: argparse.Namespace) -> None:
    """ValueError in one line for what cannot be compiled or written."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed, without which nothing can be compiled")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    if min(options.radius) < 1 or not 1 <= min(options.classes) <= max(options.classes) <= LARGEST_COLUMNS:
        raise ValueError("--classes, --radius: expected classes from 1 to 64, which one pass takes, and radii from 1")
    if options.csv:
        try:
            with options.csv.open("a+") as file:
                file.seek(0)
                header = file.readline()
        except OSError as error:
            raise ValueError(f"--csv: cannot write {options.csv}: {error.strerror}") from None
        if header and not header.startswith("target,"):
            raise ValueError(f"--csv: expected a new file, or one of this command to replace, got {options.csv}")


def _line(row: Mapping[str, Any]) -> str:
    gates = "gates" if row["gates"] == "yes" else ""
    name = f"{row['target']:8}{row['dtype']:9}C {row['classes']:<4}r {row['radius']:<3}{gates:6}{row['kernel']:12}"
    if "bound_by" not in row or row["kernel"] == "sum_offsets":
        occupied = f"{row['occupancy']:.0%}" if "occupancy" in row else "-"
        name += f"{row['registers']:4} {row['spilled_bytes']:7} {row['shared_bytes']:7} {occupied:>9} "
    if "bound_by" in row:
        clocks = "  ".join(f"{unit} {row.get(f'{unit}_clocks', 0):.1f}" for unit in CLOCKS)
        name += f"| {clocks} | {row['bound_clocks']:.1f} by {row['bound_by']}"
    return f"{name}  {row.get('config', '')}"


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
