"""What a tile does where the features of an image span more than records can pack: it takes their differences."""

import triton
import triton.language as tl

from .records import SET_SIZE, SLOTS, piece_at


@triton.jit
def sum_differences(
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
    TERM_SETS: tl.constexpr,
    FIRST_SETS: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_START: tl.constexpr,
    GATES: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    RECORD: tl.constexpr,
    RADIUS: tl.constexpr,
    OFFSET: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    # The sums of a tile over its halo, whose records have features as they are. It is laid out in registers as the sums
    # of packed features, which mean nothing then; in another layout NVIDIA's compiler runs out of registers.
    own_x = left + RADIUS + px
    sums = ()
    for b in tl.static_range(len(BLOCKS)):
        sums = sums + (tl.where((packed_sums[b] > 0) & (packed_sums[b] < 0), 1.0, 0.0),)
    for step in tl.range(0, (TILE_Y + 2 * RADIUS) * (TILE_X + 2 * RADIUS), num_stages=1):
        row, key_x = step // (TILE_X + 2 * RADIUS), step % (TILE_X + 2 * RADIUS)
        other, x = records + (tl.zeros((1,), OFFSET) + row) * pitch * RECORD, left + key_x
        dy, dx = (row - RADIUS - py).to(tl.float32), (key_x - RADIUS - px).to(tl.float32)
        squared = dy * dy + dx * dx
        met = (tl.abs(dy) <= RADIUS) & (tl.abs(dx) <= RADIUS) & (squared > 0)
        affinity = tl.zeros_like(squared)
        for m in tl.static_range(len(TERM_SETS)):
            exponent = log2_weights[m] - xy[m] * squared
            affinity += tl.exp2(
                _less_differences(exponent, own_row, own_x, other, x, pitch, factors, TERM_SETS[m], FIRST_SETS[m])
            )
        affinity = tl.where(met, affinity, 0.0)
        if GATED:
            mine = own_row + piece_at(own_x, pitch, GATES, SLOTS)
            others = other + piece_at(x, pitch, GATES, SLOTS)
            gates = _gate(mine, 0) * _gate(others, 2) + _gate(mine, 2) * _gate(others, 0)
            affinity *= gates
        updated = ()
        for b in tl.static_range(len(BLOCKS)):
            value = other + tl.arange(0, BLOCKS[b])
            v = tl.load(value + piece_at(x, pitch, HIGH + BLOCK_START[b], BLOCKS[b])).to(tl.float32)
            if SPLIT:
                v += tl.load(value + piece_at(x, pitch, LOW + BLOCK_START[b], BLOCKS[b])).to(tl.float32)
            updated = updated + (sums[b] + affinity[:, None] * v[None, :],)
        sums = updated
    return sums


@triton.jit
def _less_differences(exponent, own_row, own_x, other, x, pitch, factors, SETS: tl.constexpr, FIRST_SET: tl.constexpr):
    # less the squared differences of all features of a term
    for s in tl.static_range(FIRST_SET, FIRST_SET + SETS):
        mine, others = own_row + piece_at(own_x, pitch, s * SLOTS, SLOTS), other + piece_at(x, pitch, s * SLOTS, SLOTS)
        for k in tl.static_range(SET_SIZE):
            difference = _feature(mine, k) - _feature(others, k)
            difference *= factors[SET_SIZE * s + k]
            exponent -= difference * difference
    return exponent


@triton.jit
def _feature(piece, k: tl.constexpr):
    return tl.load(piece.to(tl.pointer_type(tl.float32), bitcast=True) + k)


@triton.jit
def _gate(piece, place: tl.constexpr):
    high, low = tl.load(piece + place), tl.load(piece + (place + 1))
    return high.to(tl.float32) + low.to(tl.float32)
