# SPDX-License-Identifier: Apache-2.0
"""`warmup`: after it, calls of the same shapes and dtypes compile nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import cupy_msda
from cupy_msda import ms_deform_attn, ms_deform_attn_backward
from cupy_msda.contract import check_query_order
from cupy_msda.cuda import launch, plans
from cupy_msda.cuda.compile import Kernel
from cupy_msda.problem import LevelTable, Problem

VALUE, LOCATIONS = (2, 26, 3, 16), (2, 5, 3, 2, 4, 2)


class FakeDevice:
    """cupy.cuda.Device of a machine with two devices."""

    current = 0

    def __init__(self, device: int | None = None) -> None:
        self.device = FakeDevice.current if device is None else device
        self.attributes = {"MultiProcessorCount": 132}

    def __enter__(self) -> None:
        self.before, FakeDevice.current = FakeDevice.current, self.device

    def __exit__(self, *_: object) -> None:
        FakeDevice.current = self.before


@pytest.fixture
def compiled(monkeypatch):
    """Pretend to have two GPUs; the kernels that were asked for, with their devices."""
    found: set[tuple[Kernel, int]] = set()
    runtime = SimpleNamespace(getDevice=lambda: FakeDevice.current)
    cupy = SimpleNamespace(
        ndarray=np.intp, cuda=SimpleNamespace(runtime=runtime, Device=FakeDevice)
    )
    monkeypatch.setattr(launch, "require_cupy", lambda: cupy)
    monkeypatch.setattr(launch, "load", lambda *key: found.add(key) or (lambda *_: None))
    launch._multiprocessors.cache_clear()
    yield found
    launch._multiprocessors.cache_clear()


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    """torch's switch."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("dtypes", [("float32", None), ("float16", "float16"), ("float64", None)])
@pytest.mark.parametrize("head_dim", [16, 5])
@pytest.mark.parametrize("most_points_owned", [0, 20])
def test_calls_find_their_kernels_compiled(
    compiled, monkeypatch, dtypes, head_dim, device, deterministic, most_points_owned
) -> None:
    monkeypatch.setattr(plans, "_MOST_POINTS_OWNED", most_points_owned)
    shape = (*VALUE[:3], head_dim)
    cupy_msda.warmup(shape, LOCATIONS, dtype=dtypes[0], points_dtype=dtypes[1], device=device)
    warm = set(compiled)
    compiled.clear()
    points = dtypes[1] or ("float64" if dtypes[0] == "float64" else "float32")
    problem = Problem(2, 26, 3, head_dim, 5, 2, 4, dtypes[0], points, points)
    table = LevelTable(((4, 5), (2, 3)), (0, 20))
    array = np.intp(0)  # a null pointer
    with FakeDevice(1 if device == "cuda:1" else 0):
        launch.forward(problem, table, *[None] * 4)
        for needed in ((array,) * 3, (array, None, None), (None, array, array)):
            sums = array if deterministic and needed[0] is not None else None
            launch.backward(problem, table, [None] * 4, needed, sums)
    assert compiled == warm
    owned = deterministic and most_points_owned and head_dim == 16 and dtypes[0] != "float64"
    files = {kernel.file for kernel, _ in compiled}
    assert ("backward_value_tiled.cu" in files, "fixed_point.cu" in files) == (
        owned,
        deterministic and not owned,
    )


@pytest.mark.parametrize("order", ["auto", None, [(20, 20), (10, 10)]], ids=str)
def test_calls_in_an_order_find_their_kernels_compiled(compiled, order) -> None:
    cupy_msda.warmup((8, 26, 8, 32), (8, 500, 8, 2, 4, 2), query_order=order)
    warm = set(compiled)
    compiled.clear()
    problem = Problem(8, 26, 8, 32, 500, 2, 4, "float32", "float32", "float32")
    table, array = LevelTable(((4, 5), (2, 3)), (0, 20)), np.intp(0)
    grids = check_query_order(order, 500)
    launch.forward(problem, table, *[None] * 4, grids)
    for needed in ((array,) * 3, (array, None, None), (None, array, array)):
        launch.backward(problem, table, [None] * 4, needed, grids=grids)
    assert compiled == warm
    names = {kernel.name.partition("<")[0] for kernel, _ in compiled}
    given = isinstance(order, list)
    assert ("msda_forward_persistent" in names, "msda_backward_value_binned" in names) == (
        given,
        given,
    )


def test_encoders_find_theirs(compiled, deterministic) -> None:
    """Queries are the pixels, enough to take them in order; then all gradients of points are."""
    problem = Problem(8, 300, 8, 32, 300, 2, 4, *["float32"] * 3)
    cupy_msda.warmup((8, 300, 8, 32), (8, 300, 8, 2, 4, 2))
    warm = set(compiled)
    compiled.clear()
    table = LevelTable(((15, 16), (6, 10)), (0, 240))
    array = np.intp(0)  # a null pointer
    launch.forward(problem, table, *[None] * 4)
    for needed in ((array,) * 3, (array, None, None), (None, array, array)):
        sums = array if deterministic and needed[0] is not None else None
        launch.backward(problem, table, [None] * 4, needed, sums)
    assert compiled == warm
    names = {kernel.name.partition("<")[0] for kernel, _ in compiled}
    assert {"msda_forward_persistent", "msda_backward_persistent"} < names
    assert "msda_backward" not in names


def test_without_the_backward_only_the_forward_is_compiled(compiled) -> None:
    cupy_msda.warmup(VALUE, LOCATIONS, backward=False)
    ((kernel, device),) = compiled
    assert (kernel.file, device) == ("forward.cu", 0)


@pytest.mark.parametrize("dtype", ["float32", np.float16, np.dtype("float64")])
def test_host_calls_compile_nothing_any_more(dtype) -> None:
    cpu = pytest.importorskip("cupy_msda.cpu.kernels", reason="needs Numba")
    name = np.dtype(dtype).name
    wide = np.float64 if name == "float64" else np.float32
    head_dim = {"float32": 23, "float16": 29, "float64": 31}[name]  # that no other test has
    shape = (*VALUE[:3], head_dim)
    cupy_msda.warmup(shape, LOCATIONS, dtype=dtype, device="cpu")
    itemsize = np.dtype(wide).itemsize
    kernels = [kernel(head_dim, itemsize) for kernel in (cpu._forward_kernel, cpu._backward_kernel)]
    before = [len(kernel.signatures) for kernel in kernels]
    assert before == [1, 1]
    value, locations = np.ones(shape, dtype), np.full(LOCATIONS, 0.5, wide)
    weights = np.ones(LOCATIONS[:-1], wide)
    table = [(4, 5), (2, 3)], None
    output = ms_deform_attn(value, *table, locations, weights)
    ms_deform_attn_backward(output, value, *table, locations, weights)
    assert [len(kernel.signatures) for kernel in kernels] == before


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"device": "xpu"}, ValueError, 'device must be "cpu", "cuda" or "cuda:INDEX", got \'xpu\''),
        ({"device": "cpu:0"}, ValueError, "device must be"),
        ({"dtype": "int8"}, TypeError, "value must have dtype float16, bfloat16, float32, float64, got int8"),
        ({"points_dtype": "float16"}, TypeError, "sampling_locations must have dtype float32, got float16"),
        ({"value_shape": (2, 26, 3)}, ValueError, "value must have shape"),
        ({"query_order": [(2, 2)]}, ValueError, "query_order must have grids that hold the Lq = 5 queries"),
        ({"query_order": "tiles"}, TypeError, 'query_order must be "auto", None or a sequence'),
        ({"sampling_locations_shape": (2, 5, 3)}, ValueError, "sampling_locations must have shape"),
        ({"sampling_locations_shape": (2, 5, 4, 2, 4, 2)}, ValueError, "since value has shape"),
        ({"value_shape": (2, 26, 3, 1.5)}, TypeError, "integer"),
    ],
)  # fmt: skip
def test_bad_arguments(changed, error, message) -> None:
    arguments = {"value_shape": VALUE, "sampling_locations_shape": LOCATIONS, "device": "cpu"}
    with pytest.raises(error) as caught:
        cupy_msda.warmup(**{**arguments, **changed})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["torch.bfloat16", "bfloat16", "ml_dtypes.bfloat16"])
def test_dtypes_of_any_library(compiled, name) -> None:
    library, _, attribute = name.rpartition(".")
    dtype = getattr(pytest.importorskip(library), attribute) if library else name
    cupy_msda.warmup(VALUE, LOCATIONS, dtype=dtype)
    assert all("<bfloat16_t, float, float" in kernel.name for kernel, _ in compiled)
    assert len(compiled) == 4
