# SPDX-License-Identifier: Apache-2.0
"""The Numba kernels of the fused operator against the reference, composed as `cupy_msda.fused` says."""

from __future__ import annotations

import tracemalloc
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from cupy_msda import contract, fused, reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.problem import Level

pytest.importorskip("numba")

from cupy_msda.cpu import backend, kernels

inf, nan = np.inf, np.nan
Array = np.ndarray[Any, Any]
LEVELS = (Level(13, 21, 0), Level(7, 11, 273), Level(4, 6, 350))


class Rules(NamedTuple):
    """The keyword arguments of one problem."""

    num_points: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    value_mask: Array | None = None
    offset_scale: float = 0.5


class Case(NamedTuple):
    """The arguments of one problem."""

    value: Array
    levels: tuple[Level, ...]
    references: Array
    offsets: Array
    logits: Array
    grad_output: Array
    rules: Rules

    @property
    def inputs(self) -> tuple[Array, ...]:
        """The differentiable ones."""
        return self.value, self.references, self.offsets, self.logits

    def to(self, dtype: Any) -> Case:
        """All arrays in another dtype."""
        return Case(*(a if isinstance(a, tuple) else a.astype(dtype) for a in self))

    def ruled(self, **changed: Any) -> Case:
        """The same by other rules."""
        return self._replace(rules=self.rules._replace(**changed))


def make(
    levels: tuple[Level, ...] = LEVELS,
    *,
    n: int = 2,
    m: int = 3,
    d: int = 32,
    lq: int = 30,
    p: int | tuple[int, ...] = 4,
    coordinates: int = 2,
    batch: int | None = None,
    per_level: bool = False,
    valid: float | None = None,
    dtype: Any = np.float32,
    **rules: Any,
) -> Case:
    """A random problem; `batch`: of the reference points, `valid`: the part that a mask leaves of value."""
    rng = np.random.default_rng(0)
    s = max((h * w + start for h, w, start in levels), default=0)
    shape = (n, lq, m, len(levels), p) if isinstance(p, int) else (n, lq, m, sum(p))
    value = rng.standard_normal((n, s, m, d))
    if valid is not None:
        rules["value_mask"] = rng.random((n, s)) < valid
        value[~rules["value_mask"]] = nan
    points = None if isinstance(p, int) else p
    references = n if batch is None else batch, lq, len(levels) if per_level else 1, coordinates
    return Case(
        value,
        levels,
        rng.uniform(0, 1, references),
        2 * rng.standard_normal((*shape, 2)),
        2 * rng.standard_normal(shape),
        rng.standard_normal((n, lq, m * d)),
        Rules(points, **rules),
    ).to(dtype)


def run(case: Case, threads: int | None = None) -> tuple[Array, ...]:
    """The output and the four gradients of the CPU backend, in the dtypes of the inputs."""
    sizes = [(level.height, level.width) for level in case.levels]
    starts = [level.start for level in case.levels]
    value, *points = case.inputs
    call = contract.check_fused(value, sizes, starts, *points, **case.rules._asdict())
    rules = {
        "mask": case.rules.value_mask,
        "offset_scale": case.rules.offset_scale,
        "threads": threads,
    }
    output = backend.fused_forward(*call, value, *points, **rules)
    results = output, *backend.fused_backward(*call, case.grad_output, value, *points, **rules)
    sources = case.grad_output, *case.inputs
    return tuple(result.astype(a.dtype) for result, a in zip(results, sources, strict=True))


def points_of(case: Case) -> tuple[fused.FusedPoints, dict[str, Any]]:
    """The points of the reference, and the rules of the plain operator."""
    sizes = np.array([(w, h) for h, w, _ in case.levels], case.offsets.dtype).reshape(-1, 2)
    rules = case.rules._asdict()
    scale = rules.pop("offset_scale")
    return fused.FusedPoints(*case.inputs[1:], sizes, rules["num_points"], scale), rules


def by_reference(case: Case) -> tuple[Array, ...]:
    """What `run` should give."""
    points, rules = points_of(case)
    locations, weights = fused.locations_and_weights(points)
    inputs = case.value, case.levels, locations, weights
    by_value, *by_points = reference.backward(case.grad_output, *inputs, **rules)
    by_references, *others = fused.gradients(points, weights, *by_points)
    return reference.forward(*inputs, **rules), by_value, by_references, *others


def check(case: Case) -> tuple[Array, ...]:
    """Hold the kernels to the error budget; return their results."""
    results = run(case)
    with np.errstate(all="ignore"):
        expected = by_reference(case), by_reference(case.to(np.float64))
    for actual, same, exact in zip(results, *expected, strict=True):
        assert_within_budget(actual, same, exact)
    return results


def assert_identical(results: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    """Bitwise, but for the shape."""
    for actual, same in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, same.reshape(actual.shape))


@pytest.mark.parametrize("p", [4, (3, 0, 6)])
@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_reference_points_of_any_shape(
    coordinates: int, batch: int, per_level: bool, p: int | tuple[int, ...]
) -> None:
    check(make(p=p, coordinates=coordinates, batch=batch, per_level=per_level))


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("p", [4, (3, 0, 6)])
@pytest.mark.parametrize("valid", [None, 0.7])
@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
@pytest.mark.parametrize("lq", [5, 150])
def test_every_combination_of_rules(
    lq: int, interpolation: str, valid: float | None, p: int | tuple[int, ...]
) -> None:
    """Within the budget, and bitwise identical for any number of threads."""
    case = make(lq=lq, m=8, p=p, coordinates=4, valid=valid, interpolation=interpolation)
    check(case)
    expected = run(case, threads=1)
    for threads in (2, 3):
        assert_identical(run(case, threads=threads), expected)


@pytest.mark.parametrize("p", [4, (3, 0, 6)])
@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_float64_gradients_are_those_of_autograd(
    coordinates: int, per_level: bool, p: int | tuple[int, ...]
) -> None:
    case = make(p=p, coordinates=coordinates, batch=1, per_level=per_level, dtype=np.float64)
    tensors = [torch.from_numpy(array).requires_grad_() for array in case.inputs]
    points, rules = points_of(case)
    points = fused.FusedPoints(*tensors[1:], torch.from_numpy(points.sizes), *points[4:])
    locations, weights = fused.locations_and_weights(points)
    output = reference.forward(tensors[0], case.levels, locations, weights, **rules)
    output.backward(torch.from_numpy(case.grad_output))
    autograd = output.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)
    # There is no wider reference: what it and autograd differ by tells the cost of rounding.
    for results in zip(run(case), autograd, by_reference(case), strict=True):
        assert_within_budget(*results)


def test_the_rules_and_dtypes_of_models() -> None:
    # RF-DETR, D-FINE with 16-bit values, an encoder.
    check(make(LEVELS[:1], m=16, d=16, lq=60, p=2, coordinates=4))
    check(make(m=8, p=(3, 6, 3), coordinates=4, dtype=np.float16))
    check(make(n=1, m=8, lq=374, batch=1))


@pytest.mark.parametrize("scale", [0.0, 1, 0.3, -2.5])
def test_offset_scale(scale: float) -> None:
    check(make(coordinates=4, offset_scale=scale))


def test_levels_of_equal_points_are_the_same_memory() -> None:
    case = make(coordinates=4)
    n, lq, m = case.logits.shape[:3]
    flat = case._replace(
        offsets=case.offsets.reshape(n, lq, m, -1, 2), logits=case.logits.reshape(n, lq, m, -1)
    )
    assert_identical(run(flat.ruled(num_points=(4, 4, 4))), run(case))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_of_any_size(dtype: Any) -> None:
    case = make(dtype=dtype, lq=60)
    largest = np.finfo(dtype).max
    rows = case.logits.reshape(-1, 12)
    rows[0::6] = np.linspace(-110, 110, 12)
    rows[1::6, 3] = largest
    rows[2::6, 4:] = -largest
    rows[3::6] = largest
    rows[4::6, ::2] = -inf
    results = check(case)
    assert all(np.isfinite(result).all() for result in results)
    assert not results[4].reshape(-1, 12)[4::6, ::2].any()


@pytest.mark.parametrize(
    "bad", [[-inf] * 12, [nan, *range(11)], [*range(11), nan], [inf, *range(11)]]
)
def test_logits_without_a_softmax(bad: list[float]) -> None:
    """The row is NaN as in torch, the others are not."""
    case = make(n=1, m=1)
    case.offsets[0, 7] = 0  # inside
    case.logits[0, 7] = np.reshape(bad, (1, 3, 4))
    results = check(case)
    assert np.isnan(results[0][0, 7]).all()
    assert np.isnan(results[4][0, 7]).all()
    others = np.arange(30) != 7
    assert np.isfinite(results[0][0, others]).all()
    assert np.isfinite(results[4][0, others]).all()


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e30])
def test_points_that_are_no_place_contribute_nothing(bad: float, coordinates: int) -> None:
    case = make(coordinates=coordinates)
    case.offsets[:, ::3, :, 1, 2, 0] = bad
    assert all(np.isfinite(result).all() for result in check(case)[:2])


def test_an_infinite_box_has_no_points_inside() -> None:
    case = make(coordinates=4, lq=9)
    case.references[:, ::2, :, 2:] = inf
    check(case)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
def test_empty_levels(interpolation: str, coordinates: int) -> None:
    levels = (Level(0, 3, 0), Level(4, 5, 0), Level(3, 0, 20), Level(0, 0, 20))
    results = check(make(levels, coordinates=coordinates, interpolation=interpolation))
    assert all(np.isfinite(result).all() for result in results)
    assert not results[3][:, :, :, [0, 2, 3]].any()


@pytest.mark.parametrize(
    "sizes",
    [{"n": 0}, {"lq": 0}, {"m": 0}, {"d": 0}, {"p": 0}, {"levels": ()}, {"p": (0, 0, 0)}],
    ids=str,
)
def test_empty_dimensions(sizes: dict[str, Any]) -> None:
    for coordinates in (2, 4):
        case = make(**sizes, coordinates=coordinates)
        results = run(case)
        assert not any(result.any() for result in results)
        for result, source in zip(results[1:], case.inputs, strict=True):
            assert result.shape == source.shape


@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
@pytest.mark.parametrize("valid", [None, 0.5])
def test_what_is_compiled_ahead_is_not_compiled_again(
    valid: float | None, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(d=23, interpolation=interpolation, valid=valid)
    value, *points = case.inputs
    sizes = [(level.height, level.width) for level in case.levels]
    problem, _ = contract.check_fused(value, sizes, None, *points, **case.rules._asdict())
    backend.compile_ahead(problem, with_backward=True)
    monkeypatch.delattr(kernels, "_compiled")
    check(case)
    read_only = Case(*case)
    for array in read_only.inputs:
        array.flags.writeable = False
    check(read_only)


@pytest.mark.parametrize("p", [4, (3, 0, 6)])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_reference_without_numba(
    coordinates: int, p: int | tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "backend", lambda: reference)
    case = make(p=p, coordinates=coordinates, valid=0.7, interpolation="nearest")
    assert_identical(run(case), by_reference(case))


def peak(call: Any) -> int:
    """The most bytes of arrays in use at once, results included."""
    tracemalloc.start()
    try:
        results = call()
        found = tracemalloc.get_traced_memory()[1]
        assert results
        return found
    finally:
        tracemalloc.stop()


def test_no_more_memory_than_the_results() -> None:
    case = make(lq=2000, m=8)
    given = case.levels, *case.inputs[1:]
    rules = {"num_points": (4, 4, 4), "offset_scale": 0.5}
    run(case)  # compiles

    def forward_and_backward() -> tuple[Array, ...]:
        output = kernels.fused_forward(case.value, *given, **rules)
        return output, *kernels.fused_backward(case.grad_output, case.value, *given, **rules)

    results = forward_and_backward()
    assert peak(forward_and_backward) < 1.05 * sum(result.nbytes for result in results)
