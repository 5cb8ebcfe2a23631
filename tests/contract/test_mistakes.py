# SPDX-License-Identifier: Apache-2.0
"""Every mistake in an argument gets its own error, through every public function that takes the argument."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import cupy_msda
from tests.contract import devices, grad_output, points, query_order, table, value
from tests.contract.inputs import NumPy, Torch, good_inputs

ANY = [*value.ANY, *points.ANY, *table.ANY, *query_order.ANY, *grad_output.ANY]
NUMPY = [*value.NUMPY, *points.NUMPY, *table.NUMPY]
TORCH = [*value.TORCH, *points.TORCH, *table.TORCH, *devices.TORCH]
ARGUMENTS = {*good_inputs(NumPy()), "query_order"}


def cases():
    """Every mistake, in the forward and the backward or, if it is in grad_output, in the backward."""
    for lib, table_of_lib in ((NumPy(), [*ANY, *NUMPY]), (Torch(), [*ANY, *TORCH])):
        for bad in table_of_lib:
            for function in ("ms_deform_attn", "ms_deform_attn_backward"):
                if function.endswith("backward") or not bad.message.startswith("grad_output"):
                    name = f"{function}-{type(lib).__name__}-{bad.name}"
                    yield pytest.param(function, lib, bad, id=name)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(("function", "lib", "bad"), list(cases()))
def test_bad_input(function, lib, bad):
    inputs = good_inputs(lib) | bad.change(lib)
    grad_output = inputs.pop("grad_output")
    order = inputs.pop("query_order", "auto")
    arguments = list(inputs.values())
    if function == "ms_deform_attn_backward":
        arguments.insert(0, grad_output)
    with pytest.raises(bad.error) as raised:
        getattr(cupy_msda, function)(*arguments, query_order=order)
    assert type(raised.value) is bad.error
    assert re.match(bad.pattern(lib), str(raised.value)), raised.value
    # The argument at fault or, where two do not fit, the other of them; the contract; the fact.
    argument = re.match(r"(\w+) (and \w+ )?must .*\bgot .+", str(raised.value))
    assert argument is not None
    assert argument[1] in ARGUMENTS


def test_the_table_is_long_enough():
    names = [bad.name for bad in (*ANY, *NUMPY, *TORCH)]
    assert len(set(names)) == len(names) >= 60
