"""A tiny case, imagined rows of measurements, and how commands refuse."""

import platform

import pytest
import torch

from bench.measuring import cases, table

TINY = cases.Case("tiny", (2, 3, 9, 7), cases.OFFICIAL_PAIR, radius=2)
CPU = torch.device("cpu")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory as glibc does")


def row(**values):
    """A row that nobody measured, but for these values."""
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


def fails_in_one_line(capsys, command, arguments, *expected):
    """A command refuses its arguments, and says why."""
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1 and message.endswith("\n")
    for part in expected:
        assert part in message
