"""`python -m bench.gpu`: on a machine with a GPU, test, compare, profile, tune, measure and plot, into one folder.

Steps run one after another, each with a limit of seconds; one that fails or meets its limit does not stop the others.
All of them take three quarters of an hour at most. With `--minutes M` a call runs as many as fit, and the next goes on
where it ended. Every call ends with the main figures, and leaves the folder as one archive beside it; where that is
unpacked, on a machine with such a device, the next call goes on too. The folder holds the output of every step,
measurements.csv, static_cost.csv, pictures, and configs.json, which the package ships once it lies in
gcrf_triton/configs under the device's name. `--dry-run` does small versions of all steps, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.machine_code.model import MACHINES
from bench.measuring.selection import QUANTITIES
from bench.measuring.summary import Device, summary
from bench.measuring.surroundings import has_gpu

REPOSITORY = Path(__file__).parent.parent
LARGEST_ARCHIVE = 2**24  # bytes
BASELINES = "triton-engine triton-engine-again torch-engine offsets flex unfold official copy"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command and the most seconds it gets."""

    name: str
    limit: int
    command: list[str]


def steps(folder: Path, dry_run: bool, target: str = "sm_90") -> list[Step]:
    """What is run, in this order: what has to be true, then why, then what is faster, then everything."""
    cases, batch = ("wsl4mis", "wsl4mis") if dry_run else ("voc-full official-clicks wsl4mis", "voc-full-batch")
    case, classes = cases.split()[0], "4" if dry_run else "4 21"
    named = "saliency" if dry_run else ""  # "" stands for all
    few = "--quick --repeats 3 --budget 0.3" if dry_run else "--repeats 20 --budget 2"
    run = f"python -m bench.run --out TABLE {few} --modes forward+backward --implementations"
    truth = f"{run} {BASELINES} --logits --cases"
    compiled = f"{run} triton-engine torch-engine NAME --logits --cases {case}"
    launches = f"python -m bench.launches --case {case} {'--quick' * dry_run}"
    counters = "ncu --clock-control none --profile-from-start off --set full --page raw --csv"
    counters += f" --kernel-name regex:^(prepare|pack|sum_tile)$ {launches} --gates no --steps 1 --dtypes"
    tune = f"python -m bench.autotune --out CONFIGS --cases {case if dry_run else 'voc-full wsl4mis'}"
    sweep = f"{run} {BASELINES.replace('flex ', '')} --sweeps"  # which would compile for every size
    workers = f"-n {min(8, os.cpu_count() or 1)}" if importlib.util.find_spec("xdist") else ""
    plan = {
        "about": (30, "python -m gcrf_triton"),
        "tests": (240, f"python -m pytest -m gpu -q {workers}"),
        "truth": (150, f"{truth} {cases}"),
        "truth-gates": (120, f"{truth} {cases} --gates"),
        "truth-half": (60, f"{truth} {case} --dtype float16"),
        "truth-half-gates": (60, f"{truth} {case} --dtype float16 --gates"),
        "copy": (30, f"{run} copy --cases {batch}"),
        "model": (120, f"python -m bench.static_cost --targets {target} --classes {classes} --no-gather --csv MODEL"),
        "compiled-offsets": (180, compiled.replace("NAME", "offsets-compiled")),
        "compiled-unfold": (90, compiled.replace("NAME", "unfold-compiled")),
        "counters": (60, f"{counters} float32"),
        "counters-half": (60, f"{counters} float16"),
        "launches": (60, launches),
        "tune": (180, f"{tune} --gates no"),
        "tune-gates": (180, f"{tune} --gates yes"),
        "tune-half": (180, f"{tune} --gates no --dtypes float16"),
        "tune-half-gates": (180, f"{tune} --gates yes --dtypes float16"),
        "cases": (240, f"{run} {BASELINES} --cases {named}"),
        **{f"sweep-{quantity}": (90, f"{sweep} {quantity}") for quantity in QUANTITIES},
        "plot": (30, "python -m bench.plot TABLE"),
    }
    words = {"TABLE": "measurements.csv", "MODEL": "static_cost.csv", "CONFIGS": "configs.json"}
    words = {word: str(folder / file) for word, file in words.items()} | {"python": sys.executable}
    slower = 2 if dry_run else 1
    return [
        Step(name, slower * limit, [words.get(word, word) for word in command.split()])
        for name, (limit, command) in plan.items()
    ]


def finish(step: Step, folder: Path) -> str:
    """Run a step, its output into a file of the folder; how it ended."""
    if shutil.which(step.command[0]) is None:
        return f"left out: there is no {step.command[0]} here"
    # tuned configurations are kept beside the results, and the steps after use them
    environment = os.environ | {"TRITON_INTERPRET": "0", "GCRF_TRITON_CACHE": str(folder / "cache")}
    start = time.monotonic()
    with (folder / f"{step.name}.log").open("w") as log:
        log.write(f"{' '.join(step.command)}\n")
        log.flush()
        process = subprocess.Popen(
            step.command,
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, of which nobody is left to disturb the next step
        )
        try:
            status = process.wait(step.limit)
            ending = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ending = "met its limit"
        finally:
            process.send_signal(signal.SIGINT)  # a benchmark keeps what it has measured
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{ending} after {time.monotonic() - start:.0f} s"


@dataclasses.dataclass
class Progress:
    """How far a folder is: for which device, and how the steps ended."""

    device: Device
    dry_run: bool
    endings: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, device: Device, dry_run: bool) -> Progress:
        """That of a folder, which is made if need be; ValueError for one of something else."""
        file = folder / "progress.json"
        if not file.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"--out: expected a new folder or one of this command, got {folder}")
            folder.mkdir(parents=True, exist_ok=True)
            new = cls(device, dry_run)
            new.write(folder)
            return new
        try:
            content = json.loads(file.read_text())
            found = cls(Device(**content["device"]), content["dry_run"], content["endings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"--out: expected progress of this command in {file}, got {error!r}") from None
        if (found.device, found.dry_run) != (device, dry_run):
            kinds = [f"{'a dry run' if kind else 'results'} of {name}" for name, kind in (
                (device.name, dry_run), (found.device.name, found.dry_run)
            )]  # fmt: skip
            raise ValueError(f"--out: expected {kinds[0]}, got {folder}, which holds {kinds[1]}")
        return found

    def write(self, folder: Path) -> None:
        temporary = folder / "progress.json.new"
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        temporary.replace(folder / "progress.json")  # the old or the new one, whenever the call ends


def this_device() -> tuple[Device, str]:
    """The GPU and the target that Triton compiles for; without one, that of the model."""
    if not has_gpu():
        machine = MACHINES["sm_90"]
        return Device(f"no GPU, modelled as {machine.device}", machine.multiprocessors, machine.gigahertz), "sm_90"
    properties = torch.get_device_module().get_device_properties(0)
    target = f"sm_{properties.major}{properties.minor}" if hasattr(properties, "major") else ""
    target = target if target in MACHINES else "sm_90"
    gigahertz = getattr(properties, "clock_rate", 0) / 1e6 or MACHINES[target].gigahertz
    units = getattr(properties, "multi_processor_count", MACHINES[target].multiprocessors)
    return Device(properties.name, units, gigahertz), target


def archive(folder: Path) -> tuple[Path, list[str]]:
    """Pack a folder beside itself, the smallest files first; the archive, and what did not fit into it."""
    path, left_out, size = folder.with_name(f"{folder.name}.tar.gz"), [], 2**16
    with tarfile.open(path, "w:gz") as packed:
        for file in sorted(filter(Path.is_file, folder.rglob("*")), key=lambda file: file.stat().st_size):
            name = str(file.relative_to(folder.parent))
            size += len(zlib.compress(file.read_bytes())) + 1024
            if size > LARGEST_ARCHIVE:
                left_out.append(name)
            else:
                packed.add(file, name)
    return path, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder, new or of a call before; default: gpu-results or gpu-dry-run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="run what fits, and the rest in other calls")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, though they be done already")
    parser.add_argument("--dry-run", action="store_true", help="small versions of all steps, with or without a GPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    folder = (options.out or Path("gpu-dry-run" if options.dry_run else "gpu-results")).absolute()
    try:
        if not options.dry_run and not has_gpu():
            raise ValueError("expected a GPU that Triton runs on, got none; --dry-run does without")
        device, target = this_device()
        plan = steps(folder, options.dry_run, target)
        known = [step.name for step in plan]
        if unknown := [name for name in options.steps or [] if name not in known]:
            raise ValueError(f"--steps: expected names of {', '.join(known)}, got {unknown[0]!r}")
        progress = Progress.of(folder, device, options.dry_run)
        chosen = options.steps or [name for name in known if name not in progress.endings]
        planned = [step for step in plan if step.name in chosen]
        if planned and planned[0].limit > 60 * options.minutes:
            least = f"{planned[0].limit / 60:g}, which {planned[0].name} may take"
            raise ValueError(f"--minutes: expected at least {least}, got {options.minutes:g}")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --out: cannot make {folder}: {error.strerror}\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")

    status = 0
    try:
        for step in planned:
            if time.monotonic() + step.limit > end:
                print(f"the next call goes on with {step.name}, which may take {step.limit} s")
                break
            print(f"{step.name:18}", end="", flush=True)
            ending = progress.endings[step.name] = finish(step, folder)
            progress.write(folder)
            status |= int(not ending.startswith(("done", "left out")))
            print(ending, flush=True)
    except KeyboardInterrupt:
        print("interrupted: the next call goes on with this step", file=sys.stderr)
        status = 130
    try:
        text = summary(folder, progress.device, progress.endings)
    except ValueError as error:
        text = f"no figures: {error}\n"
    (folder / "summary.txt").write_text(text)
    packed, left_out = archive(folder)
    print(f"\n{text}\neverything is in {folder} and, packed, in {packed}")
    if left_out:
        print(f"but for {', '.join(left_out)}, too large for the archive")
    return status


if __name__ == "__main__":
    sys.exit(main())
