"""Progress for whoever waits: a bar in a terminal, lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def write_line(line: str) -> None:
    """Print a line above the bars, at once: a pipe would hold it back."""
    tqdm.write(line)
    sys.stdout.flush()


def bar(steps: Iterable, name: str, total: int, unit: str, initial: int = 0, hidden: bool = False) -> tqdm:
    """A bar over the steps, or a line as they start where standard error is no terminal."""
    shown = tqdm(steps, name, total, unit=unit, initial=initial, disable=hidden or None)
    if shown.disable and not hidden:
        write_line(f"{name}: {initial} of {total} {unit}s")
    return shown
