"""What share of a training step the Gated CRF loss takes, forward and backward.

    python -m bench.weak_supervision.costs --acdc ACDC --msrc MSRC_v2

Networks and grids take turns, a few steps each; nothing is scored. Every turn is a row of --csv: the median step, and
the loss alone on the logits of the last one. Printed are medians over the turns, with the least and most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from ..measuring.progress import bar
from .collection import fingerprint
from .data import open_data
from .losses import time_loss
from .rows import Plan, append_row, read_rows, row_of
from .samples import Batches, TrainingSet
from .settings import Settings, preset
from .train import Result, Trainer

STEPS, WARM_UP = 12, 2  # of a turn
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "stride 4": ("msrc", {}),
    "full resolution, U-Net": ("acdc", {}),
    "full resolution, full-resolution head": ("msrc", {"network": "lite0-full"}),
    "full resolution, head of stride 4": ("msrc", {"loss_stride": "full"}),
}


class Case:
    """A training that can be gone on with, a turn at a time."""

    def __init__(self, settings: Settings, turns: int, labels: Path) -> None:
        data = open_data(settings, labels)
        self.settings, self.files, self.left_out = settings, fingerprint(data.collection), data.left_out
        self.trainer = Trainer(settings, data.pixels)
        samples = TrainingSet(data, settings)
        batches = Batches(len(samples), settings.batch, range(turns * STEPS), settings.seed, 0, 1)
        self.batches = iter(DataLoader(samples, batch_sampler=batches))

    def turn(self) -> Result:
        """A few steps, and what they cost."""
        for _ in range(STEPS):
            last = self.trainer.step(next(self.batches))
        seconds = statistics.median(self.trainer.progress.seconds[-STEPS:][WARM_UP:])
        alone, mass = time_loss(*last, self.settings)
        return Result({}, [], seconds, alone / seconds, mass)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write rows, print shares."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision.costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--acdc", default="", metavar="FOLDER", help="slices of ACDC, as WSL4MIS cuts them")
    parser.add_argument("--msrc", default="", metavar="FOLDER", help="MSRC-v2 in the layout of PASCAL VOC")
    parser.add_argument("--turns", type=int, default=5, help="of each (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("weak-supervision-output/costs.csv"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    if not (options.acdc or options.msrc):
        parser.error("expected the folder of at least one data set")
    if options.turns < 1:
        parser.error(f"--turns: expected at least 1, got {options.turns}")
    try:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        cases = {}
        for title, (data, changes) in CASES.items():
            if root := getattr(options, data):
                # no delay: all steps have the loss
                settings = preset(data, **{"root": root, "delay": 0.0, "ramp": 0.0} | changes)
                cases[title] = Case(settings, options.turns, options.csv.parent / "labels")
        for _ in bar(range(options.turns), "costs", options.turns, "turn"):
            for title, case in cases.items():
                append_row(options.csv, row_of(Plan(title, case.settings), case.turn(), case.files, case.left_out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table_of(read_rows(options.csv)))


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """Markdown, one line a network and grid."""
    lines = [["data", "loss at", "share of a step", "least to most", "a step", "turns"], ["---"] * 6]
    for title in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == title]
        shares, seconds = ([float(row[name]) for row in mine] for name in ("loss_share", "seconds_per_step"))
        share, spread = f"{statistics.median(shares):.1%}", f"{min(shares):.1%} to {max(shares):.1%}"
        step = f"{1e3 * statistics.median(seconds):.0f} ms"
        lines.append([mine[0]["data"], title, share, spread, step, str(len(mine))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
