# SPDX-License-Identifier: Apache-2.0
"""The fused operator: reference points, offsets and logits, in every way that it is called."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import cupy_msda  # noqa: E402
from cupy_msda import (  # noqa: E402
    fused,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_backward,
    reference,
)
from cupy_msda.bench.cases import consecutive  # noqa: E402
from cupy_msda.budget import assert_within_budget  # noqa: E402
from tests.calls import IGNORE_DEPRECATIONS  # noqa: E402
from tests.problems import DTYPES  # noqa: E402

pytestmark = IGNORE_DEPRECATIONS

SIZES = [(5, 7), (3, 4), (2, 2)]
POINTS = [3, 0, 2]


class Rules(NamedTuple):
    """What a call may choose."""

    coordinates: int = 2
    levels: int = 3  # of the reference points
    batch: int = 2  # likewise
    num_points: Any = None
    interpolation: str = "bilinear"
    masked: bool = False


RULES = [
    Rules(),
    Rules(coordinates=4),
    Rules(levels=1, batch=1),
    Rules(coordinates=4, levels=1, num_points=POINTS),
    Rules(num_points=POINTS, masked=True),
    Rules(coordinates=4, batch=1, interpolation="nearest", num_points=POINTS),
    Rules(interpolation="nearest", masked=True, levels=1),
]
EVERY_RULE = pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(map(str, rules)))


class Call(NamedTuple):
    """A fused call: value, reference points, offsets and logits, and what it takes by keyword."""

    tensors: tuple[torch.Tensor, ...]
    grad_output: torch.Tensor
    keywords: dict[str, Any]

    def __call__(self, function: Any = ms_deform_attn_fused, **keywords: Any) -> Any:
        value, *points = self.tensors
        return function(value, SIZES, None, *points, **self.keywords, **keywords)

    def of(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The same call on other tensors."""
        value, *points = tensors  # no other `Call`: torch 2.4 traces none
        return ms_deform_attn_fused(value, SIZES, None, *points, **self.keywords)

    def to(self, *dtypes: torch.dtype) -> Call:
        """In the dtypes of value and of the rest, as new leaves."""
        first, rest = (*dtypes, dtypes[-1])[:2]
        value, *points = self.tensors
        tensors = value.to(first), *(tensor.to(rest) for tensor in points)
        leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
        return self._replace(tensors=leaves, grad_output=self.grad_output.to(first))

    def results(self) -> tuple[torch.Tensor, ...]:
        """Output and gradients."""
        output = self()
        return output, *torch.autograd.grad(output, self.tensors, self.grad_output)


def call(rules: Rules, *, n: int = 2, lq: int = 5, m: int = 2, d: int = 8) -> Call:
    """A random call in float32."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = (n, lq, m, sum(POINTS)) if rules.num_points else (n, lq, m, len(SIZES), 4)
    value = normal(n, sum(h * w for h, w in SIZES), m, d)
    batch = min(rules.batch, n)
    references = torch.rand(batch, lq, rules.levels, rules.coordinates, generator=generator)
    keywords = {"num_points": rules.num_points, "interpolation": rules.interpolation}
    if rules.masked:
        keywords["value_mask"] = torch.rand(value.shape[:2], generator=generator) > 0.3
    grad_output = normal(n, lq, m * d)
    return Call((value, references, normal(*rows, 2), normal(*rows)), grad_output, keywords)


def by_formula(given: Call) -> tuple[torch.Tensor, ...]:
    """Output and gradients by autograd, of what a module of Deformable DETR and D-FINE writes, level by level."""
    value, references, offsets, logits = given.tensors
    keywords = dict(given.keywords)
    numbers = keywords.pop("num_points")
    flat = numbers is not None
    numbers = numbers or [offsets.shape[4]] * len(SIZES)
    weights = logits.flatten(3).softmax(-1)
    steps = offsets if flat else offsets.flatten(3, 4)
    parts = []
    for level, (part, (h, w)) in enumerate(zip(steps.split(numbers, 3), SIZES, strict=True)):
        reference_points = references[:, :, level if references.shape[2] > 1 else 0]
        at = reference_points[:, :, None, None]  # N or 1, Lq, 1, 1, 2 or 4
        if at.shape[-1] == 2:
            parts.append(at + part / torch.tensor([w, h]).to(part))
        else:
            parts.append(at[..., :2] + part / max(numbers[level], 1) * at[..., 2:] * 0.5)
    locations = torch.cat(parts, 3)
    output = reference.forward(
        value, consecutive(SIZES), locations, weights, num_points=numbers, **keywords
    )
    gradients = torch.autograd.grad(
        output, given.tensors, given.grad_output, materialize_grads=True
    )
    return output, *gradients


@EVERY_RULE
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_output_and_gradients_stay_within_the_error_budget(rules, dtypes):
    given = call(rules).to(*dtypes)
    results = given.results()
    assert [r.dtype for r in results[1:]] == [t.dtype for t in given.tensors]
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    rounded = given.to(wide)
    for actual, same, exact in zip(
        results, by_formula(rounded), by_formula(given.to(torch.float64)), strict=True
    ):
        assert_within_budget(actual.detach(), same.detach().to(actual.dtype), exact.detach())


@EVERY_RULE
def test_derivatives_are_those_of_the_output(rules):
    given = call(rules, n=1, lq=2, d=3).to(torch.float64)
    assert gradcheck(given.of, given.tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(given.of, given.tensors, fast_mode=True)


@EVERY_RULE
def test_every_way_of_a_call_gives_the_same(rules):
    given = call(rules).to(torch.float32)
    output, *gradients = given.results()

    def check(again: torch.Tensor) -> None:
        assert torch.equal(again, output)
        got = torch.autograd.grad(again, given.tensors, given.grad_output)
        assert all(map(torch.equal, got, gradients))

    torch.compiler.reset()
    check(torch.compile(given.of, fullgraph=True, backend="aot_eager")(*given.tensors))
    detached = tuple(tensor.detach() for tensor in given.tensors)
    check(torch.jit.trace(given.of, detached, check_trace=False)(*given.tensors))
    direct = given._replace(tensors=detached)(
        lambda *inputs, **keywords: ms_deform_attn_fused_backward(
            given.grad_output, *inputs, **keywords
        )
    )
    assert direct._fields == ("value", "reference_points", "sampling_offsets", "attention_logits")
    assert all(map(torch.equal, direct, gradients))


@EVERY_RULE
def test_arrays_give_the_same(rules):
    given = call(rules).to(torch.float32)
    arrays = tuple(tensor.detach().numpy() for tensor in given.tensors)
    keywords = {k: v.numpy() if k == "value_mask" else v for k, v in given.keywords.items()}
    of_arrays = given._replace(tensors=arrays, keywords=keywords)
    grad_output = given.grad_output.numpy()
    gradients = of_arrays(
        lambda *inputs, **rules: ms_deform_attn_fused_backward(grad_output, *inputs, **rules)
    )
    exact = by_formula(given.to(torch.float64))
    same = given.results()
    for actual, *expected in zip((of_arrays(), *gradients), same, exact, strict=True):
        assert_within_budget(torch.from_numpy(actual), *(t.detach() for t in expected))


@EVERY_RULE
def test_a_program_of_standard_operators_gives_the_same(rules):
    given = call(rules)

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return given.of(*tensors)

    program = torch.export.export(Model(), given.tensors)
    portable = program.run_decompositions(cupy_msda.decompositions())
    assert not [node for node in portable.graph.nodes if "cupy_msda" in str(node.target)]
    assert torch.equal(program.module()(*given.tensors), given())
    leaves = given.to(torch.float32)
    expected = by_formula(leaves)[0], by_formula(given.to(torch.float64))[0]
    assert_within_budget(portable.module()(*given.tensors), *(e.detach() for e in expected))


@pytest.mark.parametrize("rules", RULES[:4], ids=str)
def test_transforms_give_the_same(rules):
    given = call(rules).to(torch.float32)
    value, *points = (tensor.detach() for tensor in given.tensors)
    stacked = [torch.stack([point, point * 0.9]) for point in points]
    batched = torch.func.vmap(given.of, in_dims=(None, 0, 0, 0))(value, *stacked)
    each = [given.of(value, *(point[i] for point in stacked)) for i in range(2)]
    exact = [given.of(*(t.double() for t in (value, *(p[i] for p in stacked)))) for i in range(2)]
    assert_within_budget(batched, torch.stack(each), torch.stack(exact))


def test_one_gradient_alone_is_that_of_all():
    given = call(Rules(coordinates=4)).to(torch.float32)
    _, *expected = given.results()
    for number, tensor in enumerate(given.tensors):
        leaves = tuple(t.detach().requires_grad_(t is tensor) for t in given.tensors)
        output = given._replace(tensors=leaves)()
        (gradient,) = torch.autograd.grad(output, leaves[number], given.grad_output)
        assert torch.equal(gradient, expected[number])


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_logits_of_any_finite_size(size):
    given = call(Rules())
    value, references, offsets, logits = given.tensors
    logits = logits.sign() * size
    alone = torch.where(
        logits > 0, 0.0, -torch.inf
    )  # the same weights, by logits that cannot overflow
    output = given.of(value, references, offsets, logits)
    assert output.isfinite().all()
    assert torch.equal(output, given.of(value, references, offsets, alone))


def test_a_logit_of_minus_infinity_is_a_weight_of_zero_and_all_of_them_are_nan():
    given = call(Rules())
    value, references, offsets, logits = given.tensors
    some, whole = logits.clone(), logits.clone()
    some[..., 0] = -torch.inf
    fewer = value, references, offsets[..., 1:, :], logits[..., 1:]
    exact = given.of(*(tensor.double() for tensor in fewer))
    assert_within_budget(given.of(value, references, offsets, some), given.of(*fewer), exact)
    whole[0, 0, 0] = -torch.inf
    output = given.of(value, references, offsets, whole).unflatten(-1, (2, -1))
    assert output[0, 0, 0].isnan().all()
    assert output.isnan().sum() == output.shape[-1]


def test_autocast_takes_what_a_layer_gives():
    given = call(Rules(coordinates=4))
    value, references, offsets, logits = given.tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = given.of(value, references, offsets.bfloat16(), logits.bfloat16())
    assert output.dtype == torch.float32
    widened = given.of(value, references, offsets.bfloat16().float(), logits.bfloat16().float())
    assert torch.equal(output, widened)


def test_dynamic_sizes_compile_once():
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def compiled(value, h, w, references, offsets, logits):
        return ms_deform_attn_fused(value, [(h, w)], None, references, offsets, logits)

    for h, w, lq in ((3, 4, 5), (5, 2, 7), (6, 6, 9)):
        shape = (2, lq, 2, 1, 4)
        given = (
            torch.randn(2, h * w, 2, 8),
            h,
            w,
            torch.rand(2, lq, 1, 2),
            torch.randn(*shape, 2),
            torch.randn(shape),
        )
        value, *_, references, offsets, logits = given
        expected = ms_deform_attn_fused(value, [(h, w)], None, references, offsets, logits)
        assert torch.equal(compiled(*given), expected)
    assert len(graphs) <= 2


def test_flops_are_those_of_the_plain_operator():
    given = call(Rules()).to(torch.float32)
    value, _, offsets, logits = given.tensors
    counts = []
    for function in (given, lambda: ms_deform_attn(value, SIZES, None, offsets, logits)):
        with FlopCounterMode(display=False) as counter:
            function().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@EVERY_RULE
def test_the_operators_are_well_formed(rules):
    given = call(rules).to(torch.float32)
    sizes = [number for size in SIZES for number in size]
    value, references, offsets, logits = given.tensors
    keywords = {**given.keywords, "offset_scale": 0.25}
    operator = torch.ops.cupy_msda.ms_deform_attn_fused_forward.default
    arguments = value, None, None, sizes, None, references, offsets, logits
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(operator, detached, keywords, test_utils=checks)


def test_an_empty_level_has_zero_gradients():
    value, references = torch.randn(1, 6, 2, 4), torch.rand(1, 3, 2, 2)
    offsets, logits = torch.randn(1, 3, 2, 2, 4, 2), torch.randn(1, 3, 2, 2, 4)
    leaves = [tensor.requires_grad_() for tensor in (value, references, offsets, logits)]
    ms_deform_attn_fused(value, [(2, 3), (0, 4)], None, *leaves[1:]).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not references.grad[:, :, 1].any()


def test_empty_calls_have_empty_results():
    for lq, levels, points in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):
        sizes = [(2, 3), (0, 4)][:levels]
        value = torch.randn(1, 6 if levels else 0, 2, 4, requires_grad=True)
        references = torch.rand(1, lq, levels or 1, 2, requires_grad=True)
        offsets = torch.randn(1, lq, 2, levels, points, 2, requires_grad=True)
        logits = torch.randn(1, lq, 2, levels, points, requires_grad=True)
        output = ms_deform_attn_fused(value, sizes, None, references, offsets, logits)
        assert output.shape == (1, lq, 8)
        assert not output.any()
        output.sum().backward()
        assert not value.grad.any()
        arrays = [t.detach().numpy() for t in (value, references, offsets, logits)]
        assert not np.any(ms_deform_attn_fused(arrays[0], sizes, None, *arrays[1:]))


def test_gradients_in_the_dtype_to_compute_in_are_those_of_torch():
    """`fused.gradients`, which the operators use, against autograd of `fused.locations_and_weights`."""
    for rules in RULES:
        given = call(rules)
        directions = [torch.randn_like(given.tensors[2]), torch.randn_like(given.tensors[3])]
        expected = []
        for dtype in (torch.float32, torch.float64):
            leaves = given.to(dtype).tensors
            sizes = torch.tensor(SIZES, dtype=dtype).flip(1)
            points = fused.FusedPoints(*leaves[1:], sizes, rules.num_points, 0.75)
            results = fused.locations_and_weights(points)
            along = [direction.to(dtype) for direction in directions]
            expected.append(torch.autograd.grad(results, leaves[1:], along))
            if dtype == torch.float32:
                got = fused.gradients(points, results[1], *along)
        for one, *both in zip(got, *expected, strict=True):
            assert_within_budget(one.detach(), *both)
