# SPDX-License-Identifier: Apache-2.0
"""What a call allocates, in bytes beyond its inputs: the formulas of docs/support.md."""

from __future__ import annotations

from cupy_msda.problem import Problem

SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def numbers(problem: Problem) -> tuple[int, int, int]:
    """Elements of value, of the output, and of locations and weights together."""
    value = problem.batch * problem.spatial_size * problem.num_heads * problem.head_dim
    rows = problem.batch * problem.num_queries * problem.num_heads
    return value, rows * problem.head_dim, 3 * rows * problem.row_points


def of_results(problem: Problem) -> tuple[int, int]:
    """The output, and the three gradients."""
    value, output, points = numbers(problem)
    of_value, of_points = SIZE[problem.value_dtype], SIZE[problem.location_dtype]
    return of_value * output, of_value * value + of_points * points


def on_device(problem: Problem, deterministic: bool = False) -> tuple[int, int]:
    """The peak of a forward and of a backward on a device; `deterministic`: in fixed point."""
    value, (output, gradients) = numbers(problem)[0], of_results(problem)
    if deterministic:
        words = 2 if problem.value_dtype == "float64" else 1
        return output, gradients + 8 * (words * value + problem.batch * problem.num_heads)
    return output, gradients + (4 * value if SIZE[problem.value_dtype] == 2 else 0)


def on_host(problem: Problem, threads: int, packed: int = 0) -> tuple[int, int]:
    """The same by the Numba kernels; `packed`: positions of the largest level with more points than positions."""
    (value, output, points), (of_output, of_gradients) = numbers(problem), of_results(problem)
    wide = 8 if problem.value_dtype == "float64" else 4
    scratch = threads * 2 * packed * problem.head_dim * wide
    if SIZE[problem.value_dtype] != 2:
        return of_output, of_gradients + scratch
    # The kernels read copies in float32, which are gone when the results, in float32, too, are rounded.
    points_copied = points if SIZE[problem.location_dtype] == 2 else 0
    copies = 4 * (value + points_copied)
    forward = 4 * output + max(copies, of_output)
    rounded = 2 * (value + points_copied)
    backward = 4 * (value + points) + max(copies + 4 * output + scratch, rounded)
    return forward, backward
