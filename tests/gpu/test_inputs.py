# SPDX-License-Identifier: Apache-2.0
"""Layouts, empty sizes, devices, and level tables on either side."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import ms_deform_attn
from tests.gpu.common import DEVICE, NAN, check, in_float_and_half, run, same
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


@in_float_and_half
def test_strided_misaligned_and_expanded_inputs(dtypes):
    inputs = random_inputs(d=16, dtypes=dtypes, device=DEVICE)
    expected = run(inputs)
    names = inputs._fields[1:]

    def strided(tensor):
        wide = tensor.new_full((*tensor.shape, 2), NAN)
        wide[..., 0] = tensor
        return wide[..., 0]

    def misaligned(tensor):
        return tensor.new_zeros(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)

    for form in (strided, misaligned):
        same(
            run(inputs._replace(**{name: form(getattr(inputs, name)) for name in names})), expected
        )
    ones = torch.ones((), dtype=dtypes[0], device=DEVICE).expand_as(inputs.grad_output)
    same(
        run(inputs._replace(grad_output=ones)), run(inputs._replace(grad_output=ones.contiguous()))
    )


@pytest.mark.parametrize("size", ["n", "lq", "m", "d", "p", "s", "l"])
def test_empty_sizes_give_zeros(size):
    sizes = {"s": [(0, 3), (2, 0)], "l": []}.get(size, [(2, 3), (1, 1)])
    extents = {} if size in "sl" else {size: 0}
    inputs = random_inputs(sizes, s=7 if size == "l" else None, device=DEVICE, **extents)
    for shapes in (inputs.sizes, inputs.shapes()):
        output, gradients = run(inputs, shapes)
        assert output.shape == inputs.grad_output.shape
        for result, like in zip(
            (output, *gradients), (inputs.grad_output, *inputs.tensors), strict=True
        ):
            assert result.shape == like.shape
            assert not result.any()


@pytest.mark.parametrize("d", [16, 30])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_level_tables_on_the_device(d, dtype):
    inputs = random_inputs([(5, 7), (3, 4), (6, 2)], d=d, device=DEVICE)
    shapes, starts = inputs.shapes(dtype), inputs.starts(dtype)
    numbers = starts.tolist()
    expected = run(inputs)
    check_against_reference(inputs, *expected)
    for table in (
        (shapes, None),
        (shapes, starts),
        (shapes.T.contiguous().T, starts.repeat_interleave(2)[::2]),
        (shapes.cpu(), starts.cpu()),
        (shapes.cpu().numpy(), numbers),
        (inputs.sizes, starts),
        (shapes, numbers),
    ):
        same(run(inputs, *table), expected)


BAD_TABLES = {
    "beyond": ([(5, 7), (4, 4)], None),
    "start": ([(5, 7), (3, 4)], [0, 36]),
    "negative start": ([(5, 7), (3, 4)], [0, -1]),
    "negative": ([(5, 7), (-3, 4)], [0, 35]),
    "twice negative": ([(5, 7), (-3, -4)], [0, 35]),
    "huge": ([(5, 7), (2**40, 2**40)], [0, 35]),
    "wide": ([(5, 7), (0, 2**33)], [0, 35]),
}


@pytest.mark.parametrize("d", [16, 30])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_level_that_does_not_fit_gives_nan(name, d, monkeypatch):
    inputs = random_inputs([(5, 7), (3, 4)], d=d, device=DEVICE)
    sizes, numbers = BAD_TABLES[name]
    shapes = torch.tensor(sizes, device=DEVICE)
    starts = None if numbers is None else torch.tensor(numbers, device=DEVICE)
    expected = run(inputs)
    output, (_, by_locations, by_weights) = run(inputs, shapes, starts)
    assert output.isnan().all()
    assert by_locations[:, :, :, 1].isnan().all()
    assert by_weights[:, :, :, 1].isnan().all()
    # The other level is as it should be.
    torch.testing.assert_close(by_locations[:, :, :, 0], expected[1][1][:, :, :, 0])
    torch.testing.assert_close(by_weights[:, :, :, 0], expected[1][2][:, :, :, 0])
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    with pytest.raises(ValueError, match="for level 1"):
        run(inputs, shapes, starts)


def test_the_check_accepts_what_fits(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    inputs = random_inputs(device=DEVICE)
    check(inputs, inputs.shapes(), inputs.starts())


def test_host_values_with_a_level_table_on_the_device():
    inputs = random_inputs()
    output = ms_deform_attn(
        inputs.value, inputs.shapes().to(DEVICE), inputs.starts().to(DEVICE), *inputs.tensors[1:]
    )
    assert torch.equal(
        output, ms_deform_attn(inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    )


def test_tensors_on_different_devices_are_refused():
    inputs = random_inputs(device=DEVICE)
    arguments = (inputs.value, inputs.sizes, None, inputs.locations.cpu(), inputs.weights)
    with pytest.raises(
        ValueError, match="sampling_locations must be on the device of value, cuda:0, got cpu"
    ):
        ms_deform_attn(*arguments)
