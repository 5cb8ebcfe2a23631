# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `sampling_locations` and `attention_weights`."""

from __future__ import annotations

import numpy as np
import torch

from tests.contract.inputs import (
    LOCATION_SHAPE,
    LOCATIONS,
    LQ,
    SHAPE,
    Bad,
    L,
    M,
    N,
    P,
    no_array,
    of_another_library,
)

VALUE_SHAPE = "since value has shape (4, 28, 2, 7)"
WEIGHTS = "attention_weights must have shape (N, Lq, M, L, P) = (4, 5, 2, 3, 6)"


def of_dtype(name: str, argument: str, dtype: str, value: str = "float32") -> Bad:
    """A dtype that neither is float32 nor that of value."""
    allowed = "float32" if value == "float32" else f"float32 or that of value, {value}"
    return Bad(
        name,
        lambda lib: {
            "value": lib.array(SHAPE["value"], value),
            argument: lib.array(SHAPE[argument], dtype),
        },
        TypeError,
        f"{argument} must have dtype {allowed}, got {dtype}",
    )


ANY = [
    of_another_library("locations of another library", "sampling_locations"),
    of_another_library("weights of another library", "attention_weights"),
    Bad(
        "locations of one level without its axis",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, P, 2))},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (4, 5, 2, 6, 2)",
    ),
    Bad(
        "levels and points in one axis",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L * P, 2))},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (4, 5, 2, 18, 2)",
    ),
    Bad(
        "locations of another batch size",
        lambda lib: {"sampling_locations": lib.array((1, LQ, M, L, P, 2))},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (1, 5, 2, 3, 6, 2)",
    ),
    Bad(
        "locations of other heads",
        lambda lib: {"sampling_locations": lib.array((N, LQ, 8, L, P, 2))},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (4, 5, 8, 3, 6, 2)",
    ),
    Bad(
        "locations with the heads before the queries",
        lambda lib: {"sampling_locations": lib.array((N, M, LQ, L, P, 2))},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (4, 2, 5, 3, 6, 2)",
    ),
    Bad(
        "boxes for locations",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L, P, 4))},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (4, 5, 2, 3, 6, 4)",
    ),
    Bad(
        "locations without (x, y)",
        lambda lib: {"sampling_locations": lib.array(SHAPE["attention_weights"])},
        ValueError,
        f"{LOCATIONS} = (4, any, 2, any, any, 2) {VALUE_SHAPE}, got (4, 5, 2, 3, 6)",
    ),
    Bad(
        "locations of another number of levels",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, 4, P, 2))},
        ValueError,
        "attention_weights must have shape (N, Lq, M, L, P) = (4, 5, 2, 4, 6) since "
        "sampling_locations has shape (4, 5, 2, 4, 6, 2), got (4, 5, 2, 3, 6)",
    ),
    of_dtype("locations in whole pixels", "sampling_locations", "int64"),
    of_dtype("double locations with float values", "sampling_locations", "float64"),
    of_dtype("half locations with float values", "sampling_locations", "float16"),
    of_dtype("double locations with half values", "sampling_locations", "float64", "float16"),
    no_array("locations are a nested list", "sampling_locations", [[0.5, 0.5]]),
    Bad(
        "queries beyond 32 bits",
        lambda lib: {"sampling_locations": lib.wide(N, 2**31, M, L, P, 2)},
        ValueError,
        "sampling_locations must have sizes below 2**31, got shape (4, 2147483648, 2, 3, 6, 2)",
    ),
    Bad(
        "levels and points in one axis of the weights",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L * P))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (4, 5, 2, 18)",
    ),
    Bad(
        "weights with a last axis of one",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L, P, 1))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (4, 5, 2, 3, 6, 1)",
    ),
    Bad(
        "weights of another batch size",
        lambda lib: {"attention_weights": lib.array((1, LQ, M, L, P))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (1, 5, 2, 3, 6)",
    ),
    Bad(
        "weights of other queries",
        lambda lib: {"attention_weights": lib.array((N, 300, M, L, P))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (4, 300, 2, 3, 6)",
    ),
    Bad(
        "weights of other heads",
        lambda lib: {"attention_weights": lib.array((N, LQ, 8, L, P))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (4, 5, 8, 3, 6)",
    ),
    Bad(
        "weights with points before levels",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, P, L))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (4, 5, 2, 6, 3)",
    ),
    Bad(
        "weights of other points",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L, 4))},
        ValueError,
        f"{WEIGHTS} {LOCATION_SHAPE}, got (4, 5, 2, 3, 4)",
    ),
    of_dtype("a padding mask for weights", "attention_weights", "bool"),
    of_dtype("half weights with double values", "attention_weights", "float16", "float64"),
    no_array("weights are a number", "attention_weights", 1.0),
]
NUMPY = [
    no_array("a NumPy scalar", "attention_weights", np.float32(1)),
]
TORCH = [
    of_dtype("half locations with bfloat16 values", "sampling_locations", "float16", "bfloat16"),
    Bad(
        "sparse weights",
        lambda lib: {"attention_weights": lib.array(SHAPE["attention_weights"]).to_sparse()},
        TypeError,
        "attention_weights must be a dense tensor, got torch.sparse_coo",
    ),
    no_array("a dtype for a tensor", "attention_weights", torch.float32),
]
