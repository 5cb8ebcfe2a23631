# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, and how they live with torch's and CuPy's streams, devices and graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from cupy_msda import (  # noqa: E402
    KernelCompileError,
    MSDeformAttn,
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_core_pytorch,
    reference,
    warmup,
)
from cupy_msda.cuda import compile as compile_module  # noqa: E402
from tests.problems import (  # noqa: E402
    DTYPES,
    away_from_edges,
    check_against_reference,
    random_inputs,
)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
DELAY = 100_000_000  # clock cycles, some 60 ms
GIB = 2**30
HALF = (torch.float16, torch.float32)
NAN = float("nan")


def leaves(inputs):
    """The three differentiable inputs as leaves on the same memory."""
    return [tensor.detach().requires_grad_() for tensor in inputs.tensors]


def poison(inputs):
    """Leave NaN in the memory that torch will hand out for results of these sizes."""
    wide = torch.promote_types(inputs.value.dtype, torch.float32)
    results = [*inputs[1:], inputs.value.to(wide), inputs.grad_output.to(wide)]
    blocks = [torch.full_like(tensor, NAN) for tensor in results for _ in range(2)]
    del blocks


def run(inputs, shapes=None, starts=None):
    """The output and the three gradients through autograd, into poisoned memory."""
    tensors = leaves(inputs)
    poison(inputs)
    shapes = inputs.sizes if shapes is None else shapes
    output = ms_deform_attn(tensors[0], shapes, starts, *tensors[1:])
    return output.detach(), torch.autograd.grad(output, tensors, inputs.grad_output)


def check(inputs, *arguments):
    """Run and compare."""
    check_against_reference(inputs, *run(inputs, *arguments))


def same(results, expected):
    """Equal outputs; gradients equal but for the order of atomic additions."""
    assert torch.equal(results[0], expected[0])
    for got, wanted in zip(results[1], expected[1], strict=True):
        torch.testing.assert_close(got, wanted)


# --- every path against the oracle -----------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 16, 30, 32, 64, 71, 128, 256])
def test_dtypes_and_head_dims(dtypes, d):
    check(random_inputs([(7, 9), (4, 5)], lq=37, d=d, dtypes=dtypes, device=DEVICE))


PYRAMID = [(25, 42), (13, 21), (7, 11), (4, 6)]


# From a few queries, whose points are spread over several groups, to more than fill the device.
@pytest.mark.parametrize("lq", [1, 2, 20, 150, 300, 900, 5000])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
def test_numbers_of_queries(lq, dtypes):
    check(random_inputs(PYRAMID, n=1, m=8, d=32, lq=lq, p=4, dtypes=dtypes, device=DEVICE))


@pytest.mark.parametrize(
    ("m", "num_levels", "p"), [(1, 1, 1), (3, 1, 8), (8, 3, 1), (3, 3, 5), (1, 4, 4), (8, 5, 7)]
)
def test_heads_levels_and_points(m, num_levels, p):
    sizes = [(9, 7), (1, 6), (5, 1), (1, 1), (3, 4)][:num_levels]
    check(random_inputs(sizes, m=m, d=16, lq=11, p=p, device=DEVICE))


@pytest.mark.parametrize("num_levels", [16, 17, 40])
@pytest.mark.parametrize("on_device", [False, True])
def test_many_levels(num_levels, on_device):
    sizes = [(1 + i % 3, 1 + i % 5) for i in range(num_levels)]
    inputs = random_inputs(sizes, d=16, p=2, device=DEVICE)
    check(inputs, inputs.shapes() if on_device else None)


@pytest.mark.parametrize("d", [1, 2, 4, 12, 24, 48, 1025])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
def test_unusual_head_dims(d, dtypes):
    check(random_inputs(d=d, dtypes=dtypes, device=DEVICE))


MODELS = {
    "detr-encoder": ([(100, 167), (50, 84), (25, 42), (13, 21)], {"n": 1, "p": 4, "lq": 22223}),
    "detr-decoder": ([(100, 167), (50, 84), (25, 42), (13, 21)], {"n": 2, "p": 4, "lq": 300}),
    "mask2former-512": ([(16, 16), (32, 32), (64, 64)], {"n": 2, "p": 4, "lq": 5376}),
    "rtdetr-decoder": ([(80, 80), (40, 40), (20, 20)], {"n": 16, "p": 4, "lq": 300}),
    "bevformer-sca": ([(116, 200), (58, 100), (29, 50), (15, 25)], {"n": 2, "p": 8, "lq": 10000}),
    "bevformer-tsa": ([(200, 200)], {"n": 2, "p": 4, "lq": 40000}),
    "rfdetr": ([(44, 44)], {"n": 4, "p": 2, "lq": 3900, "m": 16, "d": 16}),
}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_models(name, dtypes):
    sizes, rest = MODELS[name]
    check(random_inputs(sizes, **{"m": 8, "d": 32, **rest}, dtypes=dtypes, device=DEVICE))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
@pytest.mark.parametrize("name", ["detr-encoder", "mask2former-512", "bevformer-tsa"])
def test_the_order_of_the_queries_changes_no_bit(name, dtypes):
    from cupy_msda import contract
    from cupy_msda.cuda import launch, plans

    sizes, rest = MODELS[name]
    inputs = random_inputs(sizes, **{"m": 8, "d": 32, **rest}, dtypes=dtypes, device=DEVICE)
    problem, table = contract.check(inputs.value, sizes, None, inputs.locations, inputs.weights)
    assert plans.plan_forward(problem, table, 132, ()) != plans.plan_forward(problem, table, 132)
    outputs = [torch.full_like(inputs.grad_output, NAN) for _ in range(2)]
    with launch.on_stream(0, torch.cuda.current_stream().cuda_stream):
        for output, grids in zip(outputs, ((), None), strict=True):
            launch.forward(problem, table, *inputs.tensors, output, grids)
    assert torch.equal(*outputs)
    points = inputs.locations, inputs.weights
    gradients = [[torch.full_like(one, NAN) for one in points] for _ in range(2)]
    with launch.on_stream(0, torch.cuda.current_stream().cuda_stream):
        for of_points, grids in zip(gradients, ((), None), strict=True):
            arrays = inputs.grad_output, *inputs.tensors
            launch.backward(problem, table, arrays, (None, *of_points), grids=grids)
    for ordered, plain in zip(*gradients, strict=True):
        assert torch.equal(ordered, plain)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
@pytest.mark.parametrize("size", [100, 20])
def test_the_grid_of_a_birds_eye_view_changes_no_bit(dtypes, size):
    # BEVFormer's queries; 20 x 20 are too few for any order, and their points are shared out.
    sizes, rest = MODELS["bevformer-sca"]
    options = {"m": 8, "d": 32, **rest, "lq": size * size}
    inputs = random_inputs(sizes, **options, dtypes=dtypes, device=DEVICE)
    results = []
    for order in (None, "auto", [(size, size)], [(size // 2, size)] * 2):
        tensors = leaves(inputs)
        poison(inputs)
        output = ms_deform_attn(tensors[0], sizes, None, *tensors[1:], query_order=order)
        gradients = torch.autograd.grad(output, tensors, inputs.grad_output)
        check_against_reference(inputs, output, gradients)
        results.append((output.detach(), *gradients[1:]))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("n", [154, 8200])
def test_many_images(n):
    # 8200 images of 8 heads are more than one axis of a grid holds.
    check(random_inputs([(3, 2), (1, 1)], n=n, m=8, lq=2, device=DEVICE))


HUGE = {"in 20 images": (20, 2**20, 16), "in one image": (1, 2**23 + 2**12, 32)}


@pytest.mark.parametrize("name", HUGE)
def test_more_than_2_31_elements(name):
    n, s, d = HUGE[name]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0]
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of device memory, {free / GIB:.0f} are free")
    # One small level at the far end of a value that is NaN everywhere else.
    small = random_inputs([(4, 50)], n=n, m=8, d=d, lq=9, dtypes=HALF, device=DEVICE)
    value = torch.full((n, s, 8, d), NAN, dtype=torch.float16, device=DEVICE)
    assert value.numel() > 2**31
    value[:, -200:] = small.value
    tensors = leaves(small._replace(value=value))
    output = ms_deform_attn(tensors[0], small.sizes, [s - 200], *tensors[1:])
    by_value, *by_points = torch.autograd.grad(output, tensors, small.grad_output)
    check_against_reference(small, output, (by_value[:, -200:], *by_points))
    assert not by_value[:, :-200].any()
    del value, tensors, by_value
    torch.cuda.empty_cache()


# --- where points lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 30])
def test_points_on_cell_edges_and_borders(dtypes, d):
    # Powers of two keep every coordinate exact: multiples of half a pixel from two pixels outside.
    sizes = [(4, 8), (2, 4)]
    inputs = random_inputs(sizes, n=1, d=d, lq=80, p=4, dtypes=dtypes, device=DEVICE)
    scale = 2 * inputs.shapes().flip(-1)[:, None]
    inputs.locations.copy_((inputs.locations * scale).round() / scale)
    check(inputs)


@pytest.mark.parametrize("d", [16, 30])
def test_positions_between_levels_are_never_read(d):
    inputs = random_inputs([(4, 8), (2, 4)], lq=200, d=d, device=DEVICE)
    n, s, m, _ = inputs.value.shape
    value = torch.full((n, s + 30, m, d), NAN, device=DEVICE)
    value[:, 10:42] = inputs.value[:, :32]
    value[:, 52:60] = inputs.value[:, 32:]
    output, gradients = run(inputs._replace(value=value), inputs.sizes, [10, 52])
    by_value = torch.cat([gradients[0][:, 10:42], gradients[0][:, 52:60]], dim=1)
    check_against_reference(inputs, output, (by_value, *gradients[1:]))
    for gap in (slice(0, 10), slice(42, 52), slice(60, None)):
        assert not gradients[0][:, gap].any()


@pytest.mark.parametrize("d", [16, 30])
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf"), 3e38, -3e38])
def test_locations_that_are_nowhere(d, bad):
    inputs = random_inputs(lq=64, d=d, device=DEVICE)
    for axis in (0, 1):
        lost = torch.rand(inputs.weights.shape, device=DEVICE) < 0.2
        inputs.locations[..., axis].masked_fill_(lost, bad)
    check(inputs)
    inputs.locations.fill_(bad)
    output, gradients = run(inputs)
    assert not output.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
def test_every_query_on_one_cell(dtypes):
    inputs = random_inputs(n=1, d=16, lq=20000, dtypes=dtypes, device=DEVICE)
    inputs.locations.fill_(0.4375)
    # Alike in sign, as the sums of thousands of random signs are small and their rounding is not.
    check(inputs._replace(grad_output=inputs.grad_output.abs() / 100))


# --- forms of input --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
def test_strided_misaligned_and_expanded_inputs(dtypes):
    inputs = random_inputs(d=16, dtypes=dtypes, device=DEVICE)
    expected = run(inputs)
    names = inputs._fields[1:]

    def strided(tensor):
        wide = tensor.new_full((*tensor.shape, 2), NAN)
        wide[..., 0] = tensor
        return wide[..., 0]

    def misaligned(tensor):
        return tensor.new_zeros(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)

    for form in (strided, misaligned):
        same(
            run(inputs._replace(**{name: form(getattr(inputs, name)) for name in names})), expected
        )
    ones = torch.ones((), dtype=dtypes[0], device=DEVICE).expand_as(inputs.grad_output)
    same(
        run(inputs._replace(grad_output=ones)), run(inputs._replace(grad_output=ones.contiguous()))
    )


@pytest.mark.parametrize("size", ["n", "lq", "m", "d", "p", "s", "l"])
def test_empty_sizes_give_zeros(size):
    sizes = {"s": [(0, 3), (2, 0)], "l": []}.get(size, [(2, 3), (1, 1)])
    extents = {} if size in "sl" else {size: 0}
    inputs = random_inputs(sizes, s=7 if size == "l" else None, device=DEVICE, **extents)
    for shapes in (inputs.sizes, inputs.shapes()):
        output, gradients = run(inputs, shapes)
        assert output.shape == inputs.grad_output.shape
        for result, like in zip(
            (output, *gradients), (inputs.grad_output, *inputs.tensors), strict=True
        ):
            assert result.shape == like.shape
            assert not result.any()


@pytest.mark.parametrize("d", [16, 30])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_level_tables_on_the_device(d, dtype):
    inputs = random_inputs([(5, 7), (3, 4), (6, 2)], d=d, device=DEVICE)
    shapes, starts = inputs.shapes(dtype), inputs.starts(dtype)
    numbers = starts.tolist()
    expected = run(inputs)
    check_against_reference(inputs, *expected)
    for table in (
        (shapes, None),
        (shapes, starts),
        (shapes.T.contiguous().T, starts.repeat_interleave(2)[::2]),
        (shapes.cpu(), starts.cpu()),
        (shapes.cpu().numpy(), numbers),
        (inputs.sizes, starts),
        (shapes, numbers),
    ):
        same(run(inputs, *table), expected)


BAD_TABLES = {
    "beyond": ([(5, 7), (4, 4)], None),
    "start": ([(5, 7), (3, 4)], [0, 36]),
    "negative start": ([(5, 7), (3, 4)], [0, -1]),
    "negative": ([(5, 7), (-3, 4)], [0, 35]),
    "twice negative": ([(5, 7), (-3, -4)], [0, 35]),
    "huge": ([(5, 7), (2**40, 2**40)], [0, 35]),
    "wide": ([(5, 7), (0, 2**33)], [0, 35]),
}


@pytest.mark.parametrize("d", [16, 30])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_level_that_does_not_fit_gives_nan(name, d, monkeypatch):
    inputs = random_inputs([(5, 7), (3, 4)], d=d, device=DEVICE)
    sizes, numbers = BAD_TABLES[name]
    shapes = torch.tensor(sizes, device=DEVICE)
    starts = None if numbers is None else torch.tensor(numbers, device=DEVICE)
    expected = run(inputs)
    output, (_, by_locations, by_weights) = run(inputs, shapes, starts)
    assert output.isnan().all()
    assert by_locations[:, :, :, 1].isnan().all()
    assert by_weights[:, :, :, 1].isnan().all()
    # The other level is as it should be.
    torch.testing.assert_close(by_locations[:, :, :, 0], expected[1][1][:, :, :, 0])
    torch.testing.assert_close(by_weights[:, :, :, 0], expected[1][2][:, :, :, 0])
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    with pytest.raises(ValueError, match="for level 1"):
        run(inputs, shapes, starts)


def test_the_check_accepts_what_fits(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CHECK", "1")
    inputs = random_inputs(device=DEVICE)
    check(inputs, inputs.shapes(), inputs.starts())


def test_host_values_with_a_level_table_on_the_device():
    inputs = random_inputs()
    output = ms_deform_attn(
        inputs.value, inputs.shapes().to(DEVICE), inputs.starts().to(DEVICE), *inputs.tensors[1:]
    )
    assert torch.equal(
        output, ms_deform_attn(inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    )


def test_tensors_on_different_devices_are_refused():
    inputs = random_inputs(device=DEVICE)
    arguments = (inputs.value, inputs.sizes, None, inputs.locations.cpu(), inputs.weights)
    with pytest.raises(
        ValueError, match="sampling_locations must be on the device of value, cuda:0, got cpu"
    ):
        ms_deform_attn(*arguments)


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("d", [16, 30])
def test_needed_gradients_only(needed, d):
    inputs = random_inputs(d=d, device=DEVICE)
    _, full = run(inputs)
    tensors = [tensor.requires_grad_(i in needed) for i, tensor in enumerate(leaves(inputs))]
    poison(inputs)
    ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:]).backward(inputs.grad_output)
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (i in needed)
        if i in needed:
            torch.testing.assert_close(tensor.grad, full[i])


@pytest.mark.parametrize("on_device", [False, True])
def test_gradcheck_once_and_twice(on_device):
    inputs = away_from_edges(random_inputs(n=1, d=3, lq=2, p=2, device=DEVICE))
    shapes = inputs.shapes() if on_device else inputs.sizes

    def function(value, locations, weights):
        return ms_deform_attn(value, shapes, None, locations, weights)

    arguments = (function, leaves(inputs))
    assert torch.autograd.gradcheck(*arguments, nondet_tol=1e-10)
    assert torch.autograd.gradgradcheck(*arguments, nondet_tol=1e-10, fast_mode=True)


def test_the_functions_agree():
    inputs = random_inputs(d=16, device=DEVICE)
    expected = run(inputs)
    tensors = leaves(inputs)
    output = MSDeformAttnFunction.apply(
        tensors[0], inputs.shapes(), inputs.starts(), *tensors[1:], 64
    )
    same((output, torch.autograd.grad(output, tensors, inputs.grad_output)), expected)
    tables = (inputs.sizes, None)
    gradients = ms_deform_attn_backward(
        inputs.grad_output, inputs.value, *tables, inputs.locations, inputs.weights
    )
    same((output, gradients), expected)
    plain = ms_deform_attn_core_pytorch(*inputs.tensors[:1], inputs.sizes, *inputs.tensors[1:])
    torch.testing.assert_close(plain, expected[0], rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[False, True], ids=["error", "warn"])
def deterministic(request):
    """torch's switch, in both its modes."""
    torch.use_deterministic_algorithms(True, warn_only=request.param)
    yield
    torch.use_deterministic_algorithms(False)


REPRODUCIBLE = {
    "owner": ((25, 42), {"n": 1, "m": 8, "d": 32, "lq": 300, "p": 4}),
    "owner-crowded": ((3, 2), {"n": 2, "m": 8, "d": 32, "lq": 2000, "p": 4}),
    "owner-wide": ((12, 9), {"n": 2, "m": 2, "d": 128, "lq": 700, "p": 6}),
    "split": ((25, 42), {"n": 1, "m": 1, "d": 32, "lq": 1100, "p": 8}),
    "crowded": ((3, 2), {"n": 2, "m": 8, "d": 32, "lq": 5000, "p": 4}),
    "owner-narrow": ((44, 44), {"n": 2, "m": 16, "d": 16, "lq": 1900, "p": 2}),
    "narrow": ((44, 44), {"n": 2, "m": 16, "d": 16, "lq": 4100, "p": 2}),
    "generic": ((9, 7), {"n": 2, "m": 3, "d": 30, "lq": 2000, "p": 5}),
    "encoder": ((90, 110), {"n": 1, "m": 8, "d": 32, "lq": 9920, "p": 4}),
}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_gradients_are_the_same_bits_under_deterministic_algorithms(name, dtypes, deterministic):
    size, numbers = REPRODUCIBLE[name]
    inputs = random_inputs([size, (5, 4)], dtypes=dtypes, device=DEVICE, **numbers)
    first = run(inputs)
    for _ in range(10):
        output, gradients = run(inputs)
        assert torch.equal(output, first[0])
        assert all(map(torch.equal, gradients, first[1]))
    torch.use_deterministic_algorithms(False)  # the reference need not be
    check_against_reference(inputs, *first)


def test_plain_sums_are_not_the_same_bits_in_ten_runs():
    """Else the test above would show nothing."""
    size, numbers = REPRODUCIBLE["crowded"]
    inputs = random_inputs([size, (5, 4)], device=DEVICE, **numbers)
    first = run(inputs)[1][0]
    assert not all(torch.equal(run(inputs)[1][0], first) for _ in range(10))


def milliseconds(step):
    """The median of some repeats between events on the device."""
    times = []
    for _ in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times[5:]))


@pytest.mark.parametrize("name", ["detr-encoder", "detr-decoder", "rtdetr-decoder"])
def test_the_same_bits_cost_at_most_three_times_the_default(name):
    sizes, others = MODELS[name]
    inputs = random_inputs(sizes, **{"m": 8, "d": 32, **others}, device=DEVICE)
    arguments = inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:]

    def replayed():
        ms_deform_attn_backward(*arguments)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ms_deform_attn_backward(*arguments)
        return milliseconds(graph.replay)

    default = replayed()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch's own cost, not ours
    try:
        reproducible = replayed()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert reproducible <= 3 * default


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
@pytest.mark.parametrize(("lq", "d"), [(300, 16), (3000, 16), (300, 30)])
def test_deterministic_algorithms_in_a_graph(dtypes, lq, d, deterministic):
    """Scale, sums and result are computed anew in each replay, from inputs of another magnitude."""
    inputs = random_inputs(lq=lq, d=d, dtypes=dtypes, device=DEVICE)
    arguments = (inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    run(inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ms_deform_attn_backward(*arguments)
    for factor in (1.0, 64.0, 2.0**-6):
        inputs.grad_output.mul_(factor)
        graph.replay()
        expected = ms_deform_attn_backward(*arguments)
        assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, HALF, (torch.float64,) * 2], ids=str)
@pytest.mark.parametrize(("lq", "d"), [(300, 16), (3000, 16), (300, 30)])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_deterministic_algorithms_show_what_is_not_finite(dtypes, lq, d, bad, deterministic):
    inputs = random_inputs(lq=lq, d=d, dtypes=dtypes, device=DEVICE)
    inputs.grad_output[0, 0, 1] = 0
    expected = run(inputs)[1][0]
    inputs.grad_output[0, 0, 1] = bad
    actual = run(inputs)[1][0]
    touched = ~actual.isfinite()
    assert touched[0, :, 0, 1].any()
    touched[0, :, 0, 1] = False
    assert not touched.any()
    finite = actual.isfinite()
    assert torch.equal(actual[finite], expected[finite])


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("needed", [(), (0, 1, 2)], ids=str)
def test_operators_pass_opcheck(needed):
    inputs = random_inputs(n=1, d=16, lq=2, p=1, device=DEVICE)
    value, *points = (t.requires_grad_(i in needed) for i, t in enumerate(leaves(inputs)))
    operators = torch.ops.cupy_msda
    for table in ((inputs.shapes(), None, None, None), (None, None, [5, 7, 3, 4], [0, 35])):
        torch.library.opcheck(operators.ms_deform_attn_forward.default, (value, *table, *points))
        # Without grad_value, whose sums vary in their last bits from run to run.
        torch.library.opcheck(
            operators.ms_deform_attn_backward.default,
            (inputs.grad_output, value, *table, *points, False, True),
        )
    operator = operators.ms_deform_attn_forward.default
    for order in ([], [2, 1]):
        torch.library.opcheck(operator, (value, *table, *points, order))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    inputs = random_inputs(d=16, device=DEVICE)
    shapes = inputs.shapes()

    def step(value, locations, weights):
        return ms_deform_attn(value * 2, shapes, None, locations, weights).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for function in (step, compiled):
        tensors = leaves(inputs)
        output = function(*tensors)
        results.append((output, torch.autograd.grad(output, tensors, inputs.grad_output)))
    same(*results)


# --- streams, devices, threads ---------------------------------------------------------------------


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("d", [16, 30])
def test_work_follows_torchs_current_stream_not_cupys(side, d):
    import cupy

    inputs = random_inputs(d=d, device=DEVICE)
    expected = run(inputs, inputs.shapes())
    late = inputs._replace(
        value=torch.full_like(inputs.value, NAN),
        grad_output=torch.full_like(inputs.grad_output, NAN),
    )
    shapes = torch.zeros_like(inputs.shapes())
    tensors = leaves(late)
    torch.cuda.synchronize(DEVICE)
    stream = torch.cuda.Stream(DEVICE) if side else torch.cuda.default_stream(DEVICE)
    of_cupy = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(stream), of_cupy:
        torch.cuda._sleep(DELAY)
        late.value.copy_(inputs.value)
        shapes.copy_(inputs.shapes())
        output = ms_deform_attn(tensors[0], shapes, None, *tensors[1:])
        torch.cuda._sleep(DELAY)
        late.grad_output.copy_(inputs.grad_output)
        gradients = torch.autograd.grad(output, tensors, late.grad_output)
        assert cupy.cuda.get_current_stream() == of_cupy
    stream.synchronize()
    same((output, gradients), expected)


def test_a_second_device():
    import cupy

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = random_inputs(d=16, device="cuda:1")
    other = torch.cuda.Stream("cuda:1")
    assert torch.cuda.current_device() == 0
    for shapes in (inputs.sizes, inputs.shapes()):
        check(inputs, shapes)
        with torch.cuda.stream(other):
            results = run(inputs, shapes)
        other.synchronize()
        check_against_reference(inputs, *results)
    assert torch.cuda.current_device() == 0
    assert cupy.cuda.runtime.getDevice() == 0
    arrays = [cupy.from_dlpack(tensor) for tensor in inputs.tensors]
    output = ms_deform_attn(arrays[0], inputs.sizes, None, *arrays[1:])
    assert output.device.id == 1
    assert cupy.cuda.runtime.getDevice() == 0


def test_threads_that_compile_and_run_at_once():
    # A shape of its own, so that all of them find its kernel not compiled.
    inputs = [random_inputs(d=32, p=6, seed=seed, device=DEVICE) for seed in range(8)]
    results = [None] * len(inputs)
    torch.cuda.synchronize(DEVICE)

    def work(i):
        stream = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(stream):
            results[i] = run(inputs[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, result in zip(inputs, results, strict=True):
        check_against_reference(one, *result)


@pytest.fixture
def no_waiting():
    """Make torch and CuPy raise where the host waits for the device, in this thread."""
    import cupyx

    torch.cuda.synchronize(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with cupyx.allow_synchronize(False):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def returns_at_once(function):
    """Whether a function returns while the device has not even begun with its work."""
    torch.cuda._sleep(10 * DELAY)
    function()
    done = torch.cuda.Event()
    done.record()
    return not done.query()


LEVEL_TABLES = {
    "host": lambda i: (i.sizes, None),
    "host tensors": lambda i: (i.shapes().cpu(), i.starts().cpu()),
    "device": lambda i: (i.shapes(), i.starts()),
    "device int32": lambda i: (i.shapes(torch.int32), None),
    "mixed": lambda i: (i.sizes, i.starts()),
}


@pytest.mark.filterwarnings("ignore:.*debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("table", LEVEL_TABLES)
@pytest.mark.parametrize("num_levels", [2, 17])
def test_nothing_waits_for_the_device(table, num_levels, request):
    inputs = random_inputs([(5, 7), (3, 4)] + [(1, 1)] * (num_levels - 2), d=16, device=DEVICE)
    table = LEVEL_TABLES[table](inputs)
    tensors = leaves(inputs)

    def work():
        output = ms_deform_attn(tensors[0], table[0], table[1], *tensors[1:])
        torch.autograd.grad(output, tensors, inputs.grad_output)
        arguments = (inputs.value, *table, inputs.locations, inputs.weights)
        ms_deform_attn_backward(inputs.grad_output, *arguments)

    work()
    request.getfixturevalue("no_waiting")
    assert returns_at_once(work)


@pytest.mark.filterwarnings("ignore:.*debug mode is a prototype:UserWarning")
def test_deterministic_algorithms_wait_for_nothing(deterministic, request):
    inputs = random_inputs(lq=300, d=16, device=DEVICE)
    arguments = (inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    ms_deform_attn_backward(*arguments)
    request.getfixturevalue("no_waiting")
    assert returns_at_once(lambda: ms_deform_attn_backward(*arguments))


@pytest.mark.filterwarnings("ignore:.*debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_module_waits_for_nothing(coordinates, on_device, request):
    module, arguments = module_example(coordinates, on_device)

    def work():
        module(*arguments).sum().backward()

    work()
    request.getfixturevalue("no_waiting")
    assert returns_at_once(work)


def test_memory_is_given_back():
    inputs = random_inputs(d=16, device=DEVICE)
    shapes = inputs.shapes(torch.int32)
    run(inputs, shapes)
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(20):
        run(inputs, shapes)
    assert torch.cuda.memory_allocated(DEVICE) == before


# --- CUDA graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
@pytest.mark.parametrize("table", ["host", "device", "device int32"])
@pytest.mark.parametrize("d", [16, 30])
def test_capture_and_replay_with_other_inputs(dtypes, table, d):
    sizes = [(5, 7), (3, 4)]
    fixed = random_inputs(sizes, d=d, dtypes=dtypes, device=DEVICE)
    table = LEVEL_TABLES[table](fixed)
    tensors = leaves(fixed)

    def step():
        output = ms_deform_attn(tensors[0], *table, *tensors[1:])
        return output, torch.autograd.grad(output, tensors, fixed.grad_output)

    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    for seed in (1, 2):
        # Where the table is on the device, its contents may change as well.
        order = sizes[::-1] if seed == 2 and torch.is_tensor(table[0]) else sizes
        new = random_inputs(order, d=d, dtypes=dtypes, seed=seed, device=DEVICE)
        for target, source in zip(fixed[1:], new[1:], strict=True):
            target.copy_(source)
        if torch.is_tensor(table[0]):
            table[0].copy_(new.shapes())
        if table[1] is not None:
            table[1].copy_(new.starts())
        for result in (output, *gradients):
            result.fill_(NAN)
        graph.replay()
        check_against_reference(new, output, gradients)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF], ids=str)
@pytest.mark.parametrize("lq", [3, 300])
def test_capture_at_once_after_warmup(dtypes, lq, monkeypatch):
    # A P of its own, so that nothing else has compiled its kernels.
    fixed = random_inputs(d=16, p=7, lq=lq, dtypes=dtypes, device=DEVICE)
    warmup(fixed.value.shape, fixed.locations.shape, dtype=dtypes[0], device=str(DEVICE))
    monkeypatch.setattr(compile_module, "_compile", lambda kernel: pytest.fail("compiled"))
    table = fixed.sizes, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ms_deform_attn(fixed.value, *table, *fixed.tensors[1:])
        gradients = ms_deform_attn_backward(
            fixed.grad_output, fixed.value, *table, *fixed.tensors[1:]
        )
    new = random_inputs(d=16, p=7, lq=lq, dtypes=dtypes, seed=1, device=DEVICE)
    for target, source in zip(fixed[1:], new[1:], strict=True):
        target.copy_(source)
    graph.replay()
    check_against_reference(new, output, gradients)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_compiled_into_graphs():
    inputs = random_inputs(d=16, lq=64, device=DEVICE)

    def step(value, locations, weights):
        return ms_deform_attn(value * 2, inputs.sizes, None, locations, weights).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # records in the second, replays in the third
        tensors = leaves(inputs)
        output = compiled(*tensors)
        got = output.clone(), torch.autograd.grad(output, tensors, inputs.grad_output)
    tensors = leaves(inputs)
    output = step(*tensors)
    expected = output, torch.autograd.grad(output, tensors, inputs.grad_output)
    torch.testing.assert_close(got, expected)


# --- transforms and autocast -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_transforms():
    inputs = away_from_edges(random_inputs(n=1, d=8, lq=3, p=2, device=DEVICE))

    def ours(value, *points):
        return ms_deform_attn(value, inputs.sizes, None, *points)

    def plain(value, *points):
        return reference.forward(value, inputs.levels, *points)

    along = tuple(torch.randn_like(tensor) for tensor in inputs.tensors)
    stacked = [torch.stack([tensor, 0.9 * tensor]) for tensor in inputs.tensors]

    def results(function):
        gradient = torch.func.grad(lambda *t: function(*t).square().sum(), (0, 1, 2))
        return (
            torch.func.jvp(function, inputs.tensors, along),
            torch.func.jvp(gradient, inputs.tensors, along),
            torch.func.vmap(gradient)(*stacked),
            torch.func.vmap(function, (None, 0, 0))(inputs.value, *stacked[1:]),
        )

    torch.testing.assert_close(results(ours), results(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_training_step_under_autocast(dtype):
    module = MSDeformAttn(64, 2, 4, 4).to(DEVICE)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    query, flat = torch.rand(2, 5, 64, device=DEVICE), torch.rand(2, 47, 64, device=DEVICE)
    points = torch.rand(2, 5, 2, 2, device=DEVICE)
    for _ in range(2):  # of the first, the initial offsets have no gradient that passes them
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            output = module(query, points, flat, [(5, 7), (3, 4)], None)
        assert output.dtype == dtype
        scaler.scale(output.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, old)


# --- CuPy arrays -----------------------------------------------------------------------------------


def as_cupy(tensor):
    """The same memory as a CuPy array."""
    import cupy

    return cupy.from_dlpack(tensor.detach())


CUPY_DTYPES = [pair for pair in DTYPES if torch.bfloat16 not in pair]


@pytest.mark.parametrize("dtypes", CUPY_DTYPES, ids=str)
@pytest.mark.parametrize("table", ["host", "numpy", "cupy"])
@pytest.mark.parametrize("d", [16, 30])
def test_cupy_arrays(dtypes, table, d):
    import cupy

    inputs = random_inputs(d=d, dtypes=dtypes, device=DEVICE)
    shapes = {
        "host": inputs.sizes,
        "numpy": np.array(inputs.sizes),
        "cupy": as_cupy(inputs.shapes(torch.int32)),
    }[table]
    arguments = [as_cupy(tensor) for tensor in inputs.tensors]
    arguments = (arguments[0], shapes, None, *arguments[1:])
    output = ms_deform_attn(*arguments)
    gradients = ms_deform_attn_backward(as_cupy(inputs.grad_output), *arguments)
    for result in (output, *gradients):
        assert type(result) is cupy.ndarray
    output, *gradients = map(torch.from_dlpack, (output, *gradients))
    check_against_reference(inputs, output, gradients)


def test_cupy_arrays_of_any_layout():
    inputs = random_inputs(d=16, device=DEVICE)
    output, gradients = run(inputs)
    arrays = [as_cupy(torch.stack([tensor, tensor], dim=-1))[..., 0] for tensor in inputs[1:]]
    value, locations, weights, grad_output = arrays
    arguments = (value, inputs.sizes, None, locations, weights)
    results = (ms_deform_attn(*arguments), *ms_deform_attn_backward(grad_output, *arguments))
    output_of_cupy, *gradients_of_cupy = map(torch.from_dlpack, results)
    same((output_of_cupy, gradients_of_cupy), (output, gradients))


def test_empty_cupy_arrays():
    inputs = random_inputs(lq=0, device=DEVICE)
    value, locations, weights, grad_output = map(as_cupy, inputs[1:])
    arguments = (value, inputs.sizes, None, locations, weights)
    assert ms_deform_attn(*arguments).shape == (2, 0, 16)
    gradients = ms_deform_attn_backward(grad_output, *arguments)
    assert not gradients.value.any()
    assert gradients.sampling_locations.shape == locations.shape


def test_cupy_arrays_follow_cupys_current_stream():
    import cupy

    inputs = random_inputs(d=16, device=DEVICE)
    expected = run(inputs)
    late = inputs._replace(
        value=torch.full_like(inputs.value, NAN),
        grad_output=torch.full_like(inputs.grad_output, NAN),
    )
    value, locations, weights, grad_output = map(as_cupy, late[1:])
    source, source_grad = as_cupy(inputs.value), as_cupy(inputs.grad_output)
    arguments = (value, inputs.sizes, None, locations, weights)
    torch.cuda.synchronize(DEVICE)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, DEVICE)):
        torch.cuda._sleep(DELAY)
        cupy.copyto(value, source)
        cupy.copyto(grad_output, source_grad)
        torch_stream = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(torch_stream):
            output = ms_deform_attn(*arguments)
            gradients = ms_deform_attn_backward(grad_output, *arguments)
    stream.synchronize()
    output, *gradients = map(torch.from_dlpack, (output, *gradients))
    same((output, gradients), expected)


# --- the module ------------------------------------------------------------------------------------


def module_example(coordinates=2, on_device=True, device=None):
    """A module whose parameters are not their initial values, and arguments for it."""
    torch.manual_seed(0)
    device = DEVICE if device is None else device
    module = MSDeformAttn(64, 2, 4, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    query, flat = torch.rand(2, 30, 64), torch.rand(2, 47, 64)
    points = torch.rand(2, 30, 2, coordinates)
    mask = torch.rand(2, 47) < 0.2
    sizes = [(5, 7), (3, 4)]
    shapes = torch.tensor(sizes, device=device) if on_device else sizes
    inputs = (query, points, flat)
    return module.to(device), (*(t.to(device) for t in inputs), shapes, None, mask.to(device))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_module_agrees_with_itself_on_a_cpu(coordinates, on_device):
    results = []
    for device in (DEVICE, "cpu"):
        module, arguments = module_example(coordinates, on_device, device)
        output = module(*arguments)
        output.square().sum().backward()
        gradients = [parameter.grad.cpu() for parameter in module.parameters()]
        results.append([output.detach().cpu(), *gradients])
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_module_under_autocast(dtype):
    module, arguments = module_example()
    expected = module(*arguments)
    with torch.autocast("cuda", dtype=dtype):
        output = module(*arguments)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


# --- what can go wrong -----------------------------------------------------------------------------


def test_a_kernel_that_does_not_compile_is_an_error(monkeypatch):
    monkeypatch.setattr(compile_module, "assemble", lambda file: '#error "planted"\n')
    inputs = random_inputs(d=16, p=9, device=DEVICE)  # a shape that nothing else has compiled
    with pytest.raises(KernelCompileError, match="planted") as caught:
        run(inputs)
    for part in ("msda_forward<", "forward.cu", "-std=c++17"):
        assert part in str(caught.value)
