"""Promise: time, memory and errors are those of the implementation, and what cannot be measured is recorded so."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from measurements import CPU, TINY, needs_glibc

from bench import run
from bench.measuring import cases, implementations, measure, surroundings


def test_what_is_compiled_for_a_case_is_kept_until_the_next(monkeypatch):
    events = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda loss, dynamic: (events.append("compile"), loss)[1])
    names = ["offsets-compiled", "unfold-compiled"]
    for _ in range(2):
        measure.measure(TINY, "forward+backward", names, CPU, measure.Settings(2, 10, memory=False))
    assert events == 2 * ["reset", "compile", "compile"]


@pytest.mark.parametrize(
    "policy, asked, expected",
    [
        ("always madvise [never]", "1", "never"),
        ("[always] madvise never", "0", "always"),
        ("always [madvise] never", "0", "madvise"),
        ("always [madvise] never", "1", "requested"),
        (None, "1", ""),
    ],
)
def test_huge_pages_are_those_of_the_system_or_requested(policy, asked, expected, monkeypatch, tmp_path):
    if policy:
        (tmp_path / "enabled").write_text(policy)
    monkeypatch.setattr(surroundings, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
    assert surroundings.huge_pages(CPU) == expected


def test_errors_are_those_of_the_implementation(monkeypatch):
    monkeypatch.setitem(implementations.LOSSES, "offsets", lambda *inputs: 1.5 * unfolded(*inputs))
    unfolded = implementations.unfold
    results = measure.measure(TINY, "forward+backward", ["offsets"], CPU, measure.Settings(1, 10, memory=False))
    assert results["offsets"].errors == pytest.approx((0.5, 0.5), rel=1e-4)


def test_peak_memory_is_that_of_a_process_of_its_own():
    if not measure.can_measure_memory(CPU):
        pytest.skip("peak memory is read from /proc")
    case = cases.Case("", (1, 21, 96, 96), radius=3)
    unfold, engine = (measure.peak_of_process(name, case, "forward") for name in ("unfold", "torch-engine"))
    assert 0.8 <= unfold / implementations.bytes_needed("unfold", case) <= 2
    assert engine < unfold / 5


@needs_glibc
def test_warm_memory_needs_no_new_pages():
    program = """if True:
        import resource, torch
        from bench.measuring.measure import warm_memory

        def new_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**26, dtype=torch.uint8)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        fresh = new_pages()
        with warm_memory(2**28):
            warm = new_pages()
        print(fresh, warm, new_pages())"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    fresh, warm, after = map(int, found.split())
    assert warm < fresh / 4 and after > fresh / 2


def test_warm_memory_is_that_of_the_largest_implementation_that_fits(monkeypatch):
    sizes = []
    monkeypatch.setattr(measure, "warm_memory", lambda size: (sizes.append(size), contextlib.nullcontext())[1])
    monkeypatch.setattr(measure, "available_bytes", lambda device: 100_000)
    for warm in (False, True):
        settings = measure.Settings(1, 10, memory=False, warm=warm)
        measure.measure(TINY, "forward", ["unfold", "torch-engine", "copy"], CPU, settings)
    assert sizes == [2 * implementations.bytes_needed("torch-engine", TINY)]


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, "oom"), (signal.SIGTERM, "error: RuntimeError")])
def test_only_a_killed_process_ran_out_of_memory(number, status, monkeypatch):
    monkeypatch.setattr(measure, "_fresh_processes", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(measure, "_grow", lambda *case: os.kill(os.getpid(), number))
    result = measure.Result()
    with result.recording_failure():
        measure.peak_of_process("unfold", TINY, "forward")
    assert result.status.startswith(status)


def test_what_will_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 100_000)
    monkeypatch.setitem(implementations.LOSSES, "unfold", lambda *inputs: pytest.fail("tried"))
    assert implementations.bytes_needed("unfold", TINY) > 100_000 > 2 * implementations.bytes_needed("copy", TINY)
    results = measure.measure(TINY, "forward", ["unfold", "torch-engine"], CPU, measure.Settings(1, 10, memory=False))
    assert {name: result.status for name, result in results.items()} == {
        "unfold": "oom-predicted",
        "torch-engine": "ok",
    }
    assert run.row_of(TINY, "forward", "unfold", results["unfold"], None)["seconds_median"] == ""


@pytest.mark.parametrize(
    "failure, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("no such\nkernel"), "error: RuntimeError: no such"),
    ],
)
def test_a_failure_is_recorded_and_the_others_go_on(monkeypatch, failure, status):
    def fail(*inputs):
        raise failure

    monkeypatch.setitem(implementations.LOSSES, "unfold", fail)
    results = measure.measure(TINY, "forward", ["unfold", "offsets"], CPU, measure.Settings(2, 10, memory=False))
    assert results["unfold"].status == status and not results["unfold"].seconds
    assert results["offsets"].status == "ok" and len(results["offsets"].seconds) == 2


def test_a_slow_implementation_is_stepped_once(monkeypatch):
    steps = []
    monkeypatch.setattr(measure, "stopwatch", lambda device: lambda step: (step(), steps.append(step), 7.0)[2])
    results = measure.measure(TINY, "forward", ["offsets"], CPU, measure.Settings(9, 5, memory=False))
    assert results["offsets"].status == "one step" and results["offsets"].seconds == [7.0]
    assert len(steps) == 1
    results = measure.measure(TINY, "forward", ["offsets"], CPU, measure.Settings(9, 8, memory=False))
    assert results["offsets"].status == "ok" and len(results["offsets"].seconds) == measure.FEWEST_TURNS


@pytest.mark.parametrize("cache, repeats, different", [(1000, 9, 7), (10, 9, 2), (1000, 2, 5)])
def test_inputs_rotate_beyond_the_cache(monkeypatch, cache, repeats, different):
    properties = types.SimpleNamespace(L2_cache_size=cache)
    module = types.SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    inputs = (torch.empty(40, device="meta"), torch.empty(10, device="meta"))  # 200 bytes
    seen = []
    step = measure.preparation(inputs, measure.Settings(repeats, 10))(lambda *inputs: seen.append(inputs))
    for _ in range(1 + 2 * repeats):
        step()
    assert len({id(copy[0]) for copy in seen}) == different


class Event:
    recorded = 0
    reached_early, milliseconds = [], 2.0  # whether the device came to an event before all was launched

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1

    def query(self):
        return bool(Event.reached_early) and Event.reached_early.pop()

    synchronize = elapsed_time = lambda self, *end: Event.milliseconds


@pytest.mark.parametrize("late, milliseconds, attempts", [(0, 2.0, 1), (3, 2.0, 4), (99, 2.0, 7), (99, 70.0, 1)])
def test_a_step_is_launched_behind_a_backlog_that_outlasts_its_launches(late, milliseconds, attempts, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: types.SimpleNamespace(Event=Event))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(Event, "reached_early", [True] * late)
    monkeypatch.setattr(Event, "milliseconds", milliseconds)
    stopwatch, steps = measure.stopwatch(torch.device("meta")), []
    assert stopwatch(lambda: steps.append(1)) == milliseconds / 1e3
    assert len(steps) == attempts
    assert list(stopwatch.fillings.values()) == [
        min(measure.FEWEST_FILLINGS * 2 ** (attempts - 1), measure.MOST_FILLINGS)
    ]


def test_an_accelerator_is_timed_by_events_and_asked_for_memory(monkeypatch):
    monkeypatch.setattr(Event, "recorded", 0)
    module = types.SimpleNamespace(
        Event=Event,
        mem_get_info=lambda: (10**9, 10**9),
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=1000),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for name, answer in {"memory_allocated": 500, "max_memory_allocated": 1700}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda answer=answer: answer)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.accelerator, name, lambda: None)
    monkeypatch.setattr(measure, "errors", lambda found, exact: ())  # tensors without values have none
    meta, names = torch.device("meta"), ["unfold", "offsets", "copy"]
    results = measure.measure(TINY, "forward+backward", names, meta, measure.Settings(4, 10))
    for result in results.values():
        assert result.status == "ok" and result.seconds == [0.002] * 4 and result.peak_bytes == 1200
    assert Event.recorded == 3 * 2 * (1 + 4)  # once without first use, and four turns
    module.mem_get_info = lambda: (1000, 10**9)
    results = measure.measure(TINY, "forward+backward", names, meta, measure.Settings(4, 10))
    assert {result.status for result in results.values()} == {"oom-predicted"}


def test_configurations_are_recorded():
    pytest.importorskip("triton")
    inputs = implementations.make_inputs(TINY)
    with measure.recorded_configs() as configs:
        implementations.make_step("triton-engine", TINY, "forward")(*inputs)
    assert len(configs) == 1 and configs[0].startswith("Config(tile_y=")
