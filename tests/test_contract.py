# SPDX-License-Identifier: Apache-2.0
"""The input contract: every bad input gets its own error, and what is allowed is accepted."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest

import cupy_msda
from cupy_msda import arrays, contract
from cupy_msda.problem import Level

torch = pytest.importorskip("torch", reason="torch is not installed")

N, S, M, D, LQ, L, P = 4, 28, 2, 7, 5, 3, 6
SIZES = [(4, 5), (2, 3), (1, 2)]
STARTS = [0, 20, 26]
ORDER = (
    "value",
    "spatial_shapes",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "query_order",
    "grad_output",
)


class NumPy:
    """The inputs as NumPy arrays."""

    def array(self, shape, dtype="float32"):
        return np.ones(shape, dtype)

    def integers(self, rows, dtype="int64"):
        return np.array(rows, dtype)

    def wide(self, *shape):
        """A shape of any size that takes no memory."""
        return np.broadcast_to(np.float32(0), shape)


class Torch:
    """The inputs as torch tensors."""

    def array(self, shape, dtype="float32"):
        return torch.ones(shape, dtype=getattr(torch, dtype))

    def integers(self, rows, dtype="int64"):
        return torch.tensor(rows, dtype=getattr(torch, dtype))

    def wide(self, *shape):
        return torch.zeros(()).expand(shape)


def good_inputs(lib):
    """Inputs that the contract accepts, by name."""
    return {
        "value": lib.array((N, S, M, D)),
        "spatial_shapes": SIZES,
        "level_start_index": STARTS,
        "sampling_locations": lib.array((N, LQ, M, L, P, 2)),
        "attention_weights": lib.array((N, LQ, M, L, P)),
        "grad_output": lib.array((N, LQ, M * D)),
    }


class Bad(NamedTuple):
    """One mistake: what is given for which arguments, and the error that says so."""

    name: str
    change: Any  # from the library to the arguments that are wrong
    error: type[Exception]
    message: str  # {curly} names are filled in; the rest is literal, "..." is anything


VALUE_SHAPE = "since value has shape (4, 28, 2, 7)"
LOCATION_SHAPE = "since sampling_locations has shape (4, 5, 2, 3, 6, 2)"
LOCATIONS = "sampling_locations must have shape (N, Lq, M, L, P, 2)"
WEIGHTS = "attention_weights must have shape (N, Lq, M, L, P) = (4, 5, 2, 3, 6)"
SHAPES = "spatial_shapes must have shape (L, 2) = (3, 2)"
STARTS_SHAPE = "level_start_index must have shape (L,) = (3,)"
NO_PAIRS = (
    "spatial_shapes must be a sequence of (H, W) pairs or an integer array of shape (L, 2), got "
)
NO_INTEGERS = (
    "level_start_index must be a sequence of integers or an integer array of shape (L,), got "
)
NO_ARRAY = (
    "must be a torch, CuPy or NumPy array or one with shape, dtype, __dlpack__, "
    "__dlpack_device__, __array_namespace__, got"
)
NO_ORDER = 'query_order must be "auto", None or a sequence of (H, W) pairs of integers, got '
NO_GRIDS = "query_order must have grids that hold the Lq = 5 queries of sampling_locations, got "
OUTSIDE = (
    "spatial_shapes and level_start_index must keep every level inside the S = 28 positions of "
    "value, got (H, W) = "
)


# Mistakes that every library lets a caller make.
COMMON = [
    # value
    Bad(
        "heads not split from channels",
        lambda lib: {"value": lib.array((N, S, M * D))},
        ValueError,
        "value must have shape (N, S, M, D), got (4, 28, 14)",
    ),
    Bad(
        "value has a fifth axis",
        lambda lib: {"value": lib.array((1, N, S, M, D))},
        ValueError,
        "value must have shape (N, S, M, D), got (1, 4, 28, 2, 7)",
    ),
    Bad(
        "value is transposed to (N, M, D, S)",
        lambda lib: {"value": lib.array((N, M, D, S))},
        ValueError,
        f"{LOCATIONS} = (4, any, 7, any, any, 2) since value has shape (4, 2, 7, 28), got "
        "(4, 5, 2, 3, 6, 2)",
    ),
    Bad(
        "value is a feature map, not flattened",
        lambda lib: {"value": lib.array((N, M * D, 4, 5))},
        ValueError,
        f"{LOCATIONS} = (4, any, 4, any, any, 2) since value has shape (4, 14, 4, 5), got ...",
    ),
    Bad(
        "the batch is the second axis of value",
        lambda lib: {"value": lib.array((S, N, M, D))},
        ValueError,
        f"{LOCATIONS} = (28, any, 2, any, any, 2) since value has shape (28, 4, 2, 7), got ...",
    ),
    Bad(
        "value has integers",
        lambda lib: {"value": lib.array((N, S, M, D), "int32")},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got int32",
    ),
    Bad(
        "value is complex",
        lambda lib: {"value": lib.array((N, S, M, D), "complex64")},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got complex64",
    ),
    Bad(
        "value is a list of feature maps",
        lambda lib: {"value": [lib.array((N, 14, 4, 5)), lib.array((N, 14, 2, 3))]},
        TypeError,
        f"value {NO_ARRAY} list",
    ),
    Bad("value is missing", lambda lib: {"value": None}, TypeError, f"value {NO_ARRAY} NoneType"),
    Bad(
        "value is beyond 32 bits",
        lambda lib: {"value": lib.wide(N, 2**31, M, D)},
        ValueError,
        "value must have sizes below 2**31, got shape (4, 2147483648, 2, 7)",
    ),
    # sampling_locations
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
    # attention_weights
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
    # spatial_shapes
    Bad(
        "no spatial_shapes",
        lambda lib: {"spatial_shapes": None},
        TypeError,
        f"{NO_PAIRS}None",
    ),
    Bad("a number", lambda lib: {"spatial_shapes": 64}, TypeError, f"{NO_PAIRS}64"),
    Bad("a string", lambda lib: {"spatial_shapes": "4x5"}, TypeError, f"{NO_PAIRS}'4x5'"),
    Bad(
        "one pair and not a list of one",
        lambda lib: {"spatial_shapes": (4, 5)},
        TypeError,
        f"{NO_PAIRS}(4, 5)",
    ),
    Bad(
        "areas of the levels",
        lambda lib: {"spatial_shapes": [20, 6, 2]},
        TypeError,
        f"{NO_PAIRS}[20, 6, 2]",
    ),
    Bad(
        "fractional sizes in a list",
        lambda lib: {"spatial_shapes": [(4.0, 5.0), (2.0, 2.5), (1.0, 1.25)]},
        TypeError,
        f"{NO_PAIRS}[(4.0, 5.0), (2.0, 2.5), (1.0, 1.25)]",
    ),
    Bad(
        "ragged rows",
        lambda lib: {"spatial_shapes": [(4, 5), (2,), (1, 2)]},
        ValueError,
        "spatial_shapes must hold (H, W) pairs, got (2,)",
    ),
    Bad(
        "(H, W, start) rows",
        lambda lib: {"spatial_shapes": [(4, 5, 0), (2, 3, 20), (1, 2, 26)]},
        ValueError,
        "spatial_shapes must hold (H, W) pairs, got (4, 5, 0)",
    ),
    Bad(
        "a level too few",
        lambda lib: {"spatial_shapes": SIZES[:2]},
        ValueError,
        "spatial_shapes must have one entry for each of the L = 3 levels of sampling_locations, "
        "got 2",
    ),
    Bad(
        "a level too many",
        lambda lib: {"spatial_shapes": [*SIZES, (1, 1)]},
        ValueError,
        "spatial_shapes must have one entry for each of the L = 3 levels of sampling_locations, "
        "got 4",
    ),
    Bad(
        "an array of a level too few",
        lambda lib: {"spatial_shapes": lib.integers(SIZES[:2])},
        ValueError,
        f"{SHAPES} {LOCATION_SHAPE}, got (2, 2)",
    ),
    Bad(
        "a transposed array",
        lambda lib: {"spatial_shapes": lib.integers([[4, 2, 1], [5, 3, 2]])},
        ValueError,
        f"{SHAPES} {LOCATION_SHAPE}, got (2, 3)",
    ),
    Bad(
        "a flat array",
        lambda lib: {"spatial_shapes": lib.integers([4, 5, 2, 3, 1, 2])},
        ValueError,
        f"{SHAPES} {LOCATION_SHAPE}, got (6,)",
    ),
    Bad(
        "an array of floats",
        lambda lib: {"spatial_shapes": lib.integers(SIZES, "float32")},
        TypeError,
        "spatial_shapes must have an integer dtype in native byte order, got float32",
    ),
    Bad(
        "an array of bools",
        lambda lib: {"spatial_shapes": lib.integers(SIZES, "bool")},
        TypeError,
        "spatial_shapes must have an integer dtype in native byte order, got bool",
    ),
    Bad(
        "a negative size",
        lambda lib: {"spatial_shapes": [(4, 5), (-2, -3), (1, 2)]},
        ValueError,
        "spatial_shapes must have H and W from 0 to 2**31 - 1, got (H, W) = (-2, -3) for level 1",
    ),
    Bad(
        "a negative size in an array",
        lambda lib: {"spatial_shapes": lib.integers([(4, 5), (2, 3), (-1, 2)])},
        ValueError,
        "spatial_shapes must have H and W from 0 to 2**31 - 1, got (H, W) = (-1, 2) for level 2",
    ),
    Bad(
        "an empty level whose width is beyond 32 bits",
        lambda lib: {"spatial_shapes": [(4, 5), (0, 2**31), (1, 2)]},
        ValueError,
        "spatial_shapes must have H and W from 0 to 2**31 - 1, "
        "got (H, W) = (0, 2147483648) for level 1",
    ),
    Bad(
        "a size beyond 64 bits",
        lambda lib: {"spatial_shapes": [(4, 5), (2**70, 1), (1, 2)]},
        ValueError,
        "spatial_shapes must have H and W from 0 to 2**31 - 1, "
        f"got (H, W) = ({2**70}, 1) for level 1",
    ),
    Bad(
        "levels larger than value",
        lambda lib: {"spatial_shapes": [(8, 10), (4, 5), (2, 3)], "level_start_index": None},
        ValueError,
        f"{OUTSIDE}(8, 10) starting at 0 for level 0",
    ),
    Bad(
        "a last level that is one position too large",
        lambda lib: {"spatial_shapes": [(4, 5), (2, 3), (1, 3)], "level_start_index": None},
        ValueError,
        f"{OUTSIDE}(1, 3) starting at 26 for level 2",
    ),
    Bad(
        "an array of levels larger than value",
        lambda lib: {"spatial_shapes": lib.integers([(8, 10), (4, 5), (2, 3)])},
        ValueError,
        f"{OUTSIDE}(8, 10) starting at 0 for level 0",
    ),
    # level_start_index
    Bad(
        "starts and sizes in each other's place",
        lambda lib: {"spatial_shapes": STARTS, "level_start_index": SIZES},
        TypeError,
        f"{NO_PAIRS}[0, 20, 26]",
    ),
    Bad(
        "arrays of starts and sizes in each other's place",
        lambda lib: {
            "spatial_shapes": lib.integers(STARTS),
            "level_start_index": lib.integers(SIZES),
        },
        ValueError,
        f"{SHAPES} {LOCATION_SHAPE}, got (3,)",
    ),
    Bad(
        "starts with the end appended",
        lambda lib: {"level_start_index": [0, 20, 26, 28]},
        ValueError,
        "level_start_index must have one entry for each of the L = 3 levels of "
        "sampling_locations, got 4",
    ),
    Bad(
        "an array of starts with the end appended",
        lambda lib: {"level_start_index": lib.integers([0, 20, 26, 28])},
        ValueError,
        f"{STARTS_SHAPE} {LOCATION_SHAPE}, got (4,)",
    ),
    Bad(
        "ends instead of starts",
        lambda lib: {"level_start_index": [20, 26, 28]},
        ValueError,
        f"{OUTSIDE}(4, 5) starting at 20 for level 0",
    ),
    Bad(
        "a start behind value",
        lambda lib: {"level_start_index": [0, 20, 29]},
        ValueError,
        "level_start_index must be from 0 to S = 28, got 29 for level 2",
    ),
    Bad(
        "a negative start",
        lambda lib: {"level_start_index": lib.integers([0, -1, 26])},
        ValueError,
        "level_start_index must be from 0 to S = 28, got -1 for level 1",
    ),
    Bad(
        "a start beyond 64 bits",
        lambda lib: {"level_start_index": [0, 2**70, 26]},
        ValueError,
        f"level_start_index must be from 0 to S = 28, got {2**70} for level 1",
    ),
    Bad(
        "a column of starts",
        lambda lib: {"level_start_index": lib.integers([[0], [20], [26]])},
        ValueError,
        f"{STARTS_SHAPE} {LOCATION_SHAPE}, got (3, 1)",
    ),
    Bad(
        "starts in lists of one",
        lambda lib: {"level_start_index": [[0], [20], [26]]},
        TypeError,
        f"{NO_INTEGERS}[[0], [20], [26]]",
    ),
    Bad(
        "one start",
        lambda lib: {"level_start_index": 0},
        TypeError,
        f"{NO_INTEGERS}0",
    ),
    Bad(
        "fractional starts",
        lambda lib: {"level_start_index": [0.0, 20.0, 26.0]},
        TypeError,
        f"{NO_INTEGERS}[0.0, 20.0, 26.0]",
    ),
    Bad(
        "an array of fractional starts",
        lambda lib: {"level_start_index": lib.integers(STARTS, "float64")},
        TypeError,
        "level_start_index must have an integer dtype in native byte order, got float64",
    ),
    # query_order
    Bad(
        "an order of another name",
        lambda lib: {"query_order": "tiles"},
        TypeError,
        f"{NO_ORDER}'tiles'",
    ),
    Bad("a number of queries", lambda lib: {"query_order": 5}, TypeError, f"{NO_ORDER}5"),
    Bad("False for None", lambda lib: {"query_order": False}, TypeError, f"{NO_ORDER}False"),
    Bad(
        "one grid and not a list of one",
        lambda lib: {"query_order": (1, 5)},
        TypeError,
        f"{NO_ORDER}(1, 5)",
    ),
    Bad(
        "a permutation of the queries",
        lambda lib: {"query_order": [4, 3, 2, 1, 0]},
        TypeError,
        f"{NO_ORDER}[4, 3, 2, 1, 0]",
    ),
    Bad(
        "a grid of floats",
        lambda lib: {"query_order": [(1.0, 5.0)]},
        TypeError,
        f"{NO_ORDER}[(1.0, 5.0)]",
    ),
    Bad(
        "a grid of bools",
        lambda lib: {"query_order": [(True, 5)]},
        TypeError,
        f"{NO_ORDER}[(True, 5)]",
    ),
    Bad(
        "an array of grids of floats",
        lambda lib: {"query_order": np.array([(1.0, 5.0)])},
        TypeError,
        f"{NO_ORDER}array([[1., 5.]])",
    ),
    Bad(
        "an array of grids of bools",
        lambda lib: {"query_order": np.ones((5, 2), bool)},
        TypeError,
        f"{NO_ORDER}array(...",
    ),
    Bad(
        "a tensor of grids, which may be on a device",
        lambda lib: {"query_order": torch.tensor([(1, 5)])},
        TypeError,
        f"{NO_ORDER}tensor([[1, 5]])",
    ),
    Bad(
        "grids with starts",
        lambda lib: {"query_order": [(1, 5, 0)]},
        ValueError,
        "query_order must hold (H, W) pairs, got (1, 5, 0)",
    ),
    Bad(
        "no grids",
        lambda lib: {"query_order": []},
        ValueError,
        "query_order must hold 1 to 16 grids, got 0",
    ),
    Bad(
        "a grid too many",
        lambda lib: {"query_order": [(1, 5), *[(0, 0)] * 16]},
        ValueError,
        "query_order must hold 1 to 16 grids, got 17",
    ),
    Bad(
        "a negative grid",
        lambda lib: {"query_order": [(2, 5), (-1, 5)]},
        ValueError,
        "query_order must have H and W from 0 to 2**31 - 1, got (H, W) = (-1, 5) for grid 1",
    ),
    Bad(
        "an empty grid whose width is beyond 32 bits",
        lambda lib: {"query_order": [(1, 5), (0, 2**31)]},
        ValueError,
        "query_order must have H and W from 0 to 2**31 - 1, got (H, W) = (0, 2147483648) for grid 1",
    ),
    Bad(
        "a grid beyond 64 bits",
        lambda lib: {"query_order": [(2**70, 1)]},
        ValueError,
        f"query_order must have H and W from 0 to 2**31 - 1, got (H, W) = ({2**70}, 1) for grid 0",
    ),
    Bad(
        "a grid of other queries",
        lambda lib: {"query_order": [(200, 200)]},
        ValueError,
        f"{NO_GRIDS}40000 in [(200, 200)]",
    ),
    Bad(
        "the levels as grids of other queries",
        lambda lib: {"query_order": SIZES},
        ValueError,
        f"{NO_GRIDS}28 in [(4, 5), (2, 3), (1, 2)]",
    ),
    # grad_output
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

# Mistakes that only NumPy allows.
ONLY_NUMPY = [
    Bad(
        "torch locations beside NumPy values",
        lambda lib: {"sampling_locations": Torch().array((N, LQ, M, L, P, 2))},
        TypeError,
        "sampling_locations must be an array of the library of value, numpy, got one of torch",
    ),
    Bad(
        "torch weights beside NumPy values",
        lambda lib: {"attention_weights": Torch().array((N, LQ, M, L, P))},
        TypeError,
        "attention_weights must be an array of the library of value, numpy, got one of torch",
    ),
    Bad(
        "a torch gradient beside NumPy values",
        lambda lib: {"grad_output": Torch().array((N, LQ, M * D))},
        TypeError,
        "grad_output must be an array of the library of value, numpy, got one of torch",
    ),
    Bad(
        "byte-swapped values",
        lambda lib: {"value": np.ones((N, S, M, D), np.dtype("f4").newbyteorder())},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got ...f4",
    ),
    Bad(
        "byte-swapped sizes",
        lambda lib: {"spatial_shapes": np.array(SIZES, np.dtype("i8").newbyteorder())},
        TypeError,
        "spatial_shapes must have an integer dtype in native byte order, got ...i8",
    ),
    Bad(
        "values that are objects",
        lambda lib: {"value": np.full((N, S, M, D), None)},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got object",
    ),
    Bad(
        "extended precision",
        lambda lib: {"value": np.ones((N, S, M, D), np.longdouble)},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got ...",
    ),
    Bad(
        "a masked array, whose mask would be lost",
        lambda lib: {"value": np.ma.masked_invalid(np.ones((N, S, M, D), np.float32))},
        TypeError,
        "value must be an array without a mask, got MaskedArray",
    ),
    Bad(
        "a NumPy scalar",
        lambda lib: {"attention_weights": np.float32(1)},
        TypeError,
        f"attention_weights {NO_ARRAY} float32",
    ),
    Bad(
        "an unnamed library without a namespace",
        lambda lib: {"value": NoNamespace()},
        TypeError,
        f"value {NO_ARRAY} NoNamespace",
    ),
]

# Mistakes that only torch allows.
ONLY_TORCH = [
    Bad(
        "NumPy locations beside torch values",
        lambda lib: {"sampling_locations": NumPy().array((N, LQ, M, L, P, 2))},
        TypeError,
        "sampling_locations must be an array of the library of value, torch, got one of numpy",
    ),
    Bad(
        "NumPy weights beside torch values",
        lambda lib: {"attention_weights": NumPy().array((N, LQ, M, L, P))},
        TypeError,
        "attention_weights must be an array of the library of value, torch, got one of numpy",
    ),
    Bad(
        "a NumPy gradient beside torch values",
        lambda lib: {"grad_output": NumPy().array((N, LQ, M * D))},
        TypeError,
        "grad_output must be an array of the library of value, torch, got one of numpy",
    ),
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
        "float8 values",
        lambda lib: {"value": lib.array((N, S, M, D)).to(torch.float8_e4m3fn)},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got float8_e4m3fn",
    ),
    Bad(
        "locations on another device",
        lambda lib: {"sampling_locations": lib.array((N, LQ, M, L, P, 2)).to("meta")},
        ValueError,
        "sampling_locations must be on the device of value, cpu, got meta",
    ),
    Bad(
        "weights on another device",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L, P)).to("meta")},
        ValueError,
        "attention_weights must be on the device of value, cpu, got meta",
    ),
    Bad(
        "values on another device",
        lambda lib: {"value": lib.array((N, S, M, D)).to("meta")},
        ValueError,
        "sampling_locations must be on the device of value, meta, got cpu",
    ),
    Bad(
        "sizes on a device without memory",
        lambda lib: {"spatial_shapes": lib.integers(SIZES).to("meta")},
        ValueError,
        "spatial_shapes must be on the device of value, cpu, got meta",
    ),
    Bad(
        "starts on a device without memory",
        lambda lib: {"level_start_index": lib.integers(STARTS).to("meta")},
        ValueError,
        "level_start_index must be on the device of value, cpu, got meta",
    ),
    Bad(
        "a gradient on another device",
        lambda lib: {"grad_output": lib.array((N, LQ, M * D)).to("meta")},
        ValueError,
        "grad_output must be on the device of value, cpu, got meta",
    ),
    Bad(
        "sparse weights",
        lambda lib: {"attention_weights": lib.array((N, LQ, M, L, P)).to_sparse()},
        TypeError,
        "attention_weights must be a dense tensor, got torch.sparse_coo",
    ),
    Bad(
        "nested values",
        lambda lib: {"value": torch.nested.nested_tensor([torch.ones(S, M, D)] * N)},
        TypeError,
        "value must be a dense tensor, got a nested tensor",
    ),
    Bad(
        "a module for a tensor",
        lambda lib: {"value": torch.nn.Identity()},
        TypeError,
        f"value {NO_ARRAY} Identity",
    ),
    Bad(
        "a dtype for a tensor",
        lambda lib: {"attention_weights": torch.float32},
        TypeError,
        f"attention_weights {NO_ARRAY} dtype",
    ),
]


class NoNamespace:
    """A DLPack array without a way back from NumPy."""

    shape = (N, S, M, D)
    dtype = "float32"

    def __dlpack__(self, **_):
        raise AssertionError("it must not be read")

    def __dlpack_device__(self):
        return 1, 0


def cases():
    """Every mistake, in the forward and the backward or, if it is in grad_output, in the backward."""
    for lib, table in ((NumPy(), [*COMMON, *ONLY_NUMPY]), (Torch(), [*COMMON, *ONLY_TORCH])):
        for bad in table:
            for function in ("ms_deform_attn", "ms_deform_attn_backward"):
                if function.endswith("backward") or not bad.message.startswith("grad_output"):
                    name = f"{function}-{type(lib).__name__}-{bad.name}"
                    yield pytest.param(function, lib, bad, id=name)


def pattern(message):
    """A regular expression for all of a message, "..." standing for anything."""
    return ".+".join(map(re.escape, message.split("..."))) + r"\Z"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(("function", "lib", "bad"), list(cases()))
def test_bad_input(function, lib, bad):
    inputs = good_inputs(lib) | bad.change(lib)
    grad_output = inputs.pop("grad_output")
    order = inputs.pop("query_order", "auto")
    arguments = list(inputs.values())
    if function == "ms_deform_attn_backward":
        arguments.insert(0, grad_output)
    with pytest.raises(bad.error) as raised:
        getattr(cupy_msda, function)(*arguments, query_order=order)
    assert type(raised.value) is bad.error
    assert re.match(pattern(bad.message), str(raised.value)), raised.value
    # The argument at fault or, where two do not fit, the other of them; the contract; the fact.
    argument = re.match(r"(\w+) (and \w+ )?must .*\bgot .+", str(raised.value))
    assert argument is not None
    assert argument[1] in ORDER


def test_the_table_is_long_enough():
    names = [bad.name for bad in (*COMMON, *ONLY_NUMPY, *ONLY_TORCH)]
    assert len(set(names)) == len(names) >= 60


# --- what is accepted ------------------------------------------------------------------------------

SHAPES_FORMS = {
    "a list of tuples": SIZES,
    "a tuple of lists": tuple(map(list, SIZES)),
    "a list of torch.Size": [torch.Size(size) for size in SIZES],
    "NumPy int64": np.array(SIZES),
    "NumPy int32": np.array(SIZES, np.int32),
    "NumPy uint8": np.array(SIZES, np.uint8),
    "NumPy, Fortran order": np.asfortranarray(SIZES),
    "NumPy, a view with gaps": np.array([(h, w, 0, 0) for h, w in SIZES])[:, :2],
    "a list of NumPy rows": list(np.array(SIZES)),
    "a list of NumPy integers": [(np.int32(h), np.uint8(w)) for h, w in SIZES],
    "torch int64": torch.tensor(SIZES),
    "torch int32": torch.tensor(SIZES, dtype=torch.int32),
    "torch uint8": torch.tensor(SIZES, dtype=torch.uint8),
    "torch, transposed view": torch.tensor(SIZES).t().contiguous().t(),
    "a list of torch rows": list(torch.tensor(SIZES)),
    "a list of 0-dim tensors": [(torch.tensor(h), torch.tensor(w)) for h, w in SIZES],
}
STARTS_FORMS = {
    "None": None,
    "a list": STARTS,
    "a tuple": tuple(STARTS),
    "NumPy int64": np.array(STARTS),
    "NumPy uint16": np.array(STARTS, np.uint16),
    "a list of NumPy integers": list(np.array(STARTS)),
    "torch int64": torch.tensor(STARTS),
    "torch int32": torch.tensor(STARTS, dtype=torch.int32),
    "a list of 0-dim tensors": list(torch.tensor(STARTS)),
}
LEVELS = tuple(Level(h, w, start) for (h, w), start in zip(SIZES, STARTS, strict=True))


def check_with(lib, **changed):
    """`contract.check` on good inputs but for these."""
    inputs = good_inputs(lib) | changed
    del inputs["grad_output"]
    return contract.check(*inputs.values())


def plain_ints(levels):
    """Whether the levels hold ints and nothing that only acts like one."""
    return all(type(number) is int for level in levels for number in level)


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize("form", SHAPES_FORMS)
def test_forms_of_spatial_shapes(lib, form):
    _, table = check_with(lib, spatial_shapes=SHAPES_FORMS[form], level_start_index=None)
    assert table.levels == LEVELS
    assert plain_ints(table.levels)
    assert table.device_sizes is None
    assert table.device_starts is None


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize("form", STARTS_FORMS)
def test_forms_of_level_start_index(lib, form):
    _, table = check_with(lib, level_start_index=STARTS_FORMS[form])
    assert table.levels == LEVELS
    assert plain_ints(table.levels)


@pytest.mark.parametrize("form", SHAPES_FORMS)
def test_every_form_runs_through_the_public_function(form):
    inputs = good_inputs(Torch())
    del inputs["grad_output"]
    expected = cupy_msda.ms_deform_attn(*inputs.values())
    output = cupy_msda.ms_deform_attn(*(inputs | {"spatial_shapes": SHAPES_FORMS[form]}).values())
    assert torch.equal(output, expected)


def test_iterators_are_read_once():
    _, table = check_with(NumPy(), spatial_shapes=iter(SIZES), level_start_index=iter(STARTS))
    assert table.levels == LEVELS


GRIDS = [(1, 2), (3, 1)]
GRIDS_FORMS = {
    "a list of tuples": GRIDS,
    "a tuple of lists": tuple(map(list, GRIDS)),
    "a list of torch.Size": list(map(torch.Size, GRIDS)),
    "NumPy int64": np.array(GRIDS),
    "NumPy uint8": np.array(GRIDS, np.uint8),
    "a list of NumPy rows": list(np.array(GRIDS)),
    "a list of NumPy integers": [(np.int32(h), np.uint8(w)) for h, w in GRIDS],
}


@pytest.mark.parametrize("form", GRIDS_FORMS)
def test_forms_of_query_order(form):
    grids = contract.check_query_order(GRIDS_FORMS[form], LQ)
    assert grids == tuple(GRIDS)
    assert plain_ints(grids)
    assert contract.check_query_order(iter(GRIDS), LQ) == grids


def test_auto_is_none_and_none_is_no_grids():
    assert contract.check_query_order("auto", LQ) is None
    assert contract.check_query_order(None, LQ) == ()


@pytest.mark.parametrize("grids", [[(0, 7), (5, 1), (3, 0)], [(1, 5), *[(0, 0)] * 15]], ids=str)
def test_grids_that_hold_the_queries(grids):
    assert contract.check_query_order(grids, LQ) == tuple(grids)


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize("order", ["auto", None, *GRIDS_FORMS.values()], ids=str)
def test_every_order_gives_the_same(lib, order):
    inputs = good_inputs(lib)
    grad_output = inputs.pop("grad_output")
    output = cupy_msda.ms_deform_attn(*inputs.values(), query_order=order)
    assert (output == cupy_msda.ms_deform_attn(*inputs.values())).all()
    arguments = (grad_output, *inputs.values())
    gradients = cupy_msda.ms_deform_attn_backward(*arguments, query_order=order)
    expected = cupy_msda.ms_deform_attn_backward(*arguments)
    assert all((a == b).all() for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        pytest.param([(2, 2), (2, 3), (1, 2)], [1, 10, 20], id="gaps"),
        pytest.param([(4, 5), (4, 5), (2, 3)], [0, 8, 3], id="overlaps"),
        pytest.param([(1, 2), (2, 3), (4, 5)], [26, 20, 0], id="any order"),
        pytest.param([(0, 0), (0, 5), (4, 0)], [28, 0, 28], id="empty levels, at the end too"),
        pytest.param([(2, 3), (1, 2), (1, 1)], None, id="positions left over"),
        pytest.param([(1, 28), (28, 1), (4, 7)], [0, 0, 0], id="the same positions"),
    ],
)
def test_levels_that_fit(sizes, starts):
    _, table = check_with(NumPy(), spatial_shapes=sizes, level_start_index=starts)
    assert table.sizes == tuple(sizes)
    assert table.starts == (tuple(starts) if starts else (0, 6, 8))


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize(
    ("value", "locations", "weights"),
    [
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("float64", "float64", "float32"),
        ("float64", "float32", "float32"),
        ("float16", "float16", "float16"),
        ("float16", "float32", "float32"),
        ("float16", "float32", "float16"),
        ("float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_dtypes(lib, value, locations, weights):
    if value == "bfloat16" and isinstance(lib, NumPy):
        pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 from ml_dtypes")
    problem, _ = check_with(
        lib,
        value=lib.array((N, S, M, D), value),
        sampling_locations=lib.array((N, LQ, M, L, P, 2), locations),
        attention_weights=lib.array((N, LQ, M, L, P), weights),
    )
    assert problem[-3:] == (value, locations, weights)


def test_sizes_are_those_of_the_arrays():
    problem, _ = check_with(NumPy())
    assert problem[:7] == (N, S, M, D, LQ, L, P)
    assert problem.output_shape == (N, LQ, M * D)


@pytest.mark.parametrize("zero", ["n", "s", "m", "d", "lq", "levels", "p"])
def test_empty_dimensions(zero):
    n, s, m, d, lq, levels, p = (
        {"n": N, "s": S, "m": M, "d": D, "lq": LQ, "levels": L, "p": P} | {zero: 0}
    ).values()
    sizes = SIZES[:levels] if s else [(0, 0)] * levels
    problem, table = contract.check(
        np.ones((n, s, m, d)),
        np.array(sizes, np.int64).reshape(levels, 2),
        None,
        np.ones((n, lq, m, levels, p, 2)),
        np.ones((n, lq, m, levels, p)),
    )
    assert problem[:7] == (n, s, m, d, lq, levels, p)
    assert len(table.levels) == levels


def test_subclasses_count_as_their_library():
    value = torch.nn.Parameter(torch.ones(N, S, M, D))
    assert arrays.library(value) == "torch"
    check_with(Torch(), value=value)
    mapped = np.ones((N, S, M, D), np.float32).view(np.recarray)
    assert arrays.library(mapped) == "numpy"


# --- devices ---------------------------------------------------------------------------------------


class OnDevice:
    """An array that says it is on a device, and counts how often the host reads it."""

    def __init__(self, array, device=(2, 0)):
        self.array, self.device_pair, self.reads = array, device, 0

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def tolist(self):
        self.reads += 1
        return self.array.tolist()

    def __dlpack__(self, **_):
        raise AssertionError("a check must not export the array")

    def __dlpack_device__(self):
        return self.device_pair

    def __array_namespace__(self, api_version=None):
        return np


class Device(NumPy):
    """The inputs as arrays on a device."""

    def __init__(self, *device):
        self.device = device

    def array(self, shape, dtype="float32"):
        return OnDevice(super().array(shape, dtype), self.device)

    def integers(self, rows, dtype="int64"):
        return OnDevice(super().integers(rows, dtype), self.device)


CUDA, SECOND_CUDA, METAL = Device(2, 0), Device(2, 1), Device(8, 0)


@pytest.fixture(autouse=True)
def no_check_variable(monkeypatch):
    monkeypatch.delenv("CUPY_MSDA_CHECK", raising=False)


def test_the_host_leaves_levels_on_the_device_of_value_alone():
    sizes, starts = CUDA.integers(SIZES), CUDA.integers(STARTS)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=starts)
    assert table == (None, None, sizes, starts)
    assert table.levels is None
    assert sizes.reads == starts.reads == 0


def test_starts_are_derived_where_the_sizes_are():
    sizes = CUDA.integers(SIZES)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=None)
    assert table == (None, None, sizes, None)
    _, table = check_with(CUDA, level_start_index=None)
    assert table == (tuple(SIZES), tuple(STARTS), None, None)


def test_half_a_table_may_be_on_the_device():
    sizes, starts = CUDA.integers(SIZES), CUDA.integers(STARTS)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=STARTS)
    assert table == (None, tuple(STARTS), sizes, None)
    _, table = check_with(CUDA, level_start_index=starts)
    assert table == (tuple(SIZES), None, None, starts)
    assert table.levels is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spatial_shapes": CUDA.integers(SIZES), "level_start_index": [0, 20, 29]},
         "level_start_index must be from 0 to S = 28, got 29 for level 2"),
        ({"spatial_shapes": [(4, 5), (5, 6), (1, 2)], "level_start_index": CUDA.integers(STARTS)},
         f"{OUTSIDE}(5, 6) for level 1"),
        ({"spatial_shapes": SECOND_CUDA.integers(SIZES)},
         "spatial_shapes must be on the device of value, cuda:0, got cuda:1"),
        ({"level_start_index": SECOND_CUDA.integers(STARTS)},
         "level_start_index must be on the device of value, cuda:0, got cuda:1"),
        ({"spatial_shapes": CUDA.integers(SIZES[:2])}, f"{SHAPES} {LOCATION_SHAPE}, got (2, 2)"),
        ({"sampling_locations": SECOND_CUDA.array((N, LQ, M, L, P, 2))},
         "sampling_locations must be on the device of value, cuda:0, got cuda:1"),
        ({"attention_weights": Device(1, 0).array((N, LQ, M, L, P))},
         "attention_weights must be on the device of value, cuda:0, got cpu"),
    ],
)  # fmt: skip
def test_bad_input_on_a_device(changed, message):
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(CUDA, **changed)


@pytest.mark.parametrize("where", ["host", "starts-on-the-device", "device"])
def test_levels_beyond_what_a_launch_takes_by_value(where):
    sizes = [(0, 0)] * 321
    changed = {
        "spatial_shapes": CUDA.integers(sizes) if where == "device" else sizes,
        "level_start_index": None if where == "host" else CUDA.integers([0] * 321),
        "sampling_locations": CUDA.array((N, LQ, M, 321, P, 2)),
        "attention_weights": CUDA.array((N, LQ, M, 321, P)),
    }
    if where == "device":
        check_with(CUDA, **changed)
        return
    message = (
        "spatial_shapes and level_start_index must hold at most 320 levels where value "
        "is on a CUDA device and they are not, got 321"
    )
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(CUDA, **changed)


def test_levels_on_the_device_of_another_library():
    class OtherLibrary(OnDevice):
        __module__ = "other"

    with pytest.raises(TypeError, match=r"spatial_shapes must be an array of the library of value"):
        check_with(CUDA, spatial_shapes=OtherLibrary(np.array(SIZES)))


def test_values_on_a_device_without_kernels():
    message = "value must be on the CPU or on an NVIDIA CUDA device, got DLPack device 8:0"
    with pytest.raises(ValueError, match=pattern(message)):
        check_with(METAL)


def test_bfloat16_on_a_device_is_taken_from_torch_only():
    class Brain(OnDevice):
        dtype = "bfloat16"

    with pytest.raises(TypeError, match=r"^value must have dtype .* CuPy has no bfloat16"):
        check_with(CUDA, value=Brain(np.zeros((N, S, M, D), np.int16)))


def test_pinned_memory_is_on_the_host_and_managed_memory_on_the_device():
    assert arrays.on_host(OnDevice(np.ones(1), (3, 0)))
    assert arrays.place(OnDevice(np.ones(1), (13, 1))) == "cuda:1"


def test_values_on_the_host_read_levels_from_a_device():
    sizes = CUDA.integers(SIZES)
    _, table = check_with(NumPy(), spatial_shapes=sizes, level_start_index=None)
    assert table.levels == LEVELS
    assert sizes.reads == 1


def test_values_on_a_device_read_levels_from_the_host():
    for shapes in (np.array(SIZES), torch.tensor(SIZES)):
        _, table = check_with(CUDA, spatial_shapes=shapes, level_start_index=None)
        assert table.levels == LEVELS


def test_the_check_variable_reads_and_validates_levels_on_the_device(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    sizes, starts = CUDA.integers(SIZES), CUDA.integers(STARTS)
    _, table = check_with(CUDA, spatial_shapes=sizes, level_start_index=starts)
    assert table.levels == LEVELS
    assert table.device_sizes is None
    assert sizes.reads == starts.reads == 1
    too_large = CUDA.integers([(4, 5), (2, 3), (2, 2)])
    with pytest.raises(ValueError, match=pattern(f"{OUTSIDE}(2, 2) starting at 26 for level 2")):
        check_with(CUDA, spatial_shapes=too_large)


def test_the_check_variable_is_off_unless_one(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", "0")
    _, table = check_with(CUDA, spatial_shapes=CUDA.integers(SIZES), level_start_index=None)
    assert table.sizes is None


@pytest.mark.parametrize("check", ["0", "1"])
def test_levels_without_memory_are_never_read(check, monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", check)
    inputs = {
        name: array.to("meta") if isinstance(array, torch.Tensor) else array
        for name, array in good_inputs(Torch()).items()
    }
    del inputs["grad_output"]
    inputs["spatial_shapes"] = torch.tensor(SIZES, device="meta")
    inputs["level_start_index"] = None
    problem, table = contract.check(*inputs.values())
    assert problem.output_shape == (N, LQ, M * D)
    assert table.device_sizes is inputs["spatial_shapes"]
