"""Promise: a configuration is the one in use, the user's, the package's or counted out, and a bad one is named."""

import contextlib
import dataclasses
import json
import multiprocessing
import types
import warnings

import pytest
import torch

from gcrf_triton import gated_crf_loss, tuning
from gcrf_triton.__main__ import main
from gcrf_triton.tuning import Config, Key

KEY = Key("NVIDIA Imaginary 9000", "sm_990", 24, (1,), False, 5, "float32", 18)
OTHER = Config(4, 4, 64, False)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GCRF_TRITON_CACHE", str(tmp_path))
    tuning._stored.cache_clear()
    yield tmp_path
    tuning._stored.cache_clear()


def test_the_ladder(tmp_path, monkeypatch):
    by_counting = tuning.choose_config(KEY)
    assert by_counting == Config(5, 6, 32, num_stages=tuning.STAGES) and not by_counting.unroll

    shipped = tmp_path / "shipped.json"
    shipped.write_text(json.dumps({"schema": 1, "entries": {str(KEY): {"tile_y": 8, "tile_x": 4}}}))
    monkeypatch.setattr(tuning, "shipped_file", lambda device: shipped)
    tuning._stored.cache_clear()
    assert tuning.choose_config(KEY) == Config(8, 4)

    path = tuning.remember(KEY, OTHER, milliseconds=0.5)
    assert path.is_relative_to(tmp_path) and json.loads(path.read_text())["milliseconds"] == 0.5
    assert tuning.choose_config(KEY) == OTHER

    with tuning.use_config(Config(4, 8)):
        assert tuning.choose_config(KEY) == Config(4, 8)
        with tuning.use_config(Config(8, 4)):
            assert tuning.choose_config(KEY) == Config(8, 4)
        assert tuning.choose_config(KEY) == Config(4, 8)
    assert tuning.choose_config(KEY) == OTHER


def test_a_problem_only_gets_its_own():
    tuning.remember(KEY, OTHER)
    changes = {"device": "other", "arch": "sm_80", "columns": 32, "sets": (1, 0), "gated": True, "radius": 6}
    for field, value in changes.items():
        assert tuning.choose_config(dataclasses.replace(KEY, **{field: value})) != OTHER


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        "{}",
        json.dumps({"schema": 0, "entries": {}}),
        json.dumps({"schema": 1, "entries": {str(KEY): {"tile_y": 0}}}),
        json.dumps({"schema": 1, "entries": {str(KEY): {"warps": 4}}}),
        json.dumps({"schema": 1, "entries": {str(KEY): {"tile_x": "6"}}}),
    ],
)
def test_foreign_files_warn_once(content):
    path = tuning.cache_file(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match="holds no configurations of this version .* is ignored") as caught:
        assert tuning.choose_config(KEY) == tuning.heuristic(KEY)
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.choose_config(KEY) == tuning.heuristic(KEY)


def _remember_often(_):
    for tile in (4, 8) * 50:
        tuning.remember(KEY, Config(tile, 4))


def test_writers_at_once_leave_whole_files(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        writing = pool.map_async(_remember_often, range(2))
        while not writing.ready():
            tuning._stored.cache_clear()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert tuning.choose_config(KEY) in (Config(4, 4), Config(8, 4), tuning.heuristic(KEY))
        writing.get()
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".json"]


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "tile_y: expected int, got float", {"tile_y": 4.0}),
        (TypeError, "unroll: expected bool, got int", {"unroll": 1}),
        (TypeError, "num_stages: expected int, got float", {"num_stages": 2.0}),
        (ValueError, "num_stages: expected 1 to 4, and 1 with unroll, got 5", {"num_stages": 5}),
        (ValueError, "num_stages: expected 1 to 4, and 1 with unroll, got 2", {"num_stages": 2, "unroll": True}),
        (ValueError, "expected a tile of 1 to 128 pixels, got 0 x 6", {"tile_y": 0}),
        (ValueError, "expected a tile of 1 to 128 pixels, got 50 x 6", {"tile_y": 50}),
        (ValueError, "expected to fill 16 pixels, got 1 x 5", {"tile_y": 1, "tile_x": 5}),
        (ValueError, "num_warps: expected 1, 2, 4 or 8, got 3", {"num_warps": 3}),
        (ValueError, "pack: expected 32, 64, 128 or 256, got 100", {"pack": 100}),
    ],
)
def test_wrong_configurations(error, message, arguments):
    with pytest.raises(error, match=message):
        Config(**arguments)


def test_configurations_are_frozen():
    with pytest.raises(AttributeError):
        Config().tile_y = 3


@pytest.mark.parametrize("columns", [8, 24, 48, 64])
@pytest.mark.parametrize("sets", [(0,), (1,), (1, 0), (2, 1), (3, 3)])
@pytest.mark.parametrize("radius", [1, 3, 5, 16, 100])
def test_there_is_always_a_configuration(radius, sets, columns):
    key = Key("any", "sm_90", columns, sets, True, radius, "float32", 20)
    config = tuning.heuristic(key)
    assert config in tuning.space(key) and len(set(tuning.space(key))) == len(tuning.space(key))
    assert config.tile_y * config.tile_x >= 0.8 * config.pixels


@pytest.mark.parametrize("arch, pixels", [("sm_90", 32), ("gfx942", 32), ("gfx1100", 16), ("xpu", 16)])
def test_many_classes_take_the_large_tile_where_it_is_known_to_fit(arch, pixels):
    assert tuning.heuristic(Key("any", arch, 64, (1,), True, 5, "float32", 20)).pixels == pixels


@pytest.mark.engines("triton")
def test_nothing_is_written_by_a_loss(tmp_path):
    gated_crf_loss(torch.rand(1, 2, 4, 4, requires_grad=True), {"rgb": torch.rand(1, 3, 4, 4)}).backward()
    assert not list(tmp_path.iterdir())


def test_tune_without_a_gpu_counts_and_says_so(capsys, tmp_path):
    pytest.importorskip("gcrf_triton.triton_engine")
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU, on which tuning measures")
    main(["tune", "--shape", "2", "4", "100", "120", "--radius", "3", "--gates"])
    printed = capsys.readouterr().out
    assert "counted, not measured" in printed and "nothing is kept" in printed and "best: Config(" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.engines("triton")
@pytest.mark.parametrize("gates", [[], ["--gates"]])
def test_tune_measures_all_configurations_one_after_another(gates, monkeypatch, capsys):
    """As on a GPU, for which the interpreter stands."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr("gcrf_triton.tuner.select_engine", lambda impl, device: "triton")
    configs, milliseconds = [Config(4, 8), Config(8, 4), Config(5, 6)], iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(tuning, "space", lambda key: configs)
    monkeypatch.setattr("triton.testing.do_bench", lambda step, return_mode: (step(), next(milliseconds))[1])
    main(["tune", "--shape", "1", "2", "8", "9", "--radius", "1", *gates])
    printed = capsys.readouterr().out
    assert "failed" not in printed and all(
        f"{number}.000  {configs[place]}" in printed for place, number in enumerate("312")
    )
    assert "best: Config(tile_y=8, tile_x=4" in printed and "kept in" in printed


def test_an_image_of_one_pixel_can_be_tuned_for(capsys):
    pytest.importorskip("gcrf_triton.triton_engine")
    main(["tune", "--shape", "1", "21", "1", "1"])
    assert "best: Config(" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--channels", "3", "1"], "channels: expected 1 numbers"),
        (["--shape", "1", "200", "8", "8"], "too many classes"),
        (["--channels", "0"], "channels: expected 1 numbers from 1"),
        (["--kernels", "[]"], "kernels: expected at least one"),
        (["--kernels", "x"], "expected JSON, got 'x'"),
        (["--shape", "0", "2", "8", "8"], "shape: expected four numbers from 1"),
        (["--radius", "0"], "radius: expected at least 1, got 0"),
    ],
)
def test_wrong_problems_to_tune_for(arguments, message, capsys):
    pytest.importorskip("gcrf_triton.triton_engine")
    with pytest.raises(SystemExit):
        main(["tune", *arguments])
    assert message in capsys.readouterr().err


def test_there_is_nothing_to_tune_without_triton(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["tune"])
    assert "tune: expected Triton, whose configurations these are, got none" in capsys.readouterr().err
    main([])
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize("arch, name", [(90, "sm_90"), ("gfx942", "gfx942"), ({"num_xve": 448}, "xpu")])
def test_architectures_have_short_names(arch, name, monkeypatch):
    driver = pytest.importorskip("gcrf_triton.triton_engine")
    current = []
    target = types.SimpleNamespace(get_current_target=lambda: types.SimpleNamespace(arch=(current[-1], arch)[1]))
    monkeypatch.setattr(driver.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(driver.triton.runtime.driver, "_active", target)
    monkeypatch.setattr(driver, "_current", lambda device: contextlib.nullcontext(current.append(device)))
    module = types.SimpleNamespace(get_device_name=lambda device: "Imaginary 9000")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    driver.device_and_arch.cache_clear()
    assert driver.device_and_arch(torch.device("xpu", 1)) == ("Imaginary 9000", name)
    driver.device_and_arch.cache_clear()
    assert current == [torch.device("xpu", 1)]  # not whichever was current


def test_a_home_that_cannot_be_read(monkeypatch):
    def refuse(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.warns(UserWarning, match="PermissionError"):
        assert tuning.choose_config(KEY) == tuning.heuristic(KEY)
    monkeypatch.delenv("GCRF_TRITON_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # nobody's home
    assert tuning.cache_folder().name == "gcrf_triton"


@pytest.mark.parametrize("arch, most", [("sm_90", 4), ("gfx942", 2)])
def test_the_space_has_loops_with_every_number_of_stages_and_what_is_written_out(arch, most):
    configs = tuning.space(dataclasses.replace(KEY, arch=arch))
    assert {config.num_stages for config in configs if not config.unroll} == set(range(1, most + 1))
    assert any(config.unroll for config in configs) and len(set(configs)) == len(configs)


def test_only_configurations_are_used():
    with pytest.raises(TypeError, match="config: expected a Config, got str"), tuning.use_config("fast"):
        pass
