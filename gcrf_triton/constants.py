"""Numbers that the kernels, the plan of their launches and the choice of a configuration share, and their multiples."""

import math

HALF_LOG2_E = 0.5 * math.log2(math.e)  # exp(-x / 2) = exp2(-HALF_LOG2_E x)
KEYS = 16  # pixels of a row of the halo that a tile meets at a time
SLOTS = 16  # halves a pixel has in a set of features or of gates: the depth of a tensor-core product
SET_SIZE = 3  # feature channels of a set: with what their squares take, they fill the slots
STRIDE_UNIT = 16  # elements in which strides are counted where all of them allow it
SUMMARY_UNIT = 4  # in which the parts of an image's summary are counted, so that they load as one vector
MARGIN_UNIT = 8  # pixels by which an image lies from the left of its padded rows, in multiples
COLUMN_UNIT = 8  # value columns are multiplied in multiples of it, the width of the narrowest tensor-core product
LOG2_LARGEST_VALUE = 14  # of value columns as halves, which end at 2^16
LOG2_LARGEST_AFFINITY = 14  # of affinities as halves, with gates
LARGEST_COLUMNS = 64  # value columns that a tile multiplies in one pass: their sums lie in registers
LARGEST_SETS = 6  # sets of features of all terms together: they lie in registers too


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of a unit that is at least a size."""
    return -(-size // unit) * unit
