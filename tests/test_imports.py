# SPDX-License-Identifier: Apache-2.0
"""What an import costs and what the package needs: nothing heavy until it is used."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cupy_msda

PACKAGE = Path(cupy_msda.__file__).parent
# report.py, demo.py and bench are commands: they say what is installed, draw and measure.
MAY_IMPORT = {
    "torch": {
        "torch",
        "distributed.py",
        "export.py",
        "modules.py",
        "recording.py",
        "report.py",
        "demo.py",
        "bench",
        "integrations",
    },
    "cupy": {"cuda", "report.py", "bench"},
    "numba": {"cpu"},
    "llvmlite": {"cpu"},
    "matplotlib": {"plot.py", "bench"},
    "PIL": {"demo.py"},
}
HEAVY = [*MAY_IMPORT, "cupy_backends"]


def run(code: str, *absent: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, in which some modules cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({list(absent)}))\n"
    command = [sys.executable, "-W", "error", "-c", hide + textwrap.dedent(code)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120
    )


def output(code: str, *absent: str) -> str:
    finished = run(code, *absent)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes of a file; without `typing`, but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node, typing)


def imported_names(file: Path, typing: bool = True) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in the file, and of attributes of the package."""
    for node in nodes(ast.parse(file.read_text(encoding="utf-8")), typing):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cupy_msda":
            yield f"cupy_msda.{node.attr}"
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", ""))
            in ("import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_only_its_own_files_import_a_library(module):
    importers = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if module in {name.partition(".")[0] for name in imported_names(file)}
    }
    assert importers <= MAY_IMPORT[module]


# --- layers ------------------------------------------------------------------------------------------

# What each part may import of the others; all but commands, which nothing else imports.
LAYERS = {
    "problem": set(),
    "arrays": set(),
    "budget": set(),
    "faults": set(),
    "contract": {"problem", "arrays"},
    "reference": {"problem"},
    "fused": set(),
    "cuda": {"problem", "faults"},
    "cpu": {"reference", "fused", "contract", "problem", "arrays", "faults"},
    "torch": {"cuda", "cpu", "reference", "fused", "contract", "problem", "arrays"},
    "modules": {"torch", "contract"},
    "distributed": {"modules", "torch"},
    "export": {"torch"},
    "recording": {"torch"},
    "plot": {"api", "contract"},
    "api": {"torch", "cuda", "cpu", "fused", "contract", "problem", "arrays"},
}
COMMANDS = {"__main__", "report", "run", "demo", "bench", "integrations"}
# The same inside torch.
TORCH_LAYERS = {
    "operands": set(),
    "fused_operands": {"operands"},
    "exchange": {"operands", "fused_operands"},
    "dtensor": {"operands"},
    "flops": {"operands", "fused_operands"},
    "operators": {"exchange", "dtensor", "flops", "operands", "fused_operands"},
    "derivatives": {"operators", "flops", "operands"},
    "export": {"operators", "operands", "fused_operands"},
    "tensorrt": {"operands"},
    "functions": {"derivatives", "export", "operators", "dtensor", "operands"},
    "fused": {
        "functions",
        "derivatives",
        "exchange",
        "flops",
        "operators",
        "operands",
        "fused_operands",
    },
    "": {"functions", "fused"},
}


def modules() -> dict[str, Path]:
    """The files of the package by dotted name, without its own, which imports nothing until it is asked."""
    files = (file.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*.py"))
    named = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    del named["cupy_msda"]
    return named


def import_graph() -> dict[str, set[str]]:
    """Which modules of the package each imports, in functions as well."""
    known = modules()

    def module_of(name: str) -> str:
        """The module that a dotted name lies in."""
        first = name.removeprefix("cupy_msda.").partition(".")[0]
        name = cupy_msda._HOMES.get(first, name)
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {module_of(name) for name in imported_names(PACKAGE.parent / file, typing=False)}
        - {""}
        for module, file in known.items()
    }


def part(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[1]


def test_the_import_graph_is_whole():
    graph = import_graph()
    for importer, imported in (
        ("api", "torch"),  # by an attribute of the package
        ("cuda.launch", "cuda.compile"),
        ("torch.operators", "torch.dtensor"),  # in a function
        ("demo", "torch"),  # by a name that the package loads when it is asked
        ("modules", "torch"),
    ):
        assert f"cupy_msda.{imported}" in graph[f"cupy_msda.{importer}"]
    assert "cupy_msda.torch.operators" not in graph["cupy_msda.torch.exchange"]  # a type


def test_no_module_imports_itself_through_others():
    order = list(TopologicalSorter(import_graph()).static_order())
    assert set(order) == set(modules())


def test_every_module_is_in_a_layer():
    assert {part(module) for module in modules()} == set(LAYERS) | COMMANDS
    inside = {
        module.removeprefix("cupy_msda.torch").removeprefix(".")
        for module in modules()
        if part(module) == "torch"
    }
    assert inside == set(TORCH_LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_follow_the_layers(layer):
    graph = import_graph()
    imported = {part(other) for module in graph if part(module) == layer for other in graph[module]}
    assert imported - {layer} <= LAYERS[layer]


@pytest.mark.parametrize("layer", TORCH_LAYERS)
def test_imports_follow_the_layers_inside_torch(layer):
    module = f"cupy_msda.torch.{layer}".rstrip(".")
    inside = {name for name in import_graph()[module] if part(name) == "torch"}
    assert {name.removeprefix("cupy_msda.torch.") for name in inside} <= TORCH_LAYERS[layer]


# --- what an import loads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("cupy_msda", "cupy_msda.api", "cupy_msda.contract", "cupy_msda.cpu.backend"),
        *("cupy_msda.cuda.compile", "cupy_msda.cuda.dlpack"),
        *("cupy_msda.cuda.launch", "cupy_msda.cuda.plans"),
    ],
)
def test_import_loads_nothing_heavy(name):
    loaded = output(f"import {name}, sys; print(*sorted(sys.modules.keys() & set({HEAVY})))")
    assert loaded == ""


def test_host_arrays_of_numpy_need_neither_torch_nor_cupy():
    loaded = output(
        f"""
        import sys
        import numpy as np
        from cupy_msda import ms_deform_attn
        value, locations = np.ones((1, 6, 1, 4), np.float32), np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
        ms_deform_attn(value, [(2, 3)], None, locations, np.ones((1, 1, 1, 1, 1), np.float32))
        print(*sorted(sys.modules.keys() & set({HEAVY})))
        """
    )
    assert set(loaded.split()) <= {"numba", "llvmlite"}


def test_every_public_name_resolves():
    assert set(cupy_msda.__all__) <= set(dir(cupy_msda))
    for name in cupy_msda.__all__:
        value = getattr(cupy_msda, name)
        assert value.__doc__, name
        assert value.__name__ == name


def test_lazy_names_are_the_public_ones():
    assert sorted(cupy_msda._HOMES) == sorted(cupy_msda.__all__)


def test_the_part_for_torch_is_loaded_when_it_is_asked():
    code = """
        import sys
        import cupy_msda
        assert "torch" not in sys.modules
        print(cupy_msda.torch.ms_deform_attn.__module__)
    """
    assert output(code) == "cupy_msda.torch.functions"
    finished = run("import cupy_msda; cupy_msda.torch", "torch")
    assert finished.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")


REGISTERED = "hasattr(torch.ops.cupy_msda, 'ms_deform_attn_forward')"


def test_importing_the_package_beside_torch_registers_the_operators():
    light = f"sys.modules.keys().isdisjoint({[*HEAVY[1:], 'triton', 'torch.utils.flop_counter']})"
    assert output(f"import sys, torch, cupy_msda; print({REGISTERED}, {light})") == "True True"
    assert output(f"import cupy_msda, torch, cupy_msda.torch; print({REGISTERED})") == "True"
    # No submodule of the package is an exception.
    assert output(f"import torch, cupy_msda.contract; print({REGISTERED})") == "True"


def test_the_rule_for_dtensors_comes_with_the_module_for_them():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.__version__ < (2, 5):
        pytest.skip("DTensors need torch 2.5")
    code = "import sys, cupy_msda.distributed; print('cupy_msda.torch.dtensor' in sys.modules)"
    assert output(code) == "True"


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'cupy_msda' has no attribute 'ms_deform'"):
        cupy_msda.ms_deform  # noqa: B018


@pytest.mark.parametrize("again", ["reload each", "import anew"])
def test_modules_may_be_loaded_again(again):
    """As a notebook's autoreload does: https://github.com/pytorch/pytorch/issues/125183."""
    code = f"""
        import importlib, sys, torch, cupy_msda
        if torch.__version__ >= (2, 5):
            import cupy_msda.distributed
        value = torch.arange(24.0).reshape(1, 6, 1, 4).requires_grad_()
        points = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 1, 1), 2.0)
        def run():
            output = cupy_msda.ms_deform_attn(value, [(2, 3)], None, *points)
            (gradient,) = torch.autograd.grad(output.sum(), value)
            of_transform = torch.func.grad(
                lambda value: cupy_msda.ms_deform_attn(value, [(2, 3)], None, *points).sum()
            )(value)
            assert torch.equal(gradient, of_transform)
            print(output.tolist(), cupy_msda.MSDeformAttn(8, 1, 1, 1).d_model)
        run()
        loaded = [name for name in sys.modules if name.startswith("cupy_msda")]
        assert "cupy_msda.torch.operators" in loaded
        if {again == "reload each"}:
            for name in loaded:
                importlib.reload(sys.modules[name])
                run()
        else:
            for name in loaded:
                del sys.modules[name]
            import cupy_msda
            run()
    """
    assert set(output(code).splitlines()) == {"[[[20.0, 22.0, 24.0, 26.0]]] 8"}


SMALL_CALL = """
    import numpy as np
    from cupy_msda import ms_deform_attn, ms_deform_attn_backward
    value = np.arange(24, dtype=np.float32).reshape(1, 6, 1, 4)
    locations = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
    weights = np.full((1, 1, 1, 1, 1), 2, np.float32)
    out = ms_deform_attn(value, [(2, 3)], None, locations, weights)
    grads = ms_deform_attn_backward(np.ones_like(out), value, [(2, 3)], None, locations, weights)
    print(out.ravel().tolist(), float(grads.value.sum()))
"""
# The centre of a 2 x 3 level is halfway between rows 1 and 4 of value, which start at 4 and 16.
SMALL_RESULT = "[20.0, 22.0, 24.0, 26.0] 8.0"


def test_a_torch_that_does_not_fit_is_no_obstacle_to_numpy_arrays():
    old = "import types, warnings; sys.modules['torch'] = types.ModuleType('torch')\n"
    finished = run(old + "import cupy_msda")
    assert "cupy_msda cannot register its operators with torch" in finished.stderr  # an error by -W
    assert (
        output(old + "warnings.simplefilter('ignore')" + textwrap.dedent(SMALL_CALL))
        == SMALL_RESULT
    )


@pytest.mark.parametrize(
    "absent",
    [(), ("numba",), ("torch",), ("cupy",), ("torch", "cupy", "numba", "matplotlib", "PIL")],
)
def test_numpy_arrays_run_whatever_is_absent(absent):
    assert output(SMALL_CALL, *absent) == SMALL_RESULT


def test_without_numba_the_reference_runs():
    code = "from cupy_msda.cpu import backend as host; print(host.backend().__name__)"
    assert output(code, "numba") == "cupy_msda.reference"
    assert output(code) == "cupy_msda.cpu.kernels"


@pytest.mark.parametrize(
    "name",
    [
        *("MSDeformAttn", "MSDeformAttnFunction", "decompositions", "export"),
        *("ms_deform_attn_core_pytorch", "record"),
    ],
)
def test_names_that_need_torch_say_so(name):
    finished = run(f"from cupy_msda import {name}", "torch")
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert 'pip install "cupy-msda[torch]"' in finished.stderr


def test_names_that_need_no_torch_resolve_without_it():
    names = "ms_deform_attn, ms_deform_attn_backward, MSDeformAttnGradients, KernelCompileError"
    assert output(f"from cupy_msda import {names}; print('fine')", "torch", "cupy") == "fine"


def test_cuda_array_without_cupy_says_what_to_install():
    code = """
        from cupy_msda.cuda.importing import require_cupy
        require_cupy()
    """
    finished = run(code, "cupy")
    assert finished.returncode == 1
    assert 'pip install "cupy-msda[cuda12x]"' in finished.stderr
