"""The Gated CRF loss for weakly supervised segmentation, exact, without ever unfolding a window."""

from .loss import GatedCRFLoss, gated_crf_loss, partial_cross_entropy

__version__ = "0.1.0"
__all__ = ["GatedCRFLoss", "gated_crf_loss", "partial_cross_entropy"]
