"""The kernel without tensor cores: any dtype, any number of columns and channels."""

import triton
import triton.language as tl


@triton.jit
def sum_offsets(
    values,
    features,
    factors,
    source,
    destination,
    log2_terms,
    result,
    columns,
    plane,
    height,
    width,
    TERMS: tl.constexpr,
    FEATURE_CHANNELS: tl.constexpr,
    USED: tl.constexpr,
    GATED: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Multiply values by the matrix S in their own dtype, an offset of the window at a time: where no tile can.

    Grid (ceil(H W / PIXELS), ceil(columns / BLOCK), N). A program owns BLOCK columns of PIXELS pixels. Reads values
    [N, columns, H, W], features [N, F, H, W], the gates [N, H, W] and log2_terms [terms, 2 RADIUS + 1, 2 RADIUS + 1],
    the weight and xy part of every term for every offset, -inf for a pixel with itself. `factors` and USED have, for
    every term, one entry a feature: what differences are multiplied by, and whether the term depends on it. Writes
    result [N, columns, H, W], summed offset by offset.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    n = tl.program_id(2).to(tl.int64)
    own = tl.program_id(0).to(OFFSET) * PIXELS + tl.arange(0, PIXELS)
    inside = own < plane
    y, x = own // width, own % width
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = (n * columns + column)[:, None] * plane.to(tl.int64)
    sums = tl.zeros((BLOCK, PIXELS), dtype)
    source += n * plane
    destination += n * plane
    for dy in range(-RADIUS, RADIUS + 1):
        for dx in range(-RADIUS, RADIUS + 1):
            met = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            other = own + dy * width + dx
            affinity = tl.zeros((PIXELS,), dtype)
            for m in tl.static_range(TERMS):
                offset = (m * (2 * RADIUS + 1) + dy + RADIUS) * (2 * RADIUS + 1) + dx + RADIUS
                exponent = tl.zeros((PIXELS,), dtype) + tl.load(log2_terms + offset)
                for f in tl.static_range(m * len(FEATURE_CHANNELS), (m + 1) * len(FEATURE_CHANNELS)):
                    if USED[f]:
                        factor = tl.load(factors + f)
                        channel = features[f % len(FEATURE_CHANNELS)]
                        channel += n * FEATURE_CHANNELS[f % len(FEATURE_CHANNELS)] * plane
                        for _ in range(FEATURE_CHANNELS[f % len(FEATURE_CHANNELS)]):
                            difference = tl.load(channel + other, mask=met, other=0.0)
                            difference = (difference - tl.load(channel + own, mask=met, other=0.0)) * factor
                            exponent -= difference * difference
                            channel += plane
                affinity += tl.exp2(exponent)
            if GATED:
                gate = tl.load(source + other, mask=met, other=0.0) * tl.load(destination + own, mask=met, other=0.0)
                gate += tl.load(destination + other, mask=met, other=0.0) * tl.load(source + own, mask=met, other=0.0)
                affinity *= gate * 0.5  # the 1/2 of S_ij
            read = (column < columns)[:, None] & met[None, :]
            value = tl.load((values + start) + other[None, :], mask=read, other=0.0)
            sums += tl.where(met, affinity, 0.0)[None, :] * value
    tl.store((result + start) + own[None, :], sums, mask=(column < columns)[:, None] & inside[None, :])
