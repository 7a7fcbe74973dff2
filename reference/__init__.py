"""Slow, readable versions of the Gated CRF loss, written from its equations alone."""

from .loops import gated_crf_energies
from .unfold import gated_crf_unfold

__all__ = ["gated_crf_energies", "gated_crf_unfold"]
