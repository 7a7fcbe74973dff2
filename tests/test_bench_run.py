"""Promise: a run keeps what it measured, compares it with an older one, and says in one line what it cannot do."""

import csv
import dataclasses
import io
import json
import os
import platform

import pytest
import torch
from measurements import TINY, fails_in_one_line, needs_glibc, row

from bench import plot, run
from bench.measuring import cases, implementations, measure, progress, table

FAST = ["--device", "cpu", "--no-memory", "--repeats", "1", "--budget", "10"]


@pytest.fixture
def tiny_named(monkeypatch):
    """The named cases are two tiny ones."""
    both = (TINY, dataclasses.replace(TINY, name="tinier", shape=(1, 3, 5, 6)))
    monkeypatch.setattr(cases, "NAMED", both)
    monkeypatch.setattr(run, "NAMED", both)


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


@needs_glibc
def test_a_warm_run_says_so_and_measures_no_memory(tiny_named, tmp_path):
    path = tmp_path / "rows.csv"
    arguments = ["--device", "cpu", "--cases", "tiny", "--modes", "forward", "--implementations", "offsets"]
    for warm in ([], ["--warm"]):
        assert run.main([*arguments, "--repeats", "1", "--out", str(path), *warm]) == 0
    fresh, warm = table.read(path)
    assert (fresh["warm"], warm["warm"]) == ("no", "yes") and warm["status"] == "ok"
    assert int(fresh["peak_bytes"]) >= 0 and warm["peak_bytes"] == ""


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
    fails_in_one_line(capsys, run, ["--cases", "voc-crops"], "--cases", "official-clicks", "'voc-crops'")
    fails_in_one_line(capsys, run, ["--sweeps", "sigma"], "--sweeps", "radius", "'sigma'")
    fails_in_one_line(capsys, run, ["--repeats", "0"], "--repeats", "at least 1", "0")
    fails_in_one_line(capsys, run, ["--budget", "-1"], "--budget", "above 0", "-1")
    fails_in_one_line(capsys, run, ["--device", "abacus"], "--device", "abacus")
    fails_in_one_line(capsys, run, ["--device", "cpu", "--cuda-graph"], "--cuda-graph", "cpu")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    fails_in_one_line(capsys, run, ["--device", "cpu", "--warm"], "--warm", "glibc", "cpu")
    fails_in_one_line(capsys, run, ["--out", str(tmp_path / "no" / "rows.csv")], "rows.csv", "cannot be written")
    fails_in_one_line(capsys, run, ["--compare", str(tmp_path / "no.csv")], "no.csv", "cannot be read")
    fails_in_one_line(capsys, plot, [str(tmp_path / "no.csv")], "no.csv", "cannot be read")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b"\n"])
def test_a_foreign_file_is_refused_and_left_alone(content, tmp_path, capsys):
    path = tmp_path / "foreign.csv"
    path.write_bytes(content)
    fails_in_one_line(capsys, run, ["--out", str(path)], "foreign.csv", "expected")
    fails_in_one_line(
        capsys, run, ["--compare", str(path), "--out", str(tmp_path / "new.csv")], "foreign.csv", "expected"
    )
    fails_in_one_line(capsys, plot, [str(path)], "foreign.csv", "expected")
    assert path.read_bytes() == content and not (tmp_path / "new.csv").exists()


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
