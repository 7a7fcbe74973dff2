"""Train a network from clicks, scribbles or dense masks, with or without the Gated CRF loss.

    python -m bench.weak_supervision --data acdc --root ACDC --labels scribbles --loss gcrf --out run
    torchrun --nproc-per-node 4 -m bench.weak_supervision --data voc --root VOC2012 --labels-from clicks.json

Killed and started again with the same --out, it goes on from its last checkpoint and ends in the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .data import open_data
from .settings import add_options, preset
from .train import first_process_first, train


def main(arguments: list[str] | None = None) -> None:
    """Train once; write the result next to the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("weak-supervision-output/run"), help="folder (%(default)s)")
    parser.add_argument("--on-broken", choices=("stop", "skip"), default="stop", help="at unusable files (%(default)s)")
    options = vars(parser.parse_args(arguments))
    out, on_broken = options.pop("out"), options.pop("on_broken")
    try:
        settings = preset(options.pop("data", "acdc"), **options)
        out.mkdir(parents=True, exist_ok=True)
        with first_process_first():
            data = open_data(settings, out / "labels", on_broken)
        result = train(settings, data, out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if result:
        (out / "result.json").write_text(json.dumps({"settings": asdict(settings)} | asdict(result), indent=1))
        print({name: value for name, value in result.scores.items() if not name.startswith("iou")})


if __name__ == "__main__":
    main()
