# SPDX-License-Identifier: Apache-2.0
"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators.

A multiply-add is two FLOPs, as for torch's matrix products. The forward has one for each channel of each of the four
corners of every point, or of its one pixel for "nearest"; the backward as many for the gradient of value, and again for
those of locations and weights. A corner outside the level counts, since shapes do not tell; coordinates and
coefficients do not count.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from cupy_msda.torch.fused_operands import fused_backward_operands, fused_operands
from cupy_msda.torch.operands import Operands, backward_operands

_CORNERS = {"bilinear": 4, "nearest": 1}
_MULTIPLY_ADD = 2


def _once(operands: Operands) -> int:
    """One multiply-add for each channel of each corner."""
    points: int = prod(operands.attention_weights.shape)  # N, Lq, M, L, P or N, Lq, M, K
    channels: int = operands.value.shape[3]
    return _MULTIPLY_ADD * _CORNERS[operands.interpolation] * points * channels


def forward(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the forward operator."""
    return _once(Operands(*arguments))


def backward(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the backward operator."""
    operands = backward_operands(arguments)
    passes: int = operands.needs_value + operands.needs_points
    return passes * _once(operands.forward)


def fused_forward(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the fused forward operator: the same, since coordinates and weights do not count."""
    return _once(fused_operands(arguments).given)


def fused_backward(*arguments: Any, out_val: Any = None) -> int:
    """FLOPs of the fused backward operator."""
    operands = fused_backward_operands(arguments)
    needs = operands.needs
    passes: int = needs.value + (needs.points or needs.references)
    return passes * _once(operands.forward.given)


_FORMULAS = {
    "ms_deform_attn_forward": forward,
    "ms_deform_attn_backward": backward,
    "ms_deform_attn_fused_forward": fused_forward,
    "ms_deform_attn_fused_backward": fused_backward,
}


def register() -> None:
    """Give the formulas to torch's counter, if its module is loaded, and to counters that count already.

    Loading it here would import Triton, which takes a few tenths of a second. So a counter that was made before misses
    what calls an operator past our functions, such as a loaded program, until one of them has been called.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    modes = _get_current_dispatch_mode_stack()
    counters = [module, *(getattr(mode, "counter", mode) for mode in modes)]
    # Not by `register_flop_formula`: under the keys that it uses in torch 2.4, the counter finds no operator.
    for counter in counters:
        registry = getattr(counter, "flop_registry", {})
        for name, formula in _FORMULAS.items():
            registry.setdefault(getattr(torch.ops.cupy_msda, name), formula)
