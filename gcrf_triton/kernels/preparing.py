"""The first kernel: copy what is constant, and note how large it is."""

import triton
import triton.language as tl

from .records import STRIDES, is_finite


@triton.jit(do_not_specialize=["height", "width", *STRIDES])
def prepare(
    features,
    source,
    destination,
    values,
    copies,
    summary,
    height,
    width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    FEATURE: tl.constexpr,
    OWN_CHANNEL: tl.constexpr,
    FEATURE_CHANNELS: tl.constexpr,
    SOURCE: tl.constexpr,
    DESTINATION: tl.constexpr,
    SCANNED: tl.constexpr,
    SUMMARY_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Copy features and gates of any dtype as float32, and note how large they are.

    Grid (N, parts). A program owns one of the parts of an image's pixels, PIXELS at a time. It reads, as channel k,
    channel OWN_CHANNEL[k] of features[FEATURE[k]], where features[f] is [N, FEATURE_CHANNELS[f], H, W], and, with
    SOURCE and DESTINATION, the gates [N, H, W], all contiguous. It writes copies [N, CHANNELS + 2 if gated, H, W]: the
    channels (those of uint8 divided by 255), s and d (1 for one that is not given).

    Writes summary [N, SUMMARY_ROWS, PARTS], as many of each row as there are parts: the smallest and the largest value
    of every channel where a gate is open and all channels are finite; with gates the largest s, the largest d, and the
    sum of d (of s without it); with SCANNED > 0 the largest finite magnitude of the value columns [N, SCANNED, H, W] of
    any strides and dtype.
    """
    GATED: tl.constexpr = SOURCE or DESTINATION
    CHANNELS: tl.constexpr = len(OWN_CHANNEL)
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    plane = height.to(tl.int64) * width
    zeros = tl.zeros((PIXELS,), tl.float32)
    lows, highs = (), ()
    for _channel in tl.static_range(CHANNELS):
        lows, highs = lows + (zeros + float("inf"),), highs + (zeros - float("inf"),)
    largest_s, largest_d, gate_sum, largest_value = zeros, zeros, zeros, zeros
    share = tl.cdiv(plane, tl.num_programs(1) * PIXELS) * PIXELS
    start, stop = part * share, tl.minimum((part + 1) * share, plane)
    while start < stop:  # no range: Triton 3.6's interpreter fails on tensors as bounds with NumPy 2.5
        pixel = start + tl.arange(0, PIXELS)
        inside = pixel < plane
        own = copies + n * (CHANNELS + 2 * GATED) * plane + pixel
        finite, channels = inside, ()
        for k in tl.static_range(CHANNELS):
            channel = features[FEATURE[k]] + (n * FEATURE_CHANNELS[FEATURE[k]] + OWN_CHANNEL[k]) * plane
            value = tl.load(channel + pixel, mask=inside, other=0).to(tl.float32)
            if features[FEATURE[k]].dtype.element_ty == tl.uint8:
                value = tl.div_rn(value, zeros + 255.0)
            finite, channels = finite & is_finite(value), channels + (value,)
        seen = finite
        if GATED:
            s, d = zeros + 1.0, zeros + 1.0
            if SOURCE:
                s = tl.load(source + n * plane + pixel, mask=inside, other=0).to(tl.float32)
            if DESTINATION:
                d = tl.load(destination + n * plane + pixel, mask=inside, other=0).to(tl.float32)
            gate_sum += tl.where(inside, d if DESTINATION else s, 0.0)
            largest_s = tl.maximum(largest_s, tl.where(inside, s, 0.0))
            largest_d = tl.maximum(largest_d, tl.where(inside, d, 0.0))
            tl.store(own + CHANNELS * plane, s, mask=inside)
            tl.store(own + (CHANNELS + 1) * plane, d, mask=inside)
            seen = finite & ((s != 0) | (d != 0))
        lower, higher = (), ()
        for k in tl.static_range(CHANNELS):
            lower = lower + (tl.where(seen, tl.minimum(lows[k], channels[k]), lows[k]),)
            higher = higher + (tl.where(seen, tl.maximum(highs[k], channels[k]), highs[k]),)
            tl.store(own + k * plane, channels[k], mask=inside)
        lows, highs = lower, higher
        if SCANNED > 0:
            y, x = pixel // width, pixel % width
            column = values + n * stride_n + y * stride_y + x * stride_x
            for _column in range(SCANNED):
                value = tl.abs(tl.load(column, mask=inside, other=0.0).to(tl.float32))
                largest_value = tl.where(is_finite(value), tl.maximum(largest_value, value), largest_value)
                column += stride_c
        start += PIXELS
    row = summary + n * SUMMARY_ROWS * PARTS + part
    for k in tl.static_range(CHANNELS):
        tl.store(row + 2 * k * PARTS, tl.min(lows[k]))
        tl.store(row + (2 * k + 1) * PARTS, tl.max(highs[k]))
    row += 2 * CHANNELS * PARTS
    if GATED:
        tl.store(row, tl.max(largest_s))
        tl.store(row + PARTS, tl.max(largest_d))
        tl.store(row + 2 * PARTS, tl.sum(gate_sum))
        row += 3 * PARTS
    if SCANNED > 0:
        tl.store(row, tl.max(largest_value))
