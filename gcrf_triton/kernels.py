"""The Triton kernels: pack what a pixel brings into one record, and multiply tiles of pixels by their halo.

product_i = sum_j S_ij v_j,    S_ij = k_ij (s_j d_i + s_i d_j) / 2    (S_ij = k_ij without gates),    j != i
k_ij = sum_m 2^(log2 w_m - x_m |i - j|^2 - sum_f (g_f,i - g_f,j)^2)    g_f: feature f times a factor of kernel m
"""

import triton
import triton.language as tl

SLOTS = tl.constexpr(16)  # of a set of features: the depth of a tensor-core product of halves
KEYS = tl.constexpr(16)  # pixels of the halo that a tile meets at a time
LOG2_E = tl.constexpr(1.4426950408889634)
NORM = tl.constexpr(1024.0)  # brings squares below 2^26 into the range of halves; larger ones become infinite
LARGEST_VALUE = tl.constexpr(14)  # log2 of the largest value as a half; halves end at 2^16


@triton.jit
def _exponent_above(largest):
    # e with largest < 2^e, from the bits of a float32 >= 0
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100).to(tl.float32)


@triton.jit
def _half_span(span, stride):
    # of a smallest and a largest value
    return 0.5 * tl.load(span + stride) - 0.5 * tl.load(span)


@triton.jit
def pack(
    values,
    largest_value,
    features,
    spans,
    stride_span,
    factors,
    source,
    destination,
    largest_gates,
    xy,
    records,
    along_y,
    partners,
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
    OFFSET: tl.constexpr,
    N_SETS: tl.constexpr,
    FEATURE: tl.constexpr,
    CHANNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINEAR: tl.constexpr,
    GATED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ONES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    MARGIN: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Write one record a pixel of the padded images: its sets of features, then its values, all as halves.

    Grid (ceil(padded_height pitch / PIXELS), N). A program owns PIXELS pixels of a padded image. It reads the features
    [N, F, H, W], contiguous, and the value columns [N, COUNT, H, W] of any strides and dtype, and writes records
    [N, padded_height, pitch, RECORD]. Images lie MARGIN from the left and RADIUS from the top, and the first padded row
    is RADIUS above row `top` of the image; the values around are 0.

    A set g has three features of one kernel: FEATURE and CHANNEL say which (-1: none, 0), `spans` [features, 2, N]
    between which values they lie, from whose middle they are counted, and `factors` by what they are multiplied. With u
    a power of two, g = h + l, h a multiple of u, |h| <= 2^10 u, and its 16 slots are

        h_0 h_1 h_2 l_0 l_1 l_2 a a' b b' 1024 1 1 l_0 l_1 l_2      |h|^2 = 1024 a + a',  2 h.l + |l|^2 = b + b'

    Products of h are whole numbers of u^2, which float32 adds exactly however close two pixels are, and what l adds is
    small: |g - g'|^2 comes out as if the differences had been taken first.

    A value v, after softmax over its columns if asked, times a power of two is high + low; the factor brings the
    largest (1 after softmax) up to 2^LARGEST_VALUE. With ONES a column of ones follows, each as 2^LARGEST_VALUE. The
    record has all high, then, with SPLIT, all low. Before them, with GATED, 16 slots of the gates s and d [N, H, W],
    contiguous, each scaled below 1: s s' d d' s d 0 ..., where s' is what s lacks as a half. Under two closed gates
    features are 0.

    Program (0, 0) also writes, for every kernel, its term along y (as a power of two if it is LINEAR, without
    features), along_y [kernels, ROWS], with offset 0 at ROWS // 2; and partners [3, 16, 16], which turn a pixel's own
    slots into what meets those of others: 2 h.h' - |h|^2 - |h'|^2, then 2 l.h' + 2 h.l' + 2 l.l' - b - b', and
    s d' + d s'.
    """
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    x, y = pixel % pitch - MARGIN, top + pixel // pitch - RADIUS
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    written = (pixel < padded_height * pitch)[:, None]
    own = y.to(tl.int64) * width + x
    record = records + n * padded_height * pitch * RECORD + pixel.to(OFFSET)[:, None] * RECORD

    seen = inside
    if GATED:
        s = tl.load(source + n * height * width + own, mask=inside, other=0.0)
        d = tl.load(destination + n * height * width + own, mask=inside, other=0.0)
        seen = inside & ((s != 0) | (d != 0))
        s *= tl.exp2(-_exponent_above(tl.load(largest_gates)))
        d *= tl.exp2(-_exponent_above(tl.load(largest_gates + 1)))
        s_high, d_high = s.to(tl.float16), d.to(tl.float16)
        s_low, d_low = (s - s_high.to(tl.float32)).to(tl.float16), (d - d_high.to(tl.float32)).to(tl.float16)
        none = tl.zeros((PIXELS,), tl.float16)
        slots = _interleave(
            s_high, s_low, d_high, d_low, s_high, d_high, none, none,
            none, none, none, none, none, none, none, none, PIXELS,
        )  # fmt: skip
        tl.store(record + N_SETS * SLOTS + tl.arange(0, SLOTS)[None, :], slots, mask=written)

    spans += n
    for k in tl.static_range(N_SETS):
        bound = 0.0
        for f in tl.static_range(3 * k, 3 * k + 3):
            if FEATURE[f] >= 0:
                bound = tl.maximum(_half_span(spans + 2 * FEATURE[f] * stride_span, stride_span) * factors[f], bound)
        unit_exponent = tl.minimum(tl.maximum(_exponent_above(bound) - 10, -8.0), 2.0)
        unit, units = tl.exp2(unit_exponent), tl.exp2(-unit_exponent)
        coarse, fine = (), ()
        norm, rest = tl.zeros((PIXELS,), tl.float32), tl.zeros((PIXELS,), tl.float32)
        for f in tl.static_range(3 * k, 3 * k + 3):
            g = tl.zeros((PIXELS,), tl.float32)
            if FEATURE[f] >= 0:
                channel = features[FEATURE[f]] + (n * CHANNELS[FEATURE[f]] + CHANNEL[f]) * height * width
                span = spans + 2 * FEATURE[f] * stride_span
                centre = tl.load(span) + _half_span(span, stride_span)
                g = (tl.load(channel + own, mask=inside, other=0.0) - centre) * factors[f]
                g = tl.where(seen, g, 0.0)
            h = ((g * units + 12582912.0) - 12582912.0) * unit  # 1.5 2^23 rounds to whole numbers
            half = (g - h).to(tl.float16)
            coarse, fine = coarse + (h.to(tl.float16),), fine + (half,)
            norm += h * h
            rest += (2 * h + half.to(tl.float32)) * half.to(tl.float32)
        one = tl.full((PIXELS,), 1.0, tl.float16)
        norm_high = (norm * (1 / NORM)).to(tl.float16)
        norm_low = (norm - norm_high.to(tl.float32) * NORM).to(tl.float16)
        rest_high = rest.to(tl.float16)
        rest_low = (rest - rest_high.to(tl.float32)).to(tl.float16)
        slots = _interleave(
            coarse[0], coarse[1], coarse[2], fine[0], fine[1], fine[2], norm_high, norm_low,
            rest_high, rest_low, one * NORM, one, one, fine[0], fine[1], fine[2], PIXELS,
        )  # fmt: skip
        tl.store(record + k * SLOTS + tl.arange(0, SLOTS)[None, :], slots, mask=written)

    start = values + n * stride_n + (y.to(OFFSET) * stride_y + x.to(OFFSET) * stride_x)[:, None]
    columns = ()
    for b in tl.static_range(len(BLOCKS)):
        c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
        mask = inside[:, None] & (c < COUNT)
        value = tl.load(start + c.to(OFFSET) * stride_c, mask=mask, other=0.0).to(tl.float32)
        columns = columns + (tl.where(c < COUNT, value, float("-inf")) if SOFTMAX else value,)
    if SOFTMAX:
        scale = tl.where(inside, 2.0**LARGEST_VALUE, 0.0)
        columns = _softmax(columns, scale)
    else:
        scale = tl.exp2(-_exponent_above(tl.load(largest_value)) + LARGEST_VALUE)
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2
    for b in tl.static_range(len(BLOCKS)):
        c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
        value = columns[b] if SOFTMAX else columns[b] * scale
        if ONES:
            value = tl.where(c == COUNT, tl.where(inside, 2.0**LARGEST_VALUE, 0.0)[:, None], value)
        value_high = value.to(tl.float16)
        tl.store(record + (c + high), value_high, mask=written)
        if SPLIT:
            tl.store(record + (c + low), (value - value_high.to(tl.float32)).to(tl.float16), mask=written)

    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        offset = tl.arange(0, ROWS) - ROWS // 2
        for m in tl.static_range(len(LINEAR)):
            term = tl.where(tl.abs(offset) <= RADIUS, -xy[m] * (offset * offset).to(tl.float32), float("-inf"))
            tl.store(along_y + m * ROWS + tl.arange(0, ROWS), tl.exp2(term) if LINEAR[m] else term)
        _write_partners(partners)


@triton.jit
def _softmax(columns, scale):
    # softmax over the columns [PIXELS, ...] of all blocks, times a scale [PIXELS]
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
    return results


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


@triton.jit
def sum_tile(
    records,
    largest_value,
    largest_gates,
    along_y,
    partners,
    result,
    energies,
    log2_weights,
    xy,
    kernel_scale,
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

    Writes the product G = S p (MODE "product"); or an energy a program and, with RESULT, the gradient: of
    sum_i (S 1)_i - p_i.G_i by p ("probabilities"), of sum_i p_i.(1 - I) G_i by the logits of p ("logits"). The latter
    is taken apart into terms that do not cancel where pixels agree: with t the largest of G_i, into the sum of all
    others and m = p_i.(t - G_i); its gradient is 2 p_i (t - G_i - m). The result [N, COUNT, H, W] has any strides and
    dtype.
    """
    x0, row0 = tl.program_id(0) * TILE_X, tl.program_id(1) * TILE_Y
    y0 = top + row0
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.arange(0, PIXELS)
    py, px = pixel // TILE_X, pixel % TILE_X
    key, slot = tl.arange(0, KEYS), tl.arange(0, SLOTS)
    line = pitch.to(tl.int64)
    first = (n * padded_height + row0) * line + (x0 + MARGIN - RADIUS)  # upper left of the halo
    own = (py + RADIUS).to(OFFSET) * pitch + (px + RADIUS)
    records += first * RECORD
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2

    coarse, fine = (), ()
    partner = partners + slot[:, None] * SLOTS + slot[None, :]
    for s in tl.static_range(N_SETS):
        mine = tl.load(records + (own * RECORD)[:, None] + (slot + s * SLOTS)[None, :])
        coarse = coarse + (tl.dot(mine, tl.load(partner)).to(tl.float16),)
        fine = fine + (tl.dot(mine, tl.load(partner + SLOTS * SLOTS)).to(tl.float16),)

    gate = None
    if GATED:
        mine = tl.load(records + (own * RECORD)[:, None] + (slot + N_SETS * SLOTS)[None, :])
        gate = tl.dot(mine, tl.load(partner + 2 * SLOTS * SLOTS)).to(tl.float16)
    sums = ()
    for b in tl.static_range(len(BLOCKS)):
        sums = sums + (_zeros(PIXELS, BLOCKS[b]),)
    if UNROLL:
        for chunk in tl.static_range(0, TILE_X + 2 * RADIUS, KEYS):
            along_x = _along_x(log2_weights, xy, key + (chunk - RADIUS), px, SETS, RADIUS)
            for row in tl.static_range(TILE_Y + 2 * RADIUS):
                sums = _sum_row(
                    sums, row, records + chunk * RECORD + row * line * RECORD, along_y, along_x, coarse, fine, gate,
                    key + (chunk - RADIUS), px, py, SETS, FIRST_SET, N_SETS, GATED, SPLIT,
                    (row >= RADIUS) & (row < RADIUS + TILE_Y), BLOCKS, FIRST, RECORD, RADIUS, ROWS,
                )  # fmt: skip
    else:
        for chunk in range(0, TILE_X + 2 * RADIUS, KEYS):
            along_x = _along_x(log2_weights, xy, key + (chunk - RADIUS), px, SETS, RADIUS)
            for row in range(TILE_Y + 2 * RADIUS):
                sums = _sum_row(
                    sums, row, records + chunk * RECORD + row * line * RECORD, along_y, along_x, coarse, fine, gate,
                    key + (chunk - RADIUS), px, py, SETS, FIRST_SET, N_SETS, GATED, SPLIT, True, BLOCKS, FIRST, RECORD,
                    RADIUS, ROWS,
                )  # fmt: skip

    inside = (py < TILE_Y) & (y0 + py < height) & (x0 + px < width)
    result += n * stride_n + y0.to(tl.int64) * stride_y + x0.to(tl.int64) * stride_x
    place = (py.to(OFFSET) * stride_y + px.to(OFFSET) * stride_x)[:, None]
    # back to the units of the caller: of a value, of a sum of kernels, and of one of kernels times values
    value_scale = 2.0**-LARGEST_VALUE
    if MODE != "logits":
        value_scale = tl.exp2(_exponent_above(tl.load(largest_value)) - LARGEST_VALUE)
    if GATED:
        kernel_scale *= tl.exp2(_exponent_above(tl.load(largest_gates)) + _exponent_above(tl.load(largest_gates + 1)))
    scale = kernel_scale * value_scale
    mean, largest, mine = None, None, ()
    if MODE != "product":
        energy = tl.zeros((PIXELS,), tl.float32)
        if MODE == "logits":
            energy, largest = _sum_without_largest(sums)
            mean = tl.zeros((PIXELS,), tl.float32)
        for b in tl.static_range(len(BLOCKS)):
            c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
            value = records + (own * RECORD)[:, None] + (c + high)
            p = tl.load(value).to(tl.float32)
            if SPLIT:
                p += tl.load(value + (low - high)).to(tl.float32)
            p *= value_scale
            mine = mine + (p,)
            if MODE == "logits":
                mean += tl.sum(p * (largest[:, None] - sums[b]), axis=1)
            else:
                mass = tl.where(c == COUNT, sums[b] * 2.0**-LARGEST_VALUE, 0.0)
                energy += tl.sum(tl.where(c < COUNT, -p * (sums[b] * value_scale), mass), axis=1)
        if MODE == "logits":
            energy = (energy + mean) * value_scale
        program = (n * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(energies + program, tl.sum(tl.where(inside, energy * kernel_scale, 0.0)))
    if RESULT:
        for b in tl.static_range(len(BLOCKS)):
            c = (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
            if MODE == "product":
                value = sums[b] * scale
            elif MODE == "probabilities":
                value = sums[b] * (scale * -2)
            else:
                value = (mine[b] * (scale * 2)) * ((largest[:, None] - sums[b]) - mean[:, None])
            tl.store(result + place + c.to(OFFSET) * stride_c, value, mask=inside[:, None] & (c < COUNT))


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
    # adds KEYS pixels of a row of the halo to the sums of a tile; with SELF a pixel may meet itself there
    key, slot = tl.arange(0, KEYS), tl.arange(0, SLOTS)
    high: tl.constexpr = (N_SETS + GATED) * SLOTS
    low: tl.constexpr = (RECORD + high) // 2
    operand = records + key[None, :] * RECORD + slot[:, None]  # [SLOTS, KEYS]
    level = along_y - py + (row + (ROWS // 2 - RADIUS))  # [PIXELS]
    kernel = _kernel(
        operand, level, along_x[0], coarse, fine, row, column, px, py, SETS[0], FIRST_SET[0], SPLIT, SELF,
        RADIUS,
    )  # fmt: skip
    for m in tl.static_range(1, len(SETS)):
        kernel += _kernel(
            operand, level + m * ROWS, along_x[m], coarse, fine, row, column, px, py, SETS[m], FIRST_SET[m],
            SPLIT, SELF, RADIUS,
        )  # fmt: skip
    if GATED:
        kernel *= tl.dot(gate, tl.load(operand + N_SETS * SLOTS))
    kernel_high = kernel.to(tl.float16)
    kernel_low = (kernel - kernel_high.to(tl.float32)).to(tl.float16)
    updated = ()
    for b in tl.static_range(len(BLOCKS)):
        value = records + key[:, None] * RECORD + (tl.arange(0, BLOCKS[b]) + FIRST[b])[None, :]
        value_high = tl.load(value + high)
        total = tl.dot(kernel_high, value_high, sums[b])
        if SPLIT:
            total = tl.dot(kernel_low, value_high, total)
            total = tl.dot(kernel_high, tl.load(value + low), total)
        updated = updated + (total,)
    return updated


@triton.jit
def _kernel(
    operand,
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
        whole = tl.dot(coarse[FIRST_SET], tl.load(operand + FIRST_SET * SLOTS), None if SPLIT else term)
        for s in tl.static_range(FIRST_SET + 1, FIRST_SET + SETS):
            whole = tl.dot(coarse[s], tl.load(operand + s * SLOTS), whole)
        rest = term if SPLIT else whole
        for s in tl.static_range(FIRST_SET, FIRST_SET + SETS):
            rest = tl.dot(fine[s], tl.load(operand + s * SLOTS), rest)
        term = tl.exp2(tl.fma(whole, 1.0, rest) if SPLIT else rest)  # a sum would be folded into the product
    return term


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
