"""Promise: where pixels, features and values lie in memory fits together, whatever is launched."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcrf_triton import tuning
from gcrf_triton.constants import (
    COLUMN_UNIT,
    KEYS,
    LARGEST_COLUMNS,
    LARGEST_SETS,
    LOG2_LARGEST_AFFINITY,
    MARGIN_UNIT,
    SET_SIZE,
    SLOTS,
    STRIDE_UNIT,
    SUMMARY_UNIT,
)
from gcrf_triton.planning import (
    LIMITS,
    Description,
    Limits,
    Record,
    column_blocks,
    make_feature_sets,
    make_plan,
    make_scales,
)
from gcrf_triton.problem import Term

CONFIGS = [tuning.Config(y, x) for y, x in ((1, 16), (2, 8), (3, 5), (4, 4), (5, 3), (5, 6), (8, 4), (16, 2), (8, 16))]
RGB_XY = (Term(1.0, 6.0, (0.1,)),)

descriptions = st.builds(
    Description,
    shape=st.tuples(st.integers(1, 5), st.integers(1, LARGEST_COLUMNS - 1), st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["values", "probabilities", "logits"]),
    channels=st.just((3,)),
    terms=st.just(RGB_XY),
    radius=st.integers(1, 20),
    gated=st.booleans(),
    mean=st.booleans(),
)


@given(descriptions, st.sampled_from(CONFIGS))
@settings(deadline=None)
def test_a_tile_reads_nothing_beyond_its_padded_rows(description, config):
    plan = make_plan(description, config, LIMITS)
    tiles, radius = plan.tiles, description.radius
    _, _, height, width = description.shape
    assert tiles.margin >= radius and tiles.margin % MARGIN_UNIT == 0 and tiles.pitch % STRIDE_UNIT == 0
    assert tiles.tiles_y * config.tile_y >= height and tiles.tiles_x * config.tile_x >= width
    assert tiles.margin + width <= tiles.pitch
    left = tiles.margin - radius + (tiles.tiles_x - 1) * config.tile_x  # of the last halo
    assert left + -(-(config.tile_x + 2 * radius) // KEYS) * KEYS <= tiles.pitch
    # pixels that fill a tile up to a power of two lie in rows below it, which the halo has
    assert (config.pixels - 1) // config.tile_x + radius < config.tile_y + 2 * radius
    for y in ((config.pixels - 1) // config.tile_x, 0):
        for row in (0, config.tile_y + 2 * radius - 1):
            assert 0 <= row - radius - y + tiles.table // 2 < tiles.table


@given(descriptions, st.sampled_from(CONFIGS), st.integers(1, 2**20))
@settings(deadline=None)
def test_chunks_cover_a_batch_once_and_fit_the_workspace(description, config, workspace):
    plan = make_plan(description, config, Limits(workspace=workspace))
    covered = []
    for chunk in plan.chunks.each():
        images = range(chunk.first_image, chunk.first_image + chunk.images)
        covered += [(n, chunk.top_tile + tile) for n in images for tile in range(chunk.tiles_y)]
        halves = plan.chunk_rows(chunk.tiles_y) * plan.tiles.pitch * plan.record.size
        assert 2 * halves * chunk.images <= workspace or (chunk.images, chunk.tiles_y) == (1, 1)
        assert chunk.images <= plan.chunks.images and halves <= plan.image_halves()
    everything = {(n, tile) for n in range(description.shape[0]) for tile in range(plan.tiles.tiles_y)}
    assert set(covered) == everything and len(covered) == len(everything)


@given(st.integers(0, LARGEST_SETS), st.booleans(), st.integers(1, LARGEST_COLUMNS), st.booleans())
def test_the_pieces_of_a_record_lie_one_after_another(sets, gated, columns, split):
    blocks = column_blocks(columns)
    record = Record(sets, gated, blocks, split)
    pieces = [(place * SLOTS, SLOTS) for place in range(sets)] + [(record.gates, SLOTS)] * gated
    for start in [record.high] + [record.low] * split:
        pieces += [(start + sum(blocks[:place]), size) for place, size in enumerate(blocks)]
    ends = [start + size for start, size in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == record.size
    assert columns <= sum(blocks) < columns + COLUMN_UNIT and all(size.bit_count() == 1 for size in blocks)


def test_channels_lie_in_sets_term_by_term():
    terms = (Term(1.0, 6.0, (0.1, math.inf)), Term(1.0, 3.0, (math.inf, math.inf)), Term(2.0, math.inf, (0.2, 0.5)))
    sets = make_feature_sets((3, 1), terms)
    assert sets.channels == (0, 1, 2, 0, 1, 2, 3, -1, -1) and len(sets.channels) == SET_SIZE * sum(sets.sizes)
    assert sets.sizes == (1, 0, 2) and sets.first == (0, 1, 1)
    sigmas = [0.1] * 3 + [0.2] * 3 + [0.5]
    for factor, sigma in zip(sets.factors, sigmas, strict=False):
        assert math.isclose(2 ** -((0.3 * factor) ** 2), math.exp(-0.5 * (0.3 / sigma) ** 2))
    assert sets.factors[7:] == (0.0, 0.0)


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=4), st.booleans())
def test_scaled_affinities_fit_halves_and_are_undone(weights, gated):
    scales = make_scales(weights, gated)
    largest = sum(2**weight for weight in scales.log2_weights) * (2 if gated else 1)  # s d' + d s' < 2
    assert 2 ** (LOG2_LARGEST_AFFINITY - 1) * (1 - 1e-9) <= largest <= 2**LOG2_LARGEST_AFFINITY * (1 + 1e-9)
    assert math.isclose(scales.undo * 2 ** scales.log2_weights[0], weights[0] / (2 if gated else 1), rel_tol=1e-9)


@given(descriptions, st.integers(1, 4096))
@settings(deadline=None)
def test_the_parts_of_a_summary_are_loaded_as_vectors(description, prepared):
    plan = make_plan(description, tuning.Config(5, 6), Limits(prepared=prepared))
    pixels = description.shape[2] * description.shape[3]
    assert plan.parts % SUMMARY_UNIT == 0 and SUMMARY_UNIT <= plan.parts <= Limits().parts
    assert plan.pack_arguments["parts"] * SUMMARY_UNIT == plan.parts
    assert plan.parts * prepared >= pixels or plan.parts == Limits().parts
