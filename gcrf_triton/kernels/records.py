"""How kernels find their way in records, and the numbers that they share with the plan of their launch.

`planning.Record` draws a record, `planning.TileLayout` a padded image.
"""

import triton
import triton.language as tl

from .. import constants

KEYS = tl.constexpr(constants.KEYS)
SLOTS = tl.constexpr(constants.SLOTS)
SET_SIZE = tl.constexpr(constants.SET_SIZE)
STRIDE_UNIT = tl.constexpr(constants.STRIDE_UNIT)
SUMMARY_UNIT = tl.constexpr(constants.SUMMARY_UNIT)
LOG2_LARGEST_VALUE = tl.constexpr(constants.LOG2_LARGEST_VALUE)

STRIDES = ["stride_n", "stride_c", "stride_y", "stride_x"]  # of values and results: arguments that change with sizes


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def piece_at(x, pitch, START: tl.constexpr, SIZE: tl.constexpr):
    # where a row of records has the SIZE halves of pixel x that are a piece, START of the record: pieces lie in planes
    return pitch * START + x * SIZE


@triton.jit
def in_elements(stride, UNIT: tl.constexpr, IS_ONE: tl.constexpr):
    # a stride that is given in units
    return 1 if IS_ONE else stride * UNIT
