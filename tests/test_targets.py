"""Promise: the kernels compile for every target, without spills and within its shared memory, at the stated cost."""

import itertools
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench.machine_code.compiling import TARGETS
from bench.machine_code.model import fits, rows_of
from gcrf_triton.tuning import Config

triton_engine = pytest.importorskip("gcrf_triton.triton_engine")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton compiles on Linux only")


@pytest.fixture(scope="module")
def compiled():
    """Rows of `bench.machine_code.model` for cases (target, problem), compiled by processes that interpret nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:

            def rows_of_cases(*cases):
                found = [processes.submit(rows_of, target, **problem) for target, problem in cases]
                return [each.result() for each in found]

            yield rows_of_cases


def assert_fits(rows):
    for row in rows:
        if row["kernel"] != "together":
            assert fits(row), row
            assert row["spilled_bytes"] == 0 or not triton_engine.TRITON_AT_LEAST_3_9, row


@pytest.fixture(scope="module")
def rows_of_targets(compiled):
    # small windows, as those unroll into what compiles in seconds; the next test has the large one
    logits = {"radius": 2, "gates": True}
    halves = {"radius": 2, "dtype": "bfloat16"}
    probabilities = {"shape": [2, 4, 60, 80], "radius": 16, "gates": True, "from_logits": False}
    many_classes = probabilities | {"shape": [2, 63, 60, 80]}
    doubles = probabilities | {"dtype": "float64"}
    problems = (logits, halves, probabilities, many_classes, doubles)
    rows = compiled(*itertools.product(TARGETS, problems))
    return {target: [each for each in rows if each[0]["target"] == target] for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_little_shared_memory(target, rows_of_targets):
    assert len(rows_of_targets[target]) == 5
    for rows in rows_of_targets[target]:
        assert_fits(rows)


def test_the_cost_of_the_paper_s_problem(compiled):
    # a fifth to a third above what the fewest instructions take, in 0.6 to 0.7 of the time on an H100
    limits = {("float16", False): 30, ("float16", True): 40.5, ("float32", False): 45, ("float32", True): 54}
    cases = [("sm_90", {"dtype": dtype, "gates": gates}) for dtype, gates in limits]
    # 3.5 takes 1 to 9 % more than 3.9, of which the costs are stated
    older = 1 if triton_engine.TRITON_AT_LEAST_3_9 else 1.08
    for limit, rows in zip(limits.values(), compiled(*cases), strict=True):
        together = rows[-1]
        assert together["kernel"] == "together"
        assert together["special_clocks"] < together["issue_clocks"] <= limit * older
        for row in rows[:-1]:
            assert row["spilled_bytes"] == 0
            if row["kernel"] == "sum_tile":  # `prepare` knows no row's end, and `pack` has a pixel a thread
                assert row["wide_loads"] >= 0.5 * row["loads"]


def test_several_pixels_of_a_thread_are_loaded_at_once(compiled):
    config = Config(tile_y=8, tile_x=4, pack=128)
    _, pack, tile, _ = compiled(("sm_90", {"dtype": "float16", "config": config}))[0]
    assert (pack["kernel"], tile["kernel"]) == ("pack", "sum_tile")
    assert all(row["wide_loads"] >= 0.5 * row["loads"] and row["spilled_bytes"] == 0 for row in (pack, tile))


def test_cost_grows_slower_than_classes_and_no_faster_than_the_halo(compiled):
    def problem(classes, radius):
        return ("sm_90", {"classes": classes, "radius": radius, "dtype": "float16"})

    rows = compiled(problem(16, 3), problem(32, 3), problem(63, 3), problem(21, 2), problem(21, 4))
    few, more, many, narrow, wide = (row[-1]["instructions"] for row in rows)
    assert few < more < 2 * few and more < many < 2 * more
    assert wide / narrow <= (5 + 2 * 4) ** 2 / (5 + 2 * 2) ** 2


def test_the_model_names_the_unit_that_sets_the_bound(compiled):
    *_, together = compiled(("sm_90", {"radius": 2, "dtype": "float16"}))[0]
    clocks = {name: value for name, value in together.items() if name.endswith("_clocks") and name != "bound_clocks"}
    assert together["bound_clocks"] == max(clocks.values()) == clocks[f"{together['bound_by']}_clocks"]
    assert min(clocks.values()) > 0
    # 3 colours read, copied and read; 21 halves read and written; those read, multiplied and written; a sum of tiles
    assert together["bytes"] == pytest.approx(3 * 4 * 3 + 4 * 2 * 21, abs=0.3)
    assert together["launches"] == 7
    assert together["unfold_bytes"] == 4 * 2 * 21 * 25
