"""Promise: what is modelled or ranked without a GPU says so, keeps what was found before, and fails aloud."""

import csv
import json
import random
import sys
import tarfile
import time
import types
from pathlib import Path

import matplotlib.image
import pytest
import torch
from measurements import fails_in_one_line

from bench import autotune, gpu, launches, plot, run, static_cost
from bench.machine_code import model
from bench.measuring import table
from bench.measuring.cases import Case
from bench.measuring.summary import Device, summary
from gcrf_triton import tuning

pytest.importorskip("gcrf_triton.triton_engine")

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU measures instead of modelling")


@pytest.fixture
def modelled(monkeypatch):
    """Instead of compiling: tiles cost what their area is, whatever else they are."""

    def rows_of(target, dtype, classes, radius, gates, config, **problem):
        return [{"kernel": "together", "bound_clocks": 100.0 + config.tile_y * config.tile_x - config.unroll / 2}]

    monkeypatch.setattr(model, "rows_of", rows_of)


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@no_gpu
def test_without_a_gpu_configurations_are_ranked_by_the_model(modelled, tmp_path, capsys):
    path = tmp_path / "configs.json"
    arguments = ["--out", str(path), "--gates", "no", "--cases"]
    assert autotune.main([*arguments, "official-clicks"]) == 0
    assert autotune.main([*arguments, "wsl4mis", "ade20k"]) == 0
    content = json.loads(path.read_text())
    assert "nothing was measured" in content["ranked_by"] and content["device"] == "sm_90"
    assert len(content["entries"]) == len(content["costs"]) == 3
    for name, entry in content["entries"].items():
        config, costs = tuning.Config(**entry), content["costs"][name]
        assert costs["best"] == 100 + config.tile_y * config.tile_x - config.unroll / 2
        assert costs["best"] <= costs["heuristic"] <= costs["worst"] and costs["best"] < costs["worst"]
    assert any(name.startswith("sm_90, 64 columns") for name in content["entries"])  # a pass of 150 classes
    printed = capsys.readouterr().out
    assert "nothing was measured" in printed and "3 problems are in" in printed


@no_gpu
@pytest.mark.parametrize("content", ["hello", "[1]", '{"schema": 1}'])
def test_a_foreign_file_is_no_file_of_configurations(content, tmp_path, capsys):
    path = tmp_path / "configs.json"
    path.write_text(content)
    fails_in_one_line(capsys, autotune, ["--out", str(path)], "--out: expected a file of configurations", str(path))
    assert path.read_text() == content


@no_gpu
def test_what_cannot_be_ranked_is_one_line(tmp_path, capsys):
    fails_in_one_line(capsys, autotune, ["--cases", "nope"], "--cases: expected names of official-clicks", "'nope'")
    fails_in_one_line(capsys, autotune, ["--out", str(tmp_path / "no" / "x.json")], "--out: cannot write")
    fails_in_one_line(capsys, autotune, ["--target", "gfx942"], "--target: expected one whose tiles", "gfx942")


def test_nothing_is_compiled_under_the_interpreter(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fails_in_one_line(capsys, static_cost, [], "TRITON_INTERPRET=1")
    fails_in_one_line(capsys, autotune, [], "TRITON_INTERPRET=1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    fails_in_one_line(capsys, static_cost, ["--csv", str(tmp_path / "no" / "x.csv")], "--csv: cannot write")
    fails_in_one_line(capsys, static_cost, ["--radius", "0"], "--classes, --radius: expected classes from 1 to 64")
    fails_in_one_line(capsys, static_cost, ["--classes", "150"], "--classes, --radius: expected classes from 1 to 64")
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("case,seconds\n")
    fails_in_one_line(capsys, static_cost, ["--csv", str(foreign)], "--csv: expected a new file", str(foreign))
    assert foreign.read_text() == "case,seconds\n"


def modelled_row(**values):
    known = {"target": "sm_90", "device": "H100", "classes": 21, "radius": 5, "gates": "no", "dtype": "float32"}
    known |= {f"{unit}_clocks": 10.0 + place for place, unit in enumerate(model.CLOCKS)}
    known |= {"bound_clocks": 16.0, "bound_by": model.CLOCKS[-1]}
    return dict.fromkeys(model.FIELDS, "") | known | values


def test_units_are_drawn(tmp_path, capsys):
    path = tmp_path / "cost.csv"

    def write(*rows):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, model.FIELDS)
            writer.writeheader()
            writer.writerows(rows)

    write(modelled_row(kernel="together"), modelled_row(kernel="sum_offsets", bound_clocks=300.0))
    assert plot.main([str(path)]) == 0
    with_baseline = matplotlib.image.imread(tmp_path / "cost-units.png")
    write(modelled_row(kernel="together"))
    assert plot.main([str(path)]) == 0
    alone = matplotlib.image.imread(tmp_path / "cost-units.png")
    assert with_baseline.shape == alone.shape and (with_baseline != alone).any()
    write(modelled_row(kernel="pack"))
    fails_in_one_line(capsys, plot, [str(path)], "expected rows of one problem, got none")


def program(name, text, limit=20):
    return gpu.Step(name, limit, [sys.executable, "-c", text])


@pytest.fixture
def planned(monkeypatch):
    """What bench.gpu runs instead of its own steps."""
    steps = [program(name, f"print('{name} ran')", 20) for name in ("first", "second", "third")]
    monkeypatch.setattr(gpu, "steps", lambda folder, dry_run, target: steps)
    return steps


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(planned, tmp_path, capsys):
    interrupted = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    planned[:] = [
        program("tests", "import os; print(os.environ['TRITON_INTERPRET'], os.environ['GCRF_TRITON_CACHE'])"),
        program("tune", "raise SystemExit(3)"),
        gpu.Step("counters", 20, ["no-such-profiler"]),
        program("cases", interrupted, 2),
        program("plot", "print('drawn')"),
    ]
    folder = tmp_path / "results"
    assert gpu.main(["--dry-run", "--out", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    endings = ("done", "failed with status 3", "left out: there is no no-such-profiler", "met its limit", "done")
    for line, ending in zip(lines, endings, strict=False):
        assert ending in line
    assert f"0 {folder / 'cache'}" in (folder / "tests.log").read_text()
    assert "kept" in (folder / "cases.log").read_text() and "drawn" in (folder / "plot.log").read_text()
    assert not (folder / "counters.log").exists()
    assert "tests: 0 " in (folder / "summary.txt").read_text()
    assert gpu.main(["--dry-run", "--out", str(folder)]) == 0  # nothing is left to do
    assert gpu.main(["--dry-run", "--out", str(folder), "--steps", "tune"]) == 1


def test_nothing_of_a_step_outlives_it(planned, tmp_path):
    file = tmp_path / "pid"
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    text = f"import pathlib, subprocess, sys; pathlib.Path({str(file)!r}).write_text(str({child}.pid))"
    planned[:] = [program("leaves", text)]
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "results")]) == 0
    stat = Path("/proc", file.read_text(), "stat")
    for _ in range(100):  # the system takes a moment to end it
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_a_call_goes_on_where_the_last_one_ended(planned, tmp_path, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path / "results"), "--minutes", "0.5"]
    ran = []
    for place in range(3):
        planned[place] = program(planned[place].name, "import time; time.sleep(0.6)", 29.5)  # one fits, two do not
    for left in ("second", "third", None, None):
        assert gpu.main(arguments) == 0
        printed = capsys.readouterr().out
        ran += [line.split()[0] for line in printed.splitlines() if "done after" in line]
        assert (f"goes on with {left}" in printed) == bool(left)
        assert "GHz at most" in printed.splitlines()[-4]  # the main figures come last
    assert ran == ["first", "second", "third"]
    with tarfile.open(tmp_path / "results.tar.gz") as packed:
        names = packed.getnames()
    assert {"results/first.log", "results/third.log", "results/progress.json", "results/summary.txt"} <= set(names)
    fails_in_one_line(
        capsys, gpu, [*arguments[:-1], "0.1", "--steps", "third"], "--minutes: expected at least", "third"
    )
    fails_in_one_line(capsys, gpu, [*arguments, "--steps", "fourth"], "--steps: expected names of first", "'fourth'")


def test_an_interruption_leaves_an_archive_and_the_step_to_the_next_call(planned, tmp_path, monkeypatch, capsys):
    def interrupt(step, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "finish", interrupt)
        assert gpu.main(["--dry-run", "--out", str(tmp_path / "results")]) == 130
    assert (tmp_path / "results.tar.gz").exists()
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "results")]) == 0
    assert "first             done" in capsys.readouterr().out


def test_folders_of_something_else_are_left_alone(planned, tmp_path, monkeypatch, capsys):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "mine.jpg").write_text("")
    arguments = ["--dry-run", "--out", str(tmp_path / "photographs")]
    fails_in_one_line(capsys, gpu, arguments, "--out: expected a new folder or one of this command", "photographs")
    arguments[-1] = str(tmp_path / "results")
    assert gpu.main(arguments) == 0
    whole = (tmp_path / "results" / "progress.json").read_text()
    (tmp_path / "results" / "progress.json").write_text(whole[:20])
    fails_in_one_line(capsys, gpu, arguments, "--out: expected progress of this command", "progress.json")
    (tmp_path / "results" / "progress.json").write_text(whole)
    monkeypatch.setattr(gpu, "this_device", lambda: (Device("Imaginary 9000", 1, 1.0), "sm_90"))
    fails_in_one_line(capsys, gpu, arguments, "--out: expected a dry run of Imaginary 9000", "a dry run of no GPU")


def test_the_archive_is_small_enough(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "small.log").write_text("small")
    (folder / "large.log").write_bytes(random.Random(0).randbytes(10**6))
    path, left_out = gpu.archive(folder)
    assert not left_out and path.stat().st_size > 10**6
    monkeypatch.setattr(gpu, "LARGEST_ARCHIVE", 10**6)
    path, left_out = gpu.archive(folder)
    assert left_out == ["results/large.log"] and path.stat().st_size < 10**6


def test_all_steps_fit_into_45_minutes_and_one_into_9(tmp_path):
    for dry_run in (False, True):
        planned = gpu.steps(tmp_path, dry_run)
        assert len({step.name for step in planned}) == len(planned)
        assert max(step.limit for step in planned) <= 9 * 60
        assert dry_run or sum(step.limit for step in planned) <= 45 * 60


@pytest.mark.parametrize("dry_run", [False, True])
def test_commands_of_the_steps_are_understood(dry_run, tmp_path):
    parsers = {"bench.run": run.parse, "bench.autotune": autotune.parse, "bench.static_cost": static_cost.parse}
    parsers |= {"bench.launches": launches.parse, "bench.plot": plot.parse}
    seen = set()
    for step in gpu.steps(tmp_path, dry_run):
        command = step.command[step.command.index("-m") + 1 :]
        if command[0] in parsers:
            parsers[command[0]](command[1:])
            seen.add(command[0])
    assert seen == set(parsers)


def test_the_gpu_and_its_target_are_known(monkeypatch):
    properties = types.SimpleNamespace(name="Imaginary", major=9, minor=0, multi_processor_count=7, clock_rate=1500000)
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    module = types.SimpleNamespace(get_device_properties=lambda index: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    assert gpu.this_device() == (Device("Imaginary", 7, 1.5), "sm_90")
    properties.major = 8
    assert gpu.this_device()[1] == "sm_80"


def test_the_summary_sets_measurements_beside_the_model(tmp_path):
    def measured(implementation, seconds, ratio="", **values):
        case = Case("imagined", (1, 21, 100, 100), logits=True).describe()
        known = {"mode": "forward+backward", "status": "ok", "triton": "3.6.0", "torch": "2.11.0", "loss_error": "1e-7"}
        known |= {"implementation": implementation, "seconds_median": seconds, "ratio_median": ratio}
        return dict.fromkeys(table.FIELDS, "") | case | known | values

    rows = [measured("triton-engine", "0.0001", "1", peak_bytes="2000000")]
    rows += [
        measured("official", "0.0123", "123.4"),
        measured("copy", "0.00000168"),
        measured("unfold", "", status="oom"),
        measured("triton-engine", "0.0002", "1", utc="later"),  # beside fewer others
        measured("flex", "0.0012", "6.25", utc="later"),
    ]
    table.append(rows, tmp_path / "measurements.csv")
    with (tmp_path / "static_cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, model.FIELDS)
        writer.writeheader()
        writer.writerow(modelled_row(kernel="together", bound_clocks=16.0))
    (tmp_path / "tests.log").write_text("...\n66 passed in 40.00s\n")
    # 10 multiprocessors of 1 GHz: a clock a pixel is 1 us of 10,000 pixels
    text = summary(tmp_path, Device("Imaginary", 10, 1.0), {"tests": "done after 41 s", "tune": "met its limit"})
    lines = text.splitlines()
    assert "Imaginary" in lines[0] and "tune: met its limit" in lines and "tests: 66 passed in 40.00s" in lines
    assert "a copy moves 1.00 TB/s, read and written" in lines
    figures = [line.split() for line in lines if line.startswith("imagined")]
    assert figures[0][:5] == ["imagined", "float32", "no", "0.1000", "0.0160"]
    assert {"oom", "6.25", "123", "2.0", "1e-7"} <= set(figures[0])
    assert figures[1][3] == "100.0" and "dram 16.0" in lines[-1]


@no_gpu
def test_no_gpu_is_one_line(tmp_path, capsys):
    fails_in_one_line(capsys, gpu, ["--out", str(tmp_path / "new")], "expected a GPU", "--dry-run")
    assert not (tmp_path / "new").exists()


def test_launches_of_a_step_are_listed(capsys):
    assert launches.main(["--quick", "--case", "wsl4mis", "--dtypes", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wsl4mis float32, no gates: ") and any("addcmul_" in line for line in lines)
    assert sum(line.startswith("wsl4mis") for line in lines) == 2
    assert launches.main(["--quick", "--case", "wsl4mis", "--gates", "no", "--steps", "1"]) == 0
    assert not capsys.readouterr().out


def test_a_training_step_is_timed_with_the_loss_and_without(tmp_path, capsys):
    from bench import training_step

    path = tmp_path / "steps.csv"
    for _ in range(2):
        assert training_step.main(["--quick", "--turns", "2", "--out", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["precision"] for row in rows] == 2 * ["float32", "bfloat16"] or torch.cuda.is_available()
    for row in rows:
        assert min(float(row["seconds_without"]), float(row["seconds_with"])) > 0
        assert row["turns"] == "2" and row["torch"] == torch.__version__
        assert float(row["percent_more_p20"]) <= float(row["percent_more_median"]) <= float(row["percent_more_p80"])
    assert capsys.readouterr().out.count(" ms, ") == 4


def test_a_training_step_needs_torchvision(monkeypatch, capsys):
    from bench import training_step

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models.segmentation", None)
    with pytest.raises(SystemExit) as stopped:
        training_step.main([])
    assert stopped.value.code == 2 and "expected torchvision" in capsys.readouterr().err
