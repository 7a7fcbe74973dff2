"""`python -m bench.host`: what a step of the loss takes of the host: to launch it, and to compile its kernels at first.

A loss and its gradient from logits (1 x 21 x 8 x 8, radius 1, one thread), with launches that do nothing; beside it the
official class's whole step at that size, where PyMIC is installed. And the kernels of 1 x 21 x 513 x 513, radius 5,
compiled for sm_90 without a cache. Needs Triton, but no GPU. `--against FOLDER` measures another checkout in turns.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent.parent
STEPS, WARMING = 400, 100
COMPILING = 3  # rounds
DTYPES = ("float32", "float16")
FIELDS = (
    "what",
    "problem",
    "checkout",
    "unit",
    "median",
    "low",
    "high",
    "ratio",
    "rounds",
    "torch",
    "triton",
    "python",
)


def measure(compiling: bool) -> dict[str, float]:
    """Microseconds of steps, and seconds of compiling if asked for, of the checkout that is imported, by problem."""
    import torch

    from gcrf_triton import gated_crf_loss, kernels, triton_engine

    torch.set_num_threads(1)
    found = {f"compile: {name}": seconds for name, seconds in (compile_kernels() if compiling else {}).items()}

    class Nothing:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *positional, **keywords: None

    for name in ("prepare", "pack", "sum_tile"):
        setattr(kernels, name, Nothing())
    triton_engine.device_and_arch = lambda device: ("none", "sm_90")
    triton_engine.unavailable = lambda device: None
    for module in list(sys.modules.values()):  # a GPU's values are not read
        if module.__name__.startswith("gcrf_triton.") and hasattr(module, "readable"):
            module.readable = lambda tensor: False
    logits = torch.randn(1, 21, 8, 8, requires_grad=True)
    image, gate = torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8) > 0.5
    kernel = {"weight": 1.0, "xy": 6.0, "rgb": 0.1}

    def ours(**gates: torch.Tensor) -> torch.Tensor:
        return gated_crf_loss(logits, {"rgb": image}, (kernel,), 1, from_logits=True, impl="triton", **gates)

    steps: dict[str, Callable[[], torch.Tensor]] = {"step: no gates": ours, "step: gates": lambda: ours(source=gate)}
    if importlib.util.find_spec("pymic"):
        from pymic.loss.seg.gatedcrf import GatedCRFLoss

        loss, masks = GatedCRFLoss(), torch.ones(1, 1, 8, 8)
        steps["step: official, computed"] = lambda: loss(
            logits.softmax(1), [kernel], 1, {"rgb": image}, 8, 8, mask_src=masks
        )["loss"]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number, (name, step) in itertools.product(range(WARMING + STEPS), steps.items()):
        start = time.perf_counter()
        torch.autograd.grad(step(), logits)
        if number >= WARMING:
            times[name].append(1e6 * (time.perf_counter() - start))
    return found | {name: statistics.median(each) for name, each in times.items()}


def compile_kernels() -> dict[str, float]:
    """Seconds to compile all kernels of a step for sm_90, by problem."""
    import torch

    try:
        from bench.machine_code.compiling import compile_launch
        from bench.machine_code.recording import record_launches
    except ModuleNotFoundError:  # an older checkout, where one module has both
        from bench.machine_code import compile_launch, record_launches

    def compile_all(launches: Sequence[object]) -> None:
        for launch in {launch.kernel.fn.__name__: launch for launch in launches}.values():
            compile_launch(launch, "sm_90")

    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        compile_all(record_launches((1, 2, 8, 8), torch.float64, radius=1))  # what is loaded at first
        for dtype, gated in itertools.product(DTYPES, (False, True)):
            launches = record_launches((1, 21, 513, 513), getattr(torch, dtype), gated=gated)
            os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
            start = time.perf_counter()
            compile_all(launches)
            seconds[f"{dtype}, {'gates' if gated else 'no gates'}"] = time.perf_counter() - start
    return seconds


def in_turns(checkouts: Sequence[Path], rounds: int) -> dict[Path, list[dict[str, float]]]:
    """What a process of its own measures, for every checkout and round."""
    from bench.measuring.progress import bar  # here: a worker imports another checkout

    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    turns = list(itertools.product(range(rounds), checkouts))
    for number, checkout in bar(turns, "host", len(turns), "turn"):
        run = subprocess.run(
            [sys.executable, __file__, "--worker", *["--compile"] * (number < COMPILING)],
            cwd=checkout,
            env=environment | {"PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise ValueError(f"--against: {checkout} cannot be measured: {run.stderr.strip().splitlines()[-1]}")
        found[checkout].append(json.loads(run.stdout.splitlines()[-1]))
    return found


def rows_of(found: dict[Path, list[dict[str, float]]]) -> list[dict[str, object]]:
    """One row a checkout and problem; the ratio is that to the first checkout, the median over rounds."""
    import torch
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    first, *_ = found
    rows = []
    for name in found[first][0]:
        what, _, problem = name.partition(": ")
        for checkout, rounds in found.items():
            pairs = [(mine[name], base[name]) for mine, base in zip(rounds, found[first], strict=True) if name in mine]
            times = sorted(mine for mine, _ in pairs)
            row = {"what": what, "problem": problem, "checkout": commit_of(checkout), "rounds": len(times)} | versions
            row |= {"unit": "us" if what == "step" else "s", "median": statistics.median(times)}
            rows.append(
                row | {"low": times[0], "high": times[-1]} | {"ratio": statistics.median(a / b for a, b in pairs)}
            )
    return rows


def table_of(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows of a CSV as Markdown, a line a problem: the first checkout beside the second, where it measured it."""
    lines = ["| | before | now | before / now |", "|---|---|---|---|"]
    for problem in dict.fromkeys((row["what"], row["problem"]) for row in rows):
        now, *before = [row for row in rows if (row["what"], row["problem"]) == problem]

        def show(row: Mapping[str, str]) -> str:
            return f"{float(row['median']):.3g} {row['unit']} ({float(row['low']):.3g} to {float(row['high']):.3g})"

        old, ratio = (show(before[0]), f"{float(before[0]['ratio']):.2f}") if before else ("", "")
        lines.append(f"| {': '.join(problem)} | {old} | {show(now)} | {ratio} |")
    return "\n".join(lines)


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() or checkout.name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=str(__doc__).splitlines()[0])
    parser.add_argument("--against", type=Path, action="append", default=[], help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=7, help="processes of a checkout, in turns; three compile")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--markdown", type=Path, metavar="CSV", help="print a table of such a file, and measure nothing"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # measures what it imports
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(options.compile)))
        return 0
    if options.markdown:
        with options.markdown.open(newline="") as file:
            print(table_of(list(csv.DictReader(file))))
        return 0
    try:
        if options.rounds < 1:
            raise ValueError(f"--rounds: expected at least 1, got {options.rounds}")
        if importlib.util.find_spec("triton") is None:
            raise ValueError("Triton is not installed, without which there is nothing to launch")
        for folder in options.against:
            if not (folder / "gcrf_triton").is_dir():
                raise ValueError(f"--against: expected a checkout with gcrf_triton/, got {folder}")
        rows = rows_of(in_turns([HERE, *(folder.resolve() for folder in options.against)], options.rounds))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for row in rows:
        figures = f"{row['median']:8.3g} {row['unit']:2} ({row['low']:.3g} to {row['high']:.3g})"
        ratio = f"{row['ratio']:.2f} of the first"
        print(f"{row['what']:8} {row['problem']:24} {row['checkout']:24} {figures}, {ratio}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {name: f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in FIELDS}
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
