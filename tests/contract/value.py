# SPDX-License-Identifier: Apache-2.0
"""Mistakes in `value`."""

from __future__ import annotations

import numpy as np
import torch

from tests.contract.inputs import LOCATIONS, NO_ARRAY, SHAPE, Bad, D, M, N, S, no_array


class NoNamespace:
    """A DLPack array without a way back from NumPy."""

    shape = SHAPE["value"]
    dtype = "float32"

    def __dlpack__(self, **_):
        raise AssertionError("it must not be read")

    def __dlpack_device__(self):
        return 1, 0


def of_dtype(name: str, dtype: str) -> Bad:
    """A dtype without kernels."""
    message = f"value must have dtype float16, bfloat16, float32, float64, got {dtype}"
    return Bad(name, lambda lib: {"value": lib.array(SHAPE["value"], dtype)}, TypeError, message)


ANY = [
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
    of_dtype("value has integers", "int32"),
    of_dtype("value is complex", "complex64"),
    Bad(
        "value is a list of feature maps",
        lambda lib: {"value": [lib.array((N, 14, 4, 5)), lib.array((N, 14, 2, 3))]},
        TypeError,
        f"value {NO_ARRAY} list",
    ),
    no_array("value is missing", "value", None),
    Bad(
        "value is beyond 32 bits",
        lambda lib: {"value": lib.wide(N, 2**31, M, D)},
        ValueError,
        "value must have sizes below 2**31, got shape (4, 2147483648, 2, 7)",
    ),
]
NUMPY = [
    Bad(
        "byte-swapped values",
        lambda lib: {"value": np.ones(SHAPE["value"], np.dtype("f4").newbyteorder())},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got ...f4",
    ),
    Bad(
        "values that are objects",
        lambda lib: {"value": np.full(SHAPE["value"], None)},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got object",
    ),
    Bad(
        "extended precision",
        lambda lib: {"value": np.ones(SHAPE["value"], np.longdouble)},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got ...",
    ),
    Bad(
        "a masked array, whose mask would be lost",
        lambda lib: {"value": np.ma.masked_invalid(np.ones(SHAPE["value"], np.float32))},
        TypeError,
        "value must be an array without a mask, got MaskedArray",
    ),
    no_array("an unnamed library without a namespace", "value", NoNamespace()),
]
TORCH = [
    Bad(
        "float8 values",
        lambda lib: {"value": lib.array(SHAPE["value"]).to(torch.float8_e4m3fn)},
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got float8_e4m3fn",
    ),
    Bad(
        "nested values",
        lambda lib: {"value": torch.nested.nested_tensor([torch.ones(S, M, D)] * N)},
        TypeError,
        "value must be a dense tensor, got a nested tensor",
    ),
    Bad(
        "quantised values",
        lambda lib: {
            "value": torch._empty_affine_quantized(
                SHAPE["value"], scale=1, zero_point=0, dtype=torch.qint8
            )
        },
        TypeError,
        "value must have dtype float16, bfloat16, float32, float64, got qint8",
    ),
    no_array("a module for a tensor", "value", torch.nn.Identity()),
]
