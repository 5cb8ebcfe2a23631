# SPDX-License-Identifier: Apache-2.0
"""The operator on random inputs, for tests of torch tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cupy_msda.torch  # noqa: F401 - registers the operators
from cupy_msda import ms_deform_attn

FORWARD = torch.ops.cupy_msda.ms_deform_attn_forward.default
BACKWARD = torch.ops.cupy_msda.ms_deform_attn_backward.default

# torch 2.13's own: it deprecates torch.jit, and its tracers make what it says is not to be made.
IGNORE_DEPRECATIONS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*torch.jit.* is deprecated",
        ".*should not be instantiated:DeprecationWarning",
        ".*treespec, LeafSpec.* is deprecated:FutureWarning",
    )
]

SIZES, STARTS = [(2, 3), (3, 2)], [8, 2]
ORDERS = {"auto": "auto", "order given": None, "grids": [(1, 2), (3, 1)], "column": [(5, 1)]}


def call(inputs, function=ms_deform_attn):
    """The operator on host level sizes."""
    return function(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)


def with_grad(inputs, *needed):
    """The same tensors as new leaves; those at the positions in `needed` (all: none given) require gradients."""
    tensors = [
        tensor.detach().clone().requires_grad_(not needed or i in needed)
        for i, tensor in enumerate(inputs.tensors)
    ]
    return inputs._replace(value=tensors[0], locations=tensors[1], weights=tensors[2])


def strided(tensor):
    """A tensor with the same elements that is not contiguous."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    wide[..., ::2] = tensor.detach()
    return wide[..., ::2].requires_grad_(tensor.requires_grad)


def operator_tables(inputs):
    """The level table in both forms that the operators take: tensors and flat integers."""
    flat = [number for size in inputs.sizes for number in size]
    return {
        "tensors": (inputs.shapes(), inputs.starts(), None, None),
        "integers": (None, None, flat, inputs.starts().tolist()),
    }


def in_threads(run, cases):
    """Run each case three times in a thread of its own, all at the same time; an error of any is raised."""
    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(lambda case: [run(case) for _ in range(3)], cases))
