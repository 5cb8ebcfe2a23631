# SPDX-License-Identifier: Apache-2.0
"""Tensors and arrays of a fused call on the way to its CUDA kernels and back, on an emulated device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cupy_msda import ms_deform_attn_fused, ms_deform_attn_fused_backward
from cupy_msda.contract import check_fused
from cupy_msda.torch import exchange
from cupy_msda.torch.fused_operands import FusedBackwardOperands, FusedOperands, Needs, check
from cupy_msda.torch.operands import AUTO, Sampling, pack
from tests.calls import strided
from tests.emulated_device import STREAM
from tests.emulator.fused import CASES, NAMES, Fused, check_backward, check_forward, fused

ALL = Needs(value=True, points=True, references=True)
TABLES = {
    "host": lambda i: (i.sizes, None),
    "int32": lambda i: (torch.tensor(i.sizes, dtype=torch.int32), None),
}


def prepared(inputs: Fused, table: str = "host"):
    """What the check makes of the operands, and the operands."""
    value, references, offsets, logits = inputs.tensors
    given = value, *TABLES[table](inputs), offsets, logits
    operands = FusedOperands(
        references, pack(*given, AUTO, Sampling(**inputs.rules), check_fused), inputs.offset_scale
    )
    problem, levels, grids = check(operands)
    call = SimpleNamespace(
        problem=problem,
        table=levels.on_host,
        grids=grids,
        output_shape=problem.output_shape,
        table_on_host=levels.levels is not None,
        bound={},
    )
    return call, operands


def gradients(inputs: Fused, needs: Needs = ALL, table: str = "host"):
    """By the kernels, in the order of `NAMES`."""
    call, operands = prepared(inputs, table)
    return exchange.fused_backward(call, FusedBackwardOperands(inputs.grad_output, operands, needs))


@pytest.mark.parametrize("name", ["points", "uneven-boxes", "nearest-boxes", "one-level"])
@pytest.mark.parametrize("table", TABLES)
def test_tensors_reach_the_kernels_and_results_come_back(name, table, driver_device):
    inputs = CASES[name]
    check_forward(inputs, exchange.fused_forward(*prepared(inputs, table)))
    check_backward(inputs, gradients(inputs, table=table))
    assert driver_device.streams == {STREAM}


@pytest.mark.parametrize("name", ["points", "uneven-boxes", "nearest-boxes", "one-level"])
def test_arrays_of_other_libraries_reach_the_same_kernels(name, driver_device):
    inputs = CASES[name]
    value, *points = (tensor.numpy() for tensor in inputs.tensors)
    given = value, inputs.sizes, None, *points
    rules = {name: as_array(rule) for name, rule in inputs.rules.items()}
    rules["offset_scale"] = inputs.offset_scale
    output = ms_deform_attn_fused(*given, **rules)
    check_forward(inputs, torch.from_numpy(np.asarray(output)))
    found = ms_deform_attn_fused_backward(inputs.grad_output.numpy(), *given, **rules)
    check_backward(inputs, [torch.from_numpy(np.asarray(array)) for array in found])
    by_arrays = driver_device.launched.copy()
    driver_device.launched.clear()
    exchange.fused_forward(*prepared(inputs))
    gradients(inputs)
    assert by_arrays == driver_device.launched


def as_array(rule):
    """A rule of sampling with an array for a tensor."""
    return rule.numpy() if isinstance(rule, torch.Tensor) else rule


def test_strided_and_misaligned_tensors_are_copied_for_the_kernels(driver_device):
    inputs = CASES["points"]
    names = (*NAMES, "grad_output")
    for adapted in (strided, misaligned):
        other = inputs._replace(**{name: adapted(getattr(inputs, name)) for name in names})
        check_forward(inputs, exchange.fused_forward(*prepared(other)))
        check_backward(inputs, gradients(other))


def misaligned(tensor):
    """The same elements, not on a 16-byte boundary."""
    return tensor.new_zeros(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize(
    ("needs", "launched"),
    [
        (Needs(value=True, points=False, references=False), ["fill", "value_binned"]),
        (Needs(value=False, points=True, references=False), ["persistent"]),
        (Needs(value=False, points=False, references=True), ["persistent", "gradient"]),
        (Needs(value=False, points=False, references=False), []),
    ],
)
def test_only_needed_gradients_are_computed(needs, launched, driver_device):
    inputs = CASES["points"]
    results = gradients(inputs, needs)
    names = ["fill" if isinstance(step, int) else step for step in driver_device.launched]
    assert len(names) == len(launched)
    assert all(name.endswith(end) for name, end in zip(names, launched, strict=True))
    wanted = needs.value, needs.references, needs.points, needs.points
    assert [result.numel() > 0 for result in results] == list(wanted)
    found = [result if want else None for result, want in zip(results, wanted, strict=True)]
    check_backward(inputs, found)


COMPOSED = {
    "float64": fused((2, 2, 2), d=8, lq=3, dtypes=(torch.float64,) * 4),
    "generic": fused((2, 2, 2), d=6, lq=3),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_no_kernel_covers_is_left_to_the_caller(name, driver_device):
    inputs = COMPOSED[name]
    assert exchange.fused_forward(*prepared(inputs)) is None
    assert gradients(inputs) is None
    assert driver_device.launched == []


def test_deterministic_gradients_of_value_are_left_to_the_caller(driver_device):
    inputs = CASES["points"]
    torch.use_deterministic_algorithms(True)
    try:
        assert gradients(inputs) is None
        assert gradients(inputs, ALL._replace(value=False)) is not None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_call_is_bound_once_for_each_scale(driver_device):
    inputs = CASES["boxes"]
    call, operands = prepared(inputs)
    first = exchange.fused_forward(call, operands)
    assert torch.equal(exchange.fused_forward(call, operands), first)
    assert len(call.bound) == 1
    other = inputs._replace(offset_scale=0.25)
    halved = exchange.fused_forward(call, operands._replace(offset_scale=0.25))
    check_forward(other, halved)
    assert len(call.bound) == 2


def test_empty_problems_launch_no_kernel(driver_device):
    inputs = fused((2, 2, 2), lq=5)
    empty = inputs._replace(value=inputs.value[..., :0], grad_output=inputs.grad_output[..., :0])
    results = gradients(empty)
    assert [result.shape for result in results] == [tensor.shape for tensor in empty.tensors]
    assert all((result == 0).all() for result in results)
    assert all(isinstance(step, int) for step in driver_device.launched)


@pytest.mark.parametrize("name", ["reference_points", "attention_logits"])
def test_a_tensor_without_memory_is_told_by_its_name(name, driver_device):
    inputs = CASES["points"]
    call, operands = prepared(inputs)
    if name == "reference_points":
        operands = operands._replace(reference_points=inputs.references.to("meta"))
    else:
        given = operands.given._replace(attention_weights=inputs.logits.to("meta"))
        operands = operands._replace(given=given)
    with pytest.raises(exchange.NoMemoryError, match=name):
        exchange.fused_forward(call, operands)
