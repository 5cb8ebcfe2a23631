# SPDX-License-Identifier: Apache-2.0
"""DTensors, DistributedDataParallel, fully_shard and tensor parallelism, by four processes on the CPU.

Starting processes takes seconds, so one group of four runs all selected checks, each compared with
the numbers of a single process, and each a test of its own here.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from cupy_msda import (  # noqa: E402
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_fused,
    warmup,
)
from cupy_msda.budget import assert_within_budget  # noqa: E402
from cupy_msda.torch import operators  # noqa: E402
from tests.problems import flat_points, random_inputs  # noqa: E402

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)
if torch.__version__ < (2, 5):
    pytest.skip("DTensors need torch 2.5 or later", allow_module_level=True)

from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import parallelize_module  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

# Versions of torch that do as said here, of those that were tried: 2.5.1, 2.6.0, 2.9.1, 2.13.0.
FULLY_SHARD = (2, 9)
DYNAMIC = HEADWISE = (2, 13)
WORLD = 4
SECONDS = 120  # for one check; a hang takes no longer
GROUPS = 4  # at most, since each failure needs another
R, BATCH, QUERY, HEAD = Replicate(), Shard(0), Shard(1), Shard(2)
CHECKS = {}


def check(*variants, since=(2, 5)):
    """Let a function ``check_NAME`` of the 1-D mesh, or of it and one variant, run in the four processes.

    ``test_NAME`` asserts what came of it, for each variant.
    """
    old = pytest.mark.skipif(
        torch.__version__ < since, reason=f"needs torch {since[0]}.{since[1]} or later"
    )

    def register(function):
        name = function.__name__.removeprefix("check_")
        named = {f"{name}[{variant}]": partial(function, variant=variant) for variant in variants}
        CHECKS.update(named or {name: function})

        @pytest.mark.parametrize("name", named or [name], ids=[*map(str, variants)] or ["all"])
        def test(name, outcomes):
            problem = outcomes[name]
            assert problem is None, problem

        globals()[f"test_{name}"] = old(test)
        return function

    return register


# --- the processes ---------------------------------------------------------------------------------


def process(rank, folder, names):
    """One of the four: run the checks, and write what came of each, up to the first failure."""
    warnings.simplefilter("error")
    # torch's tracing of an autograd Function makes an instance, which torch deprecates.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    # torch 2.5 warns so of every distribute_tensor on a CPU.
    warnings.filterwarnings("ignore", "DTensor random operators may not", UserWarning)
    # fully_shard of a mere Linear warns so, too: with three dimensions, that returns a view.
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    with open(folder / f"{rank}.jsonl", "w", encoding="utf-8") as report:
        for name in names:
            torch.manual_seed(0)
            problem = None
            try:
                CHECKS[name](mesh)
            except Exception:
                problem = traceback.format_exc()
            print(json.dumps([name, problem]), file=report, flush=True)
            if problem is not None:  # the others may wait for this one, or not
                break
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_group(folder, names):
    """Run one group of processes; return the checks that ended, with None or what went wrong."""
    folder.mkdir()
    context = torch.multiprocessing.start_processes(
        process, (folder, names), WORLD, join=False, start_method="spawn"
    )
    known, ends = 0, time.monotonic() + SECONDS
    trouble = "no answer in time"
    try:
        while time.monotonic() < ends:
            reported = sum(file.stat().st_size for file in folder.glob("*.jsonl"))
            if reported > known:
                known, ends = reported, time.monotonic() + SECONDS
            if context.join(timeout=1):
                trouble = "ended without a word"
                break
    except Exception as error:
        trouble = str(error)
    finally:
        for one in context.processes:
            one.kill()
            one.join()
    reports = []
    for rank in range(WORLD):
        file = folder / f"{rank}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        reports.append(dict(map(json.loads, lines)))
    ended = {}
    for name in names:
        problems = [report.get(name, trouble) for report in reports]
        bad = [f"process {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
        ended[name] = "\n".join(bad) or None
        if bad:
            break
    return ended


def compile_ahead():
    """Compile the CPU's kernels to disk once, which else each of the four processes does."""
    inputs = random_inputs(**EVEN)
    value, points = inputs.value.shape, inputs.locations.shape
    fused = {"reference_points_shape": (*points[:2], 2, 4)}
    uneven = {"num_points": [2, 1], "interpolation": "nearest", "value_mask": True}
    of_rows = flat_points(inputs, [2, 1]).locations.shape
    for dtype in ("float32", "float64"):
        warmup(value, points, dtype=dtype, device="cpu")
        warmup(value, of_rows, dtype=dtype, device="cpu", **uneven)
        warmup(value, points, dtype=dtype, device="cpu", **fused)
        warmup(value, points, dtype=dtype, device="cpu", **fused, value_mask=True)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What went wrong in each selected check: None is nothing. After a failure, a new group goes on."""
    tests = [item for item in request.session.items if "outcomes" in item.fixturenames]
    names = [
        test.callspec.params["name"]
        for test in tests
        if not any(skip.args[0] for skip in test.iter_markers("skipif"))
    ]
    compile_ahead()
    ended = {}
    for _ in range(GROUPS):
        if len(ended) < len(names):
            ended |= run_group(tmp_path_factory.mktemp("group") / "run", names[len(ended) :])
    return dict.fromkeys(names, f"not run after {GROUPS} failures") | ended


# --- the operator ----------------------------------------------------------------------------------

LEVELS = [(5, 4), (2, 3)]
EVEN = {"n": 4, "m": 4, "lq": 8}


def leaf(tensor, mesh, placements):
    """The tensor distributed so, as a leaf."""
    return distribute_tensor(tensor, mesh, placements).requires_grad_()


def leaves(inputs, mesh, value, points):
    """value, locations and weights as DTensors."""
    placements = (value, points, points)
    return [leaf(t, mesh, p) for t, p in zip(inputs.tensors, placements, strict=True)]


def single(inputs, dtype=None):
    """The output and the gradients of one process."""
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs.tensors]
    output = ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:])
    return output.detach(), *torch.autograd.grad(output, tensors, inputs.grad_output.to(dtype))


def assert_numbers(inputs, output, gradients):
    """Equal to those of a single process, but for the order in which processes add up grad_value."""
    expected, exact = single(inputs), single(inputs, torch.float64)
    for i, result in enumerate((output, *gradients)):
        assert result.shape == expected[i].shape
        if any(placement.is_partial() for placement in result.placements):
            assert i == 1
            assert_within_budget(result.full_tensor(), expected[i], exact[i])
        else:
            assert torch.equal(result.full_tensor(), expected[i])


def run(inputs, tensors, shapes=None, starts=None):
    """The output and the three gradients through autograd."""
    shapes = inputs.sizes if shapes is None else shapes
    output = ms_deform_attn(tensors[0], shapes, starts, *tensors[1:])
    grad_output = distribute_tensor(inputs.grad_output, output.device_mesh, output.placements)
    return output, torch.autograd.grad(output, tensors, grad_output)


LAYOUTS = {
    "batch": (BATCH, BATCH, BATCH),
    "head": (HEAD, HEAD, HEAD),
    "query": (R, QUERY, Partial()),
    "nothing": (R, R, R),
}


@check(*LAYOUTS)
def check_sharded_by(mesh, variant):
    value, points, grad_value = LAYOUTS[variant]
    for sizes in (EVEN, {"n": 3, "m": 4, "lq": 5}):
        inputs = random_inputs(**sizes)
        output, gradients = run(inputs, leaves(inputs, mesh, [value], [points]))
        assert output.placements == (points,)
        assert [g.placements for g in gradients] == [(grad_value,), (points,), (points,)]
        assert_numbers(inputs, output, gradients)


def assert_like_one_process_of(call, tensors, placements, grad_output, mesh):
    """Output and gradients of sharded tensors within the error budget of those of one process; gives the former."""

    def results(tensors, grad_output):
        output = call(*tensors)
        return output, *torch.autograd.grad(output, tensors, grad_output(output))

    same, exact = (
        results(
            [tensor.detach().to(dtype).requires_grad_() for tensor in tensors],
            lambda _, dtype=dtype: grad_output.to(dtype),
        )
        for dtype in (torch.float32, torch.float64)
    )
    found = results(
        [leaf(tensor, mesh, [p]) for tensor, p in zip(tensors, placements, strict=True)],
        lambda output: distribute_tensor(grad_output, mesh, output.placements),
    )
    for result, *expected in zip(found, same, exact, strict=True):
        assert_within_budget(result.full_tensor().detach(), *(e.detach() for e in expected))
    return found


@check(*LAYOUTS)
def check_points_of_levels_and_masks_sharded_by(mesh, variant):
    value, points, grad_value = LAYOUTS[variant]
    inputs = flat_points(random_inputs(**EVEN), [2, 1])
    mask = torch.rand(inputs.value.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3

    def call(value, *rest, mask=mask, shard=True):
        if shard and isinstance(value, DTensor):
            mask = distribute_tensor(mask, mesh, [QUERY])  # of positions: it may lie anyhow
        rules = {"num_points": [2, 1], "interpolation": "nearest", "value_mask": mask}
        return ms_deform_attn(value, inputs.sizes, None, *rest, **rules)

    placements = value, points, points
    found = assert_like_one_process_of(call, inputs.tensors, placements, inputs.grad_output, mesh)
    assert found[1].placements == (grad_value,)
    with pytest.raises(TypeError, match="value_mask must be a DTensor where any argument is one"):
        call(*leaves(inputs, mesh, [value], [points]), shard=False)


@check(*LAYOUTS)
def check_fused_calls_sharded_by(mesh, variant):
    value, points, _ = LAYOUTS[variant]
    inputs = random_inputs(**EVEN)
    n, lq = inputs.locations.shape[:2]
    references = torch.rand(n, lq, 2, 4, generator=torch.Generator().manual_seed(1))
    tensors = inputs.value, references, inputs.locations, inputs.weights

    def call(value, *rest):
        return ms_deform_attn_fused(value, inputs.sizes, None, *rest)

    placements = value, R if points == HEAD else points, points, points
    output, *_ = assert_like_one_process_of(call, tensors, placements, inputs.grad_output, mesh)
    assert output.placements == (points,)


@check(*(f"{a} and {b}" for a, b in itertools.product(LAYOUTS, repeat=2) if a != "nothing"))
def check_two_dimensions_sharded_by(mesh, variant):
    del mesh
    grid = init_device_mesh("cpu", (2, 2))
    placements = zip(*map(LAYOUTS.get, variant.split(" and ")), strict=True)
    value, points, grad_value = map(tuple, placements)
    inputs = random_inputs(n=5, m=4, lq=7)
    output, gradients = run(inputs, leaves(inputs, grid, value, points))
    assert output.placements == points
    assert [g.placements for g in gradients] == [grad_value, points, points]
    assert_numbers(inputs, output, gradients)


# Where value, locations and weights lie, and where the output then lies.
OTHERS = {
    "positions": (Shard(1), R, R, R),
    "channels": (Shard(3), R, R, R),
    "levels": (R, Shard(3), Shard(3), R),
    "points": (R, Shard(4), Shard(4), R),
    "coordinates": (R, Shard(5), R, R),
    "positions, queries": (Shard(1), QUERY, QUERY, QUERY),
    "images, queries": (BATCH, QUERY, QUERY, BATCH),
    "heads, images": (HEAD, BATCH, BATCH, HEAD),
    "value alone": (BATCH, R, R, BATCH),
    "locations alone": (R, HEAD, R, HEAD),
    "weights alone": (R, R, QUERY, QUERY),
}


@check(*OTHERS)
def check_redistributed_from(mesh, variant):
    *placements, of_output = OTHERS[variant]
    inputs = random_inputs(**EVEN)
    tensors = [leaf(t, mesh, [p]) for t, p in zip(inputs.tensors, placements, strict=True)]
    output, gradients = run(inputs, tensors)
    assert output.placements == (of_output,)
    assert_numbers(inputs, output, gradients)


@check()
def check_partial_inputs(mesh):
    inputs = random_inputs(**EVEN)
    _, *points = leaves(inputs, mesh, [R], [QUERY])
    quarter = DTensor.from_local(inputs.value / WORLD, mesh, [Partial()], run_check=False)
    output = ms_deform_attn(quarter.requires_grad_(), inputs.sizes, None, *points)
    grad_output = DTensor.from_local(inputs.grad_output / WORLD, mesh, [Partial()], run_check=False)
    gradients = torch.autograd.grad(output, (quarter, *points), grad_output)
    assert_numbers(inputs, output, gradients)


@check()
def check_grad_output_alone_is_sharded(mesh):
    inputs = random_inputs(**EVEN)
    value, *points = [tensor.detach() for tensor in leaves(inputs, mesh, [R], [R])]
    for placement, of_value in ((BATCH, BATCH), (QUERY, Partial()), (HEAD, HEAD)):
        grad_output = distribute_tensor(inputs.grad_output, mesh, [placement])
        gradients = ms_deform_attn_backward(grad_output, value, inputs.sizes, None, *points)
        assert gradients[0].placements == (of_value,)
        assert gradients[1].placements == (placement,)
        output = ms_deform_attn(value, inputs.sizes, None, *points)
        assert_numbers(inputs, output, gradients)


@check()
def check_forms_of_the_level_table(mesh):
    """One after another with equal shapes, so that nothing kept of one call may serve the next."""
    inputs = random_inputs(**EVEN)
    tensors = leaves(inputs, mesh, [R], [Shard(3)])
    for shapes, starts in itertools.product(
        *map(forms_of_table, (inputs.shapes(), inputs.starts()), (mesh, mesh))
    ):
        if shapes is not None:
            assert_numbers(inputs, *run(inputs, tensors, shapes, starts))


def forms_of_table(table, mesh):
    """None, ints, and tensors plain and distributed."""
    distributed = (distribute_tensor(table, mesh, [placement]) for placement in (R, Shard(0)))
    return [None, table.tolist(), table.numpy(), table, *distributed]


@check()
def check_levels_out_of_order(mesh):
    inputs = random_inputs([(2, 3), (3, 2)], **EVEN)
    starts = [6, 0]
    expected = ms_deform_attn(inputs.value, inputs.sizes, starts, *inputs.tensors[1:])
    tensors = leaves(inputs, mesh, [HEAD], [HEAD])
    for given in (None, starts, None, starts):
        output = ms_deform_attn(tensors[0], inputs.sizes, given, *tensors[1:])
        assert torch.equal(output.full_tensor(), expected) == (given is starts)


@check(*LAYOUTS)
def check_gradients_that_are_not_needed(mesh, variant):
    """In this order and from the back: what is kept of one call may not serve another."""
    import cupy_msda.distributed  # noqa: F401 - whoever calls the operators themselves imports it

    value, points, grad_value = LAYOUTS[variant]
    inputs = random_inputs(**EVEN)
    tensors = [tensor.detach() for tensor in leaves(inputs, mesh, [value], [points])]
    grad_output = distribute_tensor(inputs.grad_output, mesh, [points])
    table = (None, None, [n for pair in inputs.sizes for n in pair], None)
    flags = list(itertools.product((False, True), repeat=2))
    for needs_value, needs_points in (*flags, *flags[::-1]):
        gradients = operators.BACKWARD(
            grad_output, tensors[0], *table, *tensors[1:], needs_value, needs_points
        )
        full = single(inputs, torch.float32)[1:]
        for i, need in enumerate((needs_value, needs_points, needs_points)):
            assert gradients[i].shape == (full[i].shape if need else (0,))
            placement = R if not need else points if i else grad_value
            assert gradients[i].placements == (placement,)
            assert gradients[i].full_tensor().shape == gradients[i].shape
            if need:
                torch.testing.assert_close(gradients[i].full_tensor(), full[i])


@check()
def check_autograd_of_some_inputs(mesh):
    inputs = random_inputs(**EVEN)
    full = single(inputs)[1:]
    for needed in itertools.product((False, True), repeat=3):
        tensors = leaves(inputs, mesh, [HEAD], [HEAD])
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.requires_grad_(need)
        output = ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:])
        assert output.requires_grad == any(needed)
        if any(needed):
            output.backward(distribute_tensor(inputs.grad_output, mesh, [HEAD]))
        for tensor, need, gradient in zip(tensors, needed, full, strict=True):
            assert (tensor.grad is not None) == need
            assert not need or torch.equal(tensor.grad.full_tensor(), gradient)


@check()
def check_half_values(mesh):
    inputs = random_inputs(**EVEN, dtypes=(torch.bfloat16, torch.float32))
    for layout in ("batch", "head"):
        value, points, _ = LAYOUTS[layout]
        output, gradients = run(inputs, leaves(inputs, mesh, [value], [points]))
        assert output.dtype == gradients[0].dtype == torch.bfloat16
        assert gradients[1].dtype == gradients[2].dtype == torch.float32
        assert_numbers(inputs, output, gradients)


@check()
def check_the_operators_by_keyword(mesh):
    import cupy_msda.distributed  # noqa: F401

    inputs = random_inputs(**EVEN)
    value, locations, weights = (t.detach() for t in leaves(inputs, mesh, [R], [QUERY]))
    table = {"spatial_shapes": inputs.shapes(), "level_start_index": None, "sizes": None}
    output = operators.FORWARD(
        value=value, **table, starts=None, sampling_locations=locations, attention_weights=weights
    )
    assert torch.equal(output.full_tensor(), single(inputs)[0])


@check()
def check_a_mesh_of_some_processes(mesh):
    del mesh
    some = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    pair = torch.distributed.device_mesh.DeviceMesh("cpu", [1, 2])
    inputs = random_inputs(**EVEN)
    output, gradients = run(inputs, leaves(inputs, some, [BATCH], [BATCH]))
    assert_numbers(inputs, output, gradients)
    output, gradients = run(inputs, leaves(inputs, pair, [HEAD], [HEAD]))
    assert output.shape == inputs.grad_output.shape
    if torch.distributed.get_rank() in (1, 2):
        assert_numbers(inputs, output, gradients)


@check()
def check_compiled(mesh):
    for layout in ("batch", "head", "query"):
        assert_compiled(mesh, *LAYOUTS[layout][:2], batches=(4,))


@check(since=DYNAMIC)
def check_compiled_for_any_batch(mesh):
    """With all sizes dynamic, torch 2.13 does not trace even a matmul of DTensors."""
    for layout in ("batch", "head", "query"):
        assert_compiled(mesh, *LAYOUTS[layout][:2], batches=(8, 12))


def assert_compiled(mesh, value, points, batches):
    """Compiled whole and once for all batches, dynamic if there are several, with gradients."""
    torch.compiler.reset()
    function = torch.compile(
        lambda *tensors: ms_deform_attn(tensors[0], LEVELS, None, *tensors[1:]).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    for n in batches:
        inputs = random_inputs(LEVELS, n=n, m=4, lq=8)
        tensors = leaves(inputs, mesh, [value], [points])
        stance = nullcontext()
        if n != batches[0]:
            stance = torch.compiler.set_stance("fail_on_recompile")
        elif len(batches) > 1:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
        with stance:
            output = function(*tensors)
        plain = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
        expected = ms_deform_attn(plain[0], LEVELS, None, *plain[1:]).sin()
        torch.testing.assert_close(output.full_tensor(), expected)
        grad_output = distribute_tensor(inputs.grad_output, mesh, output.placements)
        gradients = torch.autograd.grad(output, tensors, grad_output)
        others = torch.autograd.grad(expected, plain, inputs.grad_output)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient.full_tensor(), other)


@check(*LAYOUTS)
def check_orders_of_the_queries(mesh, variant):
    """Grids describe all queries: a part of them is taken as it comes."""
    value, points, _ = LAYOUTS[variant]
    inputs = random_inputs(**EVEN)
    tensors = leaves(inputs, mesh, [value], [points])
    arguments = tensors[0], inputs.sizes, None, *tensors[1:]
    of_grids = () if variant == "query" else (2, 4)
    for order, expected in (("auto", None), (None, ()), ([(2, 4)], of_grids)):
        with patch.object(operators, "checked", wraps=operators.checked) as spy:
            output = ms_deform_attn(*arguments, query_order=order)
            grad_output = distribute_tensor(inputs.grad_output, mesh, output.placements)
            gradients = torch.autograd.grad(output, tensors, grad_output)
        assert [call.args[0].query_order for call in spy.call_args_list] == [expected] * 2
        assert_numbers(inputs, output, gradients)
    with pytest.raises(ValueError, match="query_order must have grids that hold the Lq = 8"):
        ms_deform_attn(*arguments, query_order=[(1, 4)])


# --- what is refused -------------------------------------------------------------------------------


@check()
def check_tensors_beside_dtensors(mesh):
    inputs = random_inputs(**EVEN)
    names = ("value", "sampling_locations", "attention_weights")
    for i, name in enumerate(names):
        tensors = leaves(inputs, mesh, [R], [R])
        tensors[i] = inputs.tensors[i]
        with pytest.raises(
            TypeError, match=f"^{name} must be a DTensor .*, got Tensor: distribute_tensor"
        ):
            ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:])
    value, *points = leaves(inputs, mesh, [R], [R])
    with pytest.raises(TypeError, match=r"^grad_output must be a DTensor .*, got Tensor"):
        ms_deform_attn_backward(inputs.grad_output, value, inputs.sizes, None, *points)
    table = distribute_tensor(inputs.shapes(), mesh, [R])
    with pytest.raises(TypeError, match=r"^value must be a DTensor"):
        ms_deform_attn(inputs.value, table, None, *inputs.tensors[1:])


@check()
def check_two_meshes(mesh):
    inputs = random_inputs(**EVEN)
    grid = init_device_mesh("cpu", (2, 2))
    value, locations, _ = leaves(inputs, mesh, [R], [R])
    weights = distribute_tensor(inputs.weights, grid, [R, R])
    with pytest.raises(ValueError, match=r"^attention_weights must be on the device mesh of"):
        ms_deform_attn(value, inputs.sizes, None, locations, weights)


@check()
def check_heads_that_processes_do_not_divide(mesh):
    inputs = random_inputs(n=4, m=6)
    message = r"^value must have a multiple of 4 heads M .* over 4 processes, got M = 6"
    with pytest.raises(ValueError, match=message):
        run(inputs, leaves(inputs, mesh, [HEAD], [HEAD]))
    grid = init_device_mesh("cpu", (2, 2))
    with pytest.raises(ValueError, match=message):
        run(inputs, leaves(inputs, grid, [HEAD, HEAD], [HEAD, HEAD]))
    output, gradients = run(inputs, leaves(inputs, grid, [BATCH, HEAD], [BATCH, HEAD]))
    assert_numbers(inputs, output, gradients)


@check()
def check_the_contract_holds_for_whole_shapes(mesh):
    """Parts may violate it on some processes alone, and the others would wait for them."""
    inputs = random_inputs(**EVEN)
    value, locations, weights = leaves(inputs, mesh, [R], [QUERY])
    fewer = distribute_tensor(inputs.weights[:, :7], mesh, [QUERY])
    with pytest.raises(
        ValueError, match=r"^attention_weights must .* = \(4, 8, 4, 2, 3\) .* got \(4, 7, 4, 2, 3\)"
    ):
        ms_deform_attn(value, inputs.sizes, None, locations, fewer)
    table = distribute_tensor(torch.tensor([(5, 7), (4, 4)]), mesh, [R])
    with pytest.raises(ValueError, match=r"S = 47 positions .* for level 1"):
        ms_deform_attn(value, table, None, locations, weights)
    grad_output = distribute_tensor(inputs.grad_output[:, :7], mesh, [QUERY])
    with pytest.raises(ValueError, match=r"^grad_output must have shape"):
        ms_deform_attn_backward(grad_output, value, inputs.sizes, None, locations, weights)
    with pytest.raises(TypeError, match=r"^sampling_locations must have dtype"):
        ms_deform_attn(value, inputs.sizes, None, locations.double(), weights)


@check()
def check_gradients_of_gradients(mesh):
    inputs = random_inputs(**EVEN)
    tensors = leaves(inputs, mesh, [HEAD], [HEAD])
    output = ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:])
    gradients = torch.autograd.grad(output.sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"must not be a DTensor for gradients of"):
        torch.autograd.grad(gradients[1].sum(), tensors)


# --- the module ------------------------------------------------------------------------------------

C, M, L, P = 32, 4, 2, 3  # D = 8, as above, so that the same kernels run


def module(dtype=torch.float32, m=M):
    """A module whose parameters are not their initial values, the same in every process."""
    torch.manual_seed(1)
    made = MSDeformAttn(C, L, m, P)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.to(dtype)


def module_inputs(dtype=torch.float32, n=4, coordinates=2):
    """query, reference_points and input_flatten, the same in every process."""
    torch.manual_seed(2)
    shapes = ((n, 5, C), (n, 5, L, coordinates), (n, 26, C))
    return [torch.rand(shape).to(dtype).requires_grad_() for shape in shapes]


def trained(attention, inputs, *others, scale=1):
    """The output, and the gradients of inputs and parameters, of one step."""
    output = attention(*inputs, *others)
    (output.square().sum() * scale).backward()
    named = dict(attention.named_parameters())
    gradients = {name.removeprefix("module."): p.grad for name, p in named.items()}
    assert len(gradients) == 8
    return [output.detach(), *(t.grad for t in inputs), *(gradients[k] for k in sorted(gradients))]


def assert_like_one_process(results, *others, scale=1, **sizes):
    """The results of `trained` within the error budget of those of one process."""
    same, exact = (
        trained(module(dtype), module_inputs(dtype, **sizes), *others, scale=scale)
        for dtype in (torch.float32, torch.float64)
    )
    for result, one, truth in zip(results, same, exact, strict=True):
        whole = result.full_tensor() if isinstance(result, DTensor) else result
        assert_within_budget(whole, one, truth)


def mine(tensor):
    """The images of this process."""
    return tensor.detach().chunk(WORLD)[torch.distributed.get_rank()].requires_grad_()


def gathered(tensor):
    """The images of all processes."""
    parts = [torch.empty_like(tensor) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def assert_data_parallel(attention):
    """One image for each process; gradients of parameters are means over processes."""
    output, *by_inputs_and_parameters = trained(
        attention, list(map(mine, module_inputs())), LEVELS, None
    )
    by_inputs, by_parameters = by_inputs_and_parameters[:3], by_inputs_and_parameters[3:]
    # The mean is that of a loss a fourth as large, and so are its gradients by inputs.
    results = [gathered(output), *(gathered(g) / WORLD for g in by_inputs), *by_parameters]
    assert_like_one_process(results, LEVELS, None, scale=1 / WORLD)


class Checkpointed(torch.nn.Module):
    """A module that keeps no activations."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return checkpoint(self.inner, *arguments, use_reentrant=False)


@check("kept", "recomputed")
def check_distributed_data_parallel(mesh, variant):
    """https://github.com/TRI-ML/PF-Track/issues/27 tells of both together."""
    del mesh
    attention = module() if variant == "kept" else Checkpointed(module())
    assert_data_parallel(torch.nn.parallel.DistributedDataParallel(attention))


@check(since=FULLY_SHARD)
def check_fully_shard(mesh):
    from torch.distributed.fsdp import fully_shard

    attention = fully_shard(module(), mesh=mesh)
    assert all(isinstance(p, DTensor) for p in attention.parameters())
    assert_data_parallel(attention)


MASK = torch.arange(26) >= torch.tensor([26, 20, 9, 0])[:, None]
OTHER_ARGUMENTS = {
    "integers": (LEVELS, None),
    "tensors": (torch.tensor(LEVELS), torch.tensor([0, 20])),
    "mask": (LEVELS, [0, 20], MASK),
}


@check(*OTHER_ARGUMENTS, since=HEADWISE)
def check_tensor_parallel(mesh, variant):
    from cupy_msda.distributed import HeadwiseParallel

    others = OTHER_ARGUMENTS[variant]
    for coordinates in (2, 4):
        attention = parallelize_module(module(), mesh, HeadwiseParallel())
        assert attention.value_proj.weight.to_local().shape == (C // WORLD, C)
        results = trained(attention, module_inputs(coordinates=coordinates), *others)
        assert not isinstance(results[0], DTensor)
        assert not any(isinstance(result, DTensor) for result in results[1:4])
        assert_like_one_process(results, *others, coordinates=coordinates)


@check(since=HEADWISE)
def check_tensor_parallel_of_keywords_and_dtensors(mesh):
    from cupy_msda.distributed import HeadwiseParallel

    attention = parallelize_module(module(), mesh, HeadwiseParallel())
    query, points, flat = module_inputs()
    expected = module()(query, points, flat, LEVELS, None, MASK)
    sharded = [distribute_tensor(t.detach(), mesh, [BATCH]) for t in (query, points, flat)]
    for inputs in ((query, points, flat), sharded):
        names = ("query", "reference_points", "input_flatten")
        output = attention(
            **dict(zip(names, inputs, strict=True)),
            input_spatial_shapes=torch.tensor(LEVELS),
            input_level_start_index=None,
            input_padding_mask=MASK,
        )
        torch.testing.assert_close(output, expected)


@check(since=HEADWISE)
def check_tensor_parallel_within_fully_shard(mesh):
    """Two groups of images by two groups of heads."""
    from torch.distributed.fsdp import fully_shard

    from cupy_msda.distributed import HeadwiseParallel

    del mesh
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("images", "heads"))
    model = torch.nn.ModuleDict({"attention": module()})
    parallelize_module(model, grid["heads"], {"attention": HeadwiseParallel()})
    attention = fully_shard(model["attention"], mesh=grid["images"])
    part = grid.get_local_rank("images")
    inputs = [t.detach().chunk(2)[part].requires_grad_() for t in module_inputs()]
    results = trained(attention, inputs, LEVELS, None)
    same, exact = (
        trained(module(dtype), module_inputs(dtype), LEVELS, None, scale=0.5)
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget(results[0], *(one[0].chunk(2)[part] for one in (same, exact)))
    for result, one, truth in zip(results[4:], same[4:], exact[4:], strict=True):
        assert_within_budget(result.full_tensor(), one, truth)


@check(since=HEADWISE)
def check_tensor_parallel_of_what_has_no_heads_to_share(mesh):
    from cupy_msda.distributed import HeadwiseParallel

    with pytest.raises(
        ValueError, match=r"^n_heads must be a multiple of the 4 processes .*, got 2"
    ):
        parallelize_module(module(m=2), mesh, HeadwiseParallel())
    with pytest.raises(TypeError, match=r"^module must be an MSDeformAttn .*, got Linear"):
        parallelize_module(torch.nn.Linear(4, 4), mesh, HeadwiseParallel())


# --- a test for each -------------------------------------------------------------------------------


def test_the_first_dtensor_needs_no_import(tmp_path):
    code = f"""
        import sys
        import torch
        from cupy_msda import ms_deform_attn
        value, weights = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 1, 1)
        locations = torch.full((1, 1, 1, 1, 1, 2), 0.5)
        ms_deform_attn(value, [(1, 1)], None, locations, weights)
        print("torch.distributed.tensor" in sys.modules)
        store = torch.distributed.FileStore({str(tmp_path / "store")!r}, 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh
        mesh = init_device_mesh("cpu", (1,))
        tensors = (value, locations, weights)
        value, locations, weights = (DTensor.from_local(t, mesh, [Shard(2)]) for t in tensors)
        print("cupy_msda.distributed" in sys.modules)
        print(ms_deform_attn(value, [(1, 1)], None, locations, weights).full_tensor().tolist())
        torch.distributed.destroy_process_group()
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        timeout=SECONDS,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert lines == ["False", "False", str([[[1.0] * 8]])]
