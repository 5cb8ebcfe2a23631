# SPDX-License-Identifier: Apache-2.0
"""The Numba kernels among processes: forks, exit, Numba's disk cache, limits on threads, a Numba that does not work."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from numba import config, types
from numba.core.caching import CompileResultCacheImpl

from cupy_msda import faults, ms_deform_attn, ms_deform_attn_backward
from cupy_msda.cpu import kernels, threads

# Large enough for four threads.
PROGRAM = """
import numpy as np
from cupy_msda import ms_deform_attn, ms_deform_attn_backward
rng = np.random.default_rng(0)
value = rng.standard_normal((1, 300, 8, 32), np.float32)
points = rng.random((1, 600, 8, 1, 4, 2), np.float32), rng.random((1, 600, 8, 1, 4), np.float32)
def call():
    output = ms_deform_attn(value, [(15, 20)], None, *points)
    return output, *ms_deform_attn_backward(output, value, [(15, 20)], None, *points)
def helped():
    from cupy_msda.cpu import kernels as cpu
    levels = ((15, 20, 0),)
    output = cpu.forward(value, levels, *points, num_points=(4,), threads=4)
    results = output, *cpu.backward(output, value, levels, *points, num_points=(4,), threads=4)
    assert len(cpu._helpers) == 3 and all(helper.is_alive() for helper in cpu._helpers)
    return results
def same(results, expected):
    return all((one == other).all() for one, other in zip(results, expected))
"""


def python(program: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in another interpreter, in the root of the project."""
    done = subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_the_package_imports_no_numba() -> None:
    program = "import sys, cupy_msda; print([name for name in sys.modules if name == 'numba'])"
    assert python(program).stdout.strip() == "[]"


# --- fork and exit ---------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")  # Python 3.12 and later warn of any fork with threads
def forked(function):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a deadlock ends here
        os._exit(0 if function() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@forks
def test_kernels_and_helpers_run_in_a_process_forked_after_they_ran() -> None:
    program = """
first = helped()
assert forked(lambda: same(helped(), first))
assert same(helped(), first)
"""
    python(FORK + PROGRAM + program)


@forks
@pytest.mark.parametrize(
    ("moment", "is_cached"),
    [
        ("'numba' in sys.modules", True),
        ("'cupy_msda.cpu.kernels' in sys.modules", True),
        ("compiler_locked()", False),
    ],
)
def test_a_process_forked_during_the_first_call_of_another_thread(
    moment: str, is_cached: bool, tmp_path: Path
) -> None:
    program = f"""
def compiler_locked():
    lock = sys.modules.get("numba.core.compiler_lock")
    if not hasattr(lock, "global_compiler_lock") or "cupy_msda.cpu.kernels" not in sys.modules:
        return False
    inner = lock.global_compiler_lock._lock
    if free := inner.acquire(blocking=False):
        inner.release()
    return not free
import cupy_msda.api
def forward():
    return ms_deform_attn(value, [(15, 20)], None, *points)
thread = threading.Thread(target=forward)
thread.start()
while not {moment}:
    time.sleep(1e-4)
assert thread.is_alive()
assert forked(lambda: forward().any())
thread.join()
"""
    cache = {} if is_cached else {"NUMBA_CACHE_DIR": str(tmp_path)}
    python(FORK + PROGRAM + program, **cache)


@forks
def test_a_process_forked_while_another_thread_imports_the_part_for_torch() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    program = """
import torch, cupy_msda.api
tensors = [torch.from_numpy(array) for array in (value, *points)]
def forward():
    return ms_deform_attn(tensors[0], [(15, 20)], None, *tensors[1:])
thread = threading.Thread(target=forward)
thread.start()
while 'cupy_msda.torch.functions' not in sys.modules:
    time.sleep(1e-4)
assert thread.is_alive()
assert forked(lambda: forward().any())
"""
    python(FORK + PROGRAM + program)


@forks
def test_a_process_forked_while_another_thread_looks_for_the_kernels() -> None:
    program = """
import cupy_msda.api
looking = threading.Event()
class SlowFinder:
    def find_spec(name, path, target=None):
        if name == "cupy_msda.cpu.kernels" and not looking.is_set():
            looking.set()  # the thread holds the module's lock, and sys.modules lacks it
            time.sleep(0.3)
sys.meta_path.insert(0, SlowFinder)
def forward():
    return ms_deform_attn(value, [(15, 20)], None, *points)
threading.Thread(target=forward).start()
assert looking.wait(60) and "cupy_msda.cpu.kernels" not in sys.modules
assert forked(lambda: forward().any())
"""
    python(FORK + PROGRAM + program)


@forks
def test_a_child_may_compile_for_cuda_though_another_thread_of_its_parent_did() -> None:
    program = """
from cupy_msda.cuda import compile
held, done = threading.Event(), threading.Event()
def compile_long():
    with compile._lock:
        held.set()
        done.wait()
threading.Thread(target=compile_long).start()
held.wait()
assert forked(lambda: compile._lock.acquire())
done.set()
"""
    python(FORK + program)


@forks
@pytest.mark.parametrize(
    "lock",
    [
        "numba.core.compiler_lock.global_compiler_lock",
        "llvmlite.binding.ffi.lib._lock",
    ],
)
def test_a_process_forked_while_another_thread_compiles_something_else(lock: str) -> None:
    program = f"""
import numba, llvmlite.binding, cupy_msda.api
held = threading.Event()
def compile_long():
    with {lock}:
        held.set()
        time.sleep(1)
threading.Thread(target=compile_long).start()
held.wait()
assert forked(call)
assert call()
"""
    python(FORK + PROGRAM + program)


@pytest.mark.parametrize("before", ["helped()", "call()"])
def test_kernels_run_while_the_interpreter_exits(before: str) -> None:
    """With helpers that run already, and where they would have to be started."""
    program = f"""
import atexit
from cupy_msda.cpu import kernels as cpu
first = {before}
if {before == "call()"}:
    cpu._forget_helpers()
levels = ((15, 20, 0),)
atexit.register(lambda: print(same(cpu.forward(value, levels, *points, num_points=(4,), threads=4), first[0])))
"""
    assert python(PROGRAM + program).stdout == "True\n"


# --- the disk cache --------------------------------------------------------------------------------


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path) -> None:
    program = """
call()
from cupy_msda.cpu import kernels as cpu
cpu.fused_forward_kernel(32, 4, nearest=True)
cpu.fused_backward_kernel(32, 4, nearest=True, masked=True)
"""
    stamps = []
    for _ in range(2):
        python(PROGRAM + program, "-W", "error", NUMBA_CACHE_DIR=str(tmp_path))
        stamps.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")})
    assert stamps[0] == stamps[1]
    assert any("forward_32_4" in path.name for path in stamps[0])
    assert any("backward_32_4" in path.name for path in stamps[0])
    assert any("fused_forward_nearest_32_4" in path.name for path in stamps[0])
    assert any("backward_nearest_masked_32_4" in path.name for path in stamps[0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Numba's cache, empty, in a process that has not warned yet."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(faults, "_told", set())
    return tmp_path


def compiled(name: str = "one", step: int = 1) -> Any:
    """A small kernel, compiled or found in the cache: x + step."""

    @kernels._compiled(name, types.int64)
    def add(x: Any) -> Any:
        return x + step

    assert add(1) == 1 + step
    return add


def found(kernel: Any) -> bool:
    """Whether the kernel was in the cache."""
    return bool(kernel.stats.cache_hits)


def file(folder: Path, suffix: str, name: str = "one") -> Path:
    """The index or the data of a kernel."""
    (path,) = folder.rglob(f"*.{name}-*.{suffix}")
    return path


def flipped(data: bytes) -> bytes:
    """Some bytes of the machine code changed."""
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 255 for b in data[middle : middle + 9]) + data[middle + 9 :]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *(
            (suffix, lambda data, n=n: data[:n])
            for suffix in ("nbi", "nbc")
            for n in (0, 9, 40, -1)
        ),
        *((suffix, lambda data: bytes(len(data))) for suffix in ("nbi", "nbc")),
        *((suffix, lambda _: b"cos\nno_such_name\n.") for suffix in ("nbi", "nbc")),
        ("nbi", lambda data: data[: data.index(b".") + 1] + pickle.dumps(42)),
        ("nbc", lambda _: pickle.dumps(42)),
        ("nbc", flipped),
    ],
)
def test_a_damaged_cache_costs_one_warning_and_is_replaced(
    suffix: str, damage: Callable[[bytes], bytes], folder: Path
) -> None:
    assert not found(compiled())
    path = file(folder, suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"cache in {folder}") as warnings:
        assert not found(compiled())
    assert len(warnings) == 1
    assert found(compiled())


def test_a_file_of_another_kernel_is_not_run(folder: Path) -> None:
    compiled("one", 1)
    compiled("two", 2)
    shutil.copy(file(folder, "nbc", "one"), file(folder, "nbc", "two"))
    with pytest.warns(RuntimeWarning, match="does not match its checksum"):
        compiled("two", 2)


def test_a_cache_that_can_neither_be_read_nor_written_costs_one_warning(folder: Path) -> None:
    compiled()
    index = file(folder, "nbi")
    index.unlink()
    index.mkdir()
    with pytest.warns(RuntimeWarning, match=f"cache in {folder}.* must be readable"):
        compiled()
    assert not found(compiled())  # another warning would be an error


def test_no_folder_for_a_cache_costs_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    with pytest.warns(RuntimeWarning, match="must have a folder that can be written"):
        compiled()
    compiled()


def test_a_folder_that_is_a_file_costs_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setattr(config, "CACHE_DIR", str(folder / "file"))
    with pytest.warns(RuntimeWarning, match=f"NUMBA_CACHE_DIR .* got '{folder}/file'"):
        compiled()
    compiled()


def test_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits the size of files")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    said = python(limit + PROGRAM + "call(); print('right')", NUMBA_CACHE_DIR=str(tmp_path))
    assert said.stdout == "right\n"
    assert said.stderr.count("RuntimeWarning: ") == 1
    assert str(tmp_path) in said.stderr


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs /proc, where not even root can make a file"
)
def test_a_folder_that_cannot_be_written_costs_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", "/proc/self/task")
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR .* got '/proc/self/task'"):
        compiled()
    compiled()


@forks
def test_eight_processes_that_compile_at_once_share_a_cache(tmp_path: Path) -> None:
    program = """
from tests import test_cpu_processes as tests
from tests.processes import in_processes
def compile_all():
    return [tests.found(tests.compiled(name, step)) for step, name in enumerate(("one", "two", "three"))]
in_processes(compile_all)
assert all(compile_all())
"""
    python(program, "-W", "error", NUMBA_CACHE_DIR=str(tmp_path))


INTERRUPTED = ["typeinfer.TypeInferer.propagate", "codegen.CPUCodeLibrary.finalize",
               "caching.IndexDataCacheFile.save", "caching.IndexDataCacheFile.load"]  # fmt: skip


def interrupted(*_: Any, **__: Any) -> Any:
    """A function during which a user presses Control-C."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("function", INTERRUPTED)
def test_an_interrupt_passes_and_the_next_call_compiles(
    function: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"numba.core.{function}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled()
    compiled()
    assert found(compiled())


def test_a_call_that_was_interrupted_runs_the_kernels_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value, levels = np.ones((1, 6, 1, 43), np.float32), [(2, 3)]  # D that no other test has
    points = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32), np.ones((1, 1, 1, 1, 1), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_compiled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ms_deform_attn(value, levels, None, *points)
    ran = []
    monkeypatch.setattr(
        kernels, "forward", lambda *a, f=kernels.forward, **k: ran.append(1) or f(*a, **k)
    )
    assert (ms_deform_attn(value, levels, None, *points) == 1).all()
    assert ran


# --- a Numba that does not work --------------------------------------------------------------------


def raising(*_: Any) -> Any:
    """A compiler that fails in a way that nobody expects."""
    raise KeyError("no such target")


def test_a_kernel_that_does_not_compile_means_the_reference_and_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faults, "_told", set())
    monkeypatch.setattr(kernels, "_compiled", raising)
    value, levels = np.ones((1, 6, 1, 37), np.float32), [(2, 3)]  # D that no other test has
    points = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32), np.ones((1, 1, 1, 1, 1), np.float32)
    with pytest.warns(RuntimeWarning, match=r"Numba must .* got KeyError.* reference"):
        output = ms_deform_attn(value, levels, None, *points)
    gradients = ms_deform_attn_backward(output, value, levels, None, *points)
    # Every factor is a power of two: nothing rounds.
    assert (output == 1).all()
    assert (gradients.attention_weights == 37).all()


@pytest.mark.parametrize(
    "environment",
    [{"NUMBA_NUM_THREADS": "0"}, {"NUMBA_DISABLE_JIT": "1"}],
)
def test_a_numba_that_does_not_work_means_the_reference_and_one_warning(
    environment: dict[str, str],
) -> None:
    program = """
call(), call()
from cupy_msda.cpu import backend
print(backend.backend().__name__)
"""
    said = python(PROGRAM + program, **environment)
    assert said.stdout == "cupy_msda.reference\n"
    assert said.stderr.count("RuntimeWarning: Numba must import and compile") == 1


# --- threads ---------------------------------------------------------------------------------------

FOUR_PROCESSORS = """
import os
os.sched_getaffinity = lambda _: set(range(4))
"""
COUNT = """
import cupy_msda.cpu.kernels as cpu
ms_deform_attn(value, [(15, 20)], None, *points)
print(1 + len(cpu._helpers))
"""


@pytest.mark.parametrize(
    ("setting", "environment", "threads"),
    [
        ("", {}, 4),
        ("", {"NUMBA_NUM_THREADS": "3"}, 3),
        ("", {"OMP_NUM_THREADS": "1"}, 1),
        ("", {"OMP_NUM_THREADS": "2,4"}, 2),
        ("", {"OMP_NUM_THREADS": "0"}, 4),
        ("import numba; numba.set_num_threads(1)", {}, 1),
        ("os.sched_getaffinity = lambda _: {0, 2}", {}, 2),
    ],
)
def test_limits_on_threads(setting: str, environment: dict[str, str], threads: int) -> None:
    settings = {"NUMBA_NUM_THREADS": "4", "OMP_NUM_THREADS": "", **environment}
    assert int(python(FOUR_PROCESSORS + setting + PROGRAM + COUNT, **settings).stdout) == threads


def test_limits_on_threads_by_threadpoolctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    without = threads.limit()
    blas = SimpleNamespace(internal_api="openblas", num_threads=3)
    silent = SimpleNamespace(internal_api="blis", num_threads=1)  # says 1 where nothing is set
    controller = SimpleNamespace(lib_controllers=[blas, silent])
    module = SimpleNamespace(ThreadpoolController=lambda: controller)
    monkeypatch.setitem(sys.modules, "threadpoolctl", module)
    threads._pools.cache_clear()
    try:
        assert threads.limit() == min(without, 3)
        blas.num_threads = 1
        assert threads.limit() == 1
        threads._pools.cache_clear()
        monkeypatch.setattr(module, "ThreadpoolController", raising)
        assert threads.limit() == without
    finally:
        threads._pools.cache_clear()
