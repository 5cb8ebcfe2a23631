# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `grad_output`."""

from __future__ import annotations

from tests.contract.inputs import LQ, NO_ARRAY, OTHER_LIBRARY, Bad, D, M, N, S, other

ANY = [
    Bad(
        "a gradient of another library",
        lambda lib: {"grad_output": other(lib).array((N, LQ, M * D))},
        TypeError,
        f"grad_output {OTHER_LIBRARY}",
    ),
    Bad(
        "a gradient with heads and channels apart",
        lambda lib: {"grad_output": lib.array((N, LQ, M, D))},
        ValueError,
        "grad_output must have shape (N, Lq, M*D) = (4, 5, 14), got (4, 5, 2, 7)",
    ),
    Bad(
        "a gradient of one head",
        lambda lib: {"grad_output": lib.array((N, LQ, D))},
        ValueError,
        "grad_output must have shape (N, Lq, M*D) = (4, 5, 14), got (4, 5, 7)",
    ),
    Bad(
        "a gradient of other queries",
        lambda lib: {"grad_output": lib.array((N, 1, M * D))},
        ValueError,
        "grad_output must have shape (N, Lq, M*D) = (4, 5, 14), got (4, 1, 14)",
    ),
    Bad(
        "a double gradient of a float output",
        lambda lib: {"grad_output": lib.array((N, LQ, M * D), "float64")},
        TypeError,
        "grad_output must have the dtype of value, float32, got float64",
    ),
    Bad(
        "a float gradient of a half output",
        lambda lib: {"value": lib.array((N, S, M, D), "float16")},
        TypeError,
        "grad_output must have the dtype of value, float16, got float32",
    ),
    Bad(
        "no gradient",
        lambda lib: {"grad_output": None},
        TypeError,
        f"grad_output {NO_ARRAY} NoneType",
    ),
    Bad(
        "a number for the gradient",
        lambda lib: {"grad_output": 1.0},
        TypeError,
        f"grad_output {NO_ARRAY} float",
    ),
]
