# SPDX-License-Identifier: Apache-2.0
"""The error budget of a kernel: what its dtype costs the reference too, and some rounding."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

FACTOR = 2.0
ROUNDINGS = 2.0  # of the largest magnitude, for sums in another order


def assert_within_budget(actual: Any, reference_same_dtype: Any, exact: Any) -> None:
    """Assert err(actual) <= 2 * (err(reference_same_dtype) + rounding band), in the max-abs norm.

    Errors are against `exact`, the same computation in float64. The band is 2 units of rounding of
    the dtype of `actual` at the largest finite magnitude of `exact`, so that a result of zeros must
    be met exactly. NaN must be where `exact` has it, infinity where the reference has it. Arrays of
    NumPy, CuPy and torch, on any device.
    """
    assert actual.dtype == reference_same_dtype.dtype
    assert tuple(actual.shape) == tuple(reference_same_dtype.shape) == tuple(exact.shape)
    unit = _rounding_unit(actual.dtype)
    got, reference, truth = (_on_host(array) for array in (actual, reference_same_dtype, exact))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(truth), "NaN in other places")
    infinite = np.isinf(reference)
    np.testing.assert_array_equal(got[infinite], reference[infinite], "infinities differ")
    finite = np.isfinite(reference) & np.isfinite(truth)
    assert np.isfinite(got[finite]).all(), "infinite where the reference is finite"
    got, reference, truth = got[finite], reference[finite], truth[finite]
    scale = _largest(truth)
    budget = FACTOR * (_largest(reference - truth) + ROUNDINGS * unit * scale)
    error = _largest(got - truth)
    assert error <= budget, f"error {error:.3g} over budget {budget:.3g} at scale {scale:.3g}"


def _largest(array: np.ndarray[Any, Any]) -> float:
    """The largest magnitude, 0 for an empty array."""
    return float(np.max(np.abs(array), initial=0))


def _on_host(array: Any) -> np.ndarray[Any, Any]:
    """Any library's array as float64 in NumPy."""
    if hasattr(array, "detach"):  # torch, whose bfloat16 NumPy cannot read
        array = array.detach().double().cpu().numpy()
    elif hasattr(array, "get"):  # CuPy
        array = array.get()
    return np.asarray(array, np.float64)


def _rounding_unit(dtype: Any) -> float:
    """Spacing of the numbers of a NumPy or torch dtype at 1."""
    library = sys.modules["torch"] if type(dtype).__module__ == "torch" else np
    return float(library.finfo(dtype).eps)
