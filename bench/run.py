"""Time and memory of the loss, forward and backward, beside the unfolded code it replaces.

`python -m bench.run` measures every case and appends rows to bench/results/cpu.csv; `--contended` does so while another
process keeps an OpenMP job on every core. Implementations take turns in one process, each with one step untimed and one
timed, and ratios are taken turn by turn, since the speed of a shared machine drifts. Peak memory is the growth of a
fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gcrf_triton
from reference import gated_crf_unfold

KERNELS = [{"weight": 1.0, "xy": 6.0, "rgb": 0.1}]
RADIUS = 5
CASES = [(1, 21, 128, 128), (4, 21, 64, 64), (1, 4, 256, 256), (2, 21, 256, 256)]  # N, C, H, W
RESULTS = Path(__file__).parent / "results" / "cpu.csv"
OPENMP_JOB = "import torch; x = torch.ones(1 << 22)\nwhile True: x.mul_(1.0)"


def ours(probabilities: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return gcrf_triton.gated_crf_loss(probabilities, {"rgb": image}, KERNELS, RADIUS)


def unfold(probabilities: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    n, _, height, width = probabilities.shape
    return gated_crf_unfold(probabilities, {"rgb": image}, KERNELS, RADIUS) / (n * height * width)


def official(probabilities: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    from pymic.loss.seg.gatedcrf import GatedCRFLoss

    mask = torch.ones_like(image[:, :1])  # without one it also counts neighbours outside the image
    sample = {"rgb": image.clone()}  # which it overwrites
    return GatedCRFLoss()(probabilities, KERNELS, RADIUS, sample, *image.shape[2:], mask_src=mask)["loss"]


def implementations() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The ones that can run here: PyMIC's copy of the official module only where it is installed."""
    known = {"gcrf_triton": ours, "unfold": unfold, "pymic": official}
    return {name: run for name, run in known.items() if name != "pymic" or importlib.util.find_spec("pymic")}


def make_inputs(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of noise [N, C, H, W], and images in [0, 1] with smooth areas, edges and a little noise [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    n, _, height, width = shape
    coarse = torch.rand(n, 3, 1 + height // 16, 1 + width // 16, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    image = (image + 0.05 * torch.randn(n, 3, height, width, generator=generator)).clamp(0, 1)
    return torch.randn(shape, generator=generator).softmax(1), image


def step(run: Callable, probabilities: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient."""
    probabilities = probabilities.detach().requires_grad_()
    loss = run(probabilities, image)
    loss.backward()
    return loss.detach(), probabilities.grad


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


def peak_bytes(name: str, shape: tuple[int, int, int, int]) -> int:
    """Growth of a fresh process's resident memory during one step, above its inputs."""
    arguments = [sys.executable, "-m", "bench.run", "--memory-of", name, *map(str, shape)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def measure_memory(name: str, shape: tuple[int, int, int, int]) -> int:
    run = implementations()[name]
    step(run, *make_inputs((1, shape[1], 8, 8)))  # load what is loaded on first use
    inputs = make_inputs(shape)
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("bench.run: peak memory is read from /proc, which this system does not have: use --no-memory")
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed pages that stay resident would hide new ones
    before = _status_bytes(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    step(run, *inputs)
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Relative error of the loss, and of the gradient in norm."""
    return tuple(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))


def measure(shape: tuple[int, int, int, int], repeats: int, memory: bool, progress: tqdm) -> list[dict]:
    inputs, runs = make_inputs(shape), implementations()
    exact = step(ours, *(tensor.double() for tensor in inputs))
    times: dict[str, list[float]] = {name: [] for name in runs}
    found = {name: step(run, *inputs) for name, run in runs.items()}  # warm-up
    for _ in range(repeats):
        for name, run in runs.items():
            step(run, *inputs)  # so that nobody pays for what the one before left behind
            start = time.perf_counter()
            step(run, *inputs)
            times[name].append(time.perf_counter() - start)
            progress.update()
    rows = []
    for name, seconds in times.items():
        ratios = [other / own for other, own in zip(seconds, times["gcrf_triton"], strict=True)]
        loss_error, gradient_error = errors(found[name], exact)
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "implementation": name,
                **{f"seconds_{key}": f"{value:.5f}" for key, value in percentiles(seconds).items()},
                **{f"time_ratio_{key}": f"{value:.1f}" for key, value in percentiles(ratios).items()},
                "peak_bytes": peak_bytes(name, shape) if memory else "",
                "loss_error": f"{loss_error:.1e}",
                "gradient_error": f"{gradient_error:.1e}",
            }
        )
    own_peak = rows[0]["peak_bytes"]
    return [{**row, "memory_ratio": f"{row['peak_bytes'] / own_peak:.1f}" if memory else ""} for row in rows]


def percentiles(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [20, 80])
    return {"median": statistics.median(values), "p20": float(low), "p80": float(high)}


def surroundings(contended: bool) -> dict[str, str | int]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "mode": "forward+backward",
        "dtype": "float32",
        "contended": "yes" if contended else "no",
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gcrf_triton": gcrf_triton.__version__,
        "revision": git.stdout.strip() or "unknown",
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def append(rows: list[dict], path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--contended", action="store_true", help="beside another process's OpenMP job on every core")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, *shape = arguments.memory_of
        print(measure_memory(name, tuple(map(int, shape))))
        return
    if arguments.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {arguments.repeats}")
    try:
        arguments.out.open("a").close()
    except OSError as error:
        parser.error(f"--out: cannot write {arguments.out}: {error.strerror}")
    if not arguments.out.stat().st_size:
        arguments.out.unlink()
    memory = not (arguments.no_memory or arguments.contended)
    total = len(CASES) * arguments.repeats * len(implementations())
    with tqdm(total=total, unit="step", disable=None) as progress, openmp_job(arguments.contended):
        for shape in CASES:
            rows = measure(shape, arguments.repeats, memory, progress)
            append([{**row, **surroundings(arguments.contended)} for row in rows], arguments.out)
            for row in rows:
                progress.write(
                    f"{row['shape']:>15} {row['implementation']:12} {1e3 * float(row['seconds_median']):9.1f} ms   "
                    f"time x{row['time_ratio_median']} ({row['time_ratio_p20']}-{row['time_ratio_p80']})   "
                    f"memory x{row['memory_ratio'] or '?'}   error {row['loss_error']}, {row['gradient_error']}"
                )


if __name__ == "__main__":
    main()
