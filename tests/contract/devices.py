# SPDX-License-Identifier: Apache-2.0
"""Tensors on another device than `value`."""

from __future__ import annotations

from tests.contract.inputs import SHAPE, SIZES, STARTS, Bad

TORCH = [
    Bad(
        "locations on another device",
        lambda lib: {"sampling_locations": lib.array(SHAPE["sampling_locations"]).to("meta")},
        ValueError,
        "sampling_locations must be on the device of value, cpu, got meta",
    ),
    Bad(
        "weights on another device",
        lambda lib: {"attention_weights": lib.array(SHAPE["attention_weights"]).to("meta")},
        ValueError,
        "attention_weights must be on the device of value, cpu, got meta",
    ),
    Bad(
        "values on another device",
        lambda lib: {"value": lib.array(SHAPE["value"]).to("meta")},
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
        lambda lib: {"grad_output": lib.array(SHAPE["grad_output"]).to("meta")},
        ValueError,
        "grad_output must be on the device of value, cpu, got meta",
    ),
]
