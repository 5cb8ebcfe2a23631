# SPDX-License-Identifier: Apache-2.0
"""Points of each level, the nearest pixel, masks of value, in every way that torch calls the operator."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

import cupy_msda  # noqa: E402
from cupy_msda import (  # noqa: E402
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    reference,
)
from cupy_msda.budget import assert_within_budget  # noqa: E402
from tests.calls import IGNORE_DEPRECATIONS, with_grad  # noqa: E402
from tests.problems import DTYPES, away_from_edges, flat_points, random_inputs  # noqa: E402

pytestmark = IGNORE_DEPRECATIONS

SIZES = [(5, 7), (3, 4), (2, 2)]
POINTS = [3, 0, 2]
RULES = [
    dict(zip(("num_points", "interpolation", "masked"), rules, strict=True))
    for rules in itertools.product((None, POINTS), ("bilinear", "nearest"), (False, True))
][1:]
EVERY_RULE = pytest.mark.parametrize(
    "rules", RULES, ids=lambda rules: "-".join(map(str, rules.values()))
)


def problem(rules, dtypes=(torch.float32, torch.float32), **sizes):
    """Inputs, and the keyword arguments of these rules; NaN lies under the mask."""
    inputs = random_inputs(SIZES, dtypes=dtypes, **sizes)
    keywords = {name: rules[name] for name in ("num_points", "interpolation")}
    if rules["num_points"] is not None:
        inputs = flat_points(inputs, rules["num_points"])
    if rules["masked"]:
        mask = torch.rand(inputs.value.shape[:2], generator=torch.Generator().manual_seed(3)) > 0.3
        value = inputs.value.masked_fill(~mask[..., None, None], float("nan"))
        inputs, keywords["value_mask"] = inputs._replace(value=value), mask
    return inputs, keywords


def run(inputs, keywords, function=ms_deform_attn):
    """The operator on tensors."""
    value, *points = inputs.tensors
    return function(value, inputs.sizes, None, *points, **keywords)


def by_reference(inputs, keywords):
    """Output and gradients of the reference in the dtypes of the inputs."""
    value, *points = inputs.tensors
    given = value, inputs.levels, *points
    gradients = reference.backward(inputs.grad_output, *given, **keywords)
    return reference.forward(*given, **keywords), *gradients


@EVERY_RULE
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_output_and_gradients_stay_within_the_error_budget(rules, dtypes):
    inputs, keywords = problem(rules, dtypes)
    leaves = with_grad(inputs)
    output = run(leaves, keywords)
    gradients = torch.autograd.grad(output, leaves.tensors, inputs.grad_output)
    exact = by_reference(inputs.to(torch.float64), keywords)
    same = by_reference(inputs, keywords)
    for actual, *expected in zip((output, *gradients), same, exact, strict=True):
        assert_within_budget(actual.detach(), *expected)
    if rules["masked"]:
        assert not gradients[0][~keywords["value_mask"]].any()
    if rules["interpolation"] == "nearest":
        assert not gradients[1].any()


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`")  # torch 2.4's gradcheck does not
@EVERY_RULE
def test_derivatives_are_those_of_the_output(rules):
    inputs, keywords = problem(rules, n=1, d=3, lq=2, p=3)
    if rules["masked"]:  # a NaN cannot be moved
        inputs = inputs._replace(value=inputs.value.nan_to_num(nan=7.0))
    leaves = with_grad(away_from_edges(inputs, rules["num_points"]))

    def function(*tensors):
        return ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:], **keywords)

    assert gradcheck(function, leaves.tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves.tensors, fast_mode=True)


@EVERY_RULE
def test_every_way_of_a_call_gives_the_same(rules):
    inputs, keywords = problem(rules)
    leaves = with_grad(inputs)
    output = run(leaves, keywords)
    gradients = torch.autograd.grad(output, leaves.tensors, inputs.grad_output)

    def check(again):
        assert torch.equal(again, output)
        got = torch.autograd.grad(again, leaves.tensors, inputs.grad_output)
        assert all(map(torch.equal, got, gradients))

    def call(*tensors):
        return ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:], **keywords)

    value, *points = leaves.tensors
    torch.compiler.reset()
    last = [keywords.get(name) for name in ("num_points", "interpolation", "value_mask")]
    check(MSDeformAttnFunction.apply(value, inputs.sizes, None, *points, 64, "auto", *last))
    check(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves.tensors))
    check(torch.jit.trace(call, inputs.tensors, check_trace=False)(*leaves.tensors))
    direct = run(
        inputs,
        keywords,
        lambda *given, **rules: ms_deform_attn_backward(inputs.grad_output, *given, **rules),
    )
    assert all(map(torch.equal, direct, gradients))
    batched = torch.func.vmap(call, in_dims=(None, 0, 0))(
        *(torch.stack([p.detach()] * 2) if i else p.detach() for i, p in enumerate(leaves.tensors))
    )
    assert torch.equal(batched[1], output)


@EVERY_RULE
def test_arrays_give_the_same(rules):
    inputs, keywords = problem(rules)
    arrays = [tensor.numpy() for tensor in inputs.tensors]
    if "value_mask" in keywords:
        keywords["value_mask"] = keywords["value_mask"].numpy()
    given = arrays[0], inputs.sizes, None, *arrays[1:]
    output = ms_deform_attn(*given, **keywords)
    gradients = ms_deform_attn_backward(inputs.grad_output.numpy(), *given, **keywords)
    inputs, keywords = problem(rules)
    leaves = with_grad(inputs)
    expected = run(leaves, keywords)
    expected = expected, *torch.autograd.grad(expected, leaves.tensors, inputs.grad_output)
    for one, one_expected in zip((output, *gradients), expected, strict=True):
        assert np.array_equal(one, one_expected.detach().numpy())


@EVERY_RULE
def test_a_program_of_standard_operators_gives_the_same(rules):
    inputs, keywords = problem(rules)

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:], **keywords)

    program = torch.export.export(Model(), inputs.tensors)
    portable = program.run_decompositions(cupy_msda.decompositions())
    assert not [node for node in portable.graph.nodes if "cupy_msda" in str(node.target)]
    expected = by_reference(inputs, keywords)[0]
    assert torch.equal(program.module()(*inputs.tensors), run(inputs, keywords))
    assert torch.equal(portable.module()(*inputs.tensors), expected)


@pytest.mark.parametrize("rules", RULES[1:3], ids=["mask", "nearest"])
def test_equal_points_may_be_flat(rules):
    inputs, keywords = problem(rules | {"num_points": None})
    flat = flat_points(inputs, [3, 3, 3])
    output = run(flat, keywords | {"num_points": [3, 3, 3]})
    assert torch.equal(output, run(inputs, keywords))


def test_masks_may_differ_between_samples_of_a_transform():
    inputs, keywords = problem({"num_points": POINTS, "interpolation": "bilinear", "masked": True})
    masks = torch.stack([keywords["value_mask"], ~keywords["value_mask"]])
    value, *points = inputs.tensors
    value = value.nan_to_num(nan=2.0)

    def call(mask, value):
        rules = {"num_points": POINTS, "value_mask": mask}
        return ms_deform_attn(value, inputs.sizes, None, *points, **rules)

    batched = torch.func.vmap(call, in_dims=(0, None))(masks, value)
    assert torch.equal(batched, torch.stack([call(mask, value) for mask in masks]))

    def gradient(mask, value):
        return torch.func.grad(lambda value: call(mask, value).sum())(value)

    batched = torch.func.vmap(gradient, in_dims=(0, None))(masks, value)
    assert torch.equal(batched, torch.stack([gradient(mask, value) for mask in masks]))


def test_a_mask_made_in_inference_mode_is_copied():
    inputs, keywords = problem({"num_points": None, "interpolation": "bilinear", "masked": True})
    with torch.inference_mode():
        made = keywords["value_mask"].clone()
    leaves = with_grad(inputs)
    output = run(leaves, {"value_mask": made})
    output.backward(inputs.grad_output)
    assert torch.equal(output, run(inputs, keywords))


@pytest.mark.parametrize("where", [float("nan"), float("inf"), -float("inf"), -3.0, 5.0])
def test_nearest_takes_points_outside_to_the_border_and_no_nan(where):
    inputs = random_inputs([(3, 4)], n=1, m=1, d=4, lq=1, p=1)
    locations = torch.full_like(inputs.locations, where)
    inputs = with_grad(inputs._replace(locations=locations))
    output = run(inputs, {"interpolation": "nearest"})
    output.sum().backward()
    expected = inputs.weights.flatten()[0] * inputs.value[0, 0 if where < 0 else -1, 0]
    touches = not math.isnan(where)
    assert torch.equal(output[0, 0], expected if touches else torch.zeros(4))
    assert bool(inputs.value.grad.any()) == touches
    assert not inputs.locations.grad.any()


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_the_function_of_transformers_agrees(method):
    """Its `multi_scale_deformable_attention_v2`, which RT-DETRv2 and D-FINE run."""
    theirs = pytest.importorskip(
        "transformers.models.rt_detr_v2.modeling_rt_detr_v2", reason="transformers is not installed"
    ).multi_scale_deformable_attention_v2
    interpolation = {"default": "bilinear", "discrete": "nearest"}[method]
    rules = {"num_points": [3, 1, 2], "interpolation": interpolation, "masked": False}
    single, keywords = problem(rules)
    inputs = single.to(torch.float64)
    needed = [0, 2] if method == "discrete" else [0, 1, 2]

    def by_transformers(value, sizes, _, locations, weights, **keywords):
        return theirs(value, sizes, locations, weights, keywords["num_points"], method)

    def results(inputs, function):
        leaves = with_grad(inputs)
        output = run(leaves, keywords, function)
        wanted = [leaves.tensors[i] for i in needed]
        return output.detach(), *torch.autograd.grad(output, wanted, inputs.grad_output)

    exact = results(inputs, by_transformers)
    of_reference = [by_reference(inputs, keywords)[i] for i in (0, *(1 + i for i in needed))]
    for one, same, other in zip(results(inputs, ms_deform_attn), of_reference, exact, strict=True):
        assert_within_budget(one, same, other)
    both = results(single, ms_deform_attn), results(single, by_transformers)
    for one, same, other in zip(*both, exact, strict=True):
        assert_within_budget(one, same, other)
