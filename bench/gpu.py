"""`python -m bench.gpu`: on a machine with a GPU, test, tune, measure and plot, within 25 minutes and into one folder.

Steps run one after another, each with a limit of seconds; one that fails or meets its limit does not stop the others.
The folder holds their output, measurements.csv, the pictures, and configs.json, which the package ships once it lies in
gcrf_triton/configs under the device's name. `--dry-run` does small versions of all steps, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.autotune import has_gpu

REPOSITORY = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m"]
Step = tuple[str, int, list[str]]  # name, most seconds, command


def steps(folder: Path, dry_run: bool) -> list[Step]:
    """What is run, in this order; 1500 seconds at most."""
    table, configs = str(folder / "measurements.csv"), str(folder / "configs.json")
    # compiling the unfold for every case would take most of the time
    names = ["triton-engine", "torch-engine", "offsets", "unfold", "official", "copy"]
    run = [*PYTHON, "bench.run", "--out", table, "--implementations"]
    tests, plot = [*PYTHON, "pytest", "-m", "gpu", "-q"], [*PYTHON, "bench.plot", table]
    tune = [*PYTHON, "bench.autotune", "--out", configs]
    if dry_run:
        small = [*names, "--quick", "--repeats", "3", "--budget", "0.3"]
        return [
            ("tests", 300, tests),
            ("tune", 360, [*tune, "--cases", "saliency", "--gates", "no"]),
            ("cases", 360, [*run, *small, "--cases", "official-clicks", "saliency"]),
            ("sweeps", 300, [*run, *small, "--sweeps", "pixels"]),
            ("plot", 60, plot),
        ]
    few = ["--cases", "official-clicks", "voc-full"]
    return [
        ("tests", 300, tests),
        ("tune", 420, [*tune, "--gates", "no"]),
        ("cases", 270, [*run, *names, "--cases"]),
        ("sweeps", 200, [*run, *names, "--sweeps"]),
        ("graphs", 80, [*run, "triton-engine", "offsets", "unfold", "copy", "--cuda-graph", *few]),
        ("halves", 70, [*run, *names, "--dtype", "float16", *few]),
        ("compiled", 70, [*run, "triton-engine", "unfold-compiled", "--cases", "official-clicks"]),
        ("tune-gates", 60, [*tune, "--gates", "both"]),
        ("plot", 30, plot),
    ]


def finish(step: Step, folder: Path) -> str:
    """Run a step, its output into a file of the folder; how it ended."""
    name, limit, command = step
    # tuned configurations are kept beside the results, and the steps after use them
    environment = os.environ | {"TRITON_INTERPRET": "0", "GCRF_TRITON_CACHE": str(folder / "cache")}
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        log.write(f"{' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(limit)
            ending = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ending = "met its limit"
        finally:
            process.send_signal(signal.SIGINT)  # a benchmark keeps what it has measured
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
    return f"{ending} after {time.monotonic() - start:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="new folder; default: gpu-results, or gpu-dry-run")
    parser.add_argument("--dry-run", action="store_true", help="small versions of all steps, with or without a GPU")
    options = parser.parse_args(arguments)
    folder = (options.out or Path("gpu-dry-run" if options.dry_run else "gpu-results")).absolute()
    try:
        if not options.dry_run and not has_gpu():
            raise ValueError("expected a GPU that Triton runs on, got none; --dry-run does without")
        folder.mkdir(parents=True)
    except FileExistsError:
        parser.exit(2, f"{parser.prog}: --out: expected a new folder, got {folder}, which exists\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --out: cannot make {folder}: {error.strerror}\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    failed = False
    try:
        for step in steps(folder, options.dry_run):
            print(f"{step[0]:10}", end="", flush=True)
            ending = finish(step, folder)
            failed |= not ending.startswith("done")
            print(ending, flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: what was done is in {folder}", file=sys.stderr)
        return 130
    print(f"everything is in {folder}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
