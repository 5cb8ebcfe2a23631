# SPDX-License-Identifier: Apache-2.0
"""Good inputs of each library, and the form of a mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cupy_msda import contract
from cupy_msda.problem import Level

N, S, M, D, LQ, L, P = 4, 28, 2, 7, 5, 3, 6
SIZES = [(4, 5), (2, 3), (1, 2)]
STARTS = [0, 20, 26]
PROBLEM = {"n": N, "s": S, "m": M, "d": D, "lq": LQ, "levels": L, "p": P}
SHAPE = {
    "value": (N, S, M, D),
    "sampling_locations": (N, LQ, M, L, P, 2),
    "attention_weights": (N, LQ, M, L, P),
    "grad_output": (N, LQ, M * D),
}
LEVELS = tuple(Level(h, w, start) for (h, w), start in zip(SIZES, STARTS, strict=True))


class NumPy:
    """The inputs as NumPy arrays."""

    name = "numpy"

    def array(self, shape, dtype="float32"):
        return np.ones(shape, dtype)

    def integers(self, rows, dtype="int64"):
        return np.array(rows, dtype)

    def wide(self, *shape):
        """A shape of any size that takes no memory."""
        return np.broadcast_to(np.float32(0), shape)


class Torch:
    """The inputs as torch tensors."""

    name = "torch"

    def array(self, shape, dtype="float32"):
        return torch.ones(shape, dtype=getattr(torch, dtype))

    def integers(self, rows, dtype="int64"):
        return torch.tensor(rows, dtype=getattr(torch, dtype))

    def wide(self, *shape):
        return torch.zeros(()).expand(shape)


Library = NumPy | Torch


def other(lib: Library) -> Library:
    """The other of the two libraries."""
    return NumPy() if isinstance(lib, Torch) else Torch()


def good_inputs(lib: Library) -> dict[str, Any]:
    """Inputs that the contract accepts, by name."""
    return {
        "value": lib.array(SHAPE["value"]),
        "spatial_shapes": SIZES,
        "level_start_index": STARTS,
        "sampling_locations": lib.array(SHAPE["sampling_locations"]),
        "attention_weights": lib.array(SHAPE["attention_weights"]),
        "grad_output": lib.array(SHAPE["grad_output"]),
    }


def check_with(lib, **changed):
    """`contract.check` on good inputs with some of them changed."""
    inputs = good_inputs(lib) | changed
    del inputs["grad_output"]
    return contract.check(*inputs.values())


class Bad(NamedTuple):
    """One mistake: the arguments that are wrong, and the error that says so."""

    name: str
    change: Callable[[Any], dict[str, Any]]  # from the library to the wrong arguments
    error: type[Exception]
    message: str  # literal but for "..." (anything), "{library}" and "{other}" (names of libraries)

    def pattern(self, lib: Library) -> str:
        """A regular expression for the whole message."""
        names = {"{library}": lib.name, "{other}": other(lib).name}
        message = self.message
        for placeholder, name in names.items():
            message = message.replace(placeholder, name)
        return pattern(message)


def pattern(message):
    """A regular expression for all of a message, "..." standing for anything."""
    return ".+".join(map(re.escape, message.split("..."))) + r"\Z"


# Parts of messages that several files need.
LOCATION_SHAPE = "since sampling_locations has shape (4, 5, 2, 3, 6, 2)"
SHAPES = "spatial_shapes must have shape (L, 2) = (3, 2)"
OUTSIDE = (
    "spatial_shapes and level_start_index must keep every level inside the S = 28 positions of "
    "value, got (H, W) = "
)
LOCATIONS = "sampling_locations must have shape (N, Lq, M, L, P, 2)"
NO_ARRAY = (
    "must be a torch, CuPy or NumPy array or one with shape, dtype, __dlpack__, "
    "__dlpack_device__, __array_namespace__, got"
)


def no_array(name: str, argument: str, given: Any) -> Bad:
    """Something that is no array of a known kind."""
    message = f"{argument} {NO_ARRAY} {type(given).__name__}"
    return Bad(name, lambda _: {argument: given}, TypeError, message)


def of_another_library(name: str, argument: str) -> Bad:
    """An array of the library that `value` is not of."""
    return Bad(
        name,
        lambda lib: {argument: other(lib).array(SHAPE[argument])},
        TypeError,
        f"{argument} must be an array of the library of value, {{library}}, got one of {{other}}",
    )
