# SPDX-License-Identifier: Apache-2.0
"""What launch.py and compile.py do with CuPy, with NumPy standing in for its arrays and the emulator for the device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cupy_msda import api
from cupy_msda.contract import check
from cupy_msda.cuda import compile as compiler
from cupy_msda.cuda import launch, plans
from cupy_msda.problem import Grids, LevelTable, Problem
from tests.emulator.emulator import Emulated
from tests.problems import Inputs, check_against_reference, random_inputs


class FakeDevice:
    """cupy.cuda.Device of a machine with one small device."""

    compute_capability = "90"

    def __init__(self, device: int = 0) -> None:
        assert device == 0
        self.attributes = {"MultiProcessorCount": 2}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def emulated_device(monkeypatch):
    """CuPy arrays are NumPy arrays, and a compiled kernel is an emulated one."""
    runtime = SimpleNamespace(getDevice=lambda: 0)
    names = ("ndarray", "zeros", "zeros_like", "float32", "float64")
    cupy = SimpleNamespace(
        **{name: getattr(np, name) for name in names},
        empty=lambda shape, dtype: np.full(shape, np.nan, dtype),  # as poisonous as it may be
        empty_like=lambda array: np.full_like(array, np.nan),
        from_dlpack=np.from_dlpack,
        ascontiguousarray=_ascontiguousarray,
        cuda=SimpleNamespace(
            runtime=runtime,
            Device=FakeDevice,
        ),
    )
    monkeypatch.setattr(launch, "require_cupy", lambda: cupy)
    launch._multiprocessors.cache_clear()

    def load(kernel, device):
        assert device == 0
        emulated = Emulated(compiler.assemble(kernel.file), kernel.name)

        def function(grid, block, arguments):
            emulated(grid, block, [None if type(a) is np.intp else a for a in arguments])

        return function

    monkeypatch.setattr(launch, "load", load)
    yield
    launch._multiprocessors.cache_clear()


class Array(np.ndarray):
    """A NumPy array with CuPy's `data.ptr`."""

    @property
    def data(self):
        """The memory, on a boundary that needs no copy."""
        return SimpleNamespace(ptr=0)


def _ascontiguousarray(array, dtype=None):
    return np.ascontiguousarray(array, dtype).view(Array)


def in_numpy(inputs: Inputs) -> list[np.ndarray]:
    """grad_output, value, locations and weights."""
    return [t.numpy() for t in (inputs.grad_output, *inputs.tensors)]


def results(inputs: Inputs, table: LevelTable | None = None) -> None:
    """Forward and backward through launch.py must stay within the error budget."""
    problem, known = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    grad_output, *arrays = in_numpy(inputs)
    output = launch.forward_arrays(problem, table or known, *arrays)
    gradients = launch.backward_arrays(problem, table or known, grad_output, *arrays)
    tensors = [torch.from_numpy(np.asarray(array)) for array in (output, *gradients)]
    check_against_reference(inputs, tensors[0], tensors[1:])


CASES = {
    "specialised": random_inputs(d=32),
    "half": random_inputs(d=16, dtypes=(torch.float16, torch.float32)),
    "generic": random_inputs(d=5),
    "float64": random_inputs(d=8, dtypes=(torch.float64, torch.float32)),
    "many-levels": random_inputs(((2, 3),) * 18, d=8, p=1),
    "encoder": random_inputs(((13, 17), (5, 6)), d=16, lq=13 * 17 + 5 * 6),
}


@pytest.mark.parametrize("inputs", CASES.values(), ids=CASES.keys())
def test_arguments_reach_the_kernels_in_order(emulated_device, inputs: Inputs) -> None:
    results(inputs)


class Once:
    """An exporter as torch.py makes them: its memory is handed out one time."""

    def __init__(self, array: np.ndarray) -> None:
        self._arrays = [array]

    def __dlpack__(self, **options):
        return self._arrays.pop().__dlpack__(**options)

    def __dlpack_device__(self):
        return 1, 0


@pytest.mark.parametrize(("case", "launches"), [("specialised", 1), ("encoder", 2)])
def test_each_array_is_exchanged_once_and_all_scalars_are_one_argument(
    emulated_device, monkeypatch, case: str, launches: int
) -> None:
    """Four arrays in the forward and seven in the backward, whatever it launches; the table goes with the scalars."""
    exchanged, launched = [], []
    from_dlpack = launch.require_cupy().from_dlpack

    def exchange(exporter):
        exchanged.append(exporter)
        return from_dlpack(exporter)

    monkeypatch.setattr(launch.require_cupy(), "from_dlpack", exchange)
    monkeypatch.setattr(launch, "load", lambda *_: lambda *call: launched.append(call[2]))
    inputs = CASES[case]
    problem, table = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    arrays = in_numpy(inputs)
    output, *gradients = map(np.zeros_like, arrays)
    launch.forward(problem, table, *map(Once, (*arrays[1:], output)))
    assert len(exchanged) == 4
    launch.backward(problem, table, tuple(map(Once, arrays)), tuple(map(Once, gradients)))
    assert len(exchanged) == 4 + 7
    assert len(launched) == 1 + launches
    for *pointers, params in launched:
        assert all(type(pointer) in (np.ndarray, np.intp) for pointer in pointers)
        assert params.dtype.names[:7] == Problem._fields[:7]
        assert params["levels"][: problem.num_levels, :2].tolist() == [
            list(s) for s in inputs.sizes
        ]


@pytest.mark.parametrize("inputs", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("needs_points", [True, False])
@pytest.mark.parametrize("most_points_owned", [0, 1000], ids=["fixed", "owner"])
def test_reproducible_gradients_of_value(
    emulated_device, monkeypatch, inputs: Inputs, needs_points: bool, most_points_owned: int
) -> None:
    """By tiles with owners where the specialised kernels may take them, else by sums in fixed point."""
    monkeypatch.setattr(plans, "_MOST_POINTS_OWNED", most_points_owned)
    problem, table = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    arrays = in_numpy(inputs)
    gradients = [np.full_like(array, np.nan) for array in arrays[1:]]
    sums = np.zeros(plans.num_sums(problem), np.int64)
    given = [Once(array) for array in gradients]
    of_points = given[1:] if needs_points else (None, None)
    launch.backward(problem, table, tuple(map(Once, arrays)), (given[0], *of_points), Once(sums))
    owned = most_points_owned and problem.value_dtype != "float64" and problem.head_dim >= 8
    assert sums.any() == (not owned or problem.num_levels > 16)
    output = torch.from_numpy(np.asarray(launch.forward_arrays(problem, table, *arrays[1:])))
    if needs_points:
        check_against_reference(inputs, output, list(map(torch.from_numpy, gradients)))
    else:
        assert np.isfinite(gradients[0]).all()
        assert all(np.isnan(gradient).all() for gradient in gradients[1:])


def test_who_owns_tiles() -> None:
    """Few points of one (image, head, level), and what the specialised kernels take; the rest needs sums."""
    few = Problem(2, 22223, 8, 32, 2048, 4, 4, *["float32"] * 3)
    assert plans.num_sums(few) == 0
    assert plans.plan_owner(few, LevelTable(None, None)).grid == (2 * 8 * 174, 1, 1)
    changes = (
        {"num_queries": 2049},
        {"num_points": 5},
        *LARGE.values(),
        {"batch": 2**31 // 1392 + 1},
    )
    for change in changes:
        assert plans.num_sums(few._replace(**change)) > 0


def test_grids_of_the_passes_over_memory_fill_the_device_or_cover_the_rows() -> None:
    inputs = random_inputs(((40, 40),), n=2, m=4, d=8, lq=900)
    problem, table = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    for multiprocessors, of_queries, of_positions in ((0, 1, 1), (50, 50, 50), (10**6, 113, 200)):
        assert plans.plan_scale(problem, table, multiprocessors).grid == (of_queries, 8, 1)
        assert plans.plan_finish(problem, multiprocessors).grid == (of_positions, 8, 1)


def test_level_table_of_another_integer_type_on_the_device(emulated_device) -> None:
    inputs = CASES["specialised"]
    table = LevelTable(
        None, None, inputs.shapes(torch.int32).numpy(), inputs.starts(torch.uint8).numpy()
    )
    results(inputs, table)


@pytest.mark.parametrize("empty", ["n", "lq", "m", "d", "p", "s"])
def test_nothing_is_launched_for_an_empty_problem(emulated_device, monkeypatch, empty) -> None:
    monkeypatch.setattr(launch, "load", lambda *_: pytest.fail("launched"))
    inputs = random_inputs(((0, 0),) if empty == "s" else ((5, 7), (3, 4)), **{empty: 0})
    results(inputs)


def test_grid_covers_more_images_and_heads_than_one_dimension_holds(monkeypatch) -> None:
    inputs = random_inputs(n=5, m=3, d=8)
    case = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    monkeypatch.setattr(plans, "MAX_GRID_YZ", 4)
    plan = plans.plan_forward.__wrapped__(*case)
    _, y, z = plan.grid
    assert (y, z) == (4, 4)
    output = np.full(case[0].output_shape, np.nan, np.float32)
    kernel = Emulated(compiler.assemble(plan.kernel.file), plan.kernel.name)
    arguments = [*in_numpy(inputs)[1:], output, None, None, plan.params]
    kernel(plan.grid, plan.block, arguments)
    plain = plans.plan_forward(*case)
    expected = np.empty_like(output)
    kernel(plain.grid, plain.block, [*arguments[:3], expected, None, None, plain.params])
    np.testing.assert_array_equal(output, expected)


LARGE = {
    "positions": {"spatial_size": 2**22},
    "bytes": {"spatial_size": 2**21, "num_heads": 8, "head_dim": 32},
    "levels": {"num_levels": 17},
    "head-dim": {"head_dim": 256},
    "odd-head-dim": {"head_dim": 30},
    "narrow-head-dim": {"head_dim": 4},
    "double": {"value_dtype": "float64"},
}


@pytest.mark.parametrize("change", LARGE.values(), ids=LARGE.keys())
def test_generic_kernels_take_what_the_specialised_cannot(change) -> None:
    inputs = random_inputs(d=32)
    problem, _ = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    table = LevelTable(None, None)
    assert plans.plan_forward(problem, table).kernel.file == "forward.cu"
    assert plans.plan_backward(problem, table).kernel.file == "backward.cu"
    problem = problem._replace(**change)
    assert plans.plan_forward(problem, table).kernel.file == "generic.cu"
    assert plans.plan_backward(problem, table).kernel.file == "generic.cu"


def test_rows_are_split_only_while_the_device_is_not_full() -> None:
    inputs = random_inputs(((4, 4),) * 4, m=8, d=32, lq=300, p=4)
    case = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    splits = [
        int(plans.plan_forward(*case, multiprocessors).kernel.name.split(", ")[-1][:-1])
        for multiprocessors in (1, 132, 10**6)
    ]
    assert splits[0] == 1
    assert splits == sorted(splits)
    assert splits[-1] == 4  # the most that four groups of eight lanes allow


def test_given_grids_are_an_order_for_half_as_many_queries() -> None:
    """With fewer the plain forward shares out the points of a row, so that the bits would differ."""
    inputs = random_inputs(((4, 4),), m=8, d=32, lq=16, p=4)
    small, table = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    most = 2 * 16 * 8 * 8 // plans.ORDERED_BLOCK  # multiprocessors whose blocks are full

    def ordered(multiprocessors: int, grids: Grids, **changed: int) -> bool:
        problem = small._replace(**changed)
        plan = plans.plan_forward(problem, table, multiprocessors, grids)
        sums_by_cell = plans._sorted(problem, multiprocessors, grids)
        assert sums_by_cell == plan.kernel.name.startswith("msda_forward_persistent<")
        return sums_by_cell

    assert [ordered(n, ()) for n in (most, most + 1)] == [True, False]
    given = [ordered(n, ((2, 8),)) for n in (1, most, 2 * most, 2 * most + 1, 10**6)]
    assert given == [True, True, True, False, False]
    plain = [plans.plan_forward(small, table, n).kernel.name for n in (2 * most, 2 * most + 1)]
    assert [name.endswith(", 1>") for name in plain] == [True, False]
    assert not ordered(1, None)
    assert not ordered(1, (), num_queries=15)
    assert ordered(1, ((3, 5),), num_queries=15)
    # What the kernels cannot take: rows beyond 32 bits, and what is for the generic ones.
    assert not ordered(1, ((2**15, 2**12),), num_queries=2**27)
    assert not ordered(1, ((2, 8),), head_dim=30)


ORDERS = {
    "auto": ("auto", True),
    "as-they-come": (None, False),
    "grids": ([(6, 7), (1, 5)], True),
    "one-grid": ([(47, 1)], True),
}


@pytest.mark.parametrize(("order", "ordered"), ORDERS.values(), ids=ORDERS.keys())
def test_the_order_reaches_the_kernels_from_the_array_functions(
    emulated_device, monkeypatch, order: object, ordered: bool
) -> None:
    inputs = random_inputs(m=4, d=32, lq=47)  # enough for the order by itself
    names = []
    load = launch.load

    def spy(kernel: compiler.Kernel, device: int) -> object:
        names.append(kernel.name.partition("<")[0])
        return load(kernel, device)

    monkeypatch.setattr(launch, "load", spy)
    monkeypatch.setattr(api, "on_host", lambda _: False)
    grad_output, value, *points = in_numpy(inputs)
    arguments = value, inputs.sizes, None, *points
    output = api.ms_deform_attn(*arguments, query_order=order)
    gradients = api.ms_deform_attn_backward(grad_output, *arguments, query_order=order)
    tensors = [torch.from_numpy(np.asarray(array)) for array in (output, *gradients)]
    check_against_reference(inputs, tensors[0], tensors[1:])
    assert ("msda_forward_persistent" in names, "msda_backward_value_binned" in names) == (
        ordered,
        ordered,
    )


def test_gradients_of_points_alone_are_computed_in_order_where_grids_are_known() -> None:
    encoder = Problem(2, 22223, 8, 32, 22223, 4, 4, *["float32"] * 3)
    table = LevelTable(None, None)

    def plan(
        problem: Problem,
        grids: Grids = (),
        multiprocessors: int = 132,
        needs: tuple[bool, bool] = (False, True),
    ) -> plans.Plan:
        return plans.plan_backward(problem, table, multiprocessors, *needs, grids=grids)

    decoder = encoder._replace(num_queries=900)
    for ordered in (plan(encoder), plan(decoder, ((30, 30),), 100)):
        assert ordered.kernel.name.startswith(
            "msda_backward_persistent<float, float, float, 8, 32, "
        )
        assert (ordered.grid[1:], ordered.block) == ((1, 1), (1024, 1, 1))
    assert plan(encoder).grid == (132, 1, 1)
    assert list(plan(decoder, ((30, 30),), 100).params["grids"][0]) == [30, 30]
    for plain in (
        plan(encoder, None),
        plan(encoder, (), 10**6),
        plan(encoder, needs=(True, True)),
        plan(encoder, needs=(True, False)),
        plan(decoder),
        plan(encoder._replace(head_dim=128, num_heads=2)),
    ):
        assert plain.kernel.name.startswith("msda_backward<")
    assert plan(encoder._replace(head_dim=30)).kernel.file == "generic.cu"


def test_a_null_pointer_stands_for_none() -> None:
    """CuPy would pass None as a null pointer to the argument, which the driver reads."""
    assert launch._as_cupy(None) == 0
    assert launch._as_cupy(None).itemsize == 8


def test_cupy_takes_the_parameters_by_value() -> None:
    """On a machine without a driver the launch gets as far as the driver, and no type is refused."""
    function = pytest.importorskip("cupy.cuda.function", reason="needs CuPy").Function
    runtime = pytest.importorskip("cupy_backends.cuda.api.runtime", reason="needs CuPy")
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError:
        pass
    else:
        pytest.skip("a null function must not be launched where there is a driver")
    null = function.__new__(function)
    with pytest.raises(TypeError):
        null((1,), (1,), (object(),), stream=SimpleNamespace(ptr=0))
    for inputs in (random_inputs(d=32), random_inputs(d=5)):
        case = check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
        parameters = plans.plan_forward(*case).params
        with pytest.raises(runtime.CUDARuntimeError):
            null((1,), (1,), (parameters,), stream=SimpleNamespace(ptr=0))


def test_compile_error_names_kernel_architecture_options_and_log(monkeypatch) -> None:
    """CuPy's own error, of whatever kind, becomes ours with all that is needed to report it."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy")

    def refuse(**arguments):
        assert arguments["name_expressions"] == ("msda_forward<float, 3>",)
        assert arguments["options"] == compiler.OPTIONS
        raise RuntimeError("kernels/forward.cu(7): error: no such thing")

    monkeypatch.setattr(cupy, "RawModule", refuse)
    monkeypatch.setattr(cupy.cuda, "Device", FakeDevice)
    with pytest.raises(compiler.KernelCompileError) as caught:
        compiler.load(compiler.Kernel("forward.cu", "msda_forward<float, 3>"), 0)
    text = str(caught.value)
    for part in ("msda_forward<float, 3>", "sm_90", *compiler.OPTIONS, "forward.cu(7): error"):
        assert part in text


def test_compiled_once_per_device(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(compiler, "_compile", lambda kernel: compiled.append(kernel) or object())
    monkeypatch.setattr(compiler, "_functions", {})
    kernel = compiler.Kernel("forward.cu", "some<1>")
    first = compiler.load(kernel, 0)
    assert compiler.load(kernel, 0) is first
    assert compiler.load(kernel, 1) is not first
    assert compiled == [kernel, kernel]


def test_assembled_source_is_one_piece_that_knows_its_files() -> None:
    for file in (
        "forward.cu",
        "backward.cu",
        "generic.cu",
        "fixed_point.cu",
        "backward_value_tiled.cu",
        "backward_value_binned.cu",
    ):
        source = compiler.assemble(file)
        assert "#include" not in source
        assert "#pragma once" not in source
        assert source.count("struct half_t {") == 1
        lines = source.splitlines()
        own = (compiler.kernel_dir() / file).read_text().splitlines()
        last = max(i for i, line in enumerate(lines) if line.startswith("#line"))
        number = int(lines[last].split()[1])
        assert lines[last].endswith(f'"kernels/{file}"')
        assert lines[last + 1 :] == own[number - 1 :]
