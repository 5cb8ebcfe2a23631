# SPDX-License-Identifier: Apache-2.0
"""Tensors on the way to the CUDA kernels and back, on an emulated device."""

from __future__ import annotations

import ctypes
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cupy_msda
from cupy_msda import ms_deform_attn, ms_deform_attn_backward, reference
from cupy_msda.cuda import dlpack, launch, plans
from cupy_msda.torch import exchange
from tests.calls import call, in_threads, operator_tables, strided, with_grad
from tests.emulated_device import STREAM
from tests.problems import DTYPES, check_against_reference, random_inputs


def results(inputs, *table):
    """The output and the gradients, through autograd."""
    inputs = with_grad(inputs)
    value, locations, weights = inputs.tensors
    output = ms_deform_attn(value, *(table or (inputs.sizes, None)), locations, weights)
    return output, torch.autograd.grad(output, inputs.tensors, inputs.grad_output)


TABLES = {
    "host": lambda i: (i.sizes, i.starts().tolist()),
    "int64": lambda i: (i.shapes(), i.starts()),
    "int32": lambda i: (i.shapes(torch.int32), i.starts(torch.int32)),
    "sizes only": lambda i: (i.shapes(), None),
    "mixed": lambda i: (i.sizes, i.starts()),
    "strided": lambda i: (i.shapes().T.contiguous().T, None),
}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_tensors_reach_the_kernels_and_results_come_back(dtypes, table, driver_device):
    inputs = random_inputs(dtypes=dtypes)
    check_against_reference(inputs, *results(inputs, *TABLES[table](inputs)))
    assert driver_device.streams == {STREAM}


def test_a_cupy_without_the_drivers_function_launches_as_well(device):
    for d in (32, 5):
        inputs = random_inputs(d=d)
        check_against_reference(inputs, *results(inputs))
    assert device.streams == {STREAM}


@pytest.mark.parametrize("table", ["host", "int32"])
def test_strided_tensors(table, driver_device):
    inputs = random_inputs(d=32)
    value, locations, weights = map(strided, inputs.tensors)
    leaves = inputs._replace(value=value, locations=locations, weights=weights)
    leaves = [tensor.requires_grad_() for tensor in leaves.tensors]
    output = ms_deform_attn(leaves[0], *TABLES[table](inputs), *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, strided(inputs.grad_output))
    check_against_reference(inputs, output, gradients)


def test_misaligned_tensors_are_copied_for_the_kernels(driver_device):
    inputs = random_inputs(d=32)
    shifted = {}
    for name in inputs._fields[1:]:
        tensor = getattr(inputs, name)
        shifted[name] = tensor.new_zeros(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)
    check_against_reference(inputs, *results(inputs._replace(**shifted)))


def test_the_stream_is_torchs_current_one(monkeypatch):
    """By the exchange API or, where a torch has none, by its function."""
    arguments = launch.thread_arguments()

    def read(device, address):
        ctypes.c_uint64.from_address(address).value = 70 + device

    monkeypatch.setattr(exchange, "_read_stream", read)
    assert exchange.current_stream(3, arguments) == 73
    monkeypatch.setattr(exchange, "_read_stream", None)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=80 + device)
    )
    assert exchange.current_stream(3, arguments) == 83


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_needed_gradients_are_computed(needs, driver_device):
    inputs = random_inputs(d=32)
    positions = [i for i in range(3) if needs[0 if i == 0 else 1]]
    leaves = with_grad(inputs, *positions)
    output = call(leaves)
    driver_device.launched.clear()
    output.backward(inputs.grad_output)
    assert [t.grad is not None for t in leaves.tensors] == [needs[0], needs[1], needs[1]]
    fill = [inputs.value.nbytes] if needs[0] else []
    assert driver_device.launched == [*fill, "msda_backward"]


@pytest.mark.parametrize("empty", ["n", "lq", "m", "d", "p", "s"])
def test_empty_problems_launch_no_kernel(empty, driver_device):
    inputs = random_inputs(((0, 0),) if empty == "s" else ((5, 7), (3, 4)), **{empty: 0})
    output, gradients = results(inputs)
    assert output.shape == inputs.grad_output.shape
    assert not any(tensor.any() for tensor in (output, *gradients))
    assert all(isinstance(launched, int) for launched in driver_device.launched)


@pytest.mark.parametrize(("order", "grids"), [("auto", None), (None, ()), ([(1, 2), (3, 1)],) * 2])
def test_query_order_reaches_the_plan(order, grids, driver_device, monkeypatch):
    asked = []
    for name in ("plan_forward", "plan_backward"):
        plan = getattr(plans, name)
        monkeypatch.setattr(
            launch,
            name,
            lambda *case, plan=plan, **needs: asked.append(case[3]) or plan(*case, **needs),
        )
    inputs = random_inputs()
    leaves = with_grad(inputs)
    arguments = leaves.value, inputs.sizes, None, *leaves.tensors[1:]
    output = ms_deform_attn(*arguments, query_order=order)
    check_against_reference(
        inputs, output, torch.autograd.grad(output, leaves.tensors, inputs.grad_output)
    )
    assert asked == [tuple(grids) if grids else grids] * 2


@pytest.fixture(params=[False, True], ids=["error", "warn"])
def deterministic(request):
    """torch's switch, in both its modes."""
    torch.use_deterministic_algorithms(True, warn_only=request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("max_points_tiled", [14, 15])
def test_deterministic_algorithms(
    dtypes, max_points_tiled, driver_device, deterministic, monkeypatch
):
    """Neither an error nor a warning, and only the gradient of value is computed in another way."""
    monkeypatch.setattr(plans, "MAX_POINTS_TILED", max_points_tiled)
    plans.plan_backward.cache_clear()
    inputs = random_inputs(dtypes=dtypes)
    check_against_reference(inputs, *results(inputs))
    kernels = [name for name in driver_device.launched if isinstance(name, str)]
    tiled = max_points_tiled == 15 and dtypes[0] != torch.float64
    assert ("msda_backward_value_tiled" in kernels) == tiled
    assert ("msda_fixed_point_finish" in kernels) == (not tiled)
    plans.plan_backward.cache_clear()


def test_deterministic_algorithms_on_an_empty_problem(driver_device, deterministic):
    _, gradients = results(random_inputs(lq=0))
    assert not any(gradient.any() for gradient in gradients)


# --- what a backward recognises --------------------------------------------------------------------


# A capsule, as torch had alone before 2.10, has shapes in memory of its own: then each backward is checked again.
RECOGNISES = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


@pytest.fixture
def checks(driver_device, monkeypatch):
    """How many tensors were looked at whether the check accepts them."""
    from cupy_msda.torch import operators

    seen = []
    checked = operators.checked
    monkeypatch.setattr(operators, "checked", lambda o: seen.append(o) or checked(o))
    return seen


def test_a_backward_on_the_tensors_of_its_forward_is_not_checked_again(checks):
    inputs = random_inputs(d=32)
    check_against_reference(inputs, *results(inputs, inputs.shapes(), inputs.starts()))
    assert len(checks) == (1 if RECOGNISES else 2)


@pytest.mark.parametrize("table", ["host", "sizes only"])
def test_another_call_in_between_does_not_matter(table, checks):
    """As another thread's arguments do not, on which a backward runs on a GPU."""
    inputs = random_inputs(d=32)
    leaves = with_grad(inputs)
    output = ms_deform_attn(leaves.value, *TABLES[table](inputs), *leaves.tensors[1:])
    other = random_inputs(d=32, lq=3)
    ms_deform_attn(other.value, other.shapes(), other.starts(), *other.tensors[1:])
    gradients = torch.autograd.grad(output, leaves.tensors, inputs.grad_output)
    check_against_reference(inputs, output, gradients)
    assert len(checks) == (2 if RECOGNISES else 3)  # the two forwards


def test_saved_tensors_that_hooks_replace_are_checked_again(checks):
    inputs = random_inputs(d=32)
    with torch.autograd.graph.save_on_cpu():
        check_against_reference(inputs, *results(inputs))
    assert len(checks) == 2


def test_saved_tensors_of_another_shape_are_refused(driver_device):
    inputs = with_grad(random_inputs(d=32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.detach()[:, :1]):
        output = call(inputs)
        with pytest.raises(ValueError, match="must"):
            output.backward(inputs.grad_output)


def test_other_memory_behind_a_saved_tensor_is_noticed(checks):
    inputs = with_grad(random_inputs(d=32))
    output = call(inputs)
    inputs.value.data = inputs.value.detach().clone()
    gradients = torch.autograd.grad(output, inputs.tensors, inputs.grad_output)
    check_against_reference(inputs, output, gradients)
    assert len(checks) == 2


def test_other_memory_of_another_size_is_refused(driver_device):
    inputs = with_grad(random_inputs(d=32))
    output = call(inputs)
    inputs.weights.data = inputs.weights.detach()[:, :1].clone()
    with pytest.raises(ValueError, match="attention_weights must have shape"):
        torch.autograd.grad(output, inputs.tensors, inputs.grad_output)


# --- the way of a call -----------------------------------------------------------------------------


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_few_functions_lie_between_the_public_one_and_the_driver(
    needs_gradients, driver_device, monkeypatch
):
    stacks = []
    launch_kernel = driver_device.cupy.cuda.driver.launchKernel

    def spy(*arguments):
        stacks.append(inspect.stack(context=0))
        launch_kernel(*arguments)

    monkeypatch.setattr(driver_device.cupy.cuda.driver, "launchKernel", spy)
    inputs = random_inputs(d=32)
    inputs = with_grad(inputs) if needs_gradients else inputs
    output = call(inputs)
    if needs_gradients:
        output.backward(inputs.grad_output)
    assert len(stacks) == 1 + needs_gradients
    package = Path(cupy_msda.__file__).parent
    for stack in stacks:
        files = [frame.filename for frame in stack if package in Path(frame.filename).parents]
        assert len(files) <= 8
        in_order = [file for file, _ in itertools.groupby(files)]
        assert len(in_order) == len(set(in_order))


# --- masks ---------------------------------------------------------------------------------------------


def masked_results(inputs, mask, *table):
    """The output and the gradients under a mask, through autograd."""
    leaves = with_grad(inputs)
    value, *points = leaves.tensors
    table = table or (inputs.sizes, None)
    output = ms_deform_attn(value, *table, *points, value_mask=mask)
    return output, *torch.autograd.grad(output, leaves.tensors, inputs.grad_output)


def by_reference(inputs, mask):
    """The same by the reference."""
    arguments = inputs.value, inputs.levels, inputs.locations, inputs.weights
    output = reference.forward(*arguments, value_mask=mask)
    return output, *reference.backward(inputs.grad_output, *arguments, value_mask=mask)


def random_mask(inputs, seed=0):
    """About half of the positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(inputs.value.shape[:2], generator=generator) < 0.5


MASKS = {
    "contiguous": lambda mask: mask,
    "strided": lambda mask: torch.stack([mask, ~mask], dim=-1)[..., 0],
    "transposed": lambda mask: mask.T.contiguous().T,
    "expanded": lambda mask: mask[:1].expand_as(mask),
    "at-an-odd-address": lambda mask: (
        mask.new_zeros(mask.numel() + 1)[1:].view_as(mask).copy_(mask)
    ),
}


@pytest.mark.parametrize("form", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("d", [32, 5], ids=["specialised", "generic"])
def test_masks_reach_the_kernels(d, form, driver_device):
    inputs = random_inputs(d=d)
    mask = form(random_mask(inputs))
    for table in ((inputs.sizes, None), (inputs.shapes(), inputs.starts())):
        for got, expected in zip(
            masked_results(inputs, mask, *table), by_reference(inputs, mask), strict=True
        ):
            torch.testing.assert_close(got, expected)
    # The next call has no mask.
    check_against_reference(inputs, *results(inputs))


def test_a_mask_without_memory_masks_everything(driver_device):
    inputs = random_inputs(d=32)
    nothing = torch._efficientzerotensor(inputs.value.shape[:2], dtype=torch.bool)
    assert not any(result.any() for result in masked_results(inputs, nothing))


def test_calls_with_other_masks_in_between_do_not_matter(checks):
    """Each backward is of its own forward's mask, and not checked again."""
    inputs = random_inputs(d=32)
    masks = [random_mask(inputs, seed) for seed in range(2)]
    leaves = [with_grad(inputs) for _ in masks]
    outputs = [
        ms_deform_attn(one.value, inputs.sizes, None, *one.tensors[1:], value_mask=mask)
        for one, mask in zip(leaves, masks, strict=True)
    ]
    for one, mask, output in zip(leaves, masks, outputs, strict=True):
        gradients = torch.autograd.grad(output, one.tensors, inputs.grad_output)
        for got, expected in zip(gradients, by_reference(inputs, mask)[1:], strict=True):
            torch.testing.assert_close(got, expected)
    assert len(checks) == (2 if RECOGNISES else 4)  # the two forwards


# --- threads, nested calls and torch's own machinery -----------------------------------------------


def test_threads_have_arguments_of_their_own(driver_device):
    cases = [random_inputs(d=32, seed=seed) for seed in range(4)]
    in_threads(lambda inputs: check_against_reference(inputs, *results(inputs)), cases)


def test_the_operators_and_transforms_reach_the_same_kernels(driver_device):
    """What goes through torch's dispatcher launches what an eager call launches."""
    inputs = random_inputs(d=32)
    results(inputs)
    eager = list(driver_device.launched)
    driver_device.launched.clear()
    table = operator_tables(inputs)["integers"]
    arguments = inputs.value, *table, inputs.locations, inputs.weights
    output = torch.ops.cupy_msda.ms_deform_attn_forward(*arguments)
    gradients = torch.ops.cupy_msda.ms_deform_attn_backward(
        inputs.grad_output, *arguments, True, True
    )
    check_against_reference(inputs, output, gradients)
    assert driver_device.launched == eager
    driver_device.launched.clear()
    gradient = torch.func.grad(
        lambda v: (call(inputs._replace(value=v)) * inputs.grad_output).sum()
    )
    torch.testing.assert_close(gradient(inputs.value), gradients[0])
    fill = inputs.value.nbytes
    assert driver_device.launched == ["msda_forward", fill, "msda_backward"]


def test_tensors_with_a_negative_bit_are_not_read_as_they_lie(driver_device):
    inputs = random_inputs(d=32)
    negative = torch.complex(inputs.value, -inputs.value).conj().imag
    assert negative.is_neg()
    output = call(inputs._replace(value=negative.contiguous().neg().neg()))
    torch.testing.assert_close(call(inputs._replace(value=negative)), output)


def test_tensors_without_memory_are_made_real(driver_device):
    """torch's zero tensors have null pointers, and what escaped from a transform has none."""
    inputs = random_inputs(d=32)
    zero = torch._efficientzerotensor(inputs.value.shape)
    assert not call(inputs._replace(value=zero)).any()
    escaped = []
    torch.func.grad(lambda value: escaped.append(value) or value.sum())(inputs.value)
    torch.testing.assert_close(call(inputs._replace(value=escaped[0])), call(inputs))
    leaves = with_grad(inputs, 1, 2)
    output = call(leaves._replace(value=escaped[0]))
    points = torch.autograd.grad(output, leaves.tensors[1:], inputs.grad_output)
    everything = with_grad(inputs)
    expected = torch.autograd.grad(call(everything), everything.tensors, inputs.grad_output)
    torch.testing.assert_close(points, expected[1:])
    leaves = with_grad(inputs)
    no_gradient = torch._efficientzerotensor(inputs.grad_output.shape)
    gradients = torch.autograd.grad(call(leaves), leaves.tensors, no_gradient)
    assert not any(gradient.any() for gradient in gradients)


def test_a_batch_of_gradients(driver_device):
    """`is_grads_batched` is an older `vmap` than that of `torch.func`: its tensors have no memory, either."""
    inputs = random_inputs(d=32)
    leaves = with_grad(inputs)
    output = call(leaves)
    grads = torch.stack([inputs.grad_output, 2 * inputs.grad_output])
    got = torch.autograd.grad(
        output, leaves.tensors, grads, is_grads_batched=True, retain_graph=True
    )
    expected = torch.autograd.grad(output, leaves.tensors, inputs.grad_output)
    for batch, one in zip(got, expected, strict=True):
        torch.testing.assert_close(batch, torch.stack([one, 2 * one]))


def test_gradients_of_gradients(driver_device):
    inputs = random_inputs(d=32)
    leaves = with_grad(inputs)
    (gradient,) = torch.autograd.grad(
        call(leaves), leaves.value, inputs.grad_output, create_graph=True
    )
    gradient.square().sum().backward()
    assert leaves.locations.grad.abs().sum() > 0


def test_the_backward_function(driver_device):
    inputs = random_inputs(d=32)
    arguments = inputs.value, inputs.sizes, None, *inputs.tensors[1:]
    gradients = ms_deform_attn_backward(inputs.grad_output, *arguments)
    check_against_reference(inputs, call(inputs), gradients)


# --- DLPack ------------------------------------------------------------------------------------------


class NoApi:
    """A tensor type without DLPack's C exchange API, as torch's was before 2.10."""


@pytest.mark.parametrize("tensor_type", [torch.Tensor, NoApi], ids=["exchange-api", "capsule"])
def test_a_dltensor_says_what_the_tensor_says(tensor_type):
    if tensor_type is torch.Tensor and not hasattr(tensor_type, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no DLPack exchange API")
    read = dlpack.reader(tensor_type, torch.utils.dlpack.to_dlpack)
    arguments = launch.Arguments()
    for tensor in (
        torch.rand(3, 4, requires_grad=True),
        torch.rand(5, dtype=torch.float64)[1:],
        torch.zeros(2, dtype=torch.bfloat16),
    ):
        slot = launch.SLOT["value"]
        kept = read(tensor, arguments.addresses[slot])
        words = arguments.words[dlpack.WORDS * slot : dlpack.WORDS * (slot + 1)]
        assert words[dlpack.DATA] + words[dlpack.BYTE_OFFSET] == tensor.data_ptr()
        assert words[1] == 1  # kDLCPU, device 0
        assert words[2] & 0xFFFFFFFF == tensor.dim()
        assert words[2] >> 40 & 0xFF == 8 * tensor.element_size()
        del kept


def test_calls_work_without_the_exchange_api(driver_device, monkeypatch):
    monkeypatch.setattr(exchange, "_read", dlpack.reader(NoApi, torch.utils.dlpack.to_dlpack))
    inputs = random_inputs(d=32)
    check_against_reference(inputs, *results(inputs, inputs.shapes(), inputs.starts()))
    assert dlpack.stream_reader(NoApi) is None
