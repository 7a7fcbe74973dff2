"""The Triton kernels: copy what is constant, pack what a pixel brings into one record, multiply tiles by their halo.

product_i = sum_j S_ij v_j,    S_ij = k_ij (s_j d_i + s_i d_j) / 2    (S_ij = k_ij without gates),    j != i
k_ij = sum_m 2^(log2 w_m - x_m |i - j|^2 - sum_f (g_f,i - g_f,j)^2)    g_f: feature f times a factor of kernel m
"""

import triton
import triton.language as tl

SLOTS = tl.constexpr(16)  # of a set of features: the depth of a tensor-core product of halves
KEYS = tl.constexpr(16)  # pixels of the halo that a tile meets at a time
LOG2_E = tl.constexpr(1.4426950408889634)
NORM = tl.constexpr(1024.0)  # brings squares below 2^26 into the range of halves; larger ones become infinite
LARGEST_UNIT = tl.constexpr(2.0)  # log2: squares of 2^10 such units fit into halves, times NORM
LARGEST_VALUE = tl.constexpr(14)  # log2 of the largest value as a half; halves end at 2^16


@triton.jit
def _exponent_above(largest):
    # e with largest < 2^e, from the bits of a float32 >= 0
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100).to(tl.float32)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=["height", "width", "stride_n", "stride_c", "stride_y", "stride_x"])
def prepare(
    features,
    source,
    destination,
    values,
    constants,
    summary,
    height,
    width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    FEATURE: tl.constexpr,
    CHANNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOURCE: tl.constexpr,
    DESTINATION: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Copy features and gates of any dtype as float32, and note how large they are.

    Grid (N, parts). A program owns one of the parts of an image's pixels, PIXELS at a time. It reads channel
    CHANNEL[k] of features[FEATURE[k]] [N, CHANNELS[k], H, W] and, with SOURCE and DESTINATION, the gates [N, H, W], all
    contiguous, and writes constants [N, K + 2 if gated, H, W]: the channels (those of uint8 divided by 255), s and d (1
    for one that is not given).

    Writes summary [N, rows, PARTS], as many of each row as there are parts: the smallest and the largest value of every
    channel where a gate is open and all channels are finite; with gates the largest s, the largest d, and the sum of d
    (of s without it); with COUNT > 0 the largest finite magnitude of the value columns [N, COUNT, H, W] of any strides
    and dtype.
    """
    GATED: tl.constexpr = SOURCE or DESTINATION
    K: tl.constexpr = len(CHANNEL)
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    plane = height.to(tl.int64) * width
    none = tl.zeros((PIXELS,), tl.float32)
    lows, highs = (), ()
    for _channel in tl.static_range(K):
        lows, highs = lows + (none + float("inf"),), highs + (none - float("inf"),)
    largest_s, largest_d, total, largest = none, none, none, none
    share = tl.cdiv(plane, tl.num_programs(1) * PIXELS) * PIXELS
    first, last = part * share, tl.minimum((part + 1) * share, plane)
    while first < last:  # no range: Triton 3.6's interpreter fails on tensors as bounds with NumPy 2.5
        pixel = first + tl.arange(0, PIXELS)
        inside = pixel < plane
        own = constants + n * (K + 2 * GATED) * plane + pixel
        finite, copies = inside, ()
        for k in tl.static_range(K):
            channel = features[FEATURE[k]] + (n * CHANNELS[k] + CHANNEL[k]) * plane
            value = tl.load(channel + pixel, mask=inside, other=0).to(tl.float32)
            if features[FEATURE[k]].dtype.element_ty == tl.uint8:
                value = tl.div_rn(value, none + 255.0)
            finite, copies = finite & _is_finite(value), copies + (value,)
        seen = finite
        if GATED:
            s, d = none + 1.0, none + 1.0
            if SOURCE:
                s = tl.load(source + n * plane + pixel, mask=inside, other=0).to(tl.float32)
            if DESTINATION:
                d = tl.load(destination + n * plane + pixel, mask=inside, other=0).to(tl.float32)
            total += tl.where(inside, d if DESTINATION else s, 0.0)
            largest_s = tl.maximum(largest_s, tl.where(inside, s, 0.0))
            largest_d = tl.maximum(largest_d, tl.where(inside, d, 0.0))
            tl.store(own + K * plane, s, mask=inside)
            tl.store(own + (K + 1) * plane, d, mask=inside)
            seen = finite & ((s != 0) | (d != 0))
        lower, higher = (), ()
        for k in tl.static_range(K):
            lower = lower + (tl.where(seen, tl.minimum(lows[k], copies[k]), lows[k]),)
            higher = higher + (tl.where(seen, tl.maximum(highs[k], copies[k]), highs[k]),)
            tl.store(own + k * plane, copies[k], mask=inside)
        lows, highs = lower, higher
        if COUNT > 0:
            y, x = pixel // width, pixel % width
            column = values + n * stride_n + y * stride_y + x * stride_x
            for _column in range(COUNT):
                value = tl.abs(tl.load(column, mask=inside, other=0.0).to(tl.float32))
                largest = tl.where(_is_finite(value), tl.maximum(largest, value), largest)
                column += stride_c
        first += PIXELS
    row = summary + n * (2 * K + 3 * GATED + (COUNT > 0)) * PARTS + part
    for k in tl.static_range(K):
        tl.store(row + 2 * k * PARTS, tl.min(lows[k]))
        tl.store(row + (2 * k + 1) * PARTS, tl.max(highs[k]))
    row += 2 * K * PARTS
    if GATED:
        tl.store(row, tl.max(largest_s))
        tl.store(row + PARTS, tl.max(largest_d))
        tl.store(row + 2 * PARTS, tl.sum(total))
        row += 3 * PARTS
    if COUNT > 0:
        tl.store(row, tl.max(largest))


@triton.jit
def _at(x, pitch, FIRST: tl.constexpr, SIZE: tl.constexpr):
    # where a padded row has the SIZE halves of pixel x that are a piece, FIRST of the record: pieces lie in planes
    return pitch * FIRST + x * SIZE


@triton.jit
def _largest(summary, row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(summary + row * PARTS + part, mask=part < parts, other=float("-inf")))


@triton.jit
def _middle(summary, k, parts, PARTS: tl.constexpr):
    # of the values of channel k, and how far from it they lie; 0 where no gate is open
    part = tl.arange(0, PARTS)
    low = tl.min(tl.load(summary + 2 * k * PARTS + part, mask=part < parts, other=float("inf")))
    high = _largest(summary, 2 * k + 1, parts, PARTS)
    low, high = tl.where(low > high, 0.0, low), tl.where(low > high, 0.0, high)
    half = 0.5 * high - 0.5 * low
    return low + half, half


SIZES = ["first", "images", "parts", "height", "width", "top", "padded_height", "pitch"]
STRIDES = ["stride_n", "stride_c", "stride_y", "stride_x"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def pack(
    values,
    constants,
    summary,
    factors,
    xy,
    records,
    along_y,
    partners,
    scales,
    first,
    images,
    parts,
    height,
    width,
    top,
    padded_height,
    pitch,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    K: tl.constexpr,
    N_SETS: tl.constexpr,
    CHANNEL: tl.constexpr,
    LINEAR: tl.constexpr,
    GATED: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ONES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    MARGIN: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Write one record a pixel of the padded images: its sets of features, then its values, all as halves.

    Grid (ceil(padded_height 16 pitch / PIXELS), N). A program owns PIXELS pixels of a padded image. It reads the K
    channels of the constants [images, K + 2 if gated, H, W] and the value columns [images, COUNT, H, W] of any strides
    and dtype, of N images from the `first`, and writes records [N, padded_height, RECORD 16 pitch]. Records lie in
    pieces: a row has the first set of all its pixels, pixel by pixel, then the next, the gates, and the values block by
    block, so that what a tile reads at a time lies together. Images lie MARGIN from the left and RADIUS from the top,
    and the first padded row is RADIUS above row `top` of the image; the values around are 0. The width and the strides
    are given in UNITs, the parts of the summary in fours; ORDER names the stride that is 1.

    A set g has three channels for one kernel: CHANNEL says which (-1: none, 0), the summary between which values they
    lie, from whose middle they are counted, and `factors` by what they are multiplied. With u a power of two,
    g = h + l, h a multiple of u, |h| <= 2^10 u, and its 16 slots are

        h_0 h_1 h_2 l_0 l_1 l_2 a a' b b' 1024 1 1 l_0 l_1 l_2      |h|^2 = 1024 a + a',  2 h.l + |l|^2 = b + b'

    Products of h are whole numbers of u^2, which float32 adds exactly however close two pixels are, and what l adds is
    small: |g - g'|^2 comes out as if the differences had been taken first.

    A value v, after softmax over its columns if asked, times a power of two is high + low; the factor brings the
    image's largest (1 after softmax) up to 2^LARGEST_VALUE. With ONES a column of ones follows, each as
    2^LARGEST_VALUE. The record has all high, then, with SPLIT, all low. Before them, with GATED, 16 slots of the gates
    s and d, each scaled below 1: s s' d d' s d 0 ..., where s' is what s lacks as a half. Under two closed gates
    features are 0. Where a channel or a value (after softmax) is not finite and a gate is closed, values, features and
    both gates are 0: the pixel leaves the sum.

    Where the features of an image span too much for that, 2^13 / sqrt(log2(e) / 2) sigmas or more, a set has its three
    channels as they are instead, in float32.

    Program (0, n) also writes scales [images, 3]: what undoes the scale of the gates, with MEAN divided by the sum of
    the gates over all images (at least 1); without softmax, what undoes that of the values; and 1 if the features are
    as they are, else 0. Program (0, 0) writes, for every kernel, its term along y (as a power of two if it is LINEAR,
    without features), along_y [kernels, ROWS], with offset 0 at ROWS // 2; and partners [3, 16, 16], which turn a
    pixel's own slots into what meets those of others: 2 h.h' - |h|^2 - |h'|^2, then 2 l.h' + 2 h.l' + 2 l.l' - b - b',
    and s d' + d s'.
    """
    ALL: tl.constexpr = 2 * K + 3 * GATED + (not SOFTMAX)  # rows of the summary
    width, pitch, parts = width * UNIT, pitch * 16, parts * 4
    image = tl.program_id(1)
    n = first.to(tl.int64) + image
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = pixel % pitch
    x, y = column - MARGIN, top + pixel // pitch - RADIUS
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    written = (pixel < padded_height * pitch)[:, None]
    plane = height.to(tl.int64) * width
    constants += n * (K + 2 * GATED) * plane
    own = y.to(tl.int64) * width + x
    row = records + image.to(tl.int64) * padded_height * pitch * RECORD + (pixel - column).to(OFFSET)[:, None] * RECORD
    column = column[:, None]
    whole, summary = summary, summary + n * ALL * PARTS
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2

    s, d, closed, finite = 0.0, 0.0, inside & (x < 0), inside
    if GATED:
        s = tl.load(constants + K * plane + own, mask=inside, other=0.0)
        d = tl.load(constants + (K + 1) * plane + own, mask=inside, other=0.0)
        closed = inside & ((s == 0) | (d == 0))
        for k in tl.static_range(K):
            finite = finite & _is_finite(tl.load(constants + k * plane + own, mask=inside, other=0.0))
    across, down = _stride(stride_c, UNIT, ORDER == "channels"), _stride(stride_y, UNIT, False)
    start = values + n * stride_n * UNIT
    start += (y.to(OFFSET) * down + x.to(OFFSET) * _stride(stride_x, UNIT, ORDER == "columns"))[:, None]
    columns = ()
    for b in tl.static_range(len(BLOCKS)):
        c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
        mask = inside[:, None] & (c < COUNT)
        value = tl.load(start + c.to(OFFSET) * across, mask=mask, other=0.0).to(tl.float32)
        if GATED and not SOFTMAX:
            finite = finite & (tl.sum(value * 0.0, axis=1) == 0)
        columns = columns + (tl.where(c < COUNT, value, float("-inf")) if SOFTMAX else value,)
    value_exponent = 0.0
    if SOFTMAX:
        columns, total = _softmax(columns, tl.where(inside, 2.0**LARGEST_VALUE, 0.0))
        finite = finite & _is_finite(total)
    else:
        value_exponent = _exponent_above(_largest(summary, ALL - 1, parts, PARTS))
    hidden = closed & (finite == 0)
    for b in tl.static_range(len(BLOCKS)):
        c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
        value = columns[b] if SOFTMAX else columns[b] * tl.exp2(-value_exponent + LARGEST_VALUE)
        if GATED:
            value = tl.where(hidden[:, None], 0.0, value)
        if ONES:
            value = tl.where(c == COUNT, tl.where(inside, 2.0**LARGEST_VALUE, 0.0)[:, None], value)
        value_high = value.to(tl.float16)
        place = row + tl.arange(0, BLOCKS[b])[None, :]
        tl.store(place + _at(column, pitch, high + FIRST[b], BLOCKS[b]), value_high, mask=written)
        if SPLIT:
            value_low = (value - value_high.to(tl.float32)).to(tl.float16)
            tl.store(place + _at(column, pitch, low + FIRST[b], BLOCKS[b]), value_low, mask=written)

    slot = row + tl.arange(0, SLOTS)[None, :]
    seen, gate_scale = inside, 1.0
    if GATED:
        s, d = tl.where(hidden, 0.0, s), tl.where(hidden, 0.0, d)
        seen = inside & ((s != 0) | (d != 0))
        exponent_s = _exponent_above(_largest(summary, 2 * K, parts, PARTS))
        exponent_d = _exponent_above(_largest(summary, 2 * K + 1, parts, PARTS))
        gate_scale = tl.exp2(exponent_s + exponent_d)
        s, d = s * tl.exp2(-exponent_s), d * tl.exp2(-exponent_d)
        s_high, d_high = s.to(tl.float16), d.to(tl.float16)
        s_low, d_low = (s - s_high.to(tl.float32)).to(tl.float16), (d - d_high.to(tl.float32)).to(tl.float16)
        none = tl.zeros((PIXELS,), tl.float16)
        slots = _interleave(
            s_high, s_low, d_high, d_low, s_high, d_high, none, none,
            none, none, none, none, none, none, none, none, PIXELS,
        )  # fmt: skip
        tl.store(slot + _at(column, pitch, N_SETS * SLOTS, SLOTS), slots, mask=written)

    largest_unit = LARGEST_UNIT
    for g in tl.static_range(N_SETS):
        bound = 0.0
        for k in tl.static_range(3 * g, 3 * g + 3):
            if CHANNEL[k] >= 0:
                _, half = _middle(summary, CHANNEL[k], parts, PARTS)
                bound = tl.maximum(half * factors[k], bound)
        unit_exponent = tl.maximum(_exponent_above(bound) - 10, -8.0)
        largest_unit = tl.maximum(unit_exponent, largest_unit)
        unit_exponent = tl.minimum(unit_exponent, LARGEST_UNIT)
        unit, units = tl.exp2(unit_exponent), tl.exp2(-unit_exponent)
        coarse, fine = (), ()
        norm, rest = tl.zeros((PIXELS,), tl.float32), tl.zeros((PIXELS,), tl.float32)
        for k in tl.static_range(3 * g, 3 * g + 3):
            feature = tl.zeros((PIXELS,), tl.float32)
            if CHANNEL[k] >= 0:
                middle, _ = _middle(summary, CHANNEL[k], parts, PARTS)
                feature = tl.load(constants + CHANNEL[k] * plane + own, mask=inside, other=0.0)
                feature = tl.where(seen, (feature - middle) * factors[k], 0.0)
            h = ((feature * units + 12582912.0) - 12582912.0) * unit  # 1.5 2^23 rounds to whole numbers
            half_precise = (feature - h).to(tl.float16)
            coarse, fine = coarse + (h.to(tl.float16),), fine + (half_precise,)
            norm += h * h
            rest += (2 * h + half_precise.to(tl.float32)) * half_precise.to(tl.float32)
        one = tl.full((PIXELS,), 1.0, tl.float16)
        norm_high = (norm * (1 / NORM)).to(tl.float16)
        norm_low = (norm - norm_high.to(tl.float32) * NORM).to(tl.float16)
        rest_high = rest.to(tl.float16)
        rest_low = (rest - rest_high.to(tl.float32)).to(tl.float16)
        slots = _interleave(
            coarse[0], coarse[1], coarse[2], fine[0], fine[1], fine[2], norm_high, norm_low,
            rest_high, rest_low, one * NORM, one, one, fine[0], fine[1], fine[2], PIXELS,
        )  # fmt: skip
        tl.store(slot + _at(column, pitch, g * SLOTS, SLOTS), slots, mask=written)

    if tl.program_id(0) == 0:
        if GATED and MEAN:
            part, others, other = tl.arange(0, PARTS)[None, :], tl.arange(0, 8)[:, None], 0
            sums = tl.zeros((8, PARTS), tl.float32)
            while other < images:  # eight at a time, as one would wait for the other
                mass = whole + ((other + others) * ALL + 2 * K + 2) * PARTS + part
                sums += tl.load(mass, mask=(other + others < images) & (part < parts), other=0.0)
                other += 8
            gate_scale /= tl.maximum(tl.sum(tl.sum(sums, axis=1), axis=0), 1.0)
        tl.store(scales + 3 * n, gate_scale)
        if not SOFTMAX:
            tl.store(scales + 3 * n + 1, tl.exp2(value_exponent - LARGEST_VALUE))
        tl.store(scales + 3 * n + 2, tl.where(largest_unit > LARGEST_UNIT, 1.0, 0.0))
        if tl.program_id(1) == 0:
            offset = tl.arange(0, ROWS) - ROWS // 2
            for m in tl.static_range(len(LINEAR)):
                term = tl.where(tl.abs(offset) <= RADIUS, -xy[m] * (offset * offset).to(tl.float32), float("-inf"))
                tl.store(along_y + m * ROWS + tl.arange(0, ROWS), tl.exp2(term) if LINEAR[m] else term)
            _write_partners(partners)

    if largest_unit > LARGEST_UNIT:
        tl.debug_barrier()  # other threads have written there
        for k in tl.static_range(3 * N_SETS):
            feature = tl.zeros((PIXELS,), tl.float32)
            if CHANNEL[k] >= 0:
                feature = tl.load(constants + CHANNEL[k] * plane + own, mask=seen, other=0.0)
            piece = (row + _at(column, pitch, k // 3 * SLOTS, SLOTS)).to(tl.pointer_type(tl.float32), bitcast=True)
            tl.store(piece + k % 3, feature[:, None], mask=written)


@triton.jit
def _stride(stride, UNIT: tl.constexpr, ONE: tl.constexpr):
    return 1 if ONE else stride * UNIT


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
    norms = (slot == 6) | (slot == 7) | (slot == 10) | (slot == 11)
    partner = tl.where(slot < 3, slot, slot ^ 12)
    factor = tl.where(slot < 3, 2.0, tl.where(norms, -1.0, 0.0))
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


@triton.jit(do_not_specialize=["first", "height", "width", "top", "padded_height", "pitch", "tiles_y", *STRIDES])
def sum_tile(
    records,
    along_y,
    partners,
    scales,
    result,
    energies,
    log2_weights,
    xy,
    factors,
    kernel_scale,
    result_scale,
    first,
    height,
    width,
    top,
    padded_height,
    pitch,
    tiles_y,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    RESULT: tl.constexpr,
    SETS: tl.constexpr,
    FIRST_SET: tl.constexpr,
    N_SETS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    MARGIN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    PIXELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Multiply the packed values by the pairwise kernel, a tile of pixels against its halo, and finish what is asked.

    Grid (tiles along x, along y, N). A program owns TILE_Y x TILE_X pixels, PIXELS with what fills up a power of two.
    It walks their halo, KEYS pixels of a row at a time. The terms along x and y and two products of packed features
    give exponents [PIXELS, KEYS]; their powers of two, gated, multiply the values [KEYS, columns]: high by high, and
    with SPLIT low by high and high by low. Sums are in float32, in the order of columns of KEYS pixels, then of rows.
    Where the features of an image are as they are, their differences give the sums anew, pixel by pixel of the halo.

    Writes the product G = S p (MODE "product"); or an energy a program and, with RESULT, the gradient: of
    sum_i (S 1)_i - p_i.G_i by p ("probabilities"), of sum_i p_i.(1 - I) G_i by the logits of p ("logits"). The latter
    is taken apart into terms that do not cancel where pixels agree: with t the largest of G_i, into the sum of all
    others and m = p_i.(t - G_i); its gradient is 2 p_i (t - G_i - m). The result [images, COUNT, H, W], times
    `result_scale`, has any strides (in UNITs, as the width; ORDER names the one that is 1) and dtype. Programs have the
    N images from the `first`; energies are [images, tiles_y, tiles along x].
    """
    width, pitch = width * UNIT, pitch * 16
    x0, row0 = tl.program_id(0) * TILE_X, tl.program_id(1) * TILE_Y
    y0 = top + row0
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.arange(0, PIXELS)
    py, px = pixel // TILE_X, pixel % TILE_X
    if TILE_X & (TILE_X - 1):  # not a power of two: one division serves both, and Triton is told what it knows of %
        step: tl.constexpr = TILE_X & -TILE_X
        px = tl.max_contiguous(tl.multiple_of(pixel - py * TILE_X, step), step)
    key, slot = tl.arange(0, KEYS), tl.arange(0, SLOTS)
    line = pitch.to(tl.int64)
    records += (image * padded_height + row0) * line * RECORD  # first row of the halo
    left = x0 + (MARGIN - RADIUS)  # and its first column
    own_row, own_x = records + (py + RADIUS).to(OFFSET) * pitch * RECORD, left + RADIUS + px
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2

    coarse, fine = (), ()
    partner = partners + slot[:, None] * SLOTS + slot[None, :]
    for s in tl.static_range(N_SETS):
        mine = tl.load((own_row + _at(own_x, pitch, s * SLOTS, SLOTS))[:, None] + slot[None, :])
        coarse = coarse + (tl.dot(mine, tl.load(partner)).to(tl.float16),)
        fine = fine + (tl.dot(mine, tl.load(partner + SLOTS * SLOTS)).to(tl.float16),)

    gate = None
    if GATED:
        mine = tl.load((own_row + _at(own_x, pitch, N_SETS * SLOTS, SLOTS))[:, None] + slot[None, :])
        gate = tl.dot(mine, tl.load(partner + 2 * SLOTS * SLOTS)).to(tl.float16)
    sums = ()
    for b in tl.static_range(len(BLOCKS)):
        sums = sums + (_zeros(PIXELS, BLOCKS[b]),)
    if UNROLL:
        for chunk in tl.static_range(0, TILE_X + 2 * RADIUS, KEYS):
            along_x = _along_x(log2_weights, xy, key + (chunk - RADIUS), px, SETS, RADIUS)
            for row in tl.static_range(TILE_Y + 2 * RADIUS):
                sums = _sum_row(
                    sums, row, records + row * line * RECORD, left + chunk + key, pitch, along_y, along_x, coarse, fine,
                    gate, key + (chunk - RADIUS), px, py, SETS, FIRST_SET, N_SETS, GATED, SPLIT,
                    (row >= RADIUS) & (row < RADIUS + TILE_Y), BLOCKS, FIRST, RECORD, RADIUS, ROWS,
                )  # fmt: skip
    else:
        for chunk in range(0, TILE_X + 2 * RADIUS, KEYS):
            along_x = _along_x(log2_weights, xy, key + (chunk - RADIUS), px, SETS, RADIUS)
            for part in tl.static_range(3):  # the rows above the tile, its own, and those below
                for row in range(
                    RADIUS * (part > 0) + TILE_Y * (part > 1),
                    RADIUS + TILE_Y * (part > 0) + RADIUS * (part > 1),
                ):
                    sums = _sum_row(
                        sums, row, records + row * line * RECORD, left + chunk + key, pitch, along_y, along_x, coarse,
                        fine, gate, key + (chunk - RADIUS), px, py, SETS, FIRST_SET, N_SETS, GATED, SPLIT, part == 1,
                        BLOCKS, FIRST, RECORD, RADIUS, ROWS,
                    )  # fmt: skip

    n = first + tl.program_id(2)
    scales += 3 * n
    if tl.load(scales + 2) > 0:
        sums = _sum_differences(
            sums, records, own_row, left, log2_weights, xy, factors, pitch, px, py, SETS, FIRST_SET, N_SETS, GATED,
            SPLIT, BLOCKS, FIRST, RECORD, RADIUS, OFFSET, TILE_Y, TILE_X,
        )  # fmt: skip
    inside = (py < TILE_Y) & (y0 + py < height) & (x0 + px < width)
    column, right = _stride(stride_c, UNIT, ORDER == "channels"), _stride(stride_x, UNIT, ORDER == "columns")
    down = _stride(stride_y, UNIT, False)
    result += n.to(tl.int64) * stride_n * UNIT + y0.to(tl.int64) * down + x0.to(tl.int64) * right
    place = (py.to(OFFSET) * down + px.to(OFFSET) * right)[:, None]
    # back to the units of the caller: of a value, and of a sum of kernels
    value_scale = 2.0**-LARGEST_VALUE
    if MODE != "logits":
        value_scale = tl.load(scales + 1)
    if GATED:
        kernel_scale *= tl.load(scales)
    scale = kernel_scale * value_scale * result_scale
    mean, largest, mine = None, None, ()
    if MODE != "product":
        energy = tl.zeros((PIXELS,), tl.float32)
        if MODE == "logits":
            energy, largest = _sum_without_largest(sums)
            mean = tl.zeros((PIXELS,), tl.float32)
        for b in tl.static_range(len(BLOCKS)):
            c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
            value = own_row[:, None] + tl.arange(0, BLOCKS[b])[None, :]
            p = tl.load(value + _at(own_x, pitch, high + FIRST[b], BLOCKS[b])[:, None]).to(tl.float32)
            if SPLIT:
                p += tl.load(value + _at(own_x, pitch, low + FIRST[b], BLOCKS[b])[:, None]).to(tl.float32)
            p *= value_scale
            mine = mine + (p,)
            if MODE == "logits":
                mean += tl.sum(p * (largest[:, None] - sums[b]), axis=1)
            else:
                mass = tl.where(c == COUNT, sums[b] * 2.0**-LARGEST_VALUE, 0.0)
                energy += tl.sum(tl.where(c < COUNT, -p * (sums[b] * value_scale), mass), axis=1)
        if MODE == "logits":
            energy = (energy + mean) * value_scale
        tile = (n * tiles_y + top // TILE_Y + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(energies + tile, tl.sum(tl.where(inside, energy * kernel_scale, 0.0)))
    if RESULT:
        for b in tl.static_range(len(BLOCKS)):
            c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
            if MODE == "product":
                value = sums[b] * scale
            elif MODE == "probabilities":
                value = sums[b] * (scale * -2)
            else:
                value = (mine[b] * (scale * 2)) * ((largest[:, None] - sums[b]) - mean[:, None])
            tl.store(result + place + c.to(OFFSET) * column, value, mask=inside[:, None] & (c < COUNT))


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def _along_x(log2_weights, xy, column, px, SETS: tl.constexpr, RADIUS: tl.constexpr):
    # for every kernel its weight and term along x [PIXELS, KEYS], as a power of two if it has no features
    dx = column.to(tl.float32)[None, :] - px.to(tl.float32)[:, None]
    terms = ()
    for m in tl.static_range(len(SETS)):
        term = tl.where(tl.abs(dx) <= RADIUS, log2_weights[m] - xy[m] * (dx * dx), float("-inf"))
        terms = terms + (tl.exp2(term) if SETS[m] == 0 else term,)
    return terms


@triton.jit
def _combine(rest, top, other_rest, other_top):
    return rest + other_rest + tl.minimum(top, other_top), tl.maximum(top, other_top)


@triton.jit
def _sum_without_largest(sums):
    # of the columns of all blocks, and the largest
    rest, top = tl.reduce((tl.zeros_like(sums[0]), sums[0]), 1, _combine)
    for b in tl.static_range(1, len(sums)):
        more, larger = tl.reduce((tl.zeros_like(sums[b]), sums[b]), 1, _combine)
        rest, top = _combine(rest, top, more, larger)
    return rest, top


@triton.jit
def _sum_row(
    sums,
    row,
    records,
    x,
    pitch,
    along_y,
    along_x,
    coarse,
    fine,
    gate,
    column,
    px,
    py,
    SETS: tl.constexpr,
    FIRST_SET: tl.constexpr,
    N_SETS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    SELF: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # adds the KEYS pixels x of a row of records to the sums of a tile; with SELF a pixel may meet itself there
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2
    level = along_y - py + (row + (ROWS // 2 - RADIUS))  # [PIXELS]
    kernel = _kernel(
        records, x, pitch, level, along_x[0], coarse, fine, row, column, px, py, SETS[0], FIRST_SET[0], SPLIT, SELF,
        RADIUS,
    )  # fmt: skip
    for m in tl.static_range(1, len(SETS)):
        kernel += _kernel(
            records, x, pitch, level + m * ROWS, along_x[m], coarse, fine, row, column, px, py, SETS[m], FIRST_SET[m],
            SPLIT, SELF, RADIUS,
        )  # fmt: skip
    if GATED:
        kernel *= tl.dot(gate, _slots(records, x, pitch, N_SETS))
    kernel_high = kernel.to(tl.float16)
    kernel_low = (kernel - kernel_high.to(tl.float32)).to(tl.float16)
    updated = ()
    for b in tl.static_range(len(BLOCKS)):
        value = records + tl.arange(0, BLOCKS[b])[None, :]
        value_high = tl.load(value + _at(x, pitch, high + FIRST[b], BLOCKS[b])[:, None])
        total = tl.dot(kernel_high, value_high, sums[b])
        if SPLIT:
            total = tl.dot(kernel_low, value_high, total)
            value_low = tl.load(value + _at(x, pitch, low + FIRST[b], BLOCKS[b])[:, None])
            total = tl.dot(kernel_high, value_low, total)
        updated = updated + (total,)
    return updated


@triton.jit
def _slots(records, x, pitch, s: tl.constexpr):
    # of pixels x [SLOTS, KEYS]
    return tl.load(records + _at(x, pitch, s * SLOTS, SLOTS)[None, :] + tl.arange(0, SLOTS)[:, None])


@triton.jit
def _kernel(
    records,
    x,
    pitch,
    level,
    term,
    coarse,
    fine,
    row,
    column,
    px,
    py,
    SETS: tl.constexpr,
    FIRST_SET: tl.constexpr,
    SPLIT: tl.constexpr,
    SELF: tl.constexpr,
    RADIUS: tl.constexpr,
):
    # one kernel between the pixels of a tile and KEYS others [PIXELS, KEYS], from its term along x
    if SELF:
        apart = tl.where(column[None, :] == px[:, None], 0.0 if SETS == 0 else float("-inf"), term)
        term = tl.where((py == row - RADIUS)[:, None], apart, term)
    if SETS == 0:
        term *= tl.load(level)[:, None]
    else:
        term += tl.load(level)[:, None]
        # On their own the coarse products are whole numbers of u^2, exact; a tensor core would cut off what it adds
        # them to. Halves need no such care.
        whole = tl.dot(coarse[FIRST_SET], _slots(records, x, pitch, FIRST_SET), None if SPLIT else term)
        for s in tl.static_range(FIRST_SET + 1, FIRST_SET + SETS):
            whole = tl.dot(coarse[s], _slots(records, x, pitch, s), whole)
        rest = term if SPLIT else whole
        for s in tl.static_range(FIRST_SET, FIRST_SET + SETS):
            rest = tl.dot(fine[s], _slots(records, x, pitch, s), rest)
        term = tl.exp2(tl.fma(whole, 1.0, rest) if SPLIT else rest)  # a sum would be folded into the product
    return term


@triton.jit
def _sum_differences(
    packed_sums,
    records,
    own_row,
    left,
    log2_weights,
    xy,
    factors,
    pitch,
    px,
    py,
    SETS: tl.constexpr,
    FIRST_SET: tl.constexpr,
    N_SETS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    OFFSET: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    # The sums of a tile over its halo, whose records have features as they are. It is laid out in registers as the sums
    # of packed features, which mean nothing then; in another layout NVIDIA's compiler runs out of registers.
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2
    own_x = left + RADIUS + px
    sums = ()
    for b in tl.static_range(len(BLOCKS)):
        sums = sums + (tl.where((packed_sums[b] > 0) & (packed_sums[b] < 0), 1.0, 0.0),)
    for step in tl.range(0, (TILE_Y + 2 * RADIUS) * (TILE_X + 2 * RADIUS), num_stages=1):
        row, column = step // (TILE_X + 2 * RADIUS), step % (TILE_X + 2 * RADIUS)
        other, x = records + (tl.zeros((1,), OFFSET) + row) * pitch * RECORD, left + column
        dy, dx = (row - RADIUS - py).to(tl.float32), (column - RADIUS - px).to(tl.float32)
        squared = dy * dy + dx * dx
        met = (tl.abs(dy) <= RADIUS) & (tl.abs(dx) <= RADIUS) & (squared > 0)
        kernel = tl.zeros_like(squared)
        for m in tl.static_range(len(SETS)):
            exponent = log2_weights[m] - xy[m] * squared
            kernel += tl.exp2(
                _less_differences(exponent, own_row, own_x, other, x, pitch, factors, SETS[m], FIRST_SET[m])
            )
        kernel = tl.where(met, kernel, 0.0)
        if GATED:
            mine = own_row + _at(own_x, pitch, N_SETS * SLOTS, SLOTS)
            others = other + _at(x, pitch, N_SETS * SLOTS, SLOTS)
            gates = _gate(mine, 0) * _gate(others, 2) + _gate(mine, 2) * _gate(others, 0)
            kernel *= gates
        updated = ()
        for b in tl.static_range(len(BLOCKS)):
            value = other + tl.arange(0, BLOCKS[b])
            v = tl.load(value + _at(x, pitch, high + FIRST[b], BLOCKS[b])).to(tl.float32)
            if SPLIT:
                v += tl.load(value + _at(x, pitch, low + FIRST[b], BLOCKS[b])).to(tl.float32)
            updated = updated + (sums[b] + kernel[:, None] * v[None, :],)
        sums = updated
    return sums


@triton.jit
def _less_differences(
    exponent, own_row, own_x, other, x, pitch, factors, SETS: tl.constexpr, FIRST_SET: tl.constexpr
):  # fmt: skip
    # less the squared differences of all features of a kernel
    for s in tl.static_range(FIRST_SET, FIRST_SET + SETS):
        mine, others = own_row + _at(own_x, pitch, s * SLOTS, SLOTS), other + _at(x, pitch, s * SLOTS, SLOTS)
        for k in tl.static_range(3):
            difference = _feature(mine, k) - _feature(others, k)
            difference *= factors[3 * s + k]
            exponent -= difference * difference
    return exponent


@triton.jit
def _feature(piece, k: tl.constexpr):
    return tl.load(piece.to(tl.pointer_type(tl.float32), bitcast=True) + k)


@triton.jit
def _gate(piece, place: tl.constexpr):
    high, low = tl.load(piece + place), tl.load(piece + (place + 1))
    return high.to(tl.float32) + low.to(tl.float32)


@triton.jit
def sum_offsets(
    values,
    features,
    factors,
    source,
    destination,
    log2_kernels,
    result,
    columns,
    plane,
    height,
    width,
    KERNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    USED: tl.constexpr,
    GATED: tl.constexpr,
    RADIUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSET: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Multiply values by the pairwise kernel in their own dtype, an offset at a time: where no tile can.

    Grid (ceil(H W / PIXELS), ceil(columns / COLUMNS), N). A program owns COLUMNS columns of PIXELS pixels. Reads values
    [N, columns, H, W], features [N, F, H, W], the gates [N, H, W] and log2_kernels [kernels, 2 RADIUS + 1,
    2 RADIUS + 1], the weight and xy term of every offset, -inf for a pixel with itself; USED says, for
    every kernel, which features it has. Writes result [N, columns, H, W], summed offset by offset.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    n = tl.program_id(2).to(tl.int64)
    own = tl.program_id(0).to(OFFSET) * PIXELS + tl.arange(0, PIXELS)
    inside = own < plane
    y, x = own // width, own % width
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = (n * columns + column)[:, None] * plane.to(tl.int64)
    sums = tl.zeros((COLUMNS, PIXELS), dtype)
    source += n * plane
    destination += n * plane
    for dy in range(-RADIUS, RADIUS + 1):
        for dx in range(-RADIUS, RADIUS + 1):
            met = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            other = own + dy * width + dx
            kernel = tl.zeros((PIXELS,), dtype)
            for m in tl.static_range(KERNELS):
                offset = (m * (2 * RADIUS + 1) + dy + RADIUS) * (2 * RADIUS + 1) + dx + RADIUS
                exponent = tl.zeros((PIXELS,), dtype) + tl.load(log2_kernels + offset)
                for f in tl.static_range(m * len(CHANNELS), (m + 1) * len(CHANNELS)):
                    if USED[f]:
                        factor = tl.load(factors + f)
                        channel = features[f % len(CHANNELS)] + n * CHANNELS[f % len(CHANNELS)] * plane
                        for _ in range(CHANNELS[f % len(CHANNELS)]):
                            difference = tl.load(channel + other, mask=met, other=0.0)
                            difference = (difference - tl.load(channel + own, mask=met, other=0.0)) * factor
                            exponent -= difference * difference
                            channel += plane
                kernel += tl.exp2(exponent)
            if GATED:
                gate = tl.load(source + other, mask=met, other=0.0) * tl.load(destination + own, mask=met, other=0.0)
                gate += tl.load(destination + other, mask=met, other=0.0) * tl.load(source + own, mask=met, other=0.0)
                kernel *= gate * 0.5
            read = (column < columns)[:, None] & met[None, :]
            value = tl.load((values + rows) + other[None, :], mask=read, other=0.0)
            sums += tl.where(met, kernel, 0.0)[None, :] * value
    tl.store((result + rows) + own[None, :], sums, mask=(column < columns)[:, None] & inside[None, :])
