"""Make clicks or scribbles from dense masks, and save them in the formats that people's come in.

python -m bench.weak_supervision.make_labels --data msrc --root MSRC_v2 --labels clicks --save-to clicks.json
python -m bench.weak_supervision.make_labels --data voc --root VOC2012 --labels scribbles --save-to scribbles
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .data import open_collection, save_labels
from .settings import add_options, preset

OPTIONS = ("data", "root", "images", "masks", "train_list", "test_list", "class_names", "labels", "label_seed")


def main(arguments: list[str] | None = None) -> None:
    """Write a JSON file of clicks, or a folder of XML files, for the training names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weak_supervision.make_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, OPTIONS)
    parser.add_argument("--save-to", type=Path, required=True, help="JSON file of clicks, or folder of scribbles")
    options = vars(parser.parse_args(arguments))
    save_to = options.pop("save_to")
    try:
        settings = preset(options.pop("data", "acdc"), **options)
        if settings.labels == "dense":
            raise ValueError("labels: expected clicks or scribbles, got dense")
        collection = open_collection(settings)
        names = collection.lists["train"]
        save_labels(collection, names, settings.labels, settings.label_seed, save_to)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {settings.labels} of {len(names)} images to {save_to}")


if __name__ == "__main__":
    main()
