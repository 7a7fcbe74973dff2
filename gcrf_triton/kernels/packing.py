"""The second kernel: pack what a pixel brings into one record of halves."""

import triton
import triton.language as tl

from .records import (
    LOG2_LARGEST_VALUE,
    SET_SIZE,
    SLOTS,
    STRIDE_UNIT,
    STRIDES,
    SUMMARY_UNIT,
    in_elements,
    is_finite,
    piece_at,
)

LOG2_E = tl.constexpr(1.4426950408889634)
SQUARE_UNIT = tl.constexpr(1024.0)  # brings squares below 2^26 into the range of halves; larger ones become infinite
LOG2_LARGEST_UNIT = tl.constexpr(2.0)  # log2: squares of 2^10 such units fit into halves, times SQUARE_UNIT


@triton.jit
def _exponent_above(largest):
    # e with largest < 2^e, from the bits of a float32 >= 0
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100).to(tl.float32)


@triton.jit
def _largest_of(summary, row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(summary + row * PARTS + part, mask=part < parts, other=float("-inf")))


@triton.jit
def _middle(summary, k, parts, PARTS: tl.constexpr):
    # of the values of channel k, and how far from it they lie; 0 where no gate is open
    part = tl.arange(0, PARTS)
    smallest = tl.min(tl.load(summary + 2 * k * PARTS + part, mask=part < parts, other=float("inf")))
    largest = _largest_of(summary, 2 * k + 1, parts, PARTS)
    none = smallest > largest
    smallest, largest = tl.where(none, 0.0, smallest), tl.where(none, 0.0, largest)
    half_range = 0.5 * largest - 0.5 * smallest  # halved first, as the difference may overflow
    return smallest + half_range, half_range


SIZES = ["first_image", "images", "parts", "height", "width", "top_row", "chunk_height", "pitch"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def pack(
    values,
    copies,
    summary,
    factors,
    xy,
    records,
    along_y,
    partners,
    image_scales,
    first_image,
    images,
    parts,
    height,
    width,
    top_row,
    chunk_height,
    pitch,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    N_SETS: tl.constexpr,
    CHANNEL: tl.constexpr,
    TERM_SETS: tl.constexpr,
    GATED: tl.constexpr,
    MEAN: tl.constexpr,
    KIND: tl.constexpr,
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
    SUMMARY_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Write one record a pixel of the padded images: its sets of features, its gates, then its values, all as halves.

    Grid (ceil(chunk_height STRIDE_UNIT pitch / PIXELS), N). A program owns PIXELS pixels of a padded image. It reads
    the CHANNELS channels of the copies [images, CHANNELS + 2 if gated, H, W] and the value columns [images, COLUMNS, H,
    W] of any strides and dtype, of N images from `first_image` on, and writes records [N, chunk_height, RECORD pitch].
    Images lie MARGIN from the left and RADIUS from the top, and the first padded row is RADIUS above row `top_row` of
    the image; the values around are 0. The width and the strides are given in UNITs, the pitch in STRIDE_UNITs, the
    parts of the summary in SUMMARY_UNITs; ORDER names the stride that is 1. Where pieces lie: `planning.Record`.

    A set has SET_SIZE channels g for one term, CHANNEL says which (-1: none, 0). g = (f - middle) factor, with the
    middle between the smallest and the largest f in the summary. With u a power of two, g = h + l, h a multiple of u,
    |h| <= 2^10 u. With |h|^2 = 1024 a_1 + a_2 and 2 h.l + |l|^2 = b_1 + b_2, where a_2 and b_2 are what a_1 and b_1
    lack as halves, the slots of a set are

        0    1    2    3    4    5    6    7    8    9    10    11  12  13   14   15
        h_0  h_1  h_2  l_0  l_1  l_2  a_1  a_2  b_1  b_2  1024  1   1   l_0  l_1  l_2

    Products of h are whole numbers of u^2, which float32 adds exactly however close two pixels are, and what l adds is
    small: |g - g'|^2 comes out as if the differences had been taken first.

    A value v, after softmax over its columns if KIND is "logits", times a power of two is high + low; the power brings
    the image's largest (1 after softmax) up to 2^LOG2_LARGEST_VALUE. If KIND is "probabilities" a column of ones
    follows, each as 2^LOG2_LARGEST_VALUE. Low parts exist with SPLIT. With GATED, the slots of the gates, each scaled
    below 1, are s_1 s_2 d_1 d_2 s_1 d_1 0 ..., with s = s_1 + s_2 and d = d_1 + d_2. Under two closed gates features
    are 0. Where a channel or a value (after softmax) is not finite and a gate is closed, values, features and both
    gates are 0: the pixel leaves the sum.

    Where the features of an image span too much for that, 2^13 / sqrt(log2(e) / 2) sigmas or more, a set has its
    channels as they are instead, in float32.

    Program (0, n) also writes image_scales [images, 3]: what undoes the scale of the gates, with MEAN divided by the
    sum of d over all images, of s without it (at least 1); without softmax, what undoes that of the values; and 1 if
    the features are as they are, else 0. Program (0, 0) writes along_y [terms, TABLE], the part along y of every term
    (as a power of two if it has no sets), with offset 0 at TABLE // 2. It also writes partners [3, SLOTS, SLOTS], by
    which a pixel's own slots become what meets those of another, which have a prime: 2 h.h' - |h|^2 - |h'|^2, then
    2 l.h' + 2 h.l' + 2 l.l' - b - b', and s d' + d s'.
    """
    SOFTMAX: tl.constexpr = KIND == "logits"
    width, pitch, parts = width * UNIT, pitch * STRIDE_UNIT, parts * SUMMARY_UNIT
    image = tl.program_id(1)
    n = first_image.to(tl.int64) + image
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    padded_x = pixel % pitch
    x, y = padded_x - MARGIN, top_row + pixel // pitch - RADIUS
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    written = (pixel < chunk_height * pitch)[:, None]
    plane = height.to(tl.int64) * width
    copies += n * (CHANNELS + 2 * GATED) * plane
    own = y.to(tl.int64) * width + x
    row = records + image.to(tl.int64) * chunk_height * pitch * RECORD + (pixel - padded_x).to(OFFSET)[:, None] * RECORD
    padded_x = padded_x[:, None]
    all_summaries, summary = summary, summary + n * SUMMARY_ROWS * PARTS

    s, d, closed, finite = 0.0, 0.0, inside & (x < 0), inside
    if GATED:
        s = tl.load(copies + CHANNELS * plane + own, mask=inside, other=0.0)
        d = tl.load(copies + (CHANNELS + 1) * plane + own, mask=inside, other=0.0)
        closed = inside & ((s == 0) | (d == 0))
        for k in tl.static_range(CHANNELS):
            finite = finite & is_finite(tl.load(copies + k * plane + own, mask=inside, other=0.0))
    across, down = in_elements(stride_c, UNIT, ORDER == "c"), in_elements(stride_y, UNIT, False)
    start = values + n * stride_n * UNIT
    start += (y.to(OFFSET) * down + x.to(OFFSET) * in_elements(stride_x, UNIT, ORDER == "x"))[:, None]
    columns = ()
    for b in tl.static_range(len(BLOCKS)):
        c = (tl.arange(0, BLOCKS[b]) + BLOCK_START[b])[None, :]
        mask = inside[:, None] & (c < COLUMNS)
        value = tl.load(start + c.to(OFFSET) * across, mask=mask, other=0.0).to(tl.float32)
        if GATED and not SOFTMAX:
            finite = finite & (tl.sum(value * 0.0, axis=1) == 0)
        columns = columns + (tl.where(c < COLUMNS, value, float("-inf")) if SOFTMAX else value,)
    value_exponent = 0.0
    if SOFTMAX:
        columns, total = _softmax(columns, tl.where(inside, 2.0**LOG2_LARGEST_VALUE, 0.0))
        finite = finite & is_finite(total)
    else:
        value_exponent = _exponent_above(_largest_of(summary, SUMMARY_ROWS - 1, parts, PARTS))
    hidden = closed & (finite == 0)
    for b in tl.static_range(len(BLOCKS)):
        c = (tl.arange(0, BLOCKS[b]) + BLOCK_START[b])[None, :]
        value = columns[b] if SOFTMAX else columns[b] * tl.exp2(-value_exponent + LOG2_LARGEST_VALUE)
        if GATED:
            value = tl.where(hidden[:, None], 0.0, value)
        if KIND == "probabilities":
            value = tl.where(c == COLUMNS, tl.where(inside, 2.0**LOG2_LARGEST_VALUE, 0.0)[:, None], value)
        value_high = value.to(tl.float16)
        place = row + tl.arange(0, BLOCKS[b])[None, :]
        tl.store(place + piece_at(padded_x, pitch, HIGH + BLOCK_START[b], BLOCKS[b]), value_high, mask=written)
        if SPLIT:
            value_low = (value - value_high.to(tl.float32)).to(tl.float16)
            tl.store(place + piece_at(padded_x, pitch, LOW + BLOCK_START[b], BLOCKS[b]), value_low, mask=written)

    slot = row + tl.arange(0, SLOTS)[None, :]
    seen, gate_scale = inside, 1.0
    if GATED:
        s, d = tl.where(hidden, 0.0, s), tl.where(hidden, 0.0, d)
        seen = inside & ((s != 0) | (d != 0))
        exponent_s = _exponent_above(_largest_of(summary, 2 * CHANNELS, parts, PARTS))
        exponent_d = _exponent_above(_largest_of(summary, 2 * CHANNELS + 1, parts, PARTS))
        gate_scale = tl.exp2(exponent_s + exponent_d)
        s, d = s * tl.exp2(-exponent_s), d * tl.exp2(-exponent_d)
        s_high, d_high = s.to(tl.float16), d.to(tl.float16)
        s_low, d_low = (s - s_high.to(tl.float32)).to(tl.float16), (d - d_high.to(tl.float32)).to(tl.float16)
        zero = tl.zeros((PIXELS,), tl.float16)
        slots = _interleave(
            s_high, s_low, d_high, d_low, s_high, d_high, zero, zero,
            zero, zero, zero, zero, zero, zero, zero, zero, PIXELS,
        )  # fmt: skip
        tl.store(slot + piece_at(padded_x, pitch, GATES, SLOTS), slots, mask=written)

    largest_unit = LOG2_LARGEST_UNIT
    for g in tl.static_range(N_SETS):
        bound = 0.0
        for k in tl.static_range(SET_SIZE * g, SET_SIZE * g + SET_SIZE):
            if CHANNEL[k] >= 0:
                _, half_range = _middle(summary, CHANNEL[k], parts, PARTS)
                bound = tl.maximum(half_range * factors[k], bound)
        unit_exponent = tl.maximum(_exponent_above(bound) - 10, -8.0)
        largest_unit = tl.maximum(unit_exponent, largest_unit)
        unit_exponent = tl.minimum(unit_exponent, LOG2_LARGEST_UNIT)
        unit, units = tl.exp2(unit_exponent), tl.exp2(-unit_exponent)
        highs, lows = (), ()
        square, mixed = tl.zeros((PIXELS,), tl.float32), tl.zeros((PIXELS,), tl.float32)
        for k in tl.static_range(SET_SIZE * g, SET_SIZE * g + SET_SIZE):
            feature = tl.zeros((PIXELS,), tl.float32)
            if CHANNEL[k] >= 0:
                middle, _ = _middle(summary, CHANNEL[k], parts, PARTS)
                feature = tl.load(copies + CHANNEL[k] * plane + own, mask=inside, other=0.0)
                feature = tl.where(seen, (feature - middle) * factors[k], 0.0)
            high = ((feature * units + 12582912.0) - 12582912.0) * unit  # 1.5 2^23 rounds to whole numbers
            low = (feature - high).to(tl.float16)
            highs, lows = highs + (high.to(tl.float16),), lows + (low,)
            square += high * high
            mixed += (2 * high + low.to(tl.float32)) * low.to(tl.float32)
        one = tl.full((PIXELS,), 1.0, tl.float16)
        square_high = (square * (1 / SQUARE_UNIT)).to(tl.float16)
        square_low = (square - square_high.to(tl.float32) * SQUARE_UNIT).to(tl.float16)
        mixed_high = mixed.to(tl.float16)
        mixed_low = (mixed - mixed_high.to(tl.float32)).to(tl.float16)
        slots = _interleave(
            highs[0], highs[1], highs[2], lows[0], lows[1], lows[2], square_high, square_low,
            mixed_high, mixed_low, one * SQUARE_UNIT, one, one, lows[0], lows[1], lows[2], PIXELS,
        )  # fmt: skip
        tl.store(slot + piece_at(padded_x, pitch, g * SLOTS, SLOTS), slots, mask=written)

    if tl.program_id(0) == 0:
        if GATED and MEAN:
            part, others, other = tl.arange(0, PARTS)[None, :], tl.arange(0, 8)[:, None], 0
            sums = tl.zeros((8, PARTS), tl.float32)
            while other < images:  # eight at a time, as one would wait for the other
                gate_sums = all_summaries + ((other + others) * SUMMARY_ROWS + 2 * CHANNELS + 2) * PARTS + part
                sums += tl.load(gate_sums, mask=(other + others < images) & (part < parts), other=0.0)
                other += 8
            gate_scale /= tl.maximum(tl.sum(tl.sum(sums, axis=1), axis=0), 1.0)
        tl.store(image_scales + 3 * n, gate_scale)
        if not SOFTMAX:
            tl.store(image_scales + 3 * n + 1, tl.exp2(value_exponent - LOG2_LARGEST_VALUE))
        tl.store(image_scales + 3 * n + 2, tl.where(largest_unit > LOG2_LARGEST_UNIT, 1.0, 0.0))
        if tl.program_id(1) == 0:
            offset = tl.arange(0, TABLE) - TABLE // 2
            for m in tl.static_range(len(TERM_SETS)):
                term = tl.where(tl.abs(offset) <= RADIUS, -xy[m] * (offset * offset).to(tl.float32), float("-inf"))
                tl.store(along_y + m * TABLE + tl.arange(0, TABLE), tl.exp2(term) if TERM_SETS[m] == 0 else term)
            _write_partners(partners)

    if largest_unit > LOG2_LARGEST_UNIT:
        tl.debug_barrier()  # other threads have written there
        for g in tl.static_range(N_SETS):
            for k in tl.static_range(SET_SIZE * g, SET_SIZE * g + SET_SIZE):
                feature = tl.zeros((PIXELS,), tl.float32)
                if CHANNEL[k] >= 0:
                    feature = tl.load(copies + CHANNEL[k] * plane + own, mask=seen, other=0.0)
                piece = row + piece_at(padded_x, pitch, g * SLOTS, SLOTS)
                piece = piece.to(tl.pointer_type(tl.float32), bitcast=True)
                tl.store(piece + (k - SET_SIZE * g), feature[:, None], mask=written)


@triton.jit
def _softmax(columns, scale):
    # softmax over the columns [PIXELS, ...] of all blocks, times a scale [PIXELS], and what divides it, finite if it is
    largest = tl.max(columns[0], axis=1)
    for b in tl.static_range(1, len(columns)):
        largest = tl.maximum(largest, tl.max(columns[b], axis=1))
    negative = largest * -LOG2_E  # rounded for all alike; fused, as rounding each product would show in large logits
    powers, total = (), tl.zeros_like(largest)
    for b in tl.static_range(len(columns)):
        power = tl.exp2(tl.fma(columns[b], LOG2_E, negative[:, None]))
        powers, total = powers + (power,), total + tl.sum(power, axis=1)
    results = ()
    for b in tl.static_range(len(columns)):
        results = results + (powers[b] * (scale / total)[:, None],)
    return results, total


@triton.jit
def _interleave(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, PIXELS: tl.constexpr):
    # sixteen [PIXELS] -> [PIXELS, 16]
    even = tl.join(tl.join(tl.join(s0, s8), tl.join(s4, s12)), tl.join(tl.join(s2, s10), tl.join(s6, s14)))
    odd = tl.join(tl.join(tl.join(s1, s9), tl.join(s5, s13)), tl.join(tl.join(s3, s11), tl.join(s7, s15)))
    return tl.reshape(tl.join(even, odd), (PIXELS, 16))


@triton.jit
def _write_partners(partners):
    slot = tl.arange(0, SLOTS)
    place = slot[:, None] * SLOTS + slot[None, :]
    # 2 h h' - |h|^2 - |h'|^2
    squares = (slot == 6) | (slot == 7) | (slot == 10) | (slot == 11)
    partner = tl.where(slot < 3, slot, slot ^ 12)  # 6 with 10, 7 with 11
    factor = tl.where(slot < 3, 2.0, tl.where(squares, -1.0, 0.0))
    tl.store(partners + place, tl.where(slot[:, None] == partner[None, :], factor[None, :], 0.0).to(tl.float16))
    # 2 l h' + 2 h l' + 2 l l' - b - b'
    forth = (slot < 3) | (slot == 8) | (slot == 9)
    back = ((slot >= 3) & (slot < 6)) | (slot == 11) | (slot == 12)
    partner = tl.where(forth, slot + 3, tl.where(back, slot - 3, slot))
    factor = tl.where((slot < 6) | (slot > 12), 2.0, tl.where(forth | back, -1.0, 0.0))
    place += SLOTS * SLOTS
    tl.store(partners + place, tl.where(slot[:, None] == partner[None, :], factor[None, :], 0.0).to(tl.float16))
    # s d' + d s'
    partner = tl.where(slot < 2, 2, tl.where(slot < 4, 0, tl.where(slot == 4, 3, 1)))
    factor = tl.where(slot < 6, 1.0, 0.0)
    place += SLOTS * SLOTS
    tl.store(partners + place, tl.where(slot[:, None] == partner[None, :], factor[None, :], 0.0).to(tl.float16))
