# SPDX-License-Identifier: Apache-2.0
"""Things that an argument does not take, and the public functions with arguments that they take."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

import cupy_msda
import cupy_msda.torch
from cupy_msda import MSDeformAttn, MSDeformAttnFunction
from cupy_msda.integrations import deformable_detr
from tests.contract.inputs import LQ, SIZES, STARTS, D, L, M, N, NumPy, P, S, Torch, good_inputs

# --- things ----------------------------------------------------------------------------------------


class Raises:
    """A number that cannot be read."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __index__(self) -> int:
        raise self.error("cannot be read")

    __int__ = __float__ = __index__


class RaisesInRepr(Raises):
    """Nor printed."""

    def __repr__(self) -> str:
        raise RuntimeError("cannot be printed")


class Subclass(torch.Tensor):
    """A tensor of another type."""


def broken(items: Any) -> Any:
    """A generator that raises after the first item."""
    yield items[0]
    raise LookupError("no more")


# Made anew for each call, which uses them up.
GENERATORS: dict[str, Callable[[], Any]] = {
    "empty generator": lambda: (number for number in ()),
    "generator of floats": lambda: (pair for pair in [(4.0, 5.0), (2.0, 3.0), (1.0, 2.0)]),
    "broken generator of sizes": lambda: broken(SIZES),
    "broken generator of starts": lambda: broken(STARTS),
}

SCALARS = {
    "None": None,
    "str": "float32",
    "digits": "4 5",
    "empty str": "",
    "bytes": b"\x00\x14\x1a",
    "int": 5,
    "zero": 0,
    "negative": -1,
    "huge": 2**62,
    "huger": 2**100,
    "float": 2.0,
    "nan": float("nan"),
    "complex": 1j,
    "bool": True,
    "decimal": Decimal(2),
    "object": object(),
    "class": int,
    "function": len,
    "module": np,
    "ellipsis": ...,
    "slice": slice(3),
    "numpy float": np.float32(1),
    "numpy int": np.int64(5),
    "torch dtype": torch.float32,
    "numpy dtype": np.dtype("f4"),
    "torch device": torch.device("cpu"),
    "index raises": Raises(ValueError),
    "repr raises": RaisesInRepr(RuntimeError),
    "nn module": torch.nn.Identity(),
}

CONTAINERS = {
    "empty list": [],
    "empty tuple": (),
    "empty dict": {},
    "ragged": [[4, 5], [2], [1, 2]],
    "nested": [[[4, 5], [2, 3], [1, 2]]],
    "mixed": [(4, 5), None, (1, 2)],
    "text rows": ["45", "23", "12"],
    "bytes rows": [b"\x04\x05", b"\x02\x03", b"\x01\x02"],
    "floats": [[4.0, 5.0], [2.0, 3.0], [1.0, 2.0]],
    "nan sizes": [(float("nan"), 5), (2, 3), (1, 2)],
    "bools": [(True, True), (True, False), (False, True)],
    "flat bools": [True, False, True],
    "dict of rows": dict.fromkeys(SIZES),
    "dict of starts": dict.fromkeys(STARTS),
    "dict keys": dict.fromkeys(SIZES).keys(),
    "set of rows": set(SIZES),
    "set of starts": set(STARTS),
    "rows that are sets": [{4, 5}, {2, 3}, {1, 2}],
    "rows that are dicts": [{4: 0, 5: 0}, {2: 0, 3: 0}, {1: 0, 2: 0}],
    "bytearray": bytearray((0, 20, 26)),
    "huge sizes": [(2**62, 2), (2, 3), (1, 2)],
    "huger sizes": [(2**100, 1), (2, 3), (1, 2)],
    "negative sizes": [(4, 5), (2, 3), (-1, -2)],
    "huge starts": [0, 2**62, 26],
    "huger starts": [0, 20, 2**100],
    "large sizes": [(9, 9), (9, 9), (9, 9)],
    "two levels": SIZES[:2],
    "sizes that raise": [(4, Raises(ZeroDivisionError)), (2, 3), (1, 2)],
    "starts that raise": [0, RaisesInRepr(OSError), 26],
    "list of arrays": [np.ones((2, 2)), np.ones((2, 2))],
    "columns": [np.ones(1, int), np.ones(1, int), np.ones(1, int)],
    "columns of torch": list(torch.ones(3, 1, dtype=torch.int64)),
    "0-dimensional floats": list(torch.ones(3)),
    "0-dimensional bools": list(torch.ones(3, dtype=torch.bool)),
    "0-dimensional sparse": [torch.tensor(1).to_sparse()] * 3,
    "0-dimensional meta": list(torch.ones(3, dtype=torch.int64, device="meta")),
    "rows of bools": list(torch.ones(3, 2, dtype=torch.bool)),
}

SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (3, 2), (2, 5, 24))


def _numpy_arrays() -> dict[str, Any]:
    """Arrays of NumPy; few of them are right for a level table."""
    good = np.array(SIZES)
    plain = {
        f"numpy {dtype} {shape}": np.zeros(shape, dtype)
        for dtype in ("bool", "i8", "f4", "f8", "c8", "S3", "U2", "O", "M8[s]", "V4")
        for shape in SHAPES
    }
    return plain | {
        "structured": np.zeros((3, 2), [("h", "i4"), ("w", "i4")]),
        "swapped": good.astype(good.dtype.newbyteorder()),
        "swapped floats": np.ones((3, 2), np.dtype("f4").newbyteorder()),
        "masked": np.ma.masked_equal(good, 5),
        "masked starts": np.ma.masked_equal(np.array(STARTS), 20),
        "longdouble": np.ones((3, 2), np.longdouble),
        "too large": np.full((3, 2), 2**62),
        "too large, unsigned": np.full((3,), 2**63 + 5, np.uint64),
        "negative array": -good,
        "empty array": np.zeros((0, 2), int),
        "integers as objects": good.astype(object),
    }


def _tensors() -> dict[str, Any]:
    """Tensors; few of them are right for a level table."""
    dtypes = (
        *(torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.float8_e4m3fn),
    )
    return {
        f"torch {str(dtype).partition('.')[2]} {shape}": torch.zeros(shape).to(dtype)
        for dtype in dtypes
        for shape in SHAPES
    }


def _odd_tensors() -> dict[str, Any]:
    """Of layouts and places that no argument takes."""
    good, floats, value = torch.tensor(SIZES), torch.ones(3, 2), torch.ones(4, 28, 2, 7)
    parts = [torch.ones(2, 3), torch.ones(3, 3)]
    odd = {
        "coo": good.to_sparse(),
        "coo floats": floats.to_sparse(),
        "sparse starts": torch.tensor(STARTS).to_sparse(),
        "csr": good.to_sparse_csr(),
        "csc": floats.to_sparse_csc(),
        "quantised": torch.quantize_per_tensor(floats, 0.1, 0, torch.quint8),
        "quantised value": torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "nested tensor": torch.nested.nested_tensor(parts),
        "jagged": torch.nested.nested_tensor(parts, layout=torch.jagged),
        "meta": good.to("meta"),
        "meta starts": torch.tensor(STARTS, device="meta"),
        "meta floats": floats.to("meta"),
        "requires grad": floats.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(floats),
        "no elements": torch.zeros(0, 2, dtype=torch.int64),
        "subclass of floats": floats.as_subclass(Subclass),
        "negative view": torch.view_as_complex(floats).conj().imag,
        "too large tensor": torch.full((3, 2), 2**62),
    }
    if hasattr(torch, "int4"):
        odd["torch int4"] = torch.empty((3, 2), dtype=torch.int4)
    return odd


@cache
def things() -> dict[str, Any]:
    """All but generators, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its prototypes, and of what it will remove
        return SCALARS | CONTAINERS | _numpy_arrays() | _tensors() | _odd_tensors()


def names() -> list[str]:
    """Of all things."""
    return [*things(), *GENERATORS]


def thing(name: str) -> Any:
    """One of them."""
    return GENERATORS[name]() if name in GENERATORS else things()[name]


# What an argument takes of these after all.
_TABLES = {"numpy i8 (3, 2)", "torch int64 (3, 2)"}
_STARTS = {"None", "numpy i8 (3,)", "torch int64 (3,)"}
_COUNTS = {"int", "numpy int"}
_DTYPES = {"str", "torch dtype", "numpy dtype"}
TAKEN = {
    "spatial_shapes": _TABLES,
    "level_start_index": _STARTS,
    "input_spatial_shapes": _TABLES,
    "input_level_start_index": _STARTS,
    "input_padding_mask": {"None"},
    "query_order": {"None"},
    "num_points": {"None"},
    "reference_points_shape": {"None"},
    "value_mask": {"None"},
    "offset_scale": {
        "int",
        "zero",
        "negative",
        "huge",
        "huger",
        "float",
        "numpy float",
        "numpy int",
    },
    "n_levels": _COUNTS,
    "n_points": _COUNTS,
    "ratio": {"int", "float", "numpy int", "numpy float"},
    "dtype": _DTYPES,
    "points_dtype": {"None", *_DTYPES},
}
# An error names what the operator calls it.
OTHER_NAMES = {
    "sampling_loc": "sampling_locations",
    "attn_weight": "attention_weights",
    "input_spatial_shapes": "spatial_shapes",
    "input_level_start_index": "level_start_index",
    "value_shape": "value",
    "sampling_locations_shape": "sampling_locations",
    "reference_points_shape": "reference_points",
    "points_dtype": "dtype",
}

KEYWORDS = (
    *("query_order", "num_points", "interpolation", "value_mask", "offset_scale"),
    "reference_points_shape",
)

# --- functions -------------------------------------------------------------------------------------


class Function(NamedTuple):
    """A public function, and a call of it that is right: arguments by name, in order."""

    run: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]

    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Call it by position, but for how to sample."""
        keywords = {k: v for k, v in arguments.items() if k in KEYWORDS}
        return self.run(*(v for k, v in arguments.items() if k not in keywords), **keywords)


def _forward(lib: Any, order: bool = True) -> dict[str, Any]:
    inputs = good_inputs(lib) | (_rules() if order else {})
    del inputs["grad_output"]
    return inputs


def _rules() -> dict[str, Any]:
    rules = {"num_points": None, "interpolation": "bilinear", "value_mask": None}
    return rules | {"query_order": "auto"}


def _fused(lib: Any, backward: bool = False) -> dict[str, Any]:
    inputs = good_inputs(lib)
    grad_output = {"grad_output": inputs.pop("grad_output")}
    *table, (_, offsets), (_, logits) = inputs.items()
    points = {
        "reference_points": lib.array((N, LQ, L, 4)),
        "sampling_offsets": offsets,
        "attention_logits": logits,
    }
    first = grad_output if backward else {}
    return first | dict(table) | points | _rules() | {"offset_scale": 0.5}


def _recorded_fused() -> dict[str, Any]:
    inputs = _fused(Torch())
    inputs["sampling_offsets"].requires_grad_()
    return inputs


def _recorded() -> dict[str, Any]:
    inputs = _forward(Torch())
    inputs["value"].requires_grad_()
    return inputs


def _backward(lib: Any) -> dict[str, Any]:
    inputs = good_inputs(lib)
    return {"grad_output": inputs.pop("grad_output"), **inputs, **_rules()}


def _extension() -> dict[str, Any]:
    *table, locations, weights = _forward(Torch(), order=False).items()
    return dict([*table, ("sampling_loc", locations[1]), ("attn_weight", weights[1])])


def _extension_backward() -> dict[str, Any]:
    return _extension() | {"grad_output": good_inputs(Torch())["grad_output"]}


def _module_arguments() -> dict[str, Any]:
    return {
        "query": torch.ones(4, LQ, M * D),
        "reference_points": torch.ones(4, LQ, L, 2),
        "input_flatten": torch.ones(4, S, M * D),
        "input_spatial_shapes": SIZES,
        "input_level_start_index": STARTS,
        "input_padding_mask": None,
    }


def _dual(*arguments: Any, **keywords: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return cupy_msda.ms_deform_attn(*arguments, **keywords)


def _warmup(*given: Any, **rules: Any) -> None:
    shapes, (dtype, points_dtype, device) = given[:2], given[2:]
    options = {"dtype": dtype, "points_dtype": points_dtype, "device": device}
    cupy_msda.warmup(*shapes, **options, backward=False, **rules)


def _warmup_arguments() -> dict[str, Any]:
    return {
        "value_shape": (4, S, M, D),
        "sampling_locations_shape": (4, LQ, M, L, P, 2),
        "dtype": "float32",
        "points_dtype": None,
        "device": "cpu",
        **_rules(),
        "value_mask": False,
        "reference_points_shape": None,
    }


FUNCTIONS = {
    "numpy": Function(cupy_msda.ms_deform_attn, partial(_forward, NumPy())),
    "numpy backward": Function(cupy_msda.ms_deform_attn_backward, partial(_backward, NumPy())),
    "torch": Function(cupy_msda.ms_deform_attn, partial(_forward, Torch())),
    "torch, recorded": Function(cupy_msda.ms_deform_attn, _recorded),
    "torch, forward mode": Function(_dual, partial(_forward, Torch())),
    "torch backward": Function(cupy_msda.ms_deform_attn_backward, partial(_backward, Torch())),
    "cupy_msda.torch": Function(cupy_msda.torch.ms_deform_attn, partial(_forward, Torch())),
    "cupy_msda.torch backward": Function(
        cupy_msda.torch.ms_deform_attn_backward, partial(_backward, Torch())
    ),
    "apply": Function(MSDeformAttnFunction.apply, partial(_forward, Torch(), order=False)),
    "numpy, fused": Function(cupy_msda.ms_deform_attn_fused, partial(_fused, NumPy())),
    "numpy, fused backward": Function(
        cupy_msda.ms_deform_attn_fused_backward, partial(_fused, NumPy(), backward=True)
    ),
    "torch, fused": Function(cupy_msda.ms_deform_attn_fused, partial(_fused, Torch())),
    "torch, fused, recorded": Function(cupy_msda.ms_deform_attn_fused, _recorded_fused),
    "torch, fused backward": Function(
        cupy_msda.ms_deform_attn_fused_backward, partial(_fused, Torch(), backward=True)
    ),
    "extension": Function(
        lambda *given: deformable_detr.ms_deform_attn_forward(*given, 64), _extension
    ),
    "extension backward": Function(
        lambda *given: deformable_detr.ms_deform_attn_backward(*given, 64), _extension_backward
    ),
    "module": Function(MSDeformAttn(M * D, L, M, P), _module_arguments),
    "constructor": Function(
        MSDeformAttn,
        lambda: {"d_model": 14, "n_levels": L, "n_heads": M, "n_points": P, "ratio": 1},
    ),
    "warmup": Function(_warmup, _warmup_arguments),
}
