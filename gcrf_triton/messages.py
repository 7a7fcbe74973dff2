"""Warnings that point at the line of the caller."""

from __future__ import annotations

import os
import sys
import warnings

import torch

OWN = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
_texts: dict[tuple[str, str, int], str] = {}  # of a message, file and line


def warn_caller(message: str, **values: object) -> None:
    """Warn the code that called this package; with the same text again, which Python then shows once for every line."""
    frame, level = sys._getframe(1), 2
    while frame.f_code.co_filename.startswith(OWN) and frame.f_back is not None:  # PyTorch's calls modules
        frame, level = frame.f_back, level + 1
    place = (message, frame.f_code.co_filename, frame.f_lineno)
    text = _texts.setdefault(place, message.format(**values) if values else message)
    warnings.warn(text, stacklevel=level)
