# SPDX-License-Identifier: Apache-2.0
"""What launch.py and compile.py do with CuPy: NumPy arrays are CUDA arrays, an emulated device runs the kernels."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cupy_msda import ms_deform_attn, ms_deform_attn_backward, reference
from cupy_msda.contract import check
from cupy_msda.cuda import compile as compiler
from cupy_msda.cuda import launch
from tests.calls import in_threads, strided
from tests.emulated_device import STREAM, emulated_device
from tests.problems import check_against_reference, random_inputs


def in_numpy(inputs):
    """grad_output, value, locations and weights."""
    return [tensor.numpy() for tensor in (inputs.grad_output, *inputs.tensors)]


def results(inputs, table=None, arrays=None, **options):
    """The output and the gradients by value, locations and weights, through the array functions."""
    grad_output, value, *points = in_numpy(inputs) if arrays is None else arrays
    arguments = value, *(table or (inputs.sizes, None)), *points
    output = ms_deform_attn(*arguments, **options)
    return output, *ms_deform_attn_backward(grad_output, *arguments, **options)


def check_results(inputs, *case, **options):
    """Both directions must stay within the error budget."""
    output, *gradients = (
        torch.from_numpy(np.asarray(array)) for array in results(inputs, *case, **options)
    )
    check_against_reference(inputs, output, gradients)


CASES = {
    "specialised": random_inputs(d=32),
    "half": random_inputs(d=16, dtypes=(torch.float16, torch.float32)),
    "generic": random_inputs(d=5),
    "float64": random_inputs(d=8, dtypes=(torch.float64, torch.float32)),
    "many-levels": random_inputs(((2, 3),) * 18, d=8, p=1),
    "encoder": random_inputs(((13, 17), (5, 6)), d=16, lq=13 * 17 + 5 * 6),
}
KERNELS = {
    "specialised": ["msda_forward", "msda_backward"],
    "half": ["msda_forward", "msda_backward", "msda_round"],
    "generic": ["msda_forward_generic", "msda_backward_generic"],
    "float64": ["msda_forward_generic", "msda_backward_generic"],
    "many-levels": ["msda_forward_generic", "msda_backward_generic"],
    "encoder": [
        *("msda_forward_persistent", "msda_backward_value_binned", "msda_backward_persistent"),
    ],
}


# --- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_arrays_reach_the_kernels_and_results_come_back(case, device):
    check_results(CASES[case])
    kernels = [launched for launched in device.launched if isinstance(launched, str)]
    assert kernels == KERNELS[case]


@pytest.mark.parametrize("dtypes", [("int32", "uint8"), ("int64", "int64"), ("int64", None)])
def test_level_tables_on_the_device(dtypes, device):
    inputs = CASES["specialised"]
    of_shapes, of_starts = dtypes
    starts = None if of_starts is None else inputs.starts().numpy().astype(of_starts)
    check_results(inputs, (inputs.shapes().numpy().astype(of_shapes), starts))


def test_half_of_the_level_table_on_the_device(driver_device):
    inputs = CASES["specialised"]
    check_results(inputs, (inputs.sizes, inputs.starts().numpy()))
    # The next call's kernels get null pointers again.
    check_results(inputs)


def test_arrays_that_are_not_contiguous_or_not_aligned(driver_device):
    inputs = CASES["specialised"]
    arrays = [strided(tensor).numpy() for tensor in (inputs.grad_output, *inputs.tensors)]
    check_results(inputs, None, arrays)
    shifted = [
        tensor.new_zeros(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor).numpy()
        for tensor in (inputs.grad_output, *inputs.tensors)
    ]
    assert any(array.ctypes.data % launch.ALIGNMENT for array in shifted)
    check_results(inputs, None, shifted)


@pytest.mark.parametrize("d", [32, 5], ids=["specialised", "generic"])
def test_masks_of_any_layout(d, driver_device):
    inputs = random_inputs(d=d)
    mask = np.random.default_rng(0).random(inputs.value.shape[:2]) < 0.5
    arguments = inputs.levels, inputs.locations, inputs.weights
    rules = {"value_mask": torch.from_numpy(mask)}
    expected = (
        reference.forward(inputs.value, *arguments, **rules),
        *reference.backward(inputs.grad_output, inputs.value, *arguments, **rules),
    )
    for form in (mask, np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2]):
        for got, wanted in zip(results(inputs, value_mask=form), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # The next call's kernels get null pointers again.
    check_results(inputs)


@pytest.mark.parametrize("empty", ["n", "lq", "m", "d", "p", "s"])
def test_empty_problems_launch_no_kernel(empty, device):
    inputs = random_inputs(((0, 0),) if empty == "s" else ((5, 7), (3, 4)), **{empty: 0})
    check_results(inputs)
    assert not device.compiled
    assert all(isinstance(launched, int) for launched in device.launched)


ORDERS = {
    "auto": ("auto", True),
    "as-they-come": (None, False),
    "grids": ([(6, 7), (1, 5)], True),
    "one-grid": ([(47, 1)], True),
}


@pytest.mark.parametrize(("order", "persistent"), ORDERS.values(), ids=ORDERS.keys())
def test_query_order_reaches_the_kernels(order, persistent, driver_device):
    inputs = random_inputs(m=4, d=32, lq=47)  # enough queries for the levels as grids
    check_results(inputs, query_order=order)
    launched = driver_device.launched
    assert ("msda_forward_persistent" in launched) == persistent
    assert ("msda_backward_value_binned" in launched) == persistent


@pytest.mark.parametrize("table", ["host", "device"])
def test_each_array_is_exchanged_once(table, idle_device, monkeypatch):
    """Whatever a call launches; and CuPy's own arrays are not."""
    exchanged = []
    from_dlpack = idle_device.cupy.from_dlpack
    monkeypatch.setattr(
        idle_device.cupy, "from_dlpack", lambda array: exchanged.append(array) or from_dlpack(array)
    )
    inputs = CASES["encoder"]
    known = inputs.sizes, inputs.starts().tolist()
    level_table = known if table == "host" else (inputs.shapes().numpy(), inputs.starts().numpy())
    grad_output, value, *points = in_numpy(inputs)
    of_table = [] if table == "host" else list(level_table)
    for function, gradients in ((ms_deform_attn, []), (ms_deform_attn_backward, [grad_output])):
        function(*gradients, value, *level_table, *points)
        given = [*gradients, value, *points, *of_table]
        assert list(map(id, exchanged)) == list(map(id, given))
        exchanged.clear()
    from_cupy = [array.view(idle_device.cupy.ndarray) for array in in_numpy(inputs)]
    results(inputs, known, from_cupy)
    assert not exchanged


# --- launches ----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """cuLaunchKernel's arguments, with the pointers that the argument table had."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    table: int
    extra: int
    pointers: list[int]


@pytest.fixture
def calls(idle_device, monkeypatch):
    """The driver's launches; of the first nine pointers, whichever the kernel takes."""
    found = []

    def launch_kernel(function, gx, gy, gz, bx, by, bz, shared, stream, table, extra):
        where = (gx, gy, gz), (bx, by, bz), shared, stream, table, extra
        found.append(Call(*where, list((ctypes.c_void_p * 9).from_address(table))))

    monkeypatch.setattr(idle_device.cupy.cuda.driver, "launchKernel", launch_kernel)
    return found


def forward_case(inputs):
    """Problem, level table, grids and device as `bind_forward` takes them."""
    given = inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    return *check(*given), None, 0


def forward_arguments(inputs):
    """The arguments of `ms_deform_attn`."""
    _, value, *points = in_numpy(inputs)
    return value, inputs.sizes, None, *points


def pointer_at(address):
    """The pointer that lies at an address."""
    return ctypes.c_void_p.from_address(address).value


def test_a_launch_takes_the_threads_slots_and_the_plans_params(calls):
    inputs = CASES["specialised"]
    arrays = in_numpy(inputs)[1:]
    output = ms_deform_attn(*forward_arguments(inputs))
    (step,) = launch.bind_forward(*forward_case(inputs)).plan.launches
    (call,) = calls
    assert (call.grid, call.block) == (step.grid, step.block)
    assert (call.shared, call.stream, call.extra) == (0, STREAM, 0)
    assert step.arguments == ("value", "locations", "weights", None, None, "output", None, None)
    addresses = launch.thread_arguments().addresses
    inputs_at = [addresses[launch.SLOT[name]] for name in step.arguments[:3]]
    output_at, null = addresses[launch.SLOT["output"]], addresses[len(launch.SLOT)]
    expected = [*inputs_at, null, null, output_at, null, null, step.params.ctypes.data]
    assert call.pointers == expected
    assert [pointer_at(slot) for slot in inputs_at] == [array.ctypes.data for array in arrays]
    assert pointer_at(output_at) == output.ctypes.data
    assert pointer_at(null) is None


def test_other_arrays_take_the_same_table(calls):
    inputs = CASES["specialised"]
    slot = launch.thread_arguments().addresses[launch.SLOT["output"]]
    outputs, pointers = [], []
    for _ in range(2):
        outputs.append(ms_deform_attn(*forward_arguments(inputs)))
        pointers.append(pointer_at(slot))
    assert calls[0] == calls[1]
    assert pointers == [output.ctypes.data for output in outputs]
    assert pointers[0] != pointers[1]


def in_a_thread(function):
    """What a function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_has_a_table_of_its_own(calls):
    inputs = CASES["specialised"]
    results(inputs)
    others = in_a_thread(lambda: launch.thread_arguments() if results(inputs) else None)
    mine, theirs = calls[0], calls[2]
    assert mine.table != theirs.table
    assert mine.pointers[-1] == theirs.pointers[-1]  # the plan's params
    assert set(theirs.pointers[:-1]) <= set(others.addresses)
    assert not set(theirs.pointers[:-1]) & set(mine.pointers[:-1])


def test_tables_of_many_plans_do_not_pile_up(calls):
    inputs = CASES["specialised"]
    (step,) = launch.bind_forward(*forward_case(inputs)).plan.launches
    ms_deform_attn(*forward_arguments(inputs))
    arguments, others = launch.thread_arguments(), [step._replace() for _ in range(5000)]
    for other in others:
        arguments.add_table(other)
    assert len(arguments.tables) < len(others)
    ms_deform_attn(*forward_arguments(inputs))
    assert calls[0].pointers == calls[1].pointers


def test_fills_and_launches_go_to_cupys_current_stream(device):
    with device.on_stream(5):
        check_results(CASES["specialised"])
    assert any(isinstance(launched, int) for launched in device.launched)  # a fill
    assert device.streams == {5}
    check_results(CASES["specialised"])
    assert device.streams == {5, STREAM}


@pytest.mark.parametrize("has_driver", [True, False], ids=["driver", "raw-kernel"])
@pytest.mark.parametrize("stream", [0, 5])
def test_a_plan_runs_on_the_stream_that_it_is_given(stream, has_driver, monkeypatch):
    """torch's current stream, say, while CuPy's is another."""
    with emulated_device(monkeypatch, has_driver=has_driver, runs=False) as device:
        bound = launch.bind_forward(*forward_case(CASES["specialised"]))
        launch.run(bound, launch.thread_arguments(), stream)
        assert device.streams == {stream}


# --- devices and threads -----------------------------------------------------------------------------


@pytest.fixture
def guards(idle_device, monkeypatch):
    """The devices that were made current by a guard, and those whose context was made current."""
    cuda = idle_device.cupy.cuda
    entered, contexts = [], []
    guard = cuda.Device
    monkeypatch.setattr(cuda, "Device", lambda index: entered.append(index) or guard(index))
    monkeypatch.setattr(cuda.runtime, "setDevice", contexts.append)
    return SimpleNamespace(entered=entered, contexts=contexts, guard=guard)


def test_a_guard_is_entered_on_a_threads_first_launch_and_never_on_the_current_device(guards):
    bound = launch.bind_forward(*forward_case(CASES["specialised"]))
    guards.entered.clear()

    def run():
        seen = []
        for _ in range(3):
            launch.run(bound, launch.thread_arguments(), STREAM)
            seen.append((len(guards.entered), len(guards.contexts)))
        return seen

    assert in_a_thread(run) == [(1, 1)] * 3
    assert in_a_thread(run) == [(2, 2)] * 3
    assert guards.entered == guards.contexts == [0, 0]


def test_a_guard_is_entered_while_another_device_is_current(guards, idle_device):
    bound = launch.bind_forward(*forward_case(CASES["specialised"]))
    arguments, get_device = launch.thread_arguments(), idle_device.cupy.cuda.runtime.getDevice
    launch.run(bound, arguments, STREAM)
    launched = []
    bound = bound._replace(steps=(lambda *_: launched.append(get_device()),))
    guards.entered.clear()
    with guards.guard(1):
        launch.run(bound, arguments, STREAM)
        assert get_device() == 1
    launch.run(bound, arguments, STREAM)
    assert (launched, guards.entered) == ([0, 0], [0])


def test_each_device_has_a_context_of_its_own(guards, idle_device):
    problem, table, grids, _ = forward_case(CASES["specialised"])
    bounds = [launch.bind_forward(problem, table, grids, index) for index in (0, 1)]
    assert {index for _, index in idle_device.compiled} == {0, 1}

    def run():
        for bound in bounds:
            with guards.guard(bound.device):
                for _ in range(2):
                    launch.run(bound, launch.thread_arguments(), STREAM)
        return launch.thread_arguments().devices

    assert in_a_thread(run) == {0, 1}
    assert guards.contexts == [0, 1]


def test_threads_do_not_mix_their_arrays(device):
    in_threads(check_results, [random_inputs(d=32, seed=seed) for seed in range(3)])


def test_a_device_is_described_by_its_attributes(monkeypatch):
    attributes = {"MultiProcessorCount": 132, "WarpSize": 32}
    found = SimpleNamespace(attributes=attributes, compute_capability="90")
    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: found))
    monkeypatch.setattr(launch, "require_cupy", lambda: cupy)
    assert launch.describe.__wrapped__(0) == (132, "90", 32)


# --- CuPy itself ---------------------------------------------------------------------------------------


@pytest.fixture
def without_gpu():
    """CuPy's module of the driver, where no call can get through."""
    driver = pytest.importorskip("cupy_backends.cuda.api.driver", reason="needs CuPy")
    runtime = pytest.importorskip("cupy_backends.cuda.api.runtime", reason="needs CuPy")
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError:
        return SimpleNamespace(driver=driver, runtime=runtime)
    pytest.skip("a null function must not be launched where there is a driver")


def test_cupys_driver_takes_a_launch_as_we_make_it(without_gpu, monkeypatch):
    """On a machine without a driver, the call gets as far as the driver: no type or number of arguments is refused."""
    launch_kernel = getattr(without_gpu.driver, "launchKernel", None)
    if launch_kernel is None:
        pytest.skip("this CuPy has no cupy.cuda.driver.launchKernel")
    with pytest.raises(TypeError):
        launch_kernel(0, 1, 1)
    with emulated_device(monkeypatch, runs=False) as device:
        results(CASES["specialised"])  # so that the thread has its context
        device.cupy.cuda.driver.launchKernel = launch_kernel
        launch.bind_forward.cache_clear()
        with pytest.raises(RuntimeError, match=r"libcuda|CUDA_ERROR"):
            results(CASES["specialised"])


def test_cupys_raw_kernel_takes_the_arguments_as_we_make_them(without_gpu, monkeypatch):
    """The same for a call of the RawKernel: pointers as integers, the parameters by value."""
    function = pytest.importorskip("cupy.cuda.function", reason="needs CuPy").Function
    null = function.__new__(function)

    def call(grid, block, arguments):
        return null(grid, block, arguments, stream=SimpleNamespace(ptr=0))

    with pytest.raises(TypeError):
        call((1,), (1,), (object(),))
    with emulated_device(monkeypatch, has_driver=False, runs=False):
        monkeypatch.setattr(launch, "load", lambda *_: call)
        for case in ("specialised", "generic"):
            with pytest.raises(without_gpu.runtime.CUDARuntimeError):
                results(CASES[case])


# --- compile.py ----------------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch):
    """What CuPy's RawModule was given, each time."""
    made = []

    class Module:
        def __init__(self, **arguments):
            time.sleep(0.01)  # others get to run
            made.append(arguments)

        def get_function(self, name):
            return object()

    cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(compute_capability="90"),
        nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=Module, cuda=cuda))
    return made


@pytest.fixture
def kernel():
    """One that no other test compiles."""
    return compiler.Kernel("forward.cu", f"some<{time.monotonic_ns()}>")


def test_compiled_once_per_device(modules, kernel):
    first = compiler.load(kernel, 0)
    assert compiler.load(kernel, 0) is first
    assert compiler.load(kernel, 1) is not first
    assert len(modules) == 2
    for arguments in modules:
        assert arguments == {
            "code": compiler.assemble("forward.cu"),
            "options": compiler.OPTIONS,
            "name_expressions": (kernel.name,),
        }


def test_compiled_once_by_threads_that_need_it_at_once(modules, kernel):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(compiler.load(kernel, 0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(modules) == 1
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_a_second_call_compiles_nothing(idle_device, monkeypatch):
    loads = []
    monkeypatch.setattr(launch, "load", lambda *key: loads.append(key) or idle_device.load(*key))
    inputs = CASES["encoder"]
    results(inputs)
    assert len(loads) == 3
    results(inputs)
    assert len(loads) == 3


def test_compile_error_names_kernel_architecture_options_and_log(modules, monkeypatch):
    """CuPy's own error, of whatever kind, becomes ours with all that is needed to report it."""

    def refuse(**arguments):
        raise RuntimeError("kernels/forward.cu(7): error: no such thing")

    monkeypatch.setattr(sys.modules["cupy"], "RawModule", refuse)
    with pytest.raises(compiler.KernelCompileError) as caught:
        compiler.load(compiler.Kernel("forward.cu", "msda_forward<float, 3>"), 0)
    text = str(caught.value)
    for part in ("msda_forward<float, 3>", "sm_90", *compiler.OPTIONS, "forward.cu(7): error"):
        assert part in text


@pytest.mark.parametrize("file", sorted(path.name for path in compiler.kernel_dir().glob("*.cu")))
def test_assembled_source_is_one_piece_that_knows_its_files(file):
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
