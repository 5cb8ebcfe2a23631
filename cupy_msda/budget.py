# SPDX-License-Identifier: Apache-2.0
"""The error budget, the one tolerance of the self-check, the demo, the benchmark and the tests.

    error(result) <= 2 * (error(reference in the same dtype) + rounding band)

Both errors are against the reference in float64, and the budget holds in two norms: the largest
magnitude finds one wrong element, the root mean square finds a loss of accuracy in all elements.

In 16 bits the band of the whole array's largest magnitude is so wide that its small elements could hold
anything, so the tests hold every row along the last axis to a budget of its own as well.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

_Array = np.ndarray[Any, Any]
FACTOR = 2.0
# The rounding band, in units of rounding at the norm of the exact result: the cost of a sum in
# another order. A result of zeros has no band, so it must be met exactly.
ROUNDINGS = 2.0
# A 16-bit result is a sum in float32, rounded once. Where terms cancel, a row is small and the rounding of its terms
# and of pixel coordinates remains: so many units of float32 at the largest magnitude of all rows.
OF_TERMS = 32.0
FLOAT32_UNIT = 2.0**-23


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
    errors = _errors(result, reference, exact)
    if errors is None:
        return math.inf
    error, own, truth = errors
    return max(
        _quotient(norm(error), FACTOR * (norm(own) + ROUNDINGS * unit * norm(truth)))
        for norm in (_largest, _root_mean_square)
    )


def used_by_rows(result: Any, reference: Any, exact: Any) -> float:
    """The largest part that a row along the last axis takes of its own budget, in 16 bits; else 0.

    Arguments as for `used`. The largest magnitude of a row is held to the rounding of its own elements.
    """
    unit = _rounding_unit(reference.dtype)
    errors = _errors(result, reference, exact)
    if errors is None:
        return math.inf
    if unit <= FLOAT32_UNIT or not errors.truth.size:
        return 0.0
    error, own, size = (np.abs(np.atleast_1d(array)).max(-1).ravel() for array in errors)
    band = ROUNDINGS * unit * size + OF_TERMS * FLOAT32_UNIT * size.max()
    return max(map(_quotient, error, FACTOR * (own + band)))


def relative_error(result: Any, exact: Any) -> float:
    """The root mean square of an error by that of the exact result; infinite if it is not finite."""
    truth = _on_host(exact)
    error = _quotient(_root_mean_square(_on_host(result) - truth), _root_mean_square(truth))
    return error if math.isfinite(error) else math.inf


def assert_within_budget(result: Any, reference: Any, exact: Any) -> None:
    """Assert that the error of a result of the dtype of `reference` is within its budget."""
    assert result.dtype == reference.dtype
    assert tuple(result.shape) == tuple(reference.shape) == tuple(exact.shape)
    part = max(used(result, reference, exact), used_by_rows(result, reference, exact))
    assert part <= 1, (
        f"the error is {part:.3g} times its budget "
        "(inf: NaN or infinity in other places than in the reference)"
    )


class _Errors(NamedTuple):
    """In float64, with zeros in place of what is not finite."""

    of_result: _Array
    of_reference: _Array
    truth: _Array


def _errors(result: Any, reference: Any, exact: Any) -> _Errors | None:
    """The errors of result and reference, or None if shapes differ or NaN and infinity lie elsewhere."""
    got, same, truth = (_on_host(array) for array in (result, reference, exact))
    if not got.shape == same.shape == truth.shape or (np.isnan(got) != np.isnan(truth)).any():
        return None
    infinite = np.isinf(same)
    finite = np.isfinite(same) & np.isfinite(truth)
    if (got[infinite] != same[infinite]).any() or not np.isfinite(got[finite]).all():
        return None
    got, same, truth = (np.where(finite, array, 0) for array in (got, same, truth))
    return _Errors(got - truth, same - truth, truth)


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
