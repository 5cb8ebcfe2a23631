# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `spatial_shapes` and `level_start_index`."""

from __future__ import annotations

import numpy as np
import torch

from tests.contract.inputs import LOCATION_SHAPE, OUTSIDE, SHAPES, SIZES, STARTS, Bad

STARTS_SHAPE = "level_start_index must have shape (L,) = (3,)"
NO_PAIRS = (
    "spatial_shapes must be a sequence of (H, W) pairs or an integer array of shape (L, 2), got "
)
NO_INTEGERS = (
    "level_start_index must be a sequence of integers or an integer array of shape (L,), got "
)
UNFILLED = (
    "spatial_shapes must have levels that fill the S = 28 positions of value where "
    "level_start_index is None, got "
)

ANY = [
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
    Bad(
        "sizes of another stride",
        lambda lib: {"spatial_shapes": [(2, 2), (1, 1), (1, 1)], "level_start_index": None},
        ValueError,
        f"{UNFILLED}6 positions in ((2, 2), (1, 1), (1, 1))",
    ),
    Bad(
        "an array of levels that leave one position",
        lambda lib: {
            "spatial_shapes": lib.integers([(4, 5), (2, 3), (1, 1)]),
            "level_start_index": None,
        },
        ValueError,
        f"{UNFILLED}27 positions in ((4, 5), (2, 3), (1, 1))",
    ),
    Bad(
        "levels without positions",
        lambda lib: {"spatial_shapes": [(0, 0), (0, 5), (4, 0)], "level_start_index": None},
        ValueError,
        f"{UNFILLED}0 positions in ((0, 0), (0, 5), (4, 0))",
    ),
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
]
NUMPY = [
    Bad(
        "byte-swapped sizes",
        lambda lib: {"spatial_shapes": np.array(SIZES, np.dtype("i8").newbyteorder())},
        TypeError,
        "spatial_shapes must have an integer dtype in native byte order, got ...i8",
    ),
]
TORCH = [
    Bad(
        "bfloat16 sizes",
        lambda lib: {"spatial_shapes": lib.integers(SIZES, "bfloat16")},
        TypeError,
        "spatial_shapes must have an integer dtype in native byte order, got bfloat16",
    ),
    Bad(
        "sparse sizes",
        lambda lib: {"spatial_shapes": lib.integers(SIZES).to_sparse()},
        TypeError,
        "spatial_shapes must be a dense tensor, got torch.sparse_coo",
    ),
    Bad(
        "sparse starts",
        lambda lib: {"level_start_index": lib.integers(STARTS).to_sparse()},
        TypeError,
        "level_start_index must be a dense tensor, got torch.sparse_coo",
    ),
    Bad(
        "jagged sizes",
        lambda lib: {
            "spatial_shapes": torch.nested.as_nested_tensor(
                [lib.integers(STARTS)] * 2, layout=torch.jagged
            )
        },
        TypeError,
        "spatial_shapes must be a dense tensor, got a nested tensor",
    ),
]
