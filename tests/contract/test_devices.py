# SPDX-License-Identifier: Apache-2.0
"""What the host reads and checks where arrays are on a device."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from cupy_msda import arrays, contract  # noqa: E402
from tests.contract.inputs import (  # noqa: E402
    LEVELS,
    LOCATION_SHAPE,
    OUTSIDE,
    SHAPE,
    SHAPES,
    SIZES,
    STARTS,
    NumPy,
    check_with,
    good_inputs,
    pattern,
)


class OnDevice:
    """An array that says it is on a device, and counts how often the host reads it."""

    def __init__(self, array, device=(2, 0)):
        self.array, self.device_pair, self.reads = array, device, 0

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def tolist(self):
        self.reads += 1
        return self.array.tolist()

    def __dlpack__(self, **_):
        raise AssertionError("a check must not export the array")

    def __dlpack_device__(self):
        return self.device_pair

    def __array_namespace__(self, api_version=None):
        return np


class Device(NumPy):
    """The inputs as arrays on a device."""

    def __init__(self, *device):
        self.device = device

    def array(self, shape, dtype="float32"):
        return OnDevice(super().array(shape, dtype), self.device)

    def integers(self, rows, dtype="int64"):
        return OnDevice(super().integers(rows, dtype), self.device)


CUDA, SECOND_CUDA, METAL = Device(2, 0), Device(2, 1), Device(8, 0)


@pytest.fixture(autouse=True)
def no_check_variable(monkeypatch):
    monkeypatch.delenv("CUPY_MSDA_CHECK", raising=False)


def test_the_host_leaves_levels_on_the_device_of_value_alone():
    sizes, starts = CUDA.integers(SIZES), CUDA.integers(STARTS)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=starts)
    assert table == (None, None, sizes, starts)
    assert table.levels is None
    assert sizes.reads == starts.reads == 0


def test_starts_are_derived_where_the_sizes_are():
    sizes = CUDA.integers(SIZES)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=None)
    assert table == (None, None, sizes, None)
    _, table = check_with(CUDA, level_start_index=None)
    assert table == (tuple(SIZES), tuple(STARTS), None, None)


def test_half_a_table_may_be_on_the_device():
    sizes, starts = CUDA.integers(SIZES), CUDA.integers(STARTS)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=STARTS)
    assert table == (None, tuple(STARTS), sizes, None)
    _, table = check_with(CUDA, level_start_index=starts)
    assert table == (tuple(SIZES), None, None, starts)
    assert table.levels is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spatial_shapes": CUDA.integers(SIZES), "level_start_index": [0, 20, 29]},
         "level_start_index must be from 0 to S = 28, got 29 for level 2"),
        ({"spatial_shapes": [(4, 5), (5, 6), (1, 2)], "level_start_index": CUDA.integers(STARTS)},
         f"{OUTSIDE}(5, 6) for level 1"),
        ({"spatial_shapes": SECOND_CUDA.integers(SIZES)},
         "spatial_shapes must be on the device of value, cuda:0, got cuda:1"),
        ({"level_start_index": SECOND_CUDA.integers(STARTS)},
         "level_start_index must be on the device of value, cuda:0, got cuda:1"),
        ({"spatial_shapes": CUDA.integers(SIZES[:2])}, f"{SHAPES} {LOCATION_SHAPE}, got (2, 2)"),
        ({"sampling_locations": SECOND_CUDA.array(SHAPE["sampling_locations"])},
         "sampling_locations must be on the device of value, cuda:0, got cuda:1"),
        ({"attention_weights": Device(1, 0).array(SHAPE["attention_weights"])},
         "attention_weights must be on the device of value, cuda:0, got cpu"),
    ],
)  # fmt: skip
def test_bad_input_on_a_device(changed, message):
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(CUDA, **changed)


@pytest.mark.parametrize("where", ["host", "starts-on-the-device", "device"])
def test_levels_beyond_what_a_launch_takes_by_value(where):
    sizes = [(0, 0)] * 321
    n, lq, m, _, p = SHAPE["attention_weights"]
    changed = {
        "spatial_shapes": CUDA.integers(sizes) if where == "device" else sizes,
        "level_start_index": None if where == "host" else CUDA.integers([0] * 321),
        "sampling_locations": CUDA.array((n, lq, m, 321, p, 2)),
        "attention_weights": CUDA.array((n, lq, m, 321, p)),
    }
    if where == "device":
        check_with(CUDA, **changed)
        return
    message = (
        "spatial_shapes and level_start_index must hold at most 320 levels where value "
        "is on a CUDA device and they are not, got 321"
    )
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(CUDA, **changed)


@pytest.mark.parametrize(("levels", "points"), [(16, 3), (17, 2), (17, 3)])
def test_uneven_points_of_more_levels_than_a_launch_takes(levels, points):
    n, lq, m, _, _ = SHAPE["attention_weights"]
    numbers = [points, *[2] * (levels - 1)]
    changed = {
        "spatial_shapes": [(0, 0)] * levels,
        "level_start_index": [0] * levels,
        "sampling_locations": CUDA.array((n, lq, m, sum(numbers), 2)),
        "attention_weights": CUDA.array((n, lq, m, sum(numbers))),
    }
    inputs = good_inputs(CUDA) | changed
    del inputs["grad_output"]
    if levels == 16 or points == 2:
        contract.check(*inputs.values(), num_points=numbers)
        return
    message = (
        "num_points must be the same for all levels or hold at most 16 of them where value is on a CUDA "
        "device, got (3, 2, 2, ...)"
    )
    with pytest.raises(ValueError, match=pattern(message)):
        contract.check(*inputs.values(), num_points=numbers)


def test_levels_on_the_device_of_another_library():
    class OtherLibrary(OnDevice):
        __module__ = "other"

    with pytest.raises(TypeError, match=r"spatial_shapes must be an array of the library of value"):
        check_with(CUDA, spatial_shapes=OtherLibrary(np.array(SIZES)))


def test_values_on_a_device_without_kernels():
    message = "value must be on the CPU or on an NVIDIA CUDA device, got DLPack device 8:0"
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(METAL)


def test_bfloat16_on_a_device_is_taken_from_torch_only():
    class Brain(OnDevice):
        dtype = "bfloat16"

    with pytest.raises(TypeError, match=r"^value must have dtype .* CuPy has no bfloat16"):
        check_with(CUDA, value=Brain(np.zeros(SHAPE["value"], np.int16)))


def test_pinned_memory_is_on_the_host_and_managed_memory_on_the_device():
    assert arrays.on_host(OnDevice(np.ones(1), (3, 0)))
    assert arrays.place(OnDevice(np.ones(1), (13, 1))) == "cuda:1"


def test_values_on_the_host_read_levels_from_a_device():
    sizes = CUDA.integers(SIZES)
    _, table = check_with(NumPy(), spatial_shapes=sizes, level_start_index=None)
    assert table.levels == LEVELS
    assert sizes.reads == 1


def test_values_on_a_device_read_levels_from_the_host():
    for shapes in (np.array(SIZES), torch.tensor(SIZES)):
        _, table = check_with(CUDA, spatial_shapes=shapes, level_start_index=None)
        assert table.levels == LEVELS


def test_the_check_variable_reads_and_validates_levels_on_the_device(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    sizes, starts = CUDA.integers(SIZES), CUDA.integers(STARTS)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=starts)
    assert table.levels == LEVELS
    assert table.device_sizes is None
    assert sizes.reads == starts.reads == 1
    too_large = CUDA.integers([(4, 5), (2, 3), (2, 2)])
    with pytest.raises(ValueError, match=pattern(f"{OUTSIDE}(2, 2) starting at 26 for level 2")):
        check_with(CUDA, spatial_shapes=too_large)


def test_levels_on_a_device_that_leave_positions_are_found_by_the_check_variable(monkeypatch):
    changed = {"spatial_shapes": CUDA.integers([(4, 5), (2, 3), (1, 1)]), "level_start_index": None}
    _, table = check_with(CUDA, **changed)
    assert table.sizes is None
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    message = (
        "spatial_shapes must have levels that fill the S = 28 positions of value where "
        "level_start_index is None, got 27 positions in ((4, 5), (2, 3), (1, 1))"
    )
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(CUDA, **changed)


def test_the_check_variable_is_off_unless_one(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", "0")
    _, table = check_with(CUDA, spatial_shapes=CUDA.integers(SIZES), level_start_index=None)
    assert table.sizes is None


@pytest.mark.parametrize("check", ["0", "1"])
def test_levels_without_memory_are_never_read(check, monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", check)
    value, *points, _ = (torch.ones(shape, device="meta") for shape in SHAPE.values())
    sizes = torch.tensor(SIZES, device="meta")
    problem, table = contract.check(value, sizes, None, *points)
    assert problem.output_shape == SHAPE["grad_output"]
    assert table.device_sizes is sizes
