"""Time, peak memory and errors of implementations on one case, side by side.

Every implementation first runs alone, which yields its peak memory (of a fresh process on a CPU, of the allocator on a
GPU), its errors against float64 and how long a step takes. Then they take turns, each with one step untimed and one
timed, as the speed of a shared machine drifts; ratios are taken turn by turn. On a GPU events around a step give its
time, behind a backlog of other work: all of the step is launched before the device comes to it, as in a training whose
host is ahead. What does not fit into memory, by its prediction or when tried, fails or is slow is recorded as such, and
the others go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.measuring.cases import Case
from bench.measuring.implementations import Step, bytes_needed, compiles, make_inputs, make_step, one_line

HEADROOM = 1.5  # of memory, above what bytes_needed counts
WARM = 2  # times what bytes_needed counts, since free memory is in pieces
BLOCK_BYTES = 2**24  # glibc keeps freed blocks of at most 32 MiB
FEWEST_TURNS = 3
NEEDS_NO_WARMING = 0.2  # seconds a step
BACKLOG_BYTES = 2**28  # about 100 microseconds of a large GPU
FEWEST_FILLINGS, MOST_FILLINGS = 4, 256
OUTLASTS_LAUNCHES = 0.05  # seconds a step
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure: the most turns, seconds for an implementation of a case, whether to measure memory.

    `warm` is whether the process has used and freed memory for a step before.
    """

    repeats: int
    budget: float
    memory: bool = True
    cuda_graph: bool = False
    warm: bool = False


@dataclasses.dataclass
class Result:
    """What one implementation did in one case and mode; None and empty where it was not measured."""

    status: str = "ok"
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    errors: tuple[float, ...] = ()
    config: str = ""

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Context in which an error of an implementation becomes its status."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            self.status = "oom"
        except Exception as error:
            exhausted = "allocate memory" in str(error) or "out of memory" in str(error).lower()
            self.status = "oom" if exhausted else f"error: {one_line(error)}"


def measure(
    case: Case,
    mode: str,
    names: Sequence[str],
    device: torch.device,
    settings: Settings,
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, Result]:
    """Every implementation's result in a case and mode; `report` hears whose turn to run alone it is."""
    torch.compiler.reset()  # or after some shapes it would give up compiling
    inputs = make_inputs(case)
    # by the engine whose float64 agrees with explicit loops, and on the CPU, where memory is not what is measured
    exact = make_step("torch-engine", case, mode)(*(tensor.double() for tensor in inputs))
    inputs = tuple(tensor.to(device) for tensor in inputs)
    seconds = stopwatch(device)
    results = {name: Result() for name in names}
    needed = {name: bytes_needed(name, case) for name in names}
    fitting = [name for name in names if HEADROOM * needed[name] <= available_bytes(device)]
    largest = max((needed[name] for name in fitting), default=0)
    steps: dict[str, Step] = {}
    with warm_memory(WARM * largest) if settings.warm else contextlib.nullcontext():
        for name, result in results.items():
            report(name)
            if name not in fitting:
                result.status = "oom-predicted"
                continue
            with result.recording_failure():
                if settings.memory and device.type == "cpu":
                    result.peak_bytes = peak_of_process(name, case, mode)
                step = make_step(name, case, mode)
                run_alone(result, name, step, inputs, exact, settings)
                steps[name] = step

        # all have run by now: a graph keeps its memory, which those that are captured after it share
        prepare = preparation(inputs, settings)
        ready: dict[str, Callable[[], object]] = {}
        for name, step in steps.items():
            result = results[name]
            with result.recording_failure():
                ready[name] = prepare(step)
                if device.type != "cpu" or compiles(name) or result.seconds[0] < NEEDS_NO_WARMING:
                    result.seconds = [seconds(ready[name])]  # without what is loaded and compiled on first use
            if result.status == "ok" and result.seconds[0] > settings.budget:
                result.status = "one step"
        in_turns = {name: step for name, step in ready.items() if results[name].status == "ok"}
        take_turns(results, in_turns, seconds, settings)
    return results


@contextlib.contextmanager
def warm_memory(size: int) -> Iterator[None]:
    """Context in which glibc keeps so many bytes for this process, which used and freed them in blocks."""
    torch.empty(BLOCK_BYTES, dtype=torch.uint8)  # glibc takes blocks from its heap once it has seen one freed
    blocks = [torch.ones(BLOCK_BYTES, dtype=torch.uint8) for _ in range(1 + math.ceil(size / BLOCK_BYTES))]
    del blocks[:-1]  # what is free above the last block in use would go back to the system
    try:
        yield
    finally:
        blocks.clear()
        return_freed_memory()


def run_alone(
    result: Result,
    name: str,
    step: Step,
    inputs: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    settings: Settings,
) -> None:
    """Put seconds, errors, configuration and, on a GPU, peak memory of one implementation into its result."""
    start = time.perf_counter()
    with recorded_configs() as configs:
        found = step(*inputs)
    if inputs[0].device.type != "cpu":
        torch.accelerator.synchronize()
    result.seconds = [time.perf_counter() - start]
    result.config = " + ".join(dict.fromkeys(configs))
    if name != "copy":
        result.errors = errors(found, exact)
    del found
    if settings.memory and inputs[0].device.type != "cpu":
        result.peak_bytes = peak_of_allocator(step, inputs)


def take_turns(
    results: dict[str, Result],
    steps: dict[str, Callable[[], object]],
    seconds: Callable[[Callable[[], object]], float],
    settings: Settings,
) -> None:
    """Time the steps turn by turn, the slow ones in fewer turns, and put their seconds into the results."""
    first = {name: max(*results[name].seconds, 1e-7) for name in steps}
    warmed = {name: first[name] < NEEDS_NO_WARMING for name in steps}
    turns = {}
    for name in steps:
        results[name].seconds = []
        affordable = int(settings.budget / first[name] / (1 + warmed[name]))
        turns[name] = min(max(FEWEST_TURNS, affordable), settings.repeats)
    for turn in range(settings.repeats):
        for name, step in steps.items():
            result = results[name]
            if turn >= turns[name] or result.status != "ok":
                continue
            with result.recording_failure():
                if warmed[name]:
                    step()  # so that nobody pays for what the one before left behind
                result.seconds.append(seconds(step))


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs a step and returns its seconds on a device."""

    def of_cpu(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return of_cpu if device.type == "cpu" else DeviceStopwatch(device)


class DeviceStopwatch:
    """Seconds between events around a step on a GPU, which is busy with a backlog until all of the step is launched.

    The backlog fills a buffer larger than the second-level cache, as often as it takes to outlast the launches. A step
    within which the host waits for the device, or of more launches than its queue holds (about a thousand, of which the
    loop over offsets has more), cannot be launched in advance: its time is that of both.
    """

    def __init__(self, device: torch.device) -> None:
        self.module = torch.get_device_module(device)
        self.fillings: dict[Callable[[], object], int] = {}
        self.buffer = torch.empty(BACKLOG_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, step: Callable[[], object]) -> float:
        fillings = self.fillings.get(step, FEWEST_FILLINGS)
        while True:
            start, end = (self.module.Event(enable_timing=True) for _ in range(2))
            torch.accelerator.synchronize()
            for _ in range(fillings):
                self.buffer.fill_(1)
            start.record()
            step()
            end.record()
            launched_in_time = not start.query()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
            if launched_in_time or seconds > OUTLASTS_LAUNCHES or fillings >= MOST_FILLINGS:
                self.fillings[step] = fillings
                return seconds
            fillings *= 2


def preparation(inputs: tuple[Tensor, ...], settings: Settings) -> Callable[[Step], Callable[[], object]]:
    """A function that makes a step one without arguments.

    On a GPU its inputs are copies in turn, which together exceed the cache; CUDA graphs, one a copy, share memory.
    """
    device = inputs[0].device
    if device.type == "cpu":
        return lambda step: functools.partial(step, *inputs)
    properties = torch.get_device_module(device).get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 2**26)
    steps = 1 + 2 * settings.repeats
    count = min(2 + cache // sum(tensor.nbytes for tensor in inputs), steps)
    copies = [tuple(tensor.clone() for tensor in inputs) for _ in range(count)]

    def rotating(step: Step) -> Callable[[], object]:
        turns = itertools.cycle(copies)
        return lambda: step(*next(turns))

    def graphs(step: Step) -> Callable[[], object]:
        captured = itertools.cycle([capture(step, inputs, pool) for inputs in copies])
        return lambda: next(captured).replay()

    pool = torch.cuda.graph_pool_handle() if settings.cuda_graph else None
    return graphs if settings.cuda_graph else rotating


def capture(step: Step, inputs: tuple[Tensor, ...], pool: tuple[int, int] | None) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step(*inputs)
    finally:
        torch.cuda.set_stream(stream)  # where a capture that fails would not return to
    return graph


def available_bytes(device: torch.device) -> float:
    """Memory that can still be allocated on a device; infinity where the system does not say."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        return torch.get_device_module(device).mem_get_info()[0]
    information = Path("/proc/meminfo")
    return _kilobytes(information, "MemAvailable") if information.exists() else float("inf")


def can_measure_memory(device: torch.device) -> bool:
    return device.type != "cpu" or REFERENCES.exists()


def peak_of_allocator(step: Step, inputs: tuple[Tensor, ...]) -> int:
    """Growth of the memory allocated on the accelerator during one step, above its inputs."""
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    step(*inputs)
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before


@functools.cache
def _fresh_processes() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "pymic.loss.seg.gatedcrf"])
    return context


def peak_of_process(name: str, case: Case, mode: str) -> int:
    """Growth of a fresh process's resident memory during one step, above its inputs; MemoryError if it was killed."""
    receiver, sender = _fresh_processes().Pipe(duplex=False)
    process = _fresh_processes().Process(target=_report_growth, args=(sender, name, case, mode))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # as the system does when it runs out of memory
            raise MemoryError from None
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _report_growth(sender: Connection, name: str, case: Case, mode: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one line about an interruption is that of the process above
    try:
        sender.send(_grow(name, case, mode))
    except Exception as error:
        sender.send(error)


def _grow(name: str, case: Case, mode: str) -> int:
    step = make_step(name, case, mode)
    if not compiles(name):
        step(*make_inputs(dataclasses.replace(case, shape=(1, case.shape[1], 8, 8))))  # load what the first use loads
    inputs = make_inputs(case)
    if compiles(name):
        step(*inputs)  # it is compiled for one shape
    return_freed_memory()  # freed pages that stay resident would hide new ones
    before = _kilobytes(STATUS, "VmRSS")
    REFERENCES.write_text("5")  # the peak starts again from here
    step(*inputs)
    return _kilobytes(STATUS, "VmHWM") - before


def return_freed_memory() -> None:
    """To the system, where the C library can."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _kilobytes(file: Path, field: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, ...]:
    """Relative error of the loss, and of the gradient in norm."""
    return tuple(float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))


@contextlib.contextmanager
def recorded_configs() -> Iterator[list[str]]:
    """Context that lists the configurations with which the Triton engine launches."""
    configs: list[str] = []
    try:
        from gcrf_triton import triton_engine
    except ImportError:  # no Triton, no configurations
        yield configs
        return
    choose = triton_engine.choose_config

    def choose_and_record(key):
        config = choose(key)
        configs.append(str(config))
        return config

    triton_engine.choose_config = choose_and_record
    try:
        yield configs
    finally:
        triton_engine.choose_config = choose


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    low, high = np.percentile(values, [20, 80])
    return statistics.median(values), float(low), float(high)
