# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `grad_output`."""

from __future__ import annotations

from tests.contract.inputs import LQ, SHAPE, Bad, D, M, N, no_array, of_another_library

ANY = [
    of_another_library("a gradient of another library", "grad_output"),
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
        lambda lib: {"grad_output": lib.array(SHAPE["grad_output"], "float64")},
        TypeError,
        "grad_output must have the dtype of value, float32, got float64",
    ),
    Bad(
        "a float gradient of a half output",
        lambda lib: {"value": lib.array(SHAPE["value"], "float16")},
        TypeError,
        "grad_output must have the dtype of value, float16, got float32",
    ),
    no_array("no gradient", "grad_output", None),
    no_array("a number for the gradient", "grad_output", 1.0),
]
