# SPDX-License-Identifier: Apache-2.0
"""Every instantiation through the CUDA compiler, on a machine without a GPU: registers, spills, no headers needed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any, NamedTuple

import pytest

from cupy_msda.cuda.compile import OPTIONS, Kernel, assemble
from cupy_msda.cuda.plans import Choice, Device, Launch, Plan, plan_backward, plan_forward
from cupy_msda.problem import Grids, LevelTable, Problem, References

nvrtc = pytest.importorskip(
    "cupy_backends.cuda.libs.nvrtc", reason="needs CuPy for its binding of NVRTC"
)

PINNED = (12, 9)  # the version of constraints.txt, which knows all that are compiled for
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# NVRTC 12.9 of every kernel for compute capability 7.0 or 7.2.
DEPRECATED = "nvrtc: warning: Architectures prior to '<compute/sm>_75' are deprecated"
LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21), (7, 11))
F16, BF16, F32, F64 = "float16", "bfloat16", "float32", "float64"
MANY = 10**6  # multiprocessors: split-K as far as it goes


class Resources(NamedTuple):
    """What ptxas reports of one kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_for(
    kernel: Kernel, architecture: int, source: str | None = None
) -> tuple[Resources, bytes]:
    """Compile as CuPy would. Returns what the log says, and the machine code."""
    if architecture not in nvrtc.getSupportedArchs() and nvrtc.getVersion() != PINNED:
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not know sm_{architecture}")
    program = nvrtc.createProgram(source or assemble(kernel.file), kernel.file, (), ())
    try:
        nvrtc.addNameExpression(program, kernel.name)
        options = (*OPTIONS, f"-arch=sm_{architecture}", "-ftz=true", "--ptxas-options=-v")
        try:
            nvrtc.compileProgram(program, options)
        finally:
            log = nvrtc.getProgramLog(program)
        assert nvrtc.getLoweredName(program, kernel.name)
        code = nvrtc.getCUBIN(program) + b"\0"  # CuPy cuts off the last byte, as of a string
    except nvrtc.NVRTCError as error:
        raise AssertionError(f"{kernel.name} for sm_{architecture}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    assert "warning" not in log.replace(DEPRECATED, ""), log
    numbers = [
        re.search(rf"(\d+) {what}", log)
        for what in ("registers", "bytes spill stores", "bytes smem")
    ]
    return Resources(*(int(number[1]) if number else 0 for number in numbers)), code


def problem(
    dtypes: tuple[str, str, str], d: int, levels: int, points: int, heads: int = 8
) -> tuple[Problem, LevelTable]:
    """A problem of the given kind at 800x1333."""
    sizes = LEVELS[:levels]
    size = sum(h * w for h, w in sizes)
    table = LevelTable(sizes, tuple(sum(h * w for h, w in sizes[:i]) for i in range(levels)))
    return Problem(1, size, heads, d, 900, levels, points, *dtypes), table


DTYPES = {
    "f32": (F32, F32, F32),
    "f16": (F16, F16, F16),
    "f16-mixed": (F16, F32, F32),
    "f16-locations-f32": (F16, F32, F16),
    "bf16": (BF16, BF16, BF16),
    "bf16-mixed": (BF16, F32, F32),
}
# (D, L, P, M) of shapes.md and the widest and narrowest that the specialised kernels take.
SHAPES = {
    "detr": (32, 4, 4, 8),
    "dino5": (32, 5, 4, 8),
    "three-levels": (32, 3, 4, 8),
    "bevformer-sca": (32, 4, 8, 8),
    "bevformer-tsa": (32, 1, 4, 8),
    "rfdetr": (16, 1, 2, 16),
    "dfine": (32, 3, 6, 8),
    "dfine-n": (16, 2, 6, 8),
    "d8": (8, 4, 4, 8),
    "d64": (64, 4, 4, 4),
    "d128": (128, 4, 4, 2),
}


QUERIES = 900  # of a decoder: deterministic gradients of value come from tiles
MANY_QUERIES = 20_000  # they come from fixed point


def planned(plan: Plan) -> list[Kernel]:
    """The kernels that a plan launches, in order."""
    return [step.kernel for step in plan.launches if isinstance(step, Launch)]


def forward(
    shape: str,
    dtypes: str,
    multiprocessors: int = 1,
    grids: Grids = (),
    choice: Choice | None = None,
    references: References | None = None,
) -> Kernel:
    """The forward of a shape."""
    case = of_shape(shape, dtypes, references=references)
    (kernel,) = planned(plan_forward(*case, Device(multiprocessors, "90"), grids, choice))
    return kernel


def backward(
    shape: str,
    dtypes: str,
    multiprocessors: int = 1,
    grids: Grids = (),
    queries: int = QUERIES,
    references: References | None = None,
    **needs: bool,
) -> list[Kernel]:
    """The launches of a backward of a shape."""
    case = of_shape(shape, dtypes, queries, references)
    return planned(plan_backward(*case, Device(multiprocessors, "90"), grids, **needs))


def of_shape(
    shape: str, dtypes: str, queries: int = QUERIES, references: References | None = None
) -> tuple[Problem, LevelTable]:
    """The problem of a shape."""
    d, levels, points, heads = SHAPES[shape]
    found, table = problem(DTYPES[dtypes], d, levels, points, heads)
    return found._replace(num_queries=queries, references=references), table


def kernels(shape: str, dtypes: str, references: References | None = None) -> dict[str, Kernel]:
    """Every launch that the shape may lead to. At d128 no backward is persistent: its key holds the plain kernel."""
    case = shape, dtypes
    fused: dict[str, Any] = {"references": references}
    points = {"needs_value": False} | fused
    value = {"needs_points": False} | fused
    return {
        "forward": forward(*case, **fused),
        "forward-query-tiles": forward(
            *case, grids=LEVELS, choice=Choice("query tiles", "test"), **fused
        ),
        "forward-persistent": forward(*case, grids=LEVELS, **fused),
        "forward-split-k": forward(*case, MANY, **fused),
        "backward": backward(*case, **fused)[0],
        "backward-split-k": backward(*case, MANY, **fused)[0],
        "backward-value": backward(*case, **value)[0],
        "backward-points": backward(*case, **points)[0],
        "backward-points-persistent": backward(*case, grids=LEVELS, **points)[0],
        "backward-value-binned": backward(*case, grids=LEVELS, **value)[0],
    }


def references_of(shape: str, dtype: str, coordinates: int, by_level: bool = True) -> References:
    """Reference points of every image."""
    return References(1, SHAPES[shape][1] if by_level else 1, coordinates, dtype)


def reference_gradient(shape: str, dtypes: str, references: References) -> Kernel:
    """The gradient of reference points."""
    needs = {"needs_value": False, "needs_references": True}
    return backward(shape, dtypes, references=references, **needs)[-1]


def fixed_point_kernels(
    shape: str, dtypes: str, multiprocessors: int = 1, needs_points: bool = True
) -> list[Kernel]:
    """The three launches that accumulate gradients of value in fixed point."""
    needs = {"deterministic": True, "needs_points": needs_points}
    return backward(shape, dtypes, multiprocessors, queries=MANY_QUERIES, **needs)


def binned_fixed_point_kernel(shape: str, dtypes: str) -> Kernel:
    """The binned gradient of value, accumulated in fixed point."""
    needs = {"deterministic": True, "needs_points": False}
    return backward(shape, dtypes, grids=LEVELS, queries=MANY_QUERIES, **needs)[1]


ROUNDED = ("f16", "bf16")


def round_kernel(dtype: str) -> Kernel:
    """The launch that rounds the float32 accumulator of a 16-bit gradient of value."""
    return backward("detr", dtype)[-1]


def tiled_kernel(shape: str, dtypes: str) -> Kernel:
    """The gradient of value by output-stationary tiles."""
    (kernel,) = backward(shape, dtypes, deterministic=True, needs_points=False)
    return kernel


class Budget(NamedTuple):
    """The most that a kernel may use per thread."""

    registers: int
    spill_bytes: int


# A multiprocessor has 65536 registers: 64 a thread leave room for four blocks of 256, 80 for three.
# The compiler aims at such steps by itself, and accepts a few bytes of spills for them.
BUDGETS = {
    "forward.cu": Budget(64, 16),
    "backward.cu": Budget(80, 44),
    "generic.cu": Budget(80, 16),
    "fixed_point.cu": Budget(64, 0),
    "round.cu": Budget(40, 0),
    "backward_value_tiled.cu": Budget(64, 12),
    "backward_value_binned.cu": Budget(80, 0),
    "reference_gradient.cu": Budget(64, 0),
}


Budgets = Mapping[str, Budget]


def check_budgets(kernels: Iterable[Kernel], architecture: int, budgets: Budgets = BUDGETS) -> None:
    """Compile the kernels, as many at a time as there are cores, and hold them to their budgets."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(check_budget, set(kernels), repeat(architecture), repeat(budgets)):
            pass


def check_budget(
    kernel: Kernel, architecture: int, budgets: Budgets = BUDGETS
) -> tuple[Resources, bytes]:
    """Compile one kernel and hold it to its budget."""
    used, code = compile_for(kernel, architecture)
    budget = budgets[kernel.file]
    what = f"{kernel.name} on sm_{architecture}: {used}, {budget}"
    assert used.registers <= budget.registers, what
    assert used.spill_bytes <= budget.spill_bytes, what
    assert used.shared_bytes <= 48 * 1024, what
    return used, code


# The kernels of "detr" with one dtype for all inputs are in test_kernel_budget.py.
MIXED = [dtypes for dtypes, three in DTYPES.items() if len(set(three)) > 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtypes", MIXED)
def test_detr_on_every_architecture(dtypes: str, architecture: int) -> None:
    check_budgets(kernels("detr", dtypes).values(), architecture)


# Those whose machine code differs by more than a few instructions.
DIFFERENT = (75, 80, 90, 100, 120)
# One dtype of each size: those of one size differ in their conversions only, which detr has all of.
OF_EVERY_SHAPE = [
    *(("f32", architecture) for architecture in DIFFERENT),
    *(("bf16", architecture) for architecture in (75, 90, 120)),
]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "detr"])
@pytest.mark.parametrize(("dtypes", "architecture"), OF_EVERY_SHAPE)
def test_every_shape(shape: str, dtypes: str, architecture: int) -> None:
    check_budgets(kernels(shape, dtypes).values(), architecture)


# Shape, dtypes, those of reference points, their coordinates, and whether there is one for each level.
FUSED = {
    "detr": ("detr", "f16-mixed", F32, 2, True),
    "dino": ("detr", "bf16-mixed", BF16, 4, True),
    "dfine": ("dfine", "f32", F32, 4, False),
    "rfdetr": ("rfdetr", "f16", F16, 4, True),
    "most-stages": ("d8", "f32", F32, 4, True),
    "d128": ("d128", "bf16", F32, 2, True),
}


@pytest.mark.parametrize("architecture", DIFFERENT)
@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, architecture: int) -> None:
    shape, dtypes, *kind = FUSED[name]
    references = references_of(shape, *kind)
    of_references = reference_gradient(shape, dtypes, references)
    check_budgets([*kernels(shape, dtypes, references).values(), of_references], architecture)


@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_fused_with_other_sampling(architecture: int) -> None:
    """Uneven points, nearest pixels and masks, in what a decoder runs."""
    case, table = of_shape("dfine", "f32", references=references_of("dfine", F32, 4, False))
    for change in (
        {"num_points": (3, 6, 3)},
        {"interpolation": "nearest", "has_mask": True, "num_points": (3, 6, 3)},
    ):
        changed = case._replace(**change), table, Device(MANY, "90")
        plans = plan_forward(*changed), plan_backward(*changed, needs_references=True)
        check_budgets([kernel for plan in plans for kernel in planned(plan)], architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtypes", MIXED)
def test_fixed_point(dtypes: str, architecture: int) -> None:
    check_budgets(fixed_point_kernels("detr", dtypes), architecture)


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_fixed_point_of_other_shapes(architecture: int) -> None:
    others = [
        *(fixed_point_kernels(shape, "f32")[1] for shape in ("dino5", "rfdetr", "d64")),
        fixed_point_kernels("detr", "f32", MANY)[1],
        fixed_point_kernels("dfine", "bf16", MANY)[1],
        fixed_point_kernels("detr", "f32", needs_points=False)[1],
        *(binned_fixed_point_kernel("detr", dtypes) for dtypes in MIXED),
        *(
            binned_fixed_point_kernel(shape, "f32")
            for shape in ("dino5", "bevformer-sca", "rfdetr", "d64")
        ),
        *(binned_fixed_point_kernel(shape, "bf16") for shape in ("dfine", "d8", "d128")),
    ]
    check_budgets(others, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding(architecture: int) -> None:
    check_budgets(map(round_kernel, ("f16", "bf16")), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_stationary_tiles(architecture: int) -> None:
    tiled = [
        *(tiled_kernel("detr", dtypes) for dtypes in MIXED),
        *(tiled_kernel(shape, "f32") for shape in ("dino5", "rfdetr", "d8", "d64", "d128")),
        *(tiled_kernel(shape, "bf16") for shape in ("dfine", "d8", "d128")),
    ]
    check_budgets(tiled, architecture)


# How points are sampled: of M = 8, D = 32 and three levels.
SAMPLING: dict[str, dict[str, Any]] = {
    "uneven": {"num_points": (3, 6, 3)},
    "nearest": {"interpolation": "nearest"},
    "masked": {"has_mask": True},
    "uneven-masked": {"num_points": (3, 0, 6), "has_mask": True},
    "all": {"num_points": (3, 6, 3), "interpolation": "nearest", "has_mask": True},
}


def sampled(change: dict[str, Any], dtypes: str) -> set[Kernel]:
    """Every launch of points that are sampled so, persistent backwards of points apart."""
    of_shape, table = problem(DTYPES[dtypes], 32, 3, 4)
    few, many = (
        (of_shape._replace(num_queries=queries, **change), table)
        for queries in (QUERIES, MANY_QUERIES)
    )
    one, most, everywhere = Device(1, "90"), Device(MANY, "90"), ((1, MANY_QUERIES),)
    plans = (
        *(plan_forward(*few, device, ()) for device in (one, most)),
        plan_forward(*many, one, everywhere),
        *(plan_backward(*few, device, ()) for device in (one, most)),
        plan_backward(*few, one, (), needs_value=False),
        plan_backward(*many, one, everywhere, needs_points=False),
        *(
            plan_backward(*case, one, grids, needs_points=False, deterministic=True)
            for case, grids in ((few, ()), (many, ()), (many, everywhere))
        ),
    )
    return {kernel for plan in plans for kernel in planned(plan)}


# A mask takes registers: of the backward, two blocks fit sm_100 instead of three.
SAMPLED = BUDGETS | {
    "forward.cu": Budget(64, 4),
    "backward.cu": Budget(90, 4),
    "backward_value_tiled.cu": Budget(64, 16),
    "generic.cu": Budget(80, 24),
}
NO_SPILLS = {file: budget._replace(spill_bytes=0) for file, budget in BUDGETS.items()}


@pytest.mark.parametrize(
    ("architecture", "dtypes"), [(75, "f32"), (90, "f32"), (100, "f32"), (120, "bf16")]
)
@pytest.mark.parametrize("change", SAMPLING.values(), ids=SAMPLING.keys())
def test_sampling(change: dict[str, Any], architecture: int, dtypes: str) -> None:
    kernels = sampled(change, dtypes)
    assert len({kernel.file for kernel in kernels}) >= 5
    check_budgets(kernels, architecture, NO_SPILLS if architecture == 90 else SAMPLED)


def test_the_nearest_pixel_is_found_in_two_roundings() -> None:
    """A fused multiply-add would round once, and take another pixel than the reference here and there."""
    kernel = """
__global__ void nearest(const float* u, float* to) {
  to[0] = to_pixels<true>(Fractions<float>{u[0], u[1]}, Level{4, 5, 0}).x + 3.0f;
}
"""
    program = nvrtc.createProgram(assemble("point.cuh") + kernel, "nearest.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, "-arch=compute_90", "-ftz=true"))
        ptx = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    assert ptx.count(b"mul.rn.ftz.f32") == 1
    assert b"fma" not in ptx


GENERIC = (*DTYPES.values(), (F64, F64, F64), (F64, F32, F32), (F64, F32, F64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtypes", GENERIC, ids="-".join)
def test_generic(dtypes: tuple[str, str, str], architecture: int) -> None:
    case = problem(dtypes, 30, 4, 4)
    device = Device(1, "90")
    generic = {
        *planned(plan_forward(*case, device)),
        *planned(plan_backward(*case, device)),
        *planned(plan_backward(*case, device, deterministic=True)),
    }
    names = {kernel.name.partition("<")[0] for kernel in generic}
    assert {"msda_forward_generic", "msda_backward_generic"} < names
    assert len([kernel for kernel in generic if kernel.file == "generic.cu"]) == 3
    check_budgets(generic, architecture)


@pytest.mark.parametrize("architecture", [75, 90, 100, 120])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_generic_sampling(interpolation: str, architecture: int) -> None:
    for dtypes in ((F32, F32, F32), (F64, F64, F64)):
        of_shape, table = problem(dtypes, 30, 4, 4)
        case = of_shape._replace(interpolation=interpolation, has_mask=True), table
        generic = {
            *planned(plan_forward(*case, Device(1, "90"))),
            *planned(plan_backward(*case, Device(1, "90"), deterministic=True)),
        }
        check_budgets(generic, architecture, SAMPLED)


@pytest.mark.parametrize("architecture", [70, 72, 87, 103, 121])
def test_other_architectures_compile(architecture: int) -> None:
    """The least compute capability, and those whose machine code no table counts; not all in every version of NVRTC."""
    if architecture not in nvrtc.getSupportedArchs():
        version = ".".join(map(str, nvrtc.getVersion()))
        pytest.skip(f"NVRTC {version} does not compile for sm_{architecture}")
    generic = {
        *planned(plan_forward(*problem((F64, F32, F32), 30, 4, 4), Device(1, "90"))),
        *planned(plan_backward(*problem((F16, F32, F32), 30, 4, 4), Device(1, "90"))),
    }
    of_detr = {
        *kernels("detr", "bf16").values(),
        *fixed_point_kernels("detr", "f32"),
        tiled_kernel("detr", "f32"),
    }
    check_budgets(generic | of_detr, architecture)


def test_compiler_errors_name_the_file() -> None:
    kernel = kernels("detr", "f32")["forward"]
    broken = assemble("forward.cu").replace("sum[VEC] = {};", "sum[VEC] = {} oops;", 1)
    with pytest.raises(AssertionError, match=r"kernels/forward\.cu\(\d+\): error"):
        compile_for(kernel, 90, broken)
