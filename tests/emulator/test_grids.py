# SPDX-License-Identifier: Apache-2.0
"""Every kernel under the sanitizers where threads of its grid have nothing to do.

Groups of a warp without a row, blocks without an (image, head), because y and z of the grid are limited to a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.plans import Choice, Launch, Plan
from tests.emulator import fused, launches
from tests.emulator.cases import F16, FOUR, MANY, THREE, check_backward, check_forward
from tests.problems import Inputs, random_inputs


@pytest.fixture
def padded() -> Iterator[Callable[[int], list[Launch]]]:
    """Limit y and z; the launches that have blocks without an (image, head) are noted."""
    noted: list[Launch] = []
    run = launches.run

    def note(plan: Plan, *args: Any, **options: Any) -> None:
        noted.extend(step for step in plan.launches if isinstance(step, Launch))
        run(plan, *args, **options)

    with patch.object(plans, "MAX_GRID_YZ", plans.MAX_GRID_YZ), patch.object(launches, "run", note):

        def limit(most: int) -> list[Launch]:
            plans.MAX_GRID_YZ = most
            plans.plan_forward.cache_clear()
            plans.plan_backward.cache_clear()
            return noted

        yield limit
    plans.plan_forward.cache_clear()
    plans.plan_backward.cache_clear()


def assert_padded(noted: Sequence[Launch], image_heads: int, *kernels: str) -> None:
    """These kernels ran, in more blocks than there are (image, head)."""
    names = {launch.kernel.name.partition("<")[0] for launch in noted}
    assert names >= set(kernels)
    for launch in noted:
        if launch.kernel.name.partition("<")[0] in kernels:
            _, y, z = launch.grid
            assert image_heads < y * z < image_heads + z
            assert z > 1


def five_images(inputs: fused.Fused) -> fused.Fused:
    """The two images of the inputs twice, and the first once more."""
    names = "value", "references", "offsets", "logits", "grad_output"
    tensors = {name: getattr(inputs, name) for name in names}
    return inputs._replace(**{name: torch.cat([t, t, t[:1]]) for name, t in tensors.items()})


# The instantiations that other tests compile for the sanitizers, too.
PLAIN = random_inputs(FOUR, n=1, m=8, d=32, lq=37, p=4)
SPLIT = random_inputs(THREE, n=1, m=8, d=32, lq=5, p=4)
HALF = random_inputs(((9, 9),), n=1, m=16, d=16, lq=21, p=2, dtypes=(F16, F16, F16))
GENERIC = random_inputs(THREE, n=5, m=3, d=30, lq=11, p=3)
FIXED = random_inputs(THREE, n=5, m=3, d=8, lq=11, p=3)
ENCODER = random_inputs(((17, 19), (3, 3)), n=5, m=2, d=32, lq=332, p=4)
ONE_IMAGE = random_inputs(((17, 19), (3, 3)), n=1, m=2, d=32, lq=332, p=4)
FUSED = five_images(fused.fused((4, 4, 4), 4, lq=13))


@pytest.mark.parametrize(
    ("inputs", "multiprocessors", "most"),
    [(PLAIN, 0, 3), (SPLIT, MANY, 3), (HALF, 0, 3)],
    ids=["plain", "split-k", "half"],
)
def test_plain(padded, inputs: Inputs, multiprocessors: int, most: int) -> None:
    noted = padded(most)
    check_forward(inputs, launches.forward(inputs, multiprocessors, sanitize=True))
    check_backward(inputs, launches.backward(inputs, multiprocessors, sanitize=True))
    assert_padded(
        noted, inputs.value.shape[0] * inputs.value.shape[2], "msda_forward", "msda_backward"
    )


def test_generic(padded) -> None:
    noted = padded(4)
    check_forward(GENERIC, launches.forward(GENERIC, sanitize=True))
    check_backward(GENERIC, launches.backward(GENERIC, sanitize=True))
    assert_padded(noted, 15, "msda_forward_generic", "msda_backward_generic")


def test_fixed_point(padded) -> None:
    noted = padded(4)
    check_backward(FIXED, launches.backward_fixed_point(FIXED, sanitize=True))
    kernels = "msda_fixed_point_scale", "msda_backward", "msda_fixed_point_finish"
    assert_padded(noted, 15, *kernels)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "fixed-point"])
def test_binned(padded, deterministic: bool) -> None:
    noted = padded(4)
    options: dict[str, Any] = {"deterministic": deterministic, "sanitize": True}
    grad_value = launches.backward_binned(ENCODER, **options)
    check_backward(ENCODER, (grad_value, None, None), (True, False, False))
    assert_padded(noted, 10, "msda_backward_value_binned")


def test_query_tiles(padded) -> None:
    noted = padded(4)
    by_tiles = {"grids": None, "choice": Choice("query tiles", "test")}
    check_forward(ENCODER, launches.forward(ENCODER, sanitize=True, **by_tiles))
    assert_padded(noted, 10, "msda_forward_query_tiles")


def test_fused(padded) -> None:
    noted = padded(4)
    fused.check_forward(FUSED, fused.forward(FUSED, sanitize=True))
    fused.check_backward(FUSED, fused.backward(FUSED, sanitize=True))
    assert_padded(noted, 10, "msda_forward", "msda_backward")
    assert 5 * 13 % (plans.BLOCK // plans.WARP)  # warps of msda_reference_gradient without a query


# Of 32 lanes, the last groups of some range have no row; then 332 rows of a head on three blocks.
@pytest.mark.parametrize("multiprocessors", [5, 6])
def test_persistent(multiprocessors: int) -> None:
    persistent = {"grids": None, "choice": Choice("persistent, 1 per multiprocessor", "test")}
    output = launches.forward(ONE_IMAGE, multiprocessors, sanitize=True, **persistent)
    check_forward(ONE_IMAGE, output)


def test_persistent_gradients_of_points() -> None:
    inputs = random_inputs(((24, 24),), n=1, m=4, d=16, lq=576, p=2)
    persistent = {"grids": None, "choice": Choice("persistent, 1 per multiprocessor", "test")}
    gradients = launches.backward(inputs, 7, needs=(False, True), sanitize=True, **persistent)
    check_backward(inputs, gradients, (False, True, True))


def test_tiled() -> None:
    """A last tile that is not full, points that are no whole turns of a block."""
    inputs = random_inputs(
        ((20, 40), (5, 3)), n=2, m=1, d=8, lq=53, p=5, dtypes=(F16, torch.float32)
    )
    grad_value = launches.backward_tiled(inputs, sanitize=True)
    check_backward(inputs, (grad_value, None, None), (True, False, False))
