"""Promise: the benchmark measures what it says, keeps what it measured, and says in one line what it cannot do."""

import contextlib
import csv
import dataclasses
import io
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import types

import matplotlib.image
import pytest
import torch

from bench import plot, run
from bench.measuring import cases, implementations, measure, progress, surroundings, table

TINY = cases.Case("tiny", (2, 3, 9, 7), cases.OFFICIAL_PAIR, radius=2)
CPU = torch.device("cpu")
FAST = ["--device", "cpu", "--no-memory", "--repeats", "1", "--budget", "10"]
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory as glibc does")


@pytest.fixture
def tiny_named(monkeypatch):
    """The named cases are two tiny ones."""
    both = (TINY, dataclasses.replace(TINY, name="tinier", shape=(1, 3, 5, 6)))
    monkeypatch.setattr(cases, "NAMED", both)
    monkeypatch.setattr(run, "NAMED", both)


def row(**values):
    known = cases.Case("tiny", (1, 2, 3, 4)).describe() | {
        "mode": "forward+backward",
        "implementation": "torch-engine",
        "status": "ok",
        **{f"seconds_{point}": "0.01" for point in ("median", "p20", "p80")},
        **{f"ratio_{point}": "1" for point in ("median", "p20", "p80")},
        "peak_bytes": "1000",
        "device": "imagined",
        "contended": "no",
        "warm": "no",
        "cuda_graph": "no",
        "huge_pages": "madvise",
        "utc": "2026-01-02T03:04:05+00:00",
    }
    return dict.fromkeys(table.FIELDS, "") | {field: str(value) for field, value in (known | values).items()}


def fails_in_one_line(capsys, arguments, *expected, command=run):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1 and message.endswith("\n")
    for part in expected:
        assert part in message


def test_named_cases_are_those_of_real_use():
    shapes = {case.name: case.shape for case in cases.NAMED}
    assert shapes["official-clicks"] == (48, 21, 64, 64) and shapes["cityscapes-full"] == (1, 19, 1024, 2048)
    assert len(shapes) == len(cases.NAMED) == 15
    assert {case.channels for case in cases.NAMED if case.name in ("wsl4mis", "pymic")} == {1}
    assert all(case.radius == 5 for case in cases.NAMED)


def test_quick_cases_are_small_and_different():
    quick = cases.named([case.name for case in cases.NAMED], quick=True)
    assert {"official-clicks", "official-two-kernels", "pymic", "saliency", "ade20k"} <= {case.name for case in quick}
    without_names = [dataclasses.replace(case, name="") for case in quick]
    assert all(case not in without_names[:place] for place, case in enumerate(without_names))
    for case in quick:
        n, classes, height, width = case.shape
        assert n * classes * height * width <= 2**18
        (full,) = cases.named([case.name])
        assert classes == full.shape[1] and height * full.shape[3] == width * full.shape[2]
    assert [case.name for case in cases.named(["voc-full-batch"], quick=True)] == ["voc-full-batch"]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("quantity", cases.SWEEPS)
def test_a_sweep_varies_one_quantity(quantity, quick):
    swept = cases.sweep(quantity, quick)
    field = {"pixels": "shape", "classes": "shape", "batch": "shape"}.get(quantity, quantity)
    values = [getattr(case, field) for case in swept]
    assert len(values) > 1 and all(value not in values[:place] for place, value in enumerate(values))
    same = {"name": "", field: None}
    assert all(dataclasses.replace(case, **same) == dataclasses.replace(swept[0], **same) for case in swept)
    varied = {"pixels": {2, 3}, "classes": {1}, "batch": {0}}.get(quantity, set())
    for axis in range(4):
        assert (len({case.shape[axis] for case in swept}) > 1) == (axis in varied)


def assert_same_as_the_unfold(name, case):
    torch.compiler.reset()  # as for every case that is measured
    inputs = implementations.make_inputs(case)
    exact = implementations.make_step("unfold", case, "forward+backward")(*inputs)
    found = implementations.make_step(name, case, "forward+backward")(*inputs)
    tolerance = 1e-6 if name == "official" else 1e-12  # its coordinates are float32
    for value, expected in zip(found, exact, strict=True):
        assert (value - expected).norm() <= tolerance * expected.norm()
    (forward,) = implementations.make_step(name, case, "forward")(*inputs)
    assert torch.equal(forward, found[0]) or (forward - found[0]).abs() <= tolerance * found[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("gates, logits", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (1, 1, 6, 8), (1, 2, 2, 5), (1, 4, 19, 35)])
@pytest.mark.parametrize("kernels", [cases.RGB_XY, cases.PYMIC_PAIR], ids=["one", "two"])
@pytest.mark.parametrize("name", ["offsets", "torch-engine", "official", "flex"])
def test_implementations_compute_the_same(name, kernels, shape, gates, logits):
    if name == "official":
        pytest.importorskip("pymic", reason="needs pip install --no-deps pymic==0.6.2")
    if logits and shape[1] == 1:
        pytest.skip("the softmax of one class is 1, and the loss 0")
    assert_same_as_the_unfold(name, cases.Case("", shape, kernels, 3, dtype="float64", gates=gates, logits=logits))


@pytest.mark.parametrize("name", [name for name in implementations.LOSSES if name.endswith("-compiled")])
def test_compiled_implementations_compute_the_same(name):
    if reason := implementations.why_not(name, CPU):
        pytest.skip(reason)
    assert_same_as_the_unfold(name, cases.Case("", (1, 3, 9, 7), radius=1, dtype="float64", gates=True, logits=True))


def test_what_is_compiled_for_a_case_is_kept_until_the_next(monkeypatch):
    events = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda loss, dynamic: (events.append("compile"), loss)[1])
    names = ["offsets-compiled", "unfold-compiled"]
    for _ in range(2):
        measure.measure(TINY, "forward+backward", names, CPU, measure.Settings(2, 10, memory=False))
    assert events == 2 * ["reset", "compile", "compile"]


@pytest.mark.parametrize("name", ["triton-engine", "triton-engine-again", "flex"])
def test_what_does_not_run_on_a_cpu_says_why(name):
    assert "CPU" in implementations.why_not(name, CPU)


def test_a_run_appends_what_it_measured(tiny_named, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    names = ["torch-engine", "offsets", "unfold", "copy"]
    arguments = [*FAST, "--cases", "tiny", "--implementations", *names, "--out", str(path)]
    assert run.main(arguments) == 0
    rows = table.read(path)
    assert [(r["mode"], r["implementation"]) for r in rows] == [
        *(("forward", name) for name in names[:3]),
        *(("forward+backward", name) for name in names),
    ]
    for r in rows:
        assert r["status"] == "ok" and r["shape"] == "2x3x9x7" and json.loads(r["kernels"]) == list(TINY.kernels)
        assert 0 < float(r["seconds_p20"]) <= float(r["seconds_median"]) <= float(r["seconds_p80"])
        assert float(r["ratio_median"]) == 1 or r["implementation"] != "torch-engine"
        assert (r["loss_error"] == "") == (r["implementation"] == "copy")
        assert (r["gradient_error"] == "") == (r["implementation"] == "copy" or r["mode"] == "forward")
        assert all(float(r[name] or 0) < 1e-5 for name in ("loss_error", "gradient_error"))
        assert r["torch"] == torch.__version__ and r["utc"].startswith("20")
    header = path.read_text().splitlines()[0]
    assert run.main(arguments) == 0
    assert path.read_text().splitlines().count(header) == 1 and len(table.read(path)) == 2 * len(rows)
    assert "14 rows" not in capsys.readouterr().out


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


@needs_glibc
def test_a_warm_run_says_so_and_measures_no_memory(tiny_named, tmp_path):
    path = tmp_path / "rows.csv"
    arguments = ["--device", "cpu", "--cases", "tiny", "--modes", "forward", "--implementations", "offsets"]
    for warm in ([], ["--warm"]):
        assert run.main([*arguments, "--repeats", "1", "--out", str(path), *warm]) == 0
    fresh, warm = table.read(path)
    assert (fresh["warm"], warm["warm"]) == ("no", "yes") and warm["status"] == "ok"
    assert int(fresh["peak_bytes"]) >= 0 and warm["peak_bytes"] == ""


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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.accelerator.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU, and TRITON_INTERPRET=0",
)
@pytest.mark.parametrize("graphs", [[], ["--cuda-graph"]], ids=["events", "graphs"])
def test_a_run_on_a_gpu(graphs, tiny_named, tmp_path, monkeypatch):
    monkeypatch.delenv("GCRF_TRITON_IMPL")  # what users have
    path = tmp_path / "rows.csv"
    assert run.main(["--cases", "--repeats", "3", *graphs, "--out", str(path)]) == 0
    rows = table.read(path)
    possible = {
        name
        for name in implementations.IMPLEMENTATIONS
        if not implementations.why_not(name, torch.accelerator.current_accelerator())
    }
    assert {r["implementation"] for r in rows} == possible >= {"triton-engine", "flex", "unfold-compiled"}
    for r in rows:
        assert r["status"] == "ok" and float(r["seconds_median"]) > 0 and int(r["peak_bytes"]) > 0 and r["driver"]
        assert all(float(r[name] or 0) < 1e-5 for name in ("loss_error", "gradient_error"))
        assert (r["config"] != "") == r["implementation"].startswith("triton-engine")


def test_configurations_are_recorded():
    pytest.importorskip("triton")
    inputs = implementations.make_inputs(TINY)
    with measure.recorded_configs() as configs:
        implementations.make_step("triton-engine", TINY, "forward")(*inputs)
    assert len(configs) == 1 and configs[0].startswith("Config(tile_y=")


def test_an_interruption_keeps_rows(tiny_named, tmp_path, monkeypatch, capsys):
    measured = []

    def interrupted(case, *arguments):
        measured.append(case)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure.measure(case, *arguments)

    monkeypatch.setattr(run, "measure", interrupted)
    path = tmp_path / "rows.csv"
    assert run.main([*FAST, "--cases", "--implementations", "torch-engine", "--out", str(path)]) == 130
    assert len(table.read(path)) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"interrupted: 1 rows are kept in {path}"


def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys):
    fails_in_one_line(capsys, ["--cases", "voc-crops"], "--cases", "official-clicks", "'voc-crops'")
    fails_in_one_line(capsys, ["--sweeps", "sigma"], "--sweeps", "radius", "'sigma'")
    fails_in_one_line(capsys, ["--repeats", "0"], "--repeats", "at least 1", "0")
    fails_in_one_line(capsys, ["--budget", "-1"], "--budget", "above 0", "-1")
    fails_in_one_line(capsys, ["--device", "abacus"], "--device", "abacus")
    fails_in_one_line(capsys, ["--device", "cpu", "--cuda-graph"], "--cuda-graph", "cpu")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    fails_in_one_line(capsys, ["--device", "cpu", "--warm"], "--warm", "glibc", "cpu")
    fails_in_one_line(capsys, ["--out", str(tmp_path / "no" / "rows.csv")], "rows.csv", "cannot be written")
    fails_in_one_line(capsys, ["--compare", str(tmp_path / "no.csv")], "no.csv", "cannot be read")
    fails_in_one_line(capsys, [str(tmp_path / "no.csv")], "no.csv", "cannot be read", command=plot)


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b"\n"])
def test_a_foreign_file_is_refused_and_left_alone(content, tmp_path, capsys):
    path = tmp_path / "foreign.csv"
    path.write_bytes(content)
    fails_in_one_line(capsys, ["--out", str(path)], "foreign.csv", "expected")
    fails_in_one_line(capsys, ["--compare", str(path), "--out", str(tmp_path / "new.csv")], "foreign.csv", "expected")
    fails_in_one_line(capsys, [str(path)], "foreign.csv", "expected", command=plot)
    assert path.read_bytes() == content and not (tmp_path / "new.csv").exists()


def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    (tmp_path / "other.csv").write_bytes(b"\xff,foreign\n")
    fails_in_one_line(capsys, [], "tables", "found none", command=plot)
    path = tmp_path / "rows.csv"
    table.append([row(mode="forward")], path)
    fails_in_one_line(capsys, [], "rows.csv", "forward and backward", command=plot)
    table.append([row()], path)
    assert plot.main([]) == 0 and (tmp_path / "rows-cases.png").exists()
    fails_in_one_line(capsys, ["--out", str(tmp_path / "no")], "--out", "no", command=plot)


class Stream(io.StringIO):
    """What was written, where it was flushed."""

    def __init__(self, terminal=False):
        super().__init__()
        self.isatty = lambda: terminal
        self.flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(terminal, hidden, monkeypatch):
    monkeypatch.setattr("sys.stdout", output := Stream())
    monkeypatch.setattr("sys.stderr", errors := Stream(terminal))
    assert list(progress.bar([5, 6], "cases", 2, "case", hidden=hidden)) == [5, 6]
    assert ("2/2" in errors.getvalue()) == (terminal and not hidden)
    assert output.flushed == ("" if terminal or hidden else "cases: 0 of 2 cases\n")


def test_rows_are_printed_at_once(monkeypatch):
    monkeypatch.setattr("sys.stdout", output := Stream())
    run.print_row(row(status="ok"))
    assert output.flushed.count("\n") == 1 and "tiny" in output.flushed


def test_listing_measures_nothing(capsys):
    assert run.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "case=ade20k  shape=2x150x128x128" in listed and "sweep=radius" in listed


def test_comparison_is_relative_to_the_unfold():
    old = [row(), row(implementation="unfold", ratio_median=40)]
    slower_machine = [row(seconds_median="0.03"), row(implementation="unfold", ratio_median=38)]
    ((_, quantity, factor), (_, memory, growth)) = table.compare(slower_machine, old)
    assert quantity == "time relative to the unfold" and factor == pytest.approx(40 / 38)
    assert memory == "peak memory" and growth == 1
    ((_, quantity, factor), _) = table.compare(slower_machine[:1], old)
    assert quantity == "seconds" and factor == pytest.approx(3)
    assert table.compare([row(status="oom", ratio_median="")], old)[0][2] == float("inf")
    assert not table.compare([row(threads=8)], old) and not table.compare([row(warm="yes")], old)


def test_comparison_takes_the_latest_rows():
    old = [row(seconds_median="0.001"), row(seconds_median="0.010")]
    assert [factor for *_, factor in table.compare([row(seconds_median="0.011")], old)] == pytest.approx([1.1, 1])


def test_compare_exits_with_1_if_worse(tiny_named, tmp_path, capsys):
    path, out = tmp_path / "old.csv", tmp_path / "new.csv"
    arguments = [*FAST, "--cases", "tiny", "--modes", "forward", "--implementations", "torch-engine", "--out"]
    assert run.main([*arguments, str(path)]) == 0
    (measured,) = table.read(path)
    for seconds, code, verdict in ((1e3, 0, "better"), (1e-9, 1, "worse")):
        path.unlink()
        table.append([measured | {"seconds_median": str(seconds)}], path)
        assert run.main([*arguments, str(out), "--compare", str(path)]) == code
        assert verdict in capsys.readouterr().out
    path.unlink()
    table.append([measured | {"case": "another"}], path)
    assert run.main([*arguments, str(out), "--compare", str(path)]) == 2
    assert "none of the new rows" in capsys.readouterr().err


def measurements():
    """Rows of three sweeps and two named cases of four implementations, one of which runs out of memory."""
    for quantity in plot.QUANTITIES:
        for place, case in enumerate(cases.sweep(quantity, quick=True)):
            for factor, name in ((1, "torch-engine"), (5, "offsets"), (40, "unfold"), (0.1, "copy")):
                lost = name == "unfold" and place == 3
                seconds = 0.001 * factor * 3**place
                yield row(
                    **case.describe(),
                    implementation=name,
                    status="oom-predicted" if lost else "ok",
                    seconds_median="" if lost else seconds,
                    seconds_p20="" if lost else 0.9 * seconds,
                    seconds_p80="" if lost else 1.2 * seconds,
                    peak_bytes="" if lost else int(1e6 * factor * 3**place),
                )
    for case in cases.NAMED[:2]:
        yield row(**case.describe())
        yield row(**case.describe(), implementation="unfold", ratio_median=40, ratio_p20=38, ratio_p80=45)


def test_pictures_show_the_measurements(tmp_path):
    path = tmp_path / "imagined.csv"
    table.append(list(measurements()), path)
    assert plot.main([str(path)]) == 0
    pictures = [tmp_path / "imagined-sweeps.png", tmp_path / "imagined-cases.png"]
    for picture in pictures:
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert min(pixels.shape[:2]) > 300
        for colour in ("#0072B2", "#E69F00") if picture == pictures[0] else ("#E69F00",):
            expected = torch.tensor(matplotlib.colors.to_rgb(colour))
            close = (torch.from_numpy(pixels.copy()) - expected).abs().amax(-1) < 0.02
            assert close.sum() > 100


@pytest.mark.parametrize("name", ["triton-engine-again", "copy"])
def test_pictures_leave_out_what_has_no_style(name, tmp_path):
    rows = list(measurements())
    rows += [row(**case.describe(), implementation=name, status="oom") for case in cases.sweep("pixels", quick=True)]
    plot.plt.close(plot.draw_sweeps(rows))


def test_pictures_repeat(tmp_path):
    path = tmp_path / "imagined.csv"
    table.append([r for r in measurements() if not r["sweep"]], path)
    contents = []
    for _ in range(2):
        (picture,) = plot.plot(path, tmp_path)
        contents.append(picture.read_bytes())
    assert contents[0] == contents[1]


def test_curves_are_the_rows():
    rows = list(measurements())
    figure = plot.draw_sweeps(rows)
    axes = figure.axes[0]
    curves = {line.get_color(): line for line in axes.get_lines() if line.get_linestyle() != "None"}
    assert list(curves["#0072B2"].get_xdata()) == [256, 1024, 4096, 16384]
    assert list(curves["#0072B2"].get_ydata()) == pytest.approx([1, 3, 9, 27])
    assert list(curves["#E69F00"].get_xdata()) == [256, 1024, 4096]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [16384]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    plot.plt.close(figure)


def test_a_curve_holds_what_differs_in_one_quantity():
    quick = [row(**case.describe()) for case in cases.sweep("radius", quick=True)]
    full = [row(**case.describe()) for case in cases.sweep("radius")]
    assert [plot.position(r, "radius") for r in plot.sweep_rows(quick + full + quick, "radius")] == [
        1, 2, 3, 5, 8, 11, 16
    ]  # fmt: skip
    assert {r["shape"] for r in plot.sweep_rows(full + quick, "radius")} == {"1x21x192x192"}


@pytest.mark.parametrize(
    "other", [{"contended": "yes"}, {"warm": "yes"}, {"huge_pages": "requested"}, {"mode": "forward"}]
)
def test_pictures_show_the_usual_surroundings(other):
    usual = [row(**case.describe()) for case in (*cases.NAMED[:2], *cases.sweep("radius", quick=True))]
    unusual = [r | other | {"utc": "2026-01-03"} for r in usual]
    assert plot.named_rows(usual + unusual) == plot.named_rows(usual)
    assert plot.sweep_rows(usual + unusual, "radius") == plot.sweep_rows(usual, "radius")


def test_the_table_has_the_ratios_of_fresh_and_of_warm_processes():
    ratios = [
        {f"ratio_{point}": value + step for point, step in (("median", 0), ("p20", -1), ("p80", 1))}
        for value in (40, 20)
    ]
    rows = [
        row(implementation=name, warm=warm, turns=3, utc=warm, **(ratio if name == "official" else {}))
        for warm, ratio in zip(("no", "yes"), ratios, strict=True)
        for name in ("torch-engine", "official")
    ]
    heading, _, line = ([cell.strip() for cell in line.split("|")] for line in plot.markdown(rows).splitlines())
    found = dict(zip(heading, line, strict=True))
    assert (found["times as long"], found["warm, times as long"]) == ("40 (39-41)", "20 (19-21)")
    assert plot.markdown(rows[:2]).splitlines()[-1] == plot.markdown(rows).splitlines()[-1].replace("20 (19-21)", "")


def test_a_case_shows_what_took_turns():
    case = cases.NAMED[0].describe()
    before = [row(implementation=name, utc="2026-01-01", **case) for name in ("torch-engine", "official")]
    after = row(implementation="torch-engine", utc="2026-01-02", **case)
    assert list(plot.named_rows(before)[case["case"]]) == ["torch-engine", "official"]
    assert plot.named_rows([*before, after])[case["case"]] == {"torch-engine": after}


def test_rows_survive_the_csv(tmp_path):
    rows = [row(config="Config(a=1, b=2)"), row(status='error: "quoted", with a comma')]
    path = tmp_path / "rows.csv"
    table.append(rows[:1], path)
    table.append(rows[1:], path)
    assert table.read(path) == rows
    assert next(csv.reader(io.StringIO(path.read_text()))) == list(table.FIELDS)
    path.write_text(path.read_text() + "too,short\n")
    with pytest.raises(ValueError, match="line 4"):
        table.read(path)
