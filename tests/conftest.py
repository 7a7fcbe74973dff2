import contextlib
import dataclasses
import functools
import gc
import os
import re
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before OpenMP starts: its threads sleep while they wait

import numpy as np
import pytest
import torch

gc.set_threshold(50_000)  # the interpreter makes objects by the thousand

OPTIONAL = ("efficientnet_lite_pytorch", "h5py", "imgviz", "matplotlib", "PIL", "scipy", "sklearn", "tqdm")


def spare_interpreter():
    """Keep Triton's interpreter from what it does for nothing: kernels take a third of the time, and fail as before.

    It checks for overflow and drops what it finds, patches its language again at every call of a function, writes down
    a table of types for every operation, makes the types and shapes of its tensors anew, compares shapes that are the
    same, and reduces one row after another where all could be reduced at once.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    builder, patch_once = interpreter.interpreter_builder, functools.cache(interpreter._patch_lang)
    reduce_each = interpreter.ReduceOps.generic_reduce
    look_up, remember = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    make_block, make_tensor, blocks, shapes = tl.block_type.__init__, tl.tensor.__init__, {}, {}
    broadcast_unlike = TritonSemantic.broadcast_impl_value

    def call(function, *arguments, **keywords):
        patch_once(function.fn)
        return function.rewrite()(*arguments, **keywords)

    def numpy_type(kind):
        return look_up(kind.scalar) if kind.scalar.is_ptr() else remember(kind.scalar)  # pointers have no hash

    def block_of(self, kind, shape):
        key = str(kind), *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in blocks:
            make_block(self, kind, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=kind)

    def tensor_of(self, handle, kind):
        if kind.name not in shapes:
            make_tensor(self, handle, kind)
            shapes[kind.name] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[kind.name], handle=handle, type=kind, dtype=kind.scalar)

    def broadcast(semantic, one, other):
        alike = one.type.is_block() and other.type.is_block() and one.type.shape.values == other.type.shape.values
        return (one, other) if alike else broadcast_unlike(semantic, one, other)

    def reduce_all_rows(reduction, tensors):
        if reduction.axis is None:
            return reduce_each(reduction, tensors)
        steps = zip(*(np.moveaxis(tensor.handle.data, reduction.axis, 0) for tensor in tensors), strict=True)
        results = None
        for step in steps:
            values = [reduction.to_tensor(data, tensor.dtype) for data, tensor in zip(step, tensors, strict=True)]
            results = values if results is None else reduction.combine_fn.fn(*results, *values)
            results = results if isinstance(results, (tuple, list)) else [results]
        if reduction.keep_dims:
            kept = (np.expand_dims(result.handle.data, reduction.axis) for result in results)
            results = [reduction.to_tensor(data, tensor.dtype) for data, tensor in zip(kept, tensors, strict=True)]
        return list(results)

    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_type
    interpreter.ReduceOps.generic_reduce = reduce_all_rows
    tl.block_type.__init__, tl.tensor.__init__ = block_of, tensor_of
    TritonSemantic.broadcast_impl_value = broadcast


if os.environ["TRITON_INTERPRET"] == "1":
    with contextlib.suppress(ImportError, AttributeError):  # there is none, or it does so no more
        spare_interpreter()


def reason_to_skip(report: str) -> str | None:
    """What a report says, if it is that an optional package is not installed; in CI all have to be."""
    found = re.search(r"^E +ModuleNotFoundError: (No module named '(\w+)[\w.]*')", report, re.M)
    return found[1] if found and found[2] in OPTIONAL and "CI" not in os.environ else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip files that import a package which is not installed."""
    report = yield
    if report.failed and (reason := reason_to_skip(str(report.longrepr))):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip tests that import a package which is not installed."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if reason := reason_to_skip(f"E ModuleNotFoundError: {error}"):
            pytest.skip(reason)
        raise


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fill every uninitialised allocation with NaN, so that reading one shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Tiny pictures train faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def acdc(tmp_path: Path) -> Path:
    """Five training patients and two for testing, two slices each, of different sizes."""
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    (tmp_path / "acdc" / "slices").mkdir(parents=True)
    for split, patients in (("train", range(1, 6)), ("test", range(6, 8))):
        names = [f"patient{number:03}_frame01_slice_{place}.h5" for number in patients for place in range(2)]
        (tmp_path / "acdc" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            label = np.zeros((40 + int(random.integers(3)), 36), np.uint8)
            label[8:32, 8:30] = 2
            label[14:26, 14:24] = 3
            label[8:32, 2:8] = 1
            scribble = np.full(label.shape, 4, np.uint16)
            for column in (4, 11, 19, 33):
                scribble[18:22, column] = label[18:22, column]
            with h5py.File(tmp_path / "acdc" / "slices" / name, "w") as file:
                file["image"] = (label / 4 + random.normal(0, 0.02, label.shape)).clip(0, 1).astype(np.float32)
                file["label"], file["scribble"] = label, scribble
    return tmp_path / "acdc"


@pytest.fixture
def msrc(tmp_path: Path) -> Path:
    """Photographs of a dark and a bright half with palette masks, in the layout of PASCAL VOC."""
    Image = pytest.importorskip("PIL.Image")
    root = tmp_path / "msrc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"photo_{number}" for number in range(14)]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:10]))
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names[10:]))
    (root / "classes.txt").write_text("dark\nbright\n")
    for number, name in enumerate(names):
        mask = np.zeros((36, 48), np.uint8)
        mask[:, 14 + number :] = 1
        mask[:, 13 + number] = 255
        image = Image.fromarray(mask, "P")
        image.putpalette([0, 0, 0, 128, 0, 0] * 128)  # all 256, or PNG keeps one bit of 255
        image.save(root / "SegmentationClass" / f"{name}.png")
        Image.fromarray(np.where(mask == 1, 200, 40).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
    return root


@pytest.fixture(autouse=True)
def engine(request, monkeypatch):
    """The engine that impl="auto" stands for: each of those that pytest.mark.engines names, else PyTorch's."""
    name = getattr(request, "param", "torch")
    if name == "triton":
        engine = pytest.importorskip("gcrf_triton.triton_engine")
        from gcrf_triton import planning

        if reason := engine.unavailable(torch.device("cpu")):
            pytest.skip(f"Triton cannot run on the CPU: {reason}")
        if os.environ.get("TRITON_INTERPRET") == "1":
            few = planning.LIMITS._replace(parts=4)  # a program takes the interpreter milliseconds
            monkeypatch.setattr(planning, "LIMITS", few)
    monkeypatch.setenv("GCRF_TRITON_IMPL", name)
    return name


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("engines")
    if marker:
        metafunc.parametrize("engine", marker.args, indirect=True)
