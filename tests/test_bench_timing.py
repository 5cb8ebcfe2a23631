# SPDX-License-Identifier: Apache-2.0
"""How the benchmark times a GPU, on a simulated one, and how it limits the time to compile."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from cupy_msda.bench import cases, gpu_timing, implementations, runner, time_limit, timing
from cupy_msda.bench.cases import Case, Shape
from cupy_msda.bench.constants import Constants
from cupy_msda.bench.implementations import COMPILED
from cupy_msda.bench.time_limit import TookTooLongError

CLEARING = 300.0  # microseconds on the device


class Device:
    """A host and a device with clocks of their own, in microseconds: the device runs what the host queues, in order."""

    def __init__(self):
        self.host = self.device = 0.0
        self.capturing = None  # what is being captured
        self.log = []  # replays and clearings, in order

    def launch(self, host, device):
        """Queue a kernel, or add it to the graph."""
        self.host += host
        if self.capturing is not None:
            self.capturing.append(device)
        else:
            self.device = max(self.device, self.host) + device

    def synchronize(self):
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.device)

    @contextmanager
    def capture(self, graph, pool, stream):
        assert (pool, stream) == ("pool", "stream")
        self.capturing = graph.kernels
        try:
            yield
        finally:
            self.capturing = None

    def zero_(self):
        """What the buffer does that clears the cache."""
        self.log.append("clear")
        self.launch(5, CLEARING)


def graph_class(fake):
    """CUDAGraph of a simulated device."""

    class Graph:
        def __init__(self):
            self.kernels = []

        def replay(self):
            fake.log.append(self)
            fake.launch(10, sum(self.kernels))

    return Graph


def event_class(fake):
    """Event of a simulated device."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = fake.device = max(fake.device, fake.host)

        def synchronize(self):
            fake.synchronize()

        def elapsed_time(self, end):
            return 1e-3 * (end.at - self.at)

    return Event


@pytest.fixture
def device(monkeypatch):
    """A simulated device in the place of torch's."""
    fake = Device()
    for name, replacement in {
        "Event": event_class(fake),
        "CUDAGraph": graph_class(fake),
        "graph": fake.capture,
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: "stream",
        "stream": lambda stream: nullcontext(),
        "synchronize": fake.synchronize,
        "_sleep": lambda cycles: fake.launch(5, cycles / 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement, raising=False)
    clock = SimpleNamespace(perf_counter=lambda: 1e-6 * fake.host)
    monkeypatch.setattr(gpu_timing, "time", clock)
    return fake


def kernels(device, host, each, count=5, before=lambda: None):
    """An implementation: `count` kernels in the forward, twice as many in the backward."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            before()
            ctx.save_for_backward(*tensors)
            for _ in range(count):
                device.launch(host, each)
            return inputs_of_tiny().grad_output.clone()

        @staticmethod
        def backward(ctx, grad_output):
            before()
            for _ in range(2 * count):
                device.launch(host, each)
            return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)

    return Function.apply


def inputs_of_tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.SHAPES, "tiny", Shape(1, ((3, 4),), None, heads=2, channels=8))
        return cases.build(Case("tiny", "uniform", "float32"), "cpu")


def stopwatches(device, function):
    return gpu_timing.Gpu(device).watch(function, inputs_of_tiny())


def test_slow_hosts_do_not_show_in_device_times(device):
    watches = stopwatches(device, kernels(device, host=300, each=2))
    for way, count in (("forward", 5), ("backward", 10)):
        watch = watches[way]
        assert watch.device_by == "graph"
        assert watch.device() == pytest.approx(2 * count)
        # The last kernel is still running when the host has queued the last call.
        assert watch.wall() == pytest.approx(300 * count, rel=0.01)


def test_slow_devices_show_in_both_times(device):
    watches = stopwatches(device, kernels(device, host=1, each=900))
    for way, count in (("forward", 5), ("backward", 10)):
        assert watches[way].device() == pytest.approx(900 * count)
        assert watches[way].wall() == pytest.approx(900 * count, rel=0.01)


def test_what_cannot_be_captured_runs_behind_a_spin(device):
    def waits_in_a_capture():
        if device.capturing is not None:
            device.synchronize()

    function = kernels(device, host=300, each=2, before=waits_in_a_capture)
    watches = stopwatches(device, function)
    assert device.capturing is None
    for way, count in (("forward", 5), ("backward", 10)):
        # Longer than the clearing alone would hide.
        assert 300 * count > CLEARING
        assert watches[way].device() == pytest.approx(2 * count)
        assert watches[way].device_by == (
            "spin: RuntimeError: operation not permitted when stream is capturing"
        )


def test_the_forward_is_replayed_before_each_backward(device):
    """The graph of the backward may overwrite what that of the forward saved."""
    watches = stopwatches(device, kernels(device, host=10, each=2))
    device.log.clear()
    for _ in range(2):
        watches["backward"].device()
    replays = [entry for entry in device.log if entry != "clear"]
    training, gradients = replays[:2]
    assert device.log == [training, "clear", gradients] * 2
    assert (len(training.kernels), len(gradients.kernels)) == (5, 10)


@pytest.mark.parametrize(("each", "calls"), [(2, 20), (100, 20), (500, 4), (5000, 1)])
def test_eager_loops_are_short(each, calls, device):
    """At most 20 calls, and where these take long only so many as take about ten milliseconds."""
    launched = []
    function = kernels(device, host=1, each=each, before=lambda: launched.append(1))
    forward = stopwatches(device, function)["forward"]
    launched.clear()
    forward.wall()
    assert len(launched) == pytest.approx(calls, abs=1)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no alarm signal")
class TestTimeLimit:
    """Of what is interrupted by an alarm."""

    def test_a_body_that_takes_too_long_is_interrupted(self):
        begin = time.perf_counter()
        with (
            pytest.raises(TookTooLongError, match=r"^waiting takes longer than 0.05 s$"),
            time_limit.time_limit(0.05, "waiting"),
        ):
            time.sleep(20)
        assert time.perf_counter() - begin < 10

    def test_other_errors_pass_and_the_alarm_is_off_afterwards(self):
        handler = signal.getsignal(signal.SIGALRM)
        with pytest.raises(KeyError), time_limit.time_limit(20, "raising"):
            raise KeyError
        with time_limit.time_limit(20, "nothing"):
            pass
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    def test_an_error_made_of_the_interruption_counts_as_it(self):
        def fail():
            try:
                time.sleep(20)
            except Exception as error:
                raise ValueError("the compiler failed") from error

        with pytest.raises(TookTooLongError), time_limit.time_limit(0.05, "waiting"):
            fail()

    def test_a_body_that_swallows_the_alarm_is_interrupted_again(self, monkeypatch):
        monkeypatch.setattr(time_limit, "_AGAIN", 0.05)
        swallowed = []

        def swallow():
            try:
                time.sleep(20)
            except TookTooLongError as error:
                swallowed.append(error)
            time.sleep(20)

        with pytest.raises(TookTooLongError), time_limit.time_limit(0.05, "waiting"):
            swallow()
        assert len(swallowed) == 1

    def test_elsewhere_than_in_the_main_thread_there_is_no_limit(self):
        done = []

        def body():
            with time_limit.time_limit(0.01, "waiting"):
                time.sleep(0.05)
                done.append(True)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert done == [True]

    def test_compiling_that_takes_too_long_is_left_out_and_not_tried_again(
        self, monkeypatch, tmp_path, capsys
    ):
        tried = []

        def compile_slowly(function, **options):
            def compiled(*tensors):
                tried.append(1)
                time.sleep(20)

            return compiled

        shape = Shape(1, ((3, 4),), None, heads=2, channels=8)
        monkeypatch.setitem(cases.SHAPES, "tiny", shape)
        chosen = tuple(Case("tiny", name, "float32") for name in ("uniform", "sigma 2"))
        monkeypatch.setattr(cases, "select", lambda device, quick: chosen)
        names = ["cupy_msda", COMPILED]
        monkeypatch.setattr(implementations, "installed", lambda quick: (names, {}))
        monkeypatch.setattr(torch, "compile", compile_slowly)
        monkeypatch.setitem(implementations.COMPILE_SECONDS, "cpu", 0.05)
        monkeypatch.setitem(runner._LIMITS, ("cpu", False), timing.Limits(2, 60))
        rates = Constants(copy=((100, 1e3),), multiply_adds=1e4)
        monkeypatch.setattr(runner.constants, "measure", lambda on: rates)
        implementations._compile.cache_clear()
        results = runner.measure("cpu", False, tmp_path / "results.json")
        implementations._compile.cache_clear()
        rows = [row for row in results["rows"] if row["implementation"] == COMPILED]
        assert len(rows) == 4
        for row in rows:
            assert row["verdict"] == "left out"
            assert row["why"] == "compiling takes longer than 0.05 s"
            assert row["wall_us"] is None
        assert tried == [1]
        assert "left out: compiling takes longer than 0.05 s" in capsys.readouterr().out
