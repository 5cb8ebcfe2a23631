# SPDX-License-Identifier: Apache-2.0
"""CuPy's compiler and kernel cache on a machine without a device: NVRTC compiles, and nothing is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cupy_msda.cuda.compile import Kernel

ARCHITECTURE = "90"
# Small, so that NVRTC takes a fraction of a second.
ROUND = Kernel("round.cu", "msda_round<half_t>")


class Compiled(list[str]):
    """The names of the kernels that NVRTC compiled; the others were found in the cache."""


def without_device() -> Compiled:
    """Let this process's CuPy compile for a device that is not there."""
    import cupy
    from cupy.cuda import compiler

    compiled = Compiled()
    compile_using_nvrtc = compiler._compile_using_nvrtc_no_warning

    def compile_and_count(source: str, *arguments: Any) -> Any:
        names = arguments[3]
        compiled.extend(names)
        return compile_using_nvrtc(source, *arguments)

    class RawModule:
        def __init__(self, *, code: str, options: tuple[str, ...], name_expressions: Any) -> None:
            self.module = compiler._compile_module_with_cache(
                code, options, arch=ARCHITECTURE, name_expressions=name_expressions
            )

        def get_function(self, name: str) -> tuple[str, bytes]:
            return self.module.mapping[name], self.module.code

    compiler._compile_using_nvrtc_no_warning = compile_and_count
    compiler._get_arch_for_options_for_nvrtc = lambda _: (f"-arch=sm_{ARCHITECTURE}", "cubin")
    compiler.function = SimpleNamespace(Module=_Module)
    cupy.RawModule = RawModule
    cupy.cuda.Device = lambda *_: SimpleNamespace(compute_capability=ARCHITECTURE)
    return compiled


class _Module:
    """cupy.cuda.function.Module, which keeps the machine code."""

    code: bytes
    mapping: dict[str, str]

    def load(self, code: bytes) -> None:
        self.code = code

    def _set_mapping(self, mapping: dict[str, str]) -> None:
        self.mapping = mapping
