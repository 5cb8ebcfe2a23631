# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `query_order`."""

from __future__ import annotations

import numpy as np
import torch

from tests.contract.inputs import SIZES, Bad

NO_ORDER = 'query_order must be "auto", None or a sequence of (H, W) pairs of integers, got '
NO_GRIDS = "query_order must have grids that hold the Lq = 5 queries of sampling_locations, got "

ANY = [
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
]
