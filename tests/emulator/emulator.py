# SPDX-License-Identifier: Apache-2.0
"""Compile a `.cu` source for the CPU and launch its kernels on NumPy arrays.

    scale = Emulated(source, "scale<float, 4>")
    scale((blocks, 1, 1), (256, 1, 1), [array, np.int32(array.size)], seed=3)

Every CUDA thread is a fiber (`fiber.hpp`), one block runs at a time (`block.hpp`), and the seed
decides the order of blocks and threads, so that a kernel that lacks a barrier computes something
else under some seed. Errors of synchronisation, of arguments and of the compiler are
`EmulatorError`s. With `sanitize=True` a launch runs in a program of its own under AddressSanitizer
and UndefinedBehaviorSanitizer, and their report is the message. With `races=True` every access to
memory is watched (`races.hpp`): a fault of synchronisation is found whether or not its result is wrong.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HERE = Path(__file__).parent
_HEADERS = ("fiber.hpp", "block.hpp", "races.hpp", "shim.hpp", "launch.hpp")

_FLAGS = [
    *("-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-fno-exceptions"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # one result on every machine
    "-fno-strict-aliasing",  # compilers for GPUs do not exploit these rules
    "-U_FORTIFY_SOURCE",  # it forbids a jump from one stack to another
]
_SANITIZE_FLAGS = [
    *("-DMSDA_EMULATED_SANITIZE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fsanitize=float-cast-overflow",  # saturates on a GPU, undefined in C++: not to be relied on
    "-fno-omit-frame-pointer",
    "-O1",  # compiles in two thirds of the time and runs as fast
]
_RACES_FLAGS = [
    *("-DMSDA_EMULATED_RACES", "-fsanitize=thread", "-shared"),
    "-O1",  # inlines what takes or returns structs by value: a call's own copies are not instrumented
    "-fno-tree-loop-distribute-patterns",  # makes calls of memset, which are not instrumented
    "-fno-threadsafe-statics",  # else their guards are atomics
    "-nodefaultlibs",  # without the sanitizer's own library: races.hpp takes its place
]
_LIBRARIES = ["-lstdc++", "-lm", "-lgcc_s", "-lgcc", "-lc", "-ldl"]
_SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


class EmulatorError(RuntimeError):
    """A source that does not compile, or a launch that went wrong."""


class Emulated:
    """One kernel instantiation compiled for the CPU.

    Parameters
    ----------
    source : str
        One CUDA C++ translation unit. `#line` markers in it decide the places that errors name.
    name_expression : str
        The kernel with its template arguments, such as ``"scale<float, 4>"``.
    sanitize : bool
        Run each launch under the sanitizers, in a process of its own.
    races : bool
        Watch each launch with the race detector (`races.hpp`).
    blind : str, optional
        A place such as ``"kernels/levels.cuh:86"``: to the race detector a barrier there orders nothing, and an atomic
        is a plain write, as if the source lacked them.
    build_dir : Path, optional
        Where compiled code is kept, by a hash of everything it depends on. By default a directory
        of the user below the system's temporary one.
    together : sequence of str
        Name expressions to compile in the same go, this one among them; see `build`.

    Attributes
    ----------
    warnings : str
        What the compiler had to say about the source; empty if nothing.

    Raises
    ------
    EmulatorError
        The source does not compile.
    """

    def __init__(
        self,
        source: str,
        name_expression: str,
        *,
        sanitize: bool = False,
        races: bool = False,
        blind: str | None = None,
        build_dir: Path | None = None,
        together: Sequence[str] = (),
    ) -> None:
        names = tuple(together) or (name_expression,)
        self.name_expression = name_expression
        self.sanitize = sanitize
        self._blind = None if blind is None else blind.encode()
        self._index = names.index(name_expression)
        flags = _SANITIZE_FLAGS if sanitize else _RACES_FLAGS if races else ["-shared"]
        self._binary, self.warnings = _compile(
            source, names, tuple(flags), build_dir, os.environ.get("CXX", "g++")
        )

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[object],
        *,
        seed: int = 0,
        blocks: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Launch the kernel and wait for it.

        Parameters
        ----------
        grid, block : three ints
            Blocks of the grid, threads of a block.
        args : sequence
            A NumPy array is passed as the pointer to its data (C-contiguous; the kernel writes in
            place), None as a null pointer. A NumPy scalar, and a structured array of one element,
            are passed by value.
        seed : int
            Chooses the order in which blocks and threads run.
        blocks : sequence of three ints
            The blocks of the grid that run, by default all. Not under the sanitizers.

        Raises
        ------
        EmulatorError
            The arguments do not fit the kernel, a thread waits for one that never comes, a lane
            uses a mask that it is not in, or a sanitizer or the race detector found a fault.
        TypeError, ValueError
            An argument of another type, or an array that is not contiguous.
        """
        arguments = [_argument(arg, i) for i, arg in enumerate(args)]
        if blocks and self.sanitize:
            raise ValueError("a sanitized launch must run all blocks")
        chosen = (ctypes.c_uint32 * 3 * len(blocks))(*blocks) if blocks else None
        launch = _Launch(
            *(self._index, grid, block, len(arguments), seed % 2**64),
            *(ctypes.cast(chosen, ctypes.c_void_p), len(blocks), self._blind),
        )
        run = _run_program if self.sanitize else _run_library
        error = run(self._binary, launch, arguments)
        if error:
            raise EmulatorError(f"{self.name_expression}: {error}")

    def launch_kernel(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], parameters: int
    ) -> None:
        """Launch as cuLaunchKernel does; `parameters` is the address of an array of pointers to the arguments' bytes.

        Raises
        ------
        EmulatorError
            As for a call, but that arguments are not checked.
        """
        launch = _Launch(self._index, grid, block)
        pointers = ctypes.c_void_p(parameters)
        text = _load(self._binary).emu_launch(ctypes.byref(launch), None, pointers)
        if text is not None:
            raise EmulatorError(f"{self.name_expression}: {text.decode()}")


def build(
    source: str,
    name_expressions: Sequence[str],
    *,
    sanitize: bool = False,
    build_dir: Path | None = None,
) -> dict[str, Emulated]:
    """Compile several instantiations of one source together, which is quicker than one by one."""
    return {
        name: Emulated(
            source, name, sanitize=sanitize, build_dir=build_dir, together=name_expressions
        )
        for name in name_expressions
    }


class _Launch(ctypes.Structure):
    """`emu::Launch`."""

    _fields_ = (
        ("kernel", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("count", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("blocks", ctypes.c_void_p),
        ("block_count", ctypes.c_uint64),
        ("blind", ctypes.c_char_p),
    )


class _Argument(ctypes.Structure):
    """`emu::Argument`, and beside it the array whose bytes it describes."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("item", ctypes.c_uint32),
        ("passing", ctypes.c_uint32),
        ("kind", ctypes.c_uint64),
    )
    array: npt.NDArray[Any] | None


_BY_VALUE, _BY_POINTER, _NULL = range(3)


def _argument(arg: object, position: int) -> _Argument:
    """Describe one argument of a launch."""
    if arg is None:
        described = _Argument(0, 0, 0, _NULL, 0)
        described.array = None
        return described
    if not isinstance(arg, np.ndarray | np.generic):
        raise TypeError(
            f"argument {position} must be a NumPy array, a NumPy scalar or None, got {type(arg)}"
        )
    struct = isinstance(arg, np.ndarray) and arg.dtype.kind == "V" and arg.size == 1
    by_value = isinstance(arg, np.generic) or struct
    array = np.ascontiguousarray(arg) if by_value else np.asarray(arg)
    if not array.flags.c_contiguous:
        raise ValueError(f"argument {position} must be contiguous, got strides {array.strides}")
    described = _Argument(
        array.ctypes.data,
        array.nbytes,
        array.itemsize,
        _BY_VALUE if by_value else _BY_POINTER,
        ord(array.dtype.kind),
    )
    described.array = array
    return described


def _run_library(binary: Path, launch: _Launch, arguments: Sequence[_Argument]) -> str | None:
    """Launch in this process; the error text, or None."""
    text: bytes | None = _load(binary).emu_launch(
        ctypes.byref(launch), (_Argument * len(arguments))(*arguments), None
    )
    return None if text is None else _with_places(text.decode(), binary)


def _with_places(text: str, binary: Path) -> str:
    """The text with a place in the sources for each address `<0x...>` in the library, if binutils can tell."""

    def place(match: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-s", "-e", str(binary), match[1]]
        if shutil.which(command[0]) is None:
            return match[0]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return next((x for x in lines.splitlines() if not x.startswith(_HEADERS)), match[0])

    return re.sub("<(0x[0-9a-f]+)>", place, text)


@functools.cache
def _load(binary: Path) -> ctypes.PyDLL:
    """Load a library; as a PyDLL, since the emulator's state allows one launch at a time."""
    library = ctypes.PyDLL(str(binary))
    library.emu_launch.restype = ctypes.c_char_p
    return library


def _run_program(binary: Path, launch: _Launch, arguments: Sequence[_Argument]) -> str | None:
    """Launch in a sanitized program, which gets copies of the arrays; the error text, or None."""
    payloads: list[npt.NDArray[Any]] = []
    numbered = [_Argument.from_buffer_copy(argument) for argument in arguments]
    for argument, copy in zip(arguments, numbered, strict=True):
        if argument.array is not None:
            copy.data = _number(argument.array, payloads)
    with tempfile.TemporaryDirectory(prefix="emulator-") as directory:
        files = Path(directory, "launch"), Path(directory, "result")
        with files[0].open("wb") as file:
            file.write(launch)
            for copy in numbered:
                file.write(copy)
            for payload in payloads:
                file.write(payload.tobytes())
        done = subprocess.run(
            [binary, *files],
            env=os.environ | _SANITIZER_OPTIONS,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return done.stderr.strip() or f"the program ended with status {done.returncode}"
        result = files[1].read_bytes()
    offset = 0
    for payload in payloads:
        if payload.flags.writeable:
            new = np.frombuffer(result, np.uint8, payload.nbytes, offset)
            payload.reshape(-1).view(np.uint8)[:] = new
        offset += payload.nbytes
    return None


def _number(array: npt.NDArray[Any], payloads: list[npt.NDArray[Any]]) -> int:
    """Find or give an array its place among the payloads of a sanitized launch."""
    for number, other in enumerate(payloads):
        if np.may_share_memory(other, array):
            # Two heap blocks of exact size cannot stand for arrays that overlap in part.
            if (other.ctypes.data, other.nbytes) != (array.ctypes.data, array.nbytes):
                raise ValueError("arrays of a sanitized launch must not overlap in part")
            return number
    payloads.append(array)
    return len(payloads) - 1


@functools.cache
def _compile(
    source: str, names: tuple[str, ...], mode: tuple[str, ...], build_dir: Path | None, cxx: str
) -> tuple[Path, str]:
    """Compile kernels to a library, or to a program with sanitizers; its path and the warnings."""
    compiler = shlex.split(cxx)
    flags = [*_FLAGS, *mode]
    kernels = ", ".join(f"EMU_KERNEL({name})" for name in names)
    text = "\n".join(
        [
            f'#include "{_HERE / "launch.hpp"}"',
            '#line 1 "source"',
            _place_shared(source),
            '#line 1 "emulator.py"',
            f"EMU_KERNELS({kernels})",
            "",
        ]
    )
    parts = [_version(*compiler), *compiler, *flags, text]
    parts += [(_HERE / header).read_text() for header in _HEADERS]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if build_dir is None:
        build_dir = Path(tempfile.gettempdir(), f"cupy-msda-emulator-{os.getuid()}")
    build_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    binary = build_dir / (f"{key}.so" if "-shared" in mode else key)
    log = build_dir / f"{key}.log"
    if not binary.exists():
        with tempfile.TemporaryDirectory(dir=build_dir) as directory:
            unit = Path(directory, "unit.cpp")
            unit.write_text(text)
            output = Path(directory, "out")
            command = [*compiler, *flags, str(unit), "-o", str(output), *_LIBRARIES]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise EmulatorError(f"{', '.join(names)} does not compile:\n{done.stderr}")
            unit.with_suffix(".log").write_text(done.stderr)
            # In this order: whoever finds the binary finds its log.
            unit.with_suffix(".log").replace(log)
            output.replace(binary)
    return binary, log.read_text()


@functools.cache
def _version(*compiler: str) -> str:
    """Name the compiler, as part of the key to what it made."""
    command = [*compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Comments, strings and characters pass unchanged; in them `__shared__` declares nothing.
_SHARED = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])'
    | (?P<extern>\bextern\s+)? \b__shared__\b (?P<declaration>[^;{}]*) ;""",
    re.DOTALL | re.VERBOSE,
)
_ALIGNMENT = re.compile(r"\b(?:__align__|alignas)\s*\(((?:[^()]|\([^()]*\))*)\)")
_DECLARATOR = re.compile(
    r"\s*(?P<type>.*[\s*>])(?P<name>[A-Za-z_]\w*)\s*(?P<extents>(?:\[[^\[\]]+\]\s*)*)", re.DOTALL
)


def _place_shared(source: str) -> str:
    """Turn `__shared__ T name[N];` into a reference to storage that each block finds poisoned."""
    return _SHARED.sub(_place_one, source)


def _place_one(match: re.Match[str]) -> str:
    """Rewrite one `__shared__` declaration, on as many lines as it had."""
    declaration = match["declaration"]
    if declaration is None:
        return match[0]
    alignments = [found[1] for found in _ALIGNMENT.finditer(declaration)]
    parts = _DECLARATOR.fullmatch(_ALIGNMENT.sub(" ", declaration))
    # Template arguments may hold a comma; outside of them it separates a second name.
    if match["extern"] or not parts or re.search(r"[\[\],=]", re.sub("<.*>", "", parts["type"])):
        raise EmulatorError(
            "__shared__ must declare one variable of a fixed size without initialiser, "
            f"got {match[0]!r}"
        )
    name = parts["name"]
    alignment = "".join(f", ({n})" for n in alignments)
    text = (
        f"using {name}_type = {parts['type'].strip()} {parts['extents'].strip()}; "
        f'static ::emu::Shared<{name}_type{alignment}> {name}_storage("{name}"); '
        f"auto& {name} = {name}_storage.get();"
    )
    return text + "\n" * (match[0].count("\n") - text.count("\n"))
