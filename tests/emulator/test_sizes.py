# SPDX-License-Identifier: Apache-2.0
"""Sizes beyond 32 bits: a few images, heads or queries of problems that no memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import BLOCK, WARP, assemble
from cupy_msda.cuda.plans import Choice, Launch, Plan
from cupy_msda.problem import LevelTable
from tests.emulator import fused
from tests.emulator.cases import F16, check_backward, check_forward, same_bits
from tests.emulator.emulator import Emulated
from tests.emulator.fused import Fused
from tests.emulator.launches import PLAIN as PLAINLY
from tests.emulator.launches import Rules, checked, device
from tests.emulator.sampling import mask_of
from tests.emulator.sparse import in_one_pass, is_of, of_image_heads, run, scattered, sparse
from tests.problems import Inputs, random_inputs

SIZES = ((4, 4), (2, 2), (2, 1), (1, 1))
PIXELS = 16 + 4 + 2 + 1
GRADIENTS = "grad_value", "grad_locations", "grad_weights"
IN_ORDER, ON_THE_LEVELS = (), None


def image_heads(images: Sequence[int], heads: int) -> list[int]:
    """The numbers of these images' (image, head)."""
    return [image * heads + head for image in images for head in range(heads)]


class Huge:
    """A problem of `batch` images, three of which are those of `inputs`: the first, one amid, the last."""

    def __init__(self, inputs: Inputs, batch: int, rules: Rules = PLAINLY) -> None:
        problem, self.table = checked(inputs, rules)
        self.inputs, self.problem = inputs, problem._replace(batch=batch)
        self.images = [0, batch // 2 + 1, batch - 1]
        self.image_heads = image_heads(self.images, problem.num_heads)
        self.arrays = {
            name: scattered(tensor, self.images, batch)
            for name, tensor in inputs._asdict().items()
            if name != "sizes"
        }
        if problem.has_mask:
            self.arrays["mask"] = scattered(rules["value_mask"], self.images, batch)

    def blocks(self, step: Launch) -> Any:
        """The blocks of the three images."""
        if step.kernel.file == "backward_value_tiled.cu" or "_persistent<" in step.kernel.name:
            return [(number, 0, 0) for number in self.image_heads]
        return of_image_heads(step, self.image_heads)

    def run(self, plan: Plan, results: dict[str, tuple[int, ...]]) -> list[torch.Tensor]:
        """Run the plan; the three images of the results, which have these shapes."""
        dtype = self.arrays["value"].dtype
        written = {name: sparse(shape, dtype) for name, shape in results.items()}
        if plan.workspace:
            written["accumulator"] = sparse((plan.workspace // 8,), np.int64)
        run(plan, self.arrays | written, self.blocks)
        return [torch.from_numpy(written[name][self.images]) for name in results]

    def forward(self, choice: str, grids: Any = IN_ORDER) -> torch.Tensor:
        """The output of the three images."""
        case = self.problem, self.table, device(1), grids, Choice(choice, "test")
        plan = self.of_one_head(plans.plan_forward(*case))
        return self.run(plan, {"output": self.problem.output_shape})[0]

    def backward(self, choice: str, grids: Any = IN_ORDER, **options: Any) -> list[Any]:
        """The gradients of the three images, None where not needed."""
        plan = plans.plan_backward.__wrapped__(
            *(self.problem, self.table, device(1), grids),
            choice=Choice(choice, "test"),
            **options,
        )
        needs = options.get("needs_value", True), *[options.get("needs_points", True)] * 2
        shapes = (self.arrays[name].shape for name in ("value", "locations", "weights"))
        wanted = {
            name: shape for name, shape, need in zip(GRADIENTS, shapes, needs, strict=True) if need
        }
        results = iter(self.run(self.of_one_head(plan), wanted))
        return [next(results) if need else None for need in needs]

    def of_one_head(self, plan: Plan) -> Plan:
        """The plan with as many persistent blocks as there are (image, head): each takes the rows of one."""
        grid = self.problem.batch * self.problem.num_heads, 1, 1
        return plan._replace(
            launches=tuple(
                step._replace(grid=grid)
                if isinstance(step, Launch) and "_persistent<" in step.kernel.name
                else step
                for step in plan.launches
            )
        )


PLAIN = random_inputs(((2, 2), (1, 2), (2, 1), (1, 1)), n=3, m=8, d=32, lq=5, p=4)
PIXEL_QUERIES = random_inputs(SIZES, n=3, m=2, d=32, lq=PIXELS, p=4)


@pytest.fixture(scope="module")
def many_rows() -> Huge:
    """More than 2^32 rows, and more than 2^31 (image, head): y and z of the grid are nearly as large as they may be."""
    return Huge(PLAIN, 5 * 10**8)


@pytest.fixture(scope="module")
def many_scheduled_rows() -> Huge:
    """Nearly 2^31 rows, the most that the tile scheduler numbers."""
    huge = Huge(PIXEL_QUERIES, 2**31 // (2 * PIXELS))
    assert plans._follows_grids(huge.problem, ON_THE_LEVELS)
    assert not plans._follows_grids(huge.problem._replace(num_heads=3), ON_THE_LEVELS)
    return huge


def test_forward(many_rows: Huge) -> None:
    check_forward(PLAIN, many_rows.forward("plain, split-K 1"))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "fixed-point"])
def test_backward(many_rows: Huge, deterministic: bool) -> None:
    with patch.object(plans, "MAX_POINTS_TILED", 0):
        gradients = many_rows.backward("plain, split-K 1", deterministic=deterministic)
    check_backward(PLAIN, gradients)


def test_tiled() -> None:
    """Nearly 2^31 tiles, the most that x takes."""
    huge = Huge(PLAIN, 2**28 - 1)
    assert plans.is_tiled(huge.problem)
    assert not plans.is_tiled(huge.problem._replace(batch=2**28))
    needs = {"needs_points": False, "deterministic": True}
    check_backward(PLAIN, huge.backward("tiled", **needs), (True, False, False))


@pytest.mark.parametrize("kernel", ["persistent, 1 per multiprocessor", "query tiles"])
def test_scheduled_forward(many_scheduled_rows: Huge, kernel: str) -> None:
    check_forward(PIXEL_QUERIES, many_scheduled_rows.forward(kernel, ON_THE_LEVELS))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "fixed-point"])
def test_binned(many_scheduled_rows: Huge, deterministic: bool) -> None:
    needs = {"needs_points": False, "deterministic": deterministic}
    with patch.object(plans, "MAX_POINTS_TILED", 0):
        gradients = many_scheduled_rows.backward("binned", ON_THE_LEVELS, **needs)
    check_backward(PIXEL_QUERIES, gradients, (True, False, False))


def test_scheduled_gradients_of_points(many_scheduled_rows: Huge) -> None:
    kernel = "persistent, 1 per multiprocessor"
    gradients = many_scheduled_rows.backward(kernel, ON_THE_LEVELS, needs_value=False)
    check_backward(PIXEL_QUERIES, gradients, (False, True, True))


@pytest.mark.parametrize(
    ("d", "choice"), [(32, "plain, split-K 1"), (6, "generic")], ids=["specialised", "generic"]
)
def test_masks(d: int, choice: str) -> None:
    """More than 2^32 positions of masks; what is masked is NaN."""
    inputs = random_inputs(((7, 9), (3, 5), (2, 2)), n=3, m=2, d=d, lq=5, p=4)
    rules = {"value_mask": mask_of(inputs)}
    inputs.value[~rules["value_mask"]] = torch.nan
    huge = Huge(inputs, 2**26, rules)
    assert huge.arrays["mask"].size > 2**32
    check_forward(inputs, huge.forward(choice), rules)
    with patch.object(plans, "MAX_POINTS_TILED", 0):
        gradients = huge.backward(choice, deterministic=d == 6)
    check_backward(inputs, gradients, rules=rules)


# --- many queries --------------------------------------------------------------------------------

QUERIES = 2**31 - 1
CHOSEN = [0, 2**30 + 5, QUERIES - 1]
FEW = random_inputs(SIZES, n=2, m=8, d=32, lq=3, p=4)
FEW_GENERIC = random_inputs(SIZES, n=2, m=3, d=30, lq=3, p=3)


def among_many(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Three queries of a small array, at their numbers among 2^31 - 1."""
    huge = sparse((2, QUERIES, *tensor.shape[2:]), np.float32)
    huge[:, CHOSEN] = tensor.numpy()
    return huge


def results_among_many(inputs: Inputs, backward: bool, choice: str, **options: Any) -> list[Any]:
    """The output or the gradients by two images of 2^31 - 1 queries, three of which are those of the inputs."""
    problem, table = checked(inputs)
    problem = problem._replace(num_queries=QUERIES)
    case = problem, table, device(1), ()
    arrays: dict[str, Any] = {"value": inputs.value.numpy()}
    for name in ("locations", "weights", "grad_output"):
        arrays[name] = among_many(getattr(inputs, name))
    arrays["output"] = sparse(problem.output_shape, np.float32)
    arrays["grad_value"] = np.zeros_like(arrays["value"])
    arrays["grad_locations"] = sparse(arrays["locations"].shape, np.float32)
    arrays["grad_weights"] = sparse(arrays["weights"].shape, np.float32)
    if backward:
        plan = plans.plan_backward.__wrapped__(*case, choice=Choice(choice, "test"), **options)
        arrays["accumulator"] = np.zeros(plan.workspace // 8, np.int64)
    else:
        plan = plans.plan_forward(*case, Choice(choice, "test"))

    def blocks(step: Launch) -> Any:
        heads = range(2 * problem.num_heads)
        if is_of(step, "msda_fixed_point_finish"):
            return of_image_heads(step, heads)
        assert step.grid[0] > 65535
        of_block = -(-QUERIES // step.grid[0])
        return of_image_heads(step, heads, [query // of_block for query in CHOSEN])

    run(in_one_pass(plan, "msda_fixed_point_scale", QUERIES), arrays, blocks)
    if not backward:
        return [torch.from_numpy(arrays["output"][:, CHOSEN])]
    of_points = (arrays[name][:, CHOSEN] for name in GRADIENTS[1:])
    return [torch.from_numpy(array) for array in (arrays["grad_value"], *of_points)]


OF_MANY_QUERIES = pytest.mark.parametrize(
    ("inputs", "choice"),
    [(FEW, "plain, split-K 1"), (FEW_GENERIC, "generic")],
    ids=["specialised", "generic"],
)


@OF_MANY_QUERIES
def test_forward_of_many_queries(inputs: Inputs, choice: str) -> None:
    check_forward(inputs, *results_among_many(inputs, False, choice))


@OF_MANY_QUERIES
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "fixed-point"])
def test_backward_of_many_queries(inputs: Inputs, choice: str, deterministic: bool) -> None:
    gradients = results_among_many(inputs, True, choice, deterministic=deterministic)
    check_backward(inputs, gradients)


# --- many positions ------------------------------------------------------------------------------

START = 100


class Large(NamedTuple):
    """Points of a level of 4 x 8 pixels that is the last corner of one of `height` x `width`, powers of two.

    They lie on 64ths of pixels, right of and below its first one, so that both levels give the same numbers.
    """

    inputs: Inputs
    height: int
    width: int

    @property
    def positions(self) -> np.ndarray[Any, Any]:
        """Where the small level's pixels lie in value."""
        rows, columns = self.height - 4 + np.arange(4), self.width - 8 + np.arange(8)
        return (START + rows[:, None] * self.width + columns).reshape(-1)

    @property
    def locations(self) -> torch.Tensor:
        """The points as fractions of the large level."""
        first = torch.tensor([self.width - 8, self.height - 4])
        pixels = self.inputs.locations * torch.tensor([8, 4]) + first
        return pixels / torch.tensor([self.width, self.height])


def large(height: int, width: int, m: int, d: int, p: int) -> Large:
    """Random points of such a level."""
    inputs = random_inputs([(4, 8)], n=3, m=m, d=d, lq=5, p=p)
    pixels = torch.rand(inputs.locations.shape, generator=torch.Generator().manual_seed(3))
    pixels = (pixels * torch.tensor([8 * 64, 4 * 64])).floor() / 64
    locations = (pixels + 0.5) / torch.tensor([8, 4])
    return Large(inputs._replace(locations=locations), height, width)


# As many pixels as a level may have for generic kernels, but for a factor of two, and for specialised ones.
LARGE = {"generic": large(2**14, 2**16, 2, 6, 3), "specialised": large(2**10, 2**10, 8, 32, 4)}
on_large = pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())


def of_a_large_level(case: Large, backward: bool, deterministic: bool = False) -> list[Any]:
    """The output, or the gradients as those of the small level."""
    inputs, positions = case.inputs, case.positions
    problem = checked(inputs)[0]._replace(spatial_size=START + case.height * case.width)
    plan_of = problem, LevelTable(((case.height, case.width),), (START,)), device(1), ()
    shape = problem.batch, problem.spatial_size, *inputs.value.shape[2:]
    arrays: dict[str, Any] = {"value": sparse(shape, np.float32)}
    arrays["value"][:, positions] = inputs.value.numpy()
    arrays |= {"locations": case.locations.numpy(), "weights": inputs.weights.numpy()}
    arrays["grad_output"] = inputs.grad_output.numpy()
    arrays["output"] = np.zeros(problem.output_shape, np.float32)
    arrays["grad_value"] = sparse(shape, np.float32)
    arrays["grad_locations"] = np.zeros_like(arrays["locations"])
    arrays["grad_weights"] = np.zeros_like(arrays["weights"])

    def blocks(step: Launch) -> Any:
        finish = is_of(step, "msda_fixed_point_finish")
        xs = sorted({int(p) // (BLOCK // WARP) for p in positions}) if finish else None
        return of_image_heads(step, range(problem.batch * problem.num_heads), xs)

    if not backward:
        run(plans.plan_forward(*plan_of), arrays, blocks)
        return [torch.from_numpy(arrays["output"])]
    with patch.object(plans, "MAX_POINTS_TILED", 0):
        plan = plans.plan_backward.__wrapped__(*plan_of, deterministic=deterministic)
    arrays["accumulator"] = sparse((plan.workspace // 8,), np.int64)
    run(in_one_pass(plan, "msda_fixed_point_finish", problem.spatial_size), arrays, blocks)
    scale = torch.tensor([8 / case.width, 4 / case.height])
    by_locations = torch.from_numpy(arrays["grad_locations"]) * scale
    by_value = torch.from_numpy(arrays["grad_value"][:, positions])
    return [by_value, by_locations, torch.from_numpy(arrays["grad_weights"])]


@on_large
def test_forward_in_a_large_level(case: Large) -> None:
    check_forward(case.inputs, *of_a_large_level(case, False))


@on_large
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "fixed-point"])
def test_backward_in_a_large_level(case: Large, deterministic: bool) -> None:
    check_backward(case.inputs, of_a_large_level(case, True, deterministic))


# --- fused, rounded ------------------------------------------------------------------------------

BOXES = fused.CASES["points"]


def fused_launches(inputs: Fused, plan: Plan, batch: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """The results of a plan for `batch` images, the first and the last of which are those of the inputs."""
    images = [0, batch - 1]
    heads = image_heads(images, inputs.value.shape[2])
    arrays = {
        name: scattered(tensor, images, batch)
        for name, tensor in zip(
            ("value", "references", "locations", "weights", "grad_output"),
            (*inputs.tensors, inputs.grad_output),
            strict=True,
        )
    }
    written = {name: sparse(shape, np.float32) for name, shape in shapes.items()}
    queries = inputs.offsets.shape[1]

    def blocks(step: Launch) -> Any:
        if is_of(step, "msda_reference_gradient"):  # a warp for each query
            first = [image * queries // (BLOCK // WARP) for image in images]
            return [(x, 0, 0) for x in {*range(first[0] + 11), *range(first[1], step.grid[0])}]
        return of_image_heads(step, heads)

    run(plan, arrays | written, blocks)
    return {name: torch.from_numpy(array[images]) for name, array in written.items()}


def many_fused(inputs: Fused) -> tuple[Any, LevelTable, Any, tuple[()]]:
    """Nearly 2^31 points, the most that a fused call has: the problem and the rest of what a plan takes."""
    problem, table = inputs.problem
    points = problem.point_elements // problem.batch
    batch = (2**31 - 1) // points
    references = problem.references._replace(batch=batch)
    problem = problem._replace(batch=batch, references=references)
    assert not plans.fused_limit(problem, False)
    assert plans.fused_limit(problem._replace(batch=batch + 1), False)
    return problem, table, device(1), ()


def test_fused_forward() -> None:
    case = many_fused(BOXES)
    plan = plans.plan_forward(*case, Choice("plain, split-K 1", "test"))
    shapes = {"output": case[0].output_shape}
    fused.check_forward(BOXES, fused_launches(BOXES, plan, case[0].batch, shapes)["output"])


def test_fused_backward() -> None:
    case = many_fused(BOXES)
    batch = case[0].batch
    plan = plans.plan_backward.__wrapped__(
        *case, needs_references=True, choice=Choice("plain, split-K 1", "test")
    )
    names = "grad_value", "grad_references", "grad_locations", "grad_weights"
    shapes = {
        name: (batch, *tensor.shape[1:]) for name, tensor in zip(names, BOXES.tensors, strict=True)
    }
    shapes["by_location"] = shapes["grad_locations"]
    results = fused_launches(BOXES, plan, batch, shapes)
    fused.check_backward(BOXES, [results[name] for name in names])


def test_rounding() -> None:
    """A block for each 1024 elements, of which the last are not four."""
    shape = 2**24 + 1, 23, 3, 31
    problem = checked(PLAIN)[0]._replace(
        batch=shape[0], spatial_size=23, num_heads=3, head_dim=31, value_dtype="float16"
    )
    elements, of_block = problem.value_elements, 4 * BLOCK
    assert elements % 4 == 3
    accumulator, bits = sparse((elements,), np.float32), sparse((elements,), np.int16)
    blocks = [0, 2**21 - 1, 2**21, 2**22, -(-elements // of_block) - 1]
    chosen = np.unique(
        np.concatenate([block * of_block + np.arange(of_block) for block in blocks]).clip(
            max=elements - 1
        )
    )
    accumulator[chosen] = numbers = np.random.default_rng(0).normal(size=chosen.size)
    params = plans._params(problem, LevelTable(None, None), 0)
    kernel = Emulated(assemble("round.cu"), "msda_round<half_t>")
    kernel(
        (blocks[-1] + 1, 1, 1),
        (BLOCK, 1, 1),
        [accumulator, bits, params],
        blocks=[(block, 0, 0) for block in blocks],
    )
    expected = torch.from_numpy(numbers.astype(np.float32)).to(F16)
    assert same_bits(torch.from_numpy(bits[chosen]).view(F16), expected)
