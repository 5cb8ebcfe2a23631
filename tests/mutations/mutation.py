# SPDX-License-Identifier: Apache-2.0
"""What a mutation is, and short names of the tests that find them."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault. `survives`: why no test can fail, if that is so."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""


def fault(name: str, old: str, new: str, *tests: str, survives: str = "") -> Mutation:
    """A mutation that these tests find."""
    return Mutation(name, old, new, tests, survives)


EMULATOR = "tests/emulator/test_"
KERNELS, SAMPLING = f"{EMULATOR}kernels.py::test_", f"{EMULATOR}sampling.py::test_"
BINNED, TILED = f"{EMULATOR}binned.py::test_", f"{EMULATOR}tiled.py::test_"
ORDERED = f"{EMULATOR}binned_deterministic.py::test_"
FIXED, FUSED = f"{EMULATOR}fixed_point.py::test_", f"{EMULATOR}fused.py::test_"
SCHEDULER, FINITE = f"{EMULATOR}tile_scheduler.py::test_", f"{EMULATOR}non_finite.py::test_"
ROUND, EDGES = f"{EMULATOR}round.py::test_", f"{EMULATOR}edges.py::test_"
FUZZ = f"{EMULATOR}fuzz.py::test_random_outputs"
SIZES, MARGIN = f"{EMULATOR}sizes.py::test_", f"{EMULATOR}fixed_point_margin.py::test_"
RACES = f"{EMULATOR}races.py::test_a_kernel_has_no_race"
LIMITS = "tests/test_plan_limits.py::test_"
PLANS, LAUNCH, CPU = (
    "tests/test_plans.py::test_",
    "tests/test_launch.py::test_",
    "tests/test_cpu.py::test_",
)
CPU_FUSED, CPU_PROCESSES = "tests/test_cpu_fused.py::test_", "tests/test_cpu_processes.py::test_"

EXACT = f"{KERNELS}points_on_pixels_and_edges_are_exact"
SPLIT = f"{KERNELS}split_k_forward[d8-f16]"
ROW, ROW_BACK = f"{KERNELS}specialised_forward[d8]", f"{KERNELS}specialised_backward[d8]"
