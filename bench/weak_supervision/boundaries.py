"""How strong the Gated CRF loss is on a data set, and the weight that follows, before any training.

    python -m bench.weak_supervision.boundaries --data acdc --root ACDC

For kernels and grids, from images with dense masks (a few dozen are enough):

- mass: the mean sum of a pixel's kernel, which is the loss where no two predictions agree;
- crossing: the share of it that joins pixels of different classes. A kernel that knew the classes would have 0; `xy`,
  which knows only distance, is what colour has to beat;
- masks: the loss of the dense masks, mass x crossing. This, times the weight, is what the truth costs in training;
- weight: 0.3 over the mass, where to start; the README has the evidence and its limits.

Any setting of `python -m bench.weak_supervision` can be given; images have the size that they are trained at.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from .collection import open_collection
from .masks import loss_of_masks
from .settings import add_options, preset

STRENGTH = 0.3  # weight x mass
SIGMAS = (0.02, 0.03, 0.06, 0.1, 0.2, 0.3)
GRIDS = ("full", "4")


def main(arguments: list[str] | None = None) -> None:
    """Print a line for every kernel on every grid."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision.boundaries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    try:
        settings = preset(options.pop("data", "acdc"), **options)
        collection = open_collection(settings)
        print(f"{settings.data}, radius {settings.radius}, xy {settings.xy:g}")
        print(f"{'kernel':>12}{'grid':>8}{'mass':>8}{'crossing':>10}{'masks':>8}{'weight':>8}")
        for grid in GRIDS:
            for sigma in (*SIGMAS, None):
                colour = {"kernels": "xy"} if sigma is None else {"kernels": "rgb+xy", "sigma": sigma}
                found = loss_of_masks(collection, dataclasses.replace(settings, loss_stride=grid, **colour))
                title = "xy" if sigma is None else f"sigma {sigma:g}"
                line = f"{title:>12}{grid:>8}{found.mass:8.1f}{found.loss / found.mass:10.2%}{found.loss:8.3f}"
                print(f"{line}{STRENGTH / found.mass:8.2g}", flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
