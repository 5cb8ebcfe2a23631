# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `sampling_locations` and `attention_weights`."""

from __future__ import annotations

import numpy as np
import torch

from tests.contract.inputs import (
    LOCATION_SHAPE,
    LOCATIONS,
    LQ,
    NO_ARRAY,
    OTHER_LIBRARY,
    Bad,
    D,
    L,
    M,
    N,
    P,
    S,
    other,
)

VALUE_SHAPE = "since value has shape (4, 28, 2, 7)"
WEIGHTS = "attention_weights must have shape (N, Lq, M, L, P) = (4, 5, 2, 3, 6)"

ANY = [
    Bad(
        "locations of another library",
        lambda lib: {"sampling_locations": other(lib).array((N, LQ, M, L, P, 2))},
        TypeError,
        f"sampling_locations {OTHER_LIBRARY}",
    ),
    Bad(
        "weights of another library",
        lambda lib: {"attention_weights": other(lib).array((N, LQ, M, L, P))},
        TypeError,
        f"attention_weights {OTHER_LIBRARY}",
    ),
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
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L, P))},
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
    Bad(
        "locations in whole pixels",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L, P, 2), "int64")},
        TypeError,
        "sampling_locations must have dtype float32, got int64",
    ),
    Bad(
        "double locations with float values",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L, P, 2), "float64")},
        TypeError,
        "sampling_locations must have dtype float32, got float64",
    ),
    Bad(
        "half locations with float values",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L, P, 2), "float16")},
        TypeError,
        "sampling_locations must have dtype float32, got float16",
    ),
    Bad(
        "double locations with half values",
        lambda lib: {
            "value": lib.array((N, S, M, D), "float16"),
            "sampling_locations": lib.array((N, LQ, M, L, P, 2), "float64"),
        },
        TypeError,
        "sampling_locations must have dtype float32 or that of value, float16, got float64",
    ),
    Bad(
        "locations are a nested list",
        lambda lib: {"sampling_locations": [[0.5, 0.5]]},
        TypeError,
        f"sampling_locations {NO_ARRAY} list",
    ),
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
    Bad(
        "a padding mask for weights",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L, P), "bool")},
        TypeError,
        "attention_weights must have dtype float32, got bool",
    ),
    Bad(
        "half weights with double values",
        lambda lib: {
            "value": lib.array((N, S, M, D), "float64"),
            "attention_weights": lib.array((N, LQ, M, L, P), "float16"),
        },
        TypeError,
        "attention_weights must have dtype float32 or that of value, float64, got float16",
    ),
    Bad(
        "weights are a number",
        lambda lib: {"attention_weights": 1.0},
        TypeError,
        f"attention_weights {NO_ARRAY} float",
    ),
]
NUMPY = [
    Bad(
        "a NumPy scalar",
        lambda lib: {"attention_weights": np.float32(1)},
        TypeError,
        f"attention_weights {NO_ARRAY} float32",
    ),
]
TORCH = [
    Bad(
        "half locations with bfloat16 values",
        lambda lib: {
            "value": lib.array((N, S, M, D), "bfloat16"),
            "sampling_locations": lib.array((N, LQ, M, L, P, 2), "float16"),
        },
        TypeError,
        "sampling_locations must have dtype float32 or that of value, bfloat16, got float16",
    ),
    Bad(
        "sparse weights",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L, P)).to_sparse()},
        TypeError,
        "attention_weights must be a dense tensor, got torch.sparse_coo",
    ),
    Bad(
        "a dtype for a tensor",
        lambda lib: {"attention_weights": torch.float32},
        TypeError,
        f"attention_weights {NO_ARRAY} dtype",
    ),
]
