# SPDX-License-Identifier: Apache-2.0
"""An error budget instead of tolerances: a kernel may err twice as much as the reference in its dtype, plus rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

# Units in the last place of the largest exact magnitude that even a perfect kernel may lose by rounding its result.
ROUNDING = 2


def _in_double(array: Any) -> np.ndarray:
    """A NumPy float64 copy of a NumPy array or torch tensor."""
    return np.asarray(array.double().numpy() if hasattr(array, "double") else array, np.float64)


def _epsilon(array: Any) -> float:
    """The spacing of the array's dtype at one."""
    if hasattr(array, "double"):
        import torch

        return torch.finfo(array.dtype).eps
    return float(np.finfo(array.dtype).eps)


def assert_within_budget(actual: Any, reference_same_dtype: Any, exact: Any) -> None:
    """`actual` and the reference in its dtype against the float64 reference; non-finite elements must agree."""
    assert actual.shape == exact.shape
    assert actual.dtype == reference_same_dtype.dtype
    got, same, true = map(_in_double, (actual, reference_same_dtype, exact))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(true))
    finite = np.isfinite(true)
    if not finite.any():
        return
    error, allowed = (np.abs(x[finite] - true[finite]).max() for x in (got, same))
    band = ROUNDING * _epsilon(actual) * np.abs(true[finite]).max()
    assert error <= 2 * (allowed + band), f"error {error:.3g}, reference {allowed:.3g}, rounding {band:.3g}"
