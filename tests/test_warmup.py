# SPDX-License-Identifier: Apache-2.0
"""`warmup`: after it, calls of the same shapes and dtypes compile nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cupy_msda
from cupy_msda import ms_deform_attn, ms_deform_attn_backward, ms_deform_attn_fused
from cupy_msda.cuda import plans, tuned
from cupy_msda.cuda.tuned import Entry
from cupy_msda.problem import Problem
from tests.emulated_device import emulated_device, forget

VALUE, LOCATIONS = (2, 26, 3, 16), (2, 5, 3, 2, 4, 2)
SIZES = [(4, 5), (2, 3)]  # of 26 positions


@pytest.fixture
def device(monkeypatch):
    """A device on which launches compute nothing."""
    with emulated_device(monkeypatch, 132, runs=False) as device:
        yield device


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    """torch's switch."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def warm(device, value, locations, /, **options):
    """What `warmup` compiles; later calls prepare everything anew."""
    cupy_msda.warmup(value, locations, **options)
    compiled = set(device.compiled)
    forget()
    device.compiled.clear()
    return compiled


def kernels(compiled):
    """Names without template arguments."""
    return {kernel.name.partition("<")[0] for kernel, _ in compiled}


def call_tensors(value_shape, locations_shape, sizes, dtype, points_dtype, **options):
    """A forward, and backwards for all gradients, for that of value, and for those of points."""
    value = torch.zeros(value_shape, dtype=getattr(torch, dtype))
    locations = torch.zeros(locations_shape, dtype=getattr(torch, points_dtype))
    inputs = value, locations, locations[..., 0]
    for needed in ((0, 1, 2), (0,), (1, 2)):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        output = ms_deform_attn(leaves[0], sizes, None, *leaves[1:], **options)
        output.backward(torch.zeros_like(output))


@pytest.mark.parametrize(
    "dtypes", [("float32", None), ("float16", "float16"), ("bfloat16", None), ("float64", None)]
)
@pytest.mark.parametrize("head_dim", [16, 5])
@pytest.mark.parametrize("max_points_tiled", [0, 20])
def test_calls_on_tensors_find_their_kernels_compiled(
    device, monkeypatch, dtypes, head_dim, deterministic, max_points_tiled
):
    monkeypatch.setattr(plans, "MAX_POINTS_TILED", max_points_tiled)
    plans.plan_backward.cache_clear()
    shape = (*VALUE[:3], head_dim)
    compiled = warm(device, shape, LOCATIONS, dtype=dtypes[0], points_dtype=dtypes[1])
    points = dtypes[1] or ("float64" if dtypes[0] == "float64" else "float32")
    call_tensors(shape, LOCATIONS, SIZES, dtypes[0], points)
    plans.plan_backward.cache_clear()
    assert device.compiled == compiled
    tiled = deterministic and max_points_tiled and head_dim == 16 and dtypes[0] != "float64"
    names = kernels(compiled)
    assert ("msda_backward_value_tiled" in names) == bool(tiled)
    assert ("msda_fixed_point_scale" in names) == (deterministic and not tiled)
    assert ("msda_round" in names) == (not deterministic and dtypes[0].endswith("16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_fused_calls_find_their_kernels_compiled(device, dtype, coordinates, deterministic):
    references = (2, 5, 1, coordinates)
    options = {"dtype": dtype, "points_dtype": dtype, "value_mask": True}
    compiled = warm(device, VALUE, LOCATIONS, reference_points_shape=references, **options)
    value = torch.zeros(VALUE, dtype=getattr(torch, dtype))
    offsets = torch.zeros(LOCATIONS, dtype=value.dtype)
    of_references = torch.zeros(references, dtype=torch.promote_types(value.dtype, torch.float32))
    inputs = value, of_references, offsets, offsets[..., 0]
    mask = torch.ones(VALUE[:2], dtype=torch.bool)
    for needed in ((0, 1, 2, 3), (0, 2, 3), (0,), (1,), (2, 3)):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        output = ms_deform_attn_fused(leaves[0], SIZES, None, *leaves[1:], value_mask=mask)
        output.backward(torch.zeros_like(output))
    assert device.compiled == compiled
    fused = any("Fused<" in kernel.name for kernel, _ in compiled)
    assert fused == (dtype != "float64")
    assert ("msda_reference_gradient" in kernels(compiled)) == fused


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_calls_on_other_arrays_find_theirs(device, name, dtype):
    """A NumPy array stands for one of CuPy's, on the device that was named."""
    index = int(name == "cuda:1")

    class Array(device.cupy.ndarray):
        def __dlpack_device__(self):
            return 2, index

    compiled = warm(device, VALUE, LOCATIONS, dtype=dtype, device=name)
    assert {on for _, on in compiled} == {index}
    points = np.zeros(LOCATIONS, "float64" if dtype == "float64" else "float32").view(Array)
    value = np.zeros(VALUE, dtype).view(Array)
    output = ms_deform_attn(value, SIZES, None, points, points[..., 0])
    forward = set(device.compiled)
    assert len(forward) == 1
    grad_output = np.zeros_like(output).view(Array)
    ms_deform_attn_backward(grad_output, value, SIZES, None, points, points[..., 0])
    # The rest of what was compiled is for gradients of value or of points alone.
    assert forward < device.compiled <= compiled


@pytest.mark.parametrize("order", ["auto", None, [(20, 20), (10, 10)]], ids=str)
def test_calls_with_a_query_order_find_theirs(device, order):
    shapes = (8, 26, 8, 32), (8, 500, 8, 2, 4, 2)
    compiled = warm(device, *shapes, query_order=order)
    call_tensors(*shapes, SIZES, "float32", "float32", query_order=order)
    assert device.compiled == compiled
    names = kernels(compiled)
    given = isinstance(order, list)
    assert ("msda_forward_persistent" in names) == given
    assert ("msda_backward_value_binned" in names) == given


def test_encoders_find_theirs(device, deterministic):
    """Queries are the pixels, enough for persistent kernels: then all gradients of points come from these."""
    shapes = (8, 300, 8, 32), (8, 300, 8, 2, 4, 2)
    compiled = warm(device, *shapes)
    call_tensors(*shapes, [(15, 16), (6, 10)], "float32", "float32")
    assert device.compiled == compiled
    names = kernels(compiled)
    assert {"msda_forward_persistent", "msda_backward_persistent"} < names
    assert "msda_backward" not in names


@pytest.mark.parametrize("persistent", [True, False])
def test_calls_with_a_table_of_tuned_kernels_find_theirs(device, monkeypatch, tmp_path, persistent):
    """Both against the model: an encoder too small for persistent kernels, and one that is large enough."""
    n, sizes = (1, [(10, 20)]) if persistent else (8, [(15, 20)])
    pixels = sizes[0][0] * sizes[0][1]
    problem = Problem(n, pixels, 64, 32, pixels, 1, 4, *["float32"] * 3)
    rows = "persistent, 2 per multiprocessor" if persistent else "plain, split-K 1"
    backward = f"binned; points {rows}" if persistent else rows
    winners = {"forward": rows, "backward": backward, "backward of points": rows}
    winners["backward of value"] = "binned" if persistent else rows
    entries = [Entry(result, "levels", problem, name, "") for result, name in winners.items()]
    (tmp_path / "t.json").write_text(tuned.as_text({"sm_90": entries}))
    monkeypatch.setenv("CUPY_MSDA_TUNED", str(tmp_path / "t.json"))
    shapes = (n, pixels, 64, 32), (n, pixels, 64, 1, 4, 2)
    compiled = warm(device, *shapes)
    call_tensors(*shapes, sizes, "float32", "float32")
    assert device.compiled == compiled
    names = {"msda_forward_persistent", "msda_backward_persistent", "msda_backward_value_binned"}
    assert kernels(compiled) == (names if persistent else {"msda_forward", "msda_backward"})
    monkeypatch.delenv("CUPY_MSDA_TUNED")
    forget()
    assert warm(device, *shapes) != compiled


def test_tables_on_the_device_find_theirs(device):
    compiled = warm(device, VALUE, LOCATIONS)
    call_tensors(VALUE, LOCATIONS, torch.tensor(SIZES), "float32", "float32")
    assert device.compiled == compiled


def test_without_the_backward_only_the_forward_is_compiled(device):
    ((kernel, index),) = warm(device, VALUE, LOCATIONS, backward=False)
    assert (kernel.file, index) == ("forward.cu", 0)


def test_nothing_is_launched(device):
    warm(device, VALUE, LOCATIONS)
    assert device.launched == []


def test_empty_problems_compile_nothing(device):
    assert warm(device, (0, *VALUE[1:]), (0, *LOCATIONS[1:])) == set()


@pytest.mark.parametrize("name", ["torch.bfloat16", "bfloat16", "ml_dtypes.bfloat16"])
def test_dtypes_of_any_library(device, name):
    library, _, attribute = name.rpartition(".")
    dtype = getattr(pytest.importorskip(library), attribute) if library else name
    compiled = warm(device, VALUE, LOCATIONS, dtype=dtype)
    assert compiled == warm(device, VALUE, LOCATIONS, dtype="bfloat16")
    assert all("<bfloat16_t" in kernel.name for kernel, _ in compiled)
    assert "msda_round" in kernels(compiled)


@pytest.mark.parametrize("dtype", ["float32", np.float16, np.dtype("float64")])
def test_host_calls_compile_nothing_any_more(dtype) -> None:
    cpu = pytest.importorskip("cupy_msda.cpu.kernels", reason="needs Numba")
    name = np.dtype(dtype).name
    wide = np.float64 if name == "float64" else np.float32
    head_dim = {"float32": 23, "float16": 29, "float64": 31}[name]  # that no other test has
    shape = (*VALUE[:3], head_dim)
    cupy_msda.warmup(shape, LOCATIONS, dtype=dtype, device="cpu")
    itemsize = np.dtype(wide).itemsize
    kernels = [kernel(head_dim, itemsize) for kernel in (cpu.forward_kernel, cpu.backward_kernel)]
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
