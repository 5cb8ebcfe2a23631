# SPDX-License-Identifier: Apache-2.0
"""The array functions on NumPy and other CPU arrays: the caller's array type comes back, and the right numbers."""

from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest

import cupy_msda
from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cpu import backend as cpu
from cupy_msda.problem import Level

SIZES = [(5, 7), (3, 4), (1, 2)]
LEVELS = [Level(5, 7, 0), Level(3, 4, 35), Level(1, 2, 47)]
DTYPES = [
    # value, locations, weights
    ("float32", "float32", "float32"),
    ("float64", "float64", "float64"),
    ("float64", "float32", "float32"),
    ("float16", "float16", "float16"),
    ("float16", "float32", "float32"),
    ("float16", "float32", "float16"),
]


def random_arrays(dtypes=DTYPES[0], n=2, lq=6, m=3, d=8, p=2):
    """value, sampling_locations (some outside), attention_weights and grad_output."""
    rng = np.random.default_rng(0)
    points = (n, lq, m, len(SIZES), p)
    of_value, of_locations, of_weights = dtypes
    return (
        rng.standard_normal((n, 49, m, d)).astype(of_value),
        rng.uniform(-0.2, 1.2, (*points, 2)).astype(of_locations),
        rng.uniform(0, 1, points).astype(of_weights),
        rng.standard_normal((n, lq, m * d)).astype(of_value),
    )


def run(value, locations, weights, grad, sizes=SIZES, starts=None):
    """The output and the three gradients by the public functions."""
    output = cupy_msda.ms_deform_attn(value, sizes, starts, locations, weights)
    gradients = cupy_msda.ms_deform_attn_backward(grad, value, sizes, starts, locations, weights)
    return output, *gradients


def run_reference(value, locations, weights, grad, dtype=None):
    """The same by the reference, in another dtype if one is given."""
    arrays = [array.astype(dtype or array.dtype) for array in (value, locations, weights, grad)]
    value, locations, weights, grad = arrays
    return (
        reference.forward(value, LEVELS, locations, weights),
        *reference.backward(grad, value, LEVELS, locations, weights),
    )


def same(results, expected):
    """Whether all arrays are equal, bit for bit."""
    return all(
        np.array_equal(one, other, equal_nan=True)
        for one, other in zip(results, expected, strict=True)
    )


def forget_backend():
    """Let the next call look for Numba again."""
    cpu.obstacle.cache_clear()
    cpu.backend.cache_clear()


@pytest.fixture(params=["numba", "reference"])
def backend(request, monkeypatch):
    """Each CPU backend in turn."""
    if request.param == "reference":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        pytest.importorskip("numba", reason="numba is not installed")
    forget_backend()
    yield request.param
    forget_backend()


def test_numba_runs_where_it_is_installed_and_else_the_reference(backend):
    expected = {"numba": "cupy_msda.cpu.kernels", "reference": "cupy_msda.reference"}
    assert cpu.backend().__name__ == expected[backend]


# --- NumPy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_numpy_in_numpy_out_within_the_error_budget(dtypes, backend):
    arrays = random_arrays(dtypes)
    results = run(*arrays)
    in_same_dtype, exact = run_reference(*arrays), run_reference(*arrays, dtype=np.float64)
    for result, same_dtype, true in zip(results, in_same_dtype, exact, strict=True):
        assert type(result) is np.ndarray
        assert result.flags.writeable
        assert_within_budget(result, same_dtype, true)


def test_gradients_are_named_and_shaped_like_their_inputs():
    value, locations, weights, grad = random_arrays(("float16", "float32", "float16"))
    gradients = cupy_msda.ms_deform_attn_backward(grad, value, SIZES, None, locations, weights)
    assert type(gradients) is cupy_msda.MSDeformAttnGradients
    assert gradients._fields == ("value", "sampling_locations", "attention_weights")
    for gradient, array in zip(gradients, (value, locations, weights), strict=True):
        assert gradient.shape == array.shape
        assert gradient.dtype == array.dtype


@pytest.mark.parametrize("dtypes", [DTYPES[3], DTYPES[4], DTYPES[5]], ids="-".join)
def test_float16_is_computed_in_float32_and_rounded_once(dtypes, backend):
    arrays = random_arrays(dtypes)
    wide = run(*(array.astype(np.float32) for array in arrays))
    value, locations, weights, _ = arrays
    results = run(*arrays)
    for result, wide_result, like in zip(
        results, wide, (value, value, locations, weights), strict=True
    ):
        assert result.dtype == like.dtype
        assert np.array_equal(result, wide_result.astype(like.dtype))


def test_bfloat16_of_ml_dtypes(backend):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 from ml_dtypes")
    arrays = [array.astype(ml_dtypes.bfloat16) for array in random_arrays()]
    wide = run(*(array.astype(np.float32) for array in arrays))
    for result, wide_result in zip(run(*arrays), wide, strict=True):
        assert type(result) is np.ndarray
        assert result.dtype == ml_dtypes.bfloat16
        assert np.array_equal(result, wide_result.astype(ml_dtypes.bfloat16))


def test_float16_overflows_to_infinity_without_a_warning(backend):
    value, locations, weights, grad = random_arrays(DTYPES[4])
    value[...], locations[...], weights[...] = 60_000, 0.5, 1
    output, by_value, _, _ = run(value, locations, weights, grad)
    assert np.isposinf(output).all()
    assert np.isfinite(by_value).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_locations_that_are_no_numbers_contribute_nothing_and_warn_of_nothing(bad, backend):
    value, locations, weights, grad = random_arrays()
    locations[:, 1, :, :, 0, 0] = bad
    locations[:, 2, :, :, 1, 1] = bad
    results = run(value, locations, weights, grad)
    moved = locations.copy()
    moved[~np.isfinite(moved) | (moved > 1e30)] = -5
    expected = run(value, moved, weights, grad)
    assert same(results, expected)
    assert all(np.isfinite(result).all() for result in results)


def test_infinity_outside_a_level_is_not_read(backend):
    # One level in the middle of value, all of whose other positions are infinite.
    value, locations, weights, grad = random_arrays()
    locations, weights = locations[:, :, :, :1], weights[:, :, :, :1]
    value[:, :10] = np.inf
    value[:, 45:] = np.nan
    results = run(value, locations, weights, grad, [(5, 7)], [10])
    assert all(np.isfinite(result).all() for result in results)


def discontiguous(array):
    """The same numbers in every layout that a NumPy array can have."""
    spaced = np.repeat(array, 2, axis=1)[:, ::2]
    backwards = array[..., ::-1].copy()[..., ::-1]
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    read_only = array.copy()
    read_only.setflags(write=False)
    return {
        "Fortran order": np.asfortranarray(array),
        "every second": spaced,
        "negative strides": backwards,
        "unaligned": unaligned,
        "read-only": read_only,
        "a subclass": array.view(np.recarray),
    }


@pytest.mark.parametrize("layout", discontiguous(np.zeros((1, 1))))
def test_layouts(layout, backend):
    arrays = random_arrays()
    expected = run(*arrays)
    variants = [discontiguous(array)[layout] for array in arrays]
    copies = [array.copy() for array in variants]
    results = run(*variants)
    assert same(results, expected)
    assert all(type(result) is np.ndarray for result in results)
    assert same(variants, copies)


def test_broadcast_inputs(backend):
    value, locations, weights, grad = random_arrays()
    value = np.broadcast_to(value[:1], value.shape)
    weights = np.broadcast_to(np.float32(0.25), weights.shape)
    expected = run(value.copy(), locations, weights.copy(), grad)
    assert same(run(value, locations, weights, grad), expected)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[4]], ids="-".join)
def test_inputs_are_not_modified_and_results_share_no_memory_with_them(dtypes, backend):
    arrays = random_arrays(dtypes)
    sizes, starts = np.array(SIZES), np.array([0, 35, 47])
    kept = [array.copy() for array in (*arrays, sizes, starts)]
    results = run(*arrays, sizes, starts)
    assert same((*arrays, sizes, starts), kept)
    for index, result in enumerate(results):
        others = (*arrays, *results[:index])
        assert not any(np.shares_memory(result, other) for other in others)


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        pytest.param([(5, 7), (2, 4), (1, 2)], [0, 36, 47], id="gaps"),
        pytest.param([(5, 7), (5, 7), (4, 4)], [0, 7, 30], id="overlaps"),
        pytest.param([(1, 2), (3, 4), (5, 7)], [47, 35, 0], id="any order"),
        pytest.param([(0, 0), (7, 7), (0, 3)], [49, 0, 0], id="empty levels"),
    ],
)
def test_levels_anywhere_in_value(sizes, starts, backend):
    arrays = random_arrays()
    levels = [Level(*size, start) for size, start in zip(sizes, starts, strict=True)]
    value, *points, grad = (array.astype(np.float64) for array in arrays)
    exact = (
        reference.forward(value, levels, *points),
        *reference.backward(grad, value, levels, *points),
    )
    for result, true in zip(run(*arrays, sizes, starts), exact, strict=True):
        assert np.allclose(result, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", ["n", "s", "m", "d", "lq", "levels", "p"])
def test_empty_dimensions(zero, backend):
    n, s, m, d, lq, levels, p = (
        {"n": 2, "s": 6, "m": 3, "d": 5, "lq": 4, "levels": 2, "p": 3} | {zero: 0}
    ).values()
    sizes = [(2, 3) if s else (0, 3), (1, 2) if s else (0, 0)][:levels]
    value = np.ones((n, s, m, d), np.float32)
    locations = np.full((n, lq, m, levels, p, 2), 0.5, np.float32)
    weights = np.ones((n, lq, m, levels, p), np.float32)
    grad = np.ones((n, lq, m * d), np.float32)
    output, *gradients = run(value, locations, weights, grad, sizes, [0] * levels)
    assert output.shape == (n, lq, m * d)
    assert not output.any()
    for gradient, array in zip(gradients, (value, locations, weights), strict=True):
        assert gradient.shape == array.shape
        assert not gradient.any()


def test_calls_from_several_threads_agree(backend):
    arrays = random_arrays(n=3, lq=40)
    expected = run(*arrays)
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(*arrays))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    assert all(same(result, expected) for result in results)


# --- other libraries -------------------------------------------------------------------------------


class Foreign:
    """An array as another library might have it: DLPack and a namespace, and a dtype of its own."""

    def __init__(self, array, dtype=None):
        self._array = np.asarray(array)
        self.dtype = dtype or f"foreign.{self._array.dtype}"

    @property
    def shape(self):
        return self._array.shape

    @property
    def device(self):
        return "the usual one"

    def __dlpack__(self, **keywords):
        if self.dtype.endswith("bfloat16"):
            raise BufferError("NumPy knows no bfloat16")
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __array_namespace__(self, *, api_version=None):
        return foreign_namespace


def foreign_astype(array, dtype, /, *, copy=True):
    """A bfloat16 is held as the float32 that it is exactly."""
    if dtype == array.dtype:
        return array
    held = array._array.astype(np.float32 if dtype.endswith("bfloat16") else dtype.split(".")[1])
    if dtype.endswith("bfloat16"):
        held = to_bfloat16(held)
    return Foreign(held, dtype)


def to_bfloat16(array):
    """float32 numbers rounded to the nearest that bfloat16 has, ties to even."""
    bits = array.view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (rounded & 0xFFFF0000).view(np.float32)


foreign_namespace = types.ModuleType("foreign")
foreign_namespace.astype = foreign_astype
foreign_namespace.float32 = "foreign.float32"
foreign_namespace.from_dlpack = lambda array: Foreign(np.from_dlpack(array))


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_any_dlpack_array_in_and_the_same_out(dtypes, backend):
    arrays = random_arrays(dtypes)
    expected = run(*arrays)
    results = run(*map(Foreign, arrays), Foreign(np.array(SIZES)), Foreign(np.array([0, 35, 47])))
    for result, like in zip(results, expected, strict=True):
        assert type(result) is Foreign
        assert result.dtype == f"foreign.{like.dtype}"
    assert same([result._array for result in results], expected)


def test_bfloat16_of_another_library(backend):
    arrays = [to_bfloat16(array) for array in random_arrays()]
    expected = [to_bfloat16(result) for result in run(*arrays)]
    results = run(*(Foreign(array, "foreign.bfloat16") for array in arrays))
    for result in results:
        assert type(result) is Foreign
        assert result.dtype == "foreign.bfloat16"
    assert same([result._array for result in results], expected)


# It raises BufferError for an array that must not be written.
exports_read_only = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0",
    reason="NumPy before 2.1 hands out no read-only array",
)


@exports_read_only  # as results are that such a NumPy wraps
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_array_api_strict(dtype, backend):
    xp = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    arrays = random_arrays((dtype,) * 3)
    expected = run(*arrays)
    sizes, starts = xp.asarray(SIZES), xp.asarray([0, 35, 47], dtype=xp.int32)
    results = run(*map(xp.asarray, arrays), sizes, starts)
    for result in results:
        assert type(result) is type(xp.asarray(0))
        assert result.dtype == getattr(xp, dtype)
    assert same(map(np.from_dlpack, results), expected)


@exports_read_only
def test_read_only_arrays_of_another_library(backend):
    # As JAX's are: an exporter that tells NumPy not to write.
    arrays = random_arrays()
    expected = run(*arrays)
    for array in arrays:
        array.setflags(write=False)
    results = run(*map(Foreign, arrays))
    assert same([result._array for result in results], expected)


def test_another_librarys_arrays_are_not_mixed_with_numpys():
    value, locations, weights, grad = random_arrays()
    with pytest.raises(TypeError, match=r"sampling_locations must be an array of the library of"):
        run(Foreign(value), locations, weights, grad)


def test_an_array_while_jax_traces_it_is_refused():
    # It has __dlpack__ and no memory: a tracer names no DLPack device.
    class Tracer:
        shape, dtype = (2, 49, 3, 8), "float32"

        def __dlpack__(self, **_):
            raise AssertionError("it must not be read")

        def __array_namespace__(self, *, api_version=None):
            return foreign_namespace

    _, locations, weights, grad = random_arrays()
    with pytest.raises(TypeError, match=r"value must be .* with .*__dlpack_device__.*, got Tracer"):
        run(Tracer(), locations, weights, grad)
