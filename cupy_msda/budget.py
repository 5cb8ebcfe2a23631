# SPDX-License-Identifier: Apache-2.0
"""The error budget, the one tolerance of the self-check, the demo, the benchmark and the tests.

    error(result) <= 2 * (error(reference in the same dtype) + rounding band)

Both errors are against the reference in float64, and the budget holds in two norms of the whole array:
the largest magnitude finds one wrong element, the root mean square finds a loss of accuracy in all elements.
In 16 bits the band of the largest magnitude is so wide that small elements could hold anything. There the
largest magnitude of every row along the last axis has a budget of its own as well.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
FACTOR = 2.0
# The rounding band, in units of rounding at the norm of the exact result: the cost of a sum in
# another order. A result of zeros has no band, so it must be met exactly.
ROUNDINGS = 2.0
# 16-bit results are sums in float32, rounded once: within a row they are off by little more than the row's own
# rounding, plus this part of the largest magnitude of the whole array. It is 32 roundings of float32: those of the
# terms that cancel in a row, and of pixel coordinates.
OF_TERMS = 32 * 2.0**-23


def _largest(array: _Array) -> float:
    """The largest magnitude, 0 for an empty array."""
    return float(np.max(np.abs(array), initial=0))


def _root_mean_square(array: _Array) -> float:
    """The root of the mean square, 0 for an empty array; scaled, so that no square overflows."""
    scale = _largest(array)
    if scale in (0, math.inf):
        return scale
    return scale * float(np.linalg.norm(array / scale)) / math.sqrt(array.size)


def used(result: Any, reference: Any, exact: Any) -> float:
    """The part of its budget that the error of a result takes; a correct result takes at most 1.

    `reference` is the result of the reference in the same dtype, `exact` its result in float64:
    arrays of NumPy, CuPy or torch, on any device. Infinite unless the result has NaN exactly where
    `exact` has it, and infinity where `reference` has it.
    """
    unit = _rounding_unit(reference.dtype)
    got, same, truth = (_on_host(array) for array in (result, reference, exact))
    if not got.shape == same.shape == truth.shape or (np.isnan(got) != np.isnan(truth)).any():
        return math.inf
    infinite = np.isinf(same)
    finite = np.isfinite(same) & np.isfinite(truth)
    if (got[infinite] != same[infinite]).any() or not np.isfinite(got[finite]).all():
        return math.inf
    got, same, truth = (np.where(finite, array, 0) for array in (got, same, truth))
    parts = [
        _quotient(norm(got - truth), FACTOR * (norm(same - truth) + ROUNDINGS * unit * norm(truth)))
        for norm in (_largest, _root_mean_square)
    ]
    if unit > np.finfo(np.float32).eps:
        parts.append(_of_rows(got - truth, same - truth, truth, unit))
    return max(parts)


def _of_rows(error: _Array, own: _Array, truth: _Array, unit: float) -> float:
    """The largest part that a row's error takes of its budget; `own`: the error of the reference."""
    error, own, size = (
        np.max(np.abs(np.atleast_1d(array)), axis=-1, initial=0) for array in (error, own, truth)
    )
    band = ROUNDINGS * unit * size + OF_TERMS * _largest(truth)
    return max(map(_quotient, error.ravel(), FACTOR * (own + band).ravel()), default=0)


def relative_error(result: Any, exact: Any) -> float:
    """The root mean square of an error by that of the exact result; infinite if it is not finite."""
    truth = _on_host(exact)
    error = _quotient(_root_mean_square(_on_host(result) - truth), _root_mean_square(truth))
    return error if math.isfinite(error) else math.inf


def assert_within_budget(result: Any, reference: Any, exact: Any) -> None:
    """Assert that the error of a result of the dtype of `reference` is within its budget."""
    assert result.dtype == reference.dtype
    assert tuple(result.shape) == tuple(reference.shape) == tuple(exact.shape)
    part = used(result, reference, exact)
    assert part <= 1, (
        f"the error is {part:.3g} times its budget "
        "(inf: NaN or infinity in other places than in the reference)"
    )


def _quotient(error: float, budget: float) -> float:
    """Error / budget, where no error needs no budget."""
    if error == 0:
        return 0.0
    return error / budget if budget else math.inf


def _on_host(array: Any) -> _Array:
    """An array of any library as float64 in NumPy."""
    if hasattr(array, "detach"):  # torch, whose bfloat16 NumPy cannot read
        array = array.detach().double().cpu().numpy()
    elif hasattr(array, "get"):  # CuPy
        array = array.get()
    return np.asarray(array, np.float64)


def _rounding_unit(dtype: Any) -> float:
    """The spacing of the numbers of a NumPy or torch dtype at 1."""
    library = sys.modules["torch"] if type(dtype).__module__ == "torch" else np
    return float(library.finfo(dtype).eps)
