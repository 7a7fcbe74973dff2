"""The third kernel: multiply tiles of pixels by their halo."""

import triton
import triton.language as tl

from .differences import sum_differences
from .records import KEYS, LOG2_LARGEST_VALUE, SLOTS, STRIDE_UNIT, STRIDES, in_elements, piece_at

SIZES = ["first_image", "height", "width", "top_row", "chunk_height", "pitch", "tiles_y"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def sum_tile(
    records,
    along_y,
    partners,
    image_scales,
    result,
    energies,
    log2_weights,
    xy,
    factors,
    affinity_scale,
    result_scale,
    first_image,
    height,
    width,
    top_row,
    chunk_height,
    pitch,
    tiles_y,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    KIND: tl.constexpr,
    RESULT: tl.constexpr,
    TERM_SETS: tl.constexpr,
    FIRST_SETS: tl.constexpr,
    N_SETS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_START: tl.constexpr,
    GATES: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    MARGIN: tl.constexpr,
    TABLE: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    PIXELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Multiply packed values by the matrix S, a tile of pixels against its halo, and make of it what is wanted.

    Grid (tiles along x, along y, N). A program owns TILE_Y x TILE_X pixels, padded to PIXELS, a power of two.
    It walks their halo, KEYS pixels of a row at a time. The parts of a term along x and y and two products of packed
    features give exponents [PIXELS, KEYS]; their powers of two, gated, multiply the values [KEYS, columns]: high by
    high, and with SPLIT low by high and high by low. Sums are in float32, in the order of x, KEYS pixels at a time,
    then of rows. Where the features of an image are as they are, their differences give the sums anew, pixel by pixel
    of the halo. `planning.Record` says where pieces lie, `planning.TileLayout` where pixels do.

    What is written, with G = S v and 1 / D in S for a mean, is an energy a program, and with RESULT a result a pixel:

        KIND             energy                     result
        "values"         none                       G
        "probabilities"  sum_i (S 1)_i - p_i.G_i    its gradient by p
        "logits"         sum_i p_i.(1 - I) G_i      its gradient by the logits of p

    The last is taken apart into terms that do not cancel where pixels agree: with t the largest of G_i, into the sum of
    all others and gap = p_i.(t - G_i); its gradient is 2 p_i (t - G_i - gap). The result [images, COLUMNS, H, W], times
    `result_scale`, has any strides (in UNITs, as the width; ORDER names the one that is 1) and dtype. Programs have the
    N images from `first_image` on; energies are [images, tiles_y, tiles along x].
    """
    width, pitch = width * UNIT, pitch * STRIDE_UNIT
    x0, row0 = tl.program_id(0) * TILE_X, tl.program_id(1) * TILE_Y
    y0 = top_row + row0
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.arange(0, PIXELS)
    py, px = pixel // TILE_X, pixel % TILE_X
    if TILE_X & (TILE_X - 1):  # not a power of two: one division serves both, and Triton is told what it knows of %
        step: tl.constexpr = TILE_X & -TILE_X
        px = tl.max_contiguous(tl.multiple_of(pixel - py * TILE_X, step), step)
    key, slot = tl.arange(0, KEYS), tl.arange(0, SLOTS)
    line = pitch.to(tl.int64)
    records += (image * chunk_height + row0) * line * RECORD  # first row of the halo
    left = x0 + (MARGIN - RADIUS)  # and its first pixel
    own_row, own_x = records + (py + RADIUS).to(OFFSET) * pitch * RECORD, left + RADIUS + px

    left_exact, left_rounded = (), ()
    partner = partners + slot[:, None] * SLOTS + slot[None, :]
    for s in tl.static_range(N_SETS):
        mine = tl.load((own_row + piece_at(own_x, pitch, s * SLOTS, SLOTS))[:, None] + slot[None, :])
        left_exact = left_exact + (tl.dot(mine, tl.load(partner)).to(tl.float16),)
        left_rounded = left_rounded + (tl.dot(mine, tl.load(partner + SLOTS * SLOTS)).to(tl.float16),)

    gate = None
    if GATED:
        mine = tl.load((own_row + piece_at(own_x, pitch, GATES, SLOTS))[:, None] + slot[None, :])
        gate = tl.dot(mine, tl.load(partner + 2 * SLOTS * SLOTS)).to(tl.float16)
    sums = ()
    for b in tl.static_range(len(BLOCKS)):
        sums = sums + (_zeros(PIXELS, BLOCKS[b]),)
    if UNROLL:
        for key0 in tl.static_range(0, TILE_X + 2 * RADIUS, KEYS):
            along_x = _along_x(log2_weights, xy, key + (key0 - RADIUS), px, TERM_SETS, RADIUS)
            for row in tl.static_range(TILE_Y + 2 * RADIUS):
                sums = _sum_row(
                    sums, row, records + row * line * RECORD, left + key0 + key, pitch, along_y, along_x, left_exact,
                    left_rounded, gate, key + (key0 - RADIUS), px, py, TERM_SETS, FIRST_SETS, GATED, SPLIT,
                    (row >= RADIUS) & (row < RADIUS + TILE_Y), BLOCKS, BLOCK_START, GATES, HIGH, LOW, RADIUS, TABLE,
                )  # fmt: skip
    else:
        for key0 in range(0, TILE_X + 2 * RADIUS, KEYS):
            along_x = _along_x(log2_weights, xy, key + (key0 - RADIUS), px, TERM_SETS, RADIUS)
            for zone in tl.static_range(3):  # the rows above the tile, its own, and those below
                for row in range(
                    RADIUS * (zone > 0) + TILE_Y * (zone > 1),
                    RADIUS + TILE_Y * (zone > 0) + RADIUS * (zone > 1),
                ):
                    sums = _sum_row(
                        sums, row, records + row * line * RECORD, left + key0 + key, pitch, along_y, along_x,
                        left_exact, left_rounded, gate, key + (key0 - RADIUS), px, py, TERM_SETS, FIRST_SETS, GATED,
                        SPLIT, zone == 1, BLOCKS, BLOCK_START, GATES, HIGH, LOW, RADIUS, TABLE,
                    )  # fmt: skip

    n = first_image + tl.program_id(2)
    image_scales += 3 * n
    if tl.load(image_scales + 2) > 0:
        sums = sum_differences(
            sums, records, own_row, left, log2_weights, xy, factors, pitch, px, py, TERM_SETS, FIRST_SETS, GATED, SPLIT,
            BLOCKS, BLOCK_START, GATES, HIGH, LOW, RECORD, RADIUS, OFFSET, TILE_Y, TILE_X,
        )  # fmt: skip
    inside = (py < TILE_Y) & (y0 + py < height) & (x0 + px < width)
    across, right = in_elements(stride_c, UNIT, ORDER == "c"), in_elements(stride_x, UNIT, ORDER == "x")
    down = in_elements(stride_y, UNIT, False)
    result += n.to(tl.int64) * stride_n * UNIT + y0.to(tl.int64) * down + x0.to(tl.int64) * right
    place = (py.to(OFFSET) * down + px.to(OFFSET) * right)[:, None]
    # back to the units of the caller: of a value, and of a sum of affinities
    value_scale = 2.0**-LOG2_LARGEST_VALUE
    if KIND != "logits":
        value_scale = tl.load(image_scales + 1)
    if GATED:
        affinity_scale *= tl.load(image_scales)
    scale = affinity_scale * value_scale * result_scale
    gap, largest, own_p = None, None, ()
    if KIND != "values":
        energy = tl.zeros((PIXELS,), tl.float32)
        if KIND == "logits":
            energy, largest = _sum_without_largest(sums)
            gap = tl.zeros((PIXELS,), tl.float32)
        for b in tl.static_range(len(BLOCKS)):
            c = (tl.arange(0, BLOCKS[b]) + BLOCK_START[b])[None, :]
            value = own_row[:, None] + tl.arange(0, BLOCKS[b])[None, :]
            p = tl.load(value + piece_at(own_x, pitch, HIGH + BLOCK_START[b], BLOCKS[b])[:, None]).to(tl.float32)
            if SPLIT:
                p += tl.load(value + piece_at(own_x, pitch, LOW + BLOCK_START[b], BLOCKS[b])[:, None]).to(tl.float32)
            p *= value_scale
            own_p = own_p + (p,)
            if KIND == "logits":
                gap += tl.sum(p * (largest[:, None] - sums[b]), axis=1)
            else:
                mass = tl.where(c == COLUMNS, sums[b] * 2.0**-LOG2_LARGEST_VALUE, 0.0)
                energy += tl.sum(tl.where(c < COLUMNS, -p * (sums[b] * value_scale), mass), axis=1)
        if KIND == "logits":
            energy = (energy + gap) * value_scale
        tile = (n * tiles_y + top_row // TILE_Y + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(energies + tile, tl.sum(tl.where(inside, energy * affinity_scale, 0.0)))
    if RESULT:
        for b in tl.static_range(len(BLOCKS)):
            c = (tl.arange(0, BLOCKS[b]) + BLOCK_START[b])[None, :]
            if KIND == "values":
                value = sums[b] * scale
            elif KIND == "probabilities":
                value = sums[b] * (scale * -2)
            else:
                value = (own_p[b] * (scale * 2)) * ((largest[:, None] - sums[b]) - gap[:, None])
            tl.store(result + place + c.to(OFFSET) * across, value, mask=inside[:, None] & (c < COLUMNS))


@triton.jit
def _zeros(PIXELS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((PIXELS, COLUMNS), tl.float32)


@triton.jit
def _along_x(log2_weights, xy, key_x, px, TERM_SETS: tl.constexpr, RADIUS: tl.constexpr):
    # for every term its weight and part along x [PIXELS, KEYS], as a power of two if it has no features
    dx = key_x.to(tl.float32)[None, :] - px.to(tl.float32)[:, None]
    along_x = ()
    for m in tl.static_range(len(TERM_SETS)):
        part = tl.where(tl.abs(dx) <= RADIUS, log2_weights[m] - xy[m] * (dx * dx), float("-inf"))
        along_x = along_x + (tl.exp2(part) if TERM_SETS[m] == 0 else part,)
    return along_x


@triton.jit
def _combine(others, largest, more_others, other_largest):
    return others + more_others + tl.minimum(largest, other_largest), tl.maximum(largest, other_largest)


@triton.jit
def _sum_without_largest(sums):
    # over the columns of all blocks: the sum of all but the largest, and the largest
    others, largest = tl.reduce((tl.zeros_like(sums[0]), sums[0]), 1, _combine)
    for b in tl.static_range(1, len(sums)):
        more_others, other_largest = tl.reduce((tl.zeros_like(sums[b]), sums[b]), 1, _combine)
        others, largest = _combine(others, largest, more_others, other_largest)
    return others, largest


@triton.jit
def _sum_row(
    sums,
    row,
    records,
    x,
    pitch,
    along_y,
    along_x,
    left_exact,
    left_rounded,
    gate,
    key_x,
    px,
    py,
    TERM_SETS: tl.constexpr,
    FIRST_SETS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    SELF: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_START: tl.constexpr,
    GATES: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    RADIUS: tl.constexpr,
    TABLE: tl.constexpr,
):
    # adds the KEYS pixels x of a row of records to the sums of a tile; with SELF a pixel may meet itself there
    y_term = along_y - py + (row + (TABLE // 2 - RADIUS))  # where that of dy = row - RADIUS - py lies [PIXELS]
    affinity = _affinity_of_term(
        records, x, pitch, y_term, along_x[0], left_exact, left_rounded, row, key_x, px, py, TERM_SETS[0],
        FIRST_SETS[0], SPLIT, SELF, RADIUS,
    )  # fmt: skip
    for m in tl.static_range(1, len(TERM_SETS)):
        affinity += _affinity_of_term(
            records, x, pitch, y_term + m * TABLE, along_x[m], left_exact, left_rounded, row, key_x, px, py,
            TERM_SETS[m], FIRST_SETS[m], SPLIT, SELF, RADIUS,
        )  # fmt: skip
    if GATED:
        affinity *= tl.dot(gate, _slots(records, x, pitch, GATES))
    affinity_high = affinity.to(tl.float16)
    affinity_low = (affinity - affinity_high.to(tl.float32)).to(tl.float16)
    updated = ()
    for b in tl.static_range(len(BLOCKS)):
        value = records + tl.arange(0, BLOCKS[b])[None, :]
        value_high = tl.load(value + piece_at(x, pitch, HIGH + BLOCK_START[b], BLOCKS[b])[:, None])
        total = tl.dot(affinity_high, value_high, sums[b])
        if SPLIT:
            total = tl.dot(affinity_low, value_high, total)
            value_low = tl.load(value + piece_at(x, pitch, LOW + BLOCK_START[b], BLOCKS[b])[:, None])
            total = tl.dot(affinity_high, value_low, total)
        updated = updated + (total,)
    return updated


@triton.jit
def _slots(records, x, pitch, START: tl.constexpr):
    # of the set or gates at START of the records of pixels x [SLOTS, KEYS]
    return tl.load(records + piece_at(x, pitch, START, SLOTS)[None, :] + tl.arange(0, SLOTS)[:, None])


@triton.jit
def _affinity_of_term(
    records,
    x,
    pitch,
    y_term,
    exponent,
    left_exact,
    left_rounded,
    row,
    key_x,
    px,
    py,
    SETS: tl.constexpr,
    FIRST_SET: tl.constexpr,
    SPLIT: tl.constexpr,
    SELF: tl.constexpr,
    RADIUS: tl.constexpr,
):
    # between the pixels of a tile and KEYS others [PIXELS, KEYS]; the exponent comes with its part along x
    if SELF:
        without_self = tl.where(key_x[None, :] == px[:, None], 0.0 if SETS == 0 else float("-inf"), exponent)
        exponent = tl.where((py == row - RADIUS)[:, None], without_self, exponent)
    if SETS == 0:  # both parts are powers of two already
        affinity = exponent * tl.load(y_term)[:, None]
    else:
        exponent += tl.load(y_term)[:, None]
        # These products are whole numbers of u^2, and exact if summed from 0: tensor cores cut off digits of what they
        # add to a large sum. float16 inputs do not need that precision.
        exact = tl.dot(left_exact[FIRST_SET], _slots(records, x, pitch, FIRST_SET * SLOTS), None if SPLIT else exponent)
        for s in tl.static_range(FIRST_SET + 1, FIRST_SET + SETS):
            exact = tl.dot(left_exact[s], _slots(records, x, pitch, s * SLOTS), exact)
        rounded = exponent if SPLIT else exact
        for s in tl.static_range(FIRST_SET, FIRST_SET + SETS):
            rounded = tl.dot(left_rounded[s], _slots(records, x, pitch, s * SLOTS), rounded)
        # a plain sum would become the start of the dot's own sum
        affinity = tl.exp2(tl.fma(exact, 1.0, rounded) if SPLIT else rounded)
    return affinity
