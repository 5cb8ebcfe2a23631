# SPDX-License-Identifier: Apache-2.0
"""What each specialised kernel costs by its machine code: measured, and kept in kernels/BUDGET.md.

`python -m tests.kernel_budget` writes the table anew.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from cupy_msda.cuda.compile import BINNED_QUERIES, Kernel
from tests import sass, test_nvrtc

TABLE = Path(__file__).parents[1] / "kernels" / "BUDGET.md"
DTYPES = {"f32": 4, "f16": 2, "bf16": 2}  # bytes
_D, _K, _GROUP = 32, 16, 8  # of the shape "detr"; lanes to a row in the backward
_POWER = r"MUFU\.EX2"
_TURN = 8  # corners: two points, which is what the shortest inner loops take at a time


class Key(NamedTuple):
    """A row of the table."""

    kernel: str
    dtype: str
    architecture: int

    def __str__(self) -> str:
        return f"kernel {self.kernel} {self.dtype} sm_{self.architecture}"


class Figures(NamedTuple):
    """What a kernel costs. None: not measured."""

    registers: int
    spill_bytes: int
    per_corner: float | None = None
    per_row: float | None = None


class Interior(NamedTuple):
    """How to recognise the path of a warp whose points are all interior."""

    passes: dict[str, int]  # patterns of instructions, and how often the path meets each
    per_corner: int = 1  # matches of the first pattern for one corner
    whole_points: bool = (
        True  # no block holds fewer matches of the first pattern than one point has
    )
    rows: float | None = None  # (query, head) of a warp
    turns: int | None = 1  # how often the path meets all that; None: count what one more turn adds
    once: tuple[tuple[str, int], ...] = ()  # what it meets once, whatever the turns


def _forward(size: int, split: int, coordinates: int = 0) -> Interior:
    group, part = _D * size // 16, _K // split
    stages = -(-part // group)
    passes = {r"^LDG\.E\.128": 4 * part, r"STS\.128": stages, "STG": 1}
    interior = Interior(passes, rows=32 / (group * split))
    return _with_references(interior, size, coordinates, stages)


def _backward(
    size: int,
    architecture: int,
    split: int = 1,
    value: bool = True,
    points: bool = True,
    fixed: bool = False,
    coordinates: int = 0,
) -> Interior:
    part = _K // split
    stages = -(-part // _GROUP)
    additions = 1 if architecture >= 90 and not fixed else 4
    passes = {r"^REDG?\.": 4 * part * additions} if value else {}
    if points:  # one gather more, of grad_output
        passes |= {rf"^LDG\.E\.{32 * size}": 4 * part + 1, "STG": 2 * stages}
    interior = Interior(passes, additions if value else 1, value, 32 / (_GROUP * split))
    if not coordinates:
        # A lane without a point makes its descriptor without the load of a weight. In fixed point other loads look so.
        mark = r"STS\.128" if fixed else _loads(size)
        return interior._replace(passes=passes | {mark: stages})
    own = _K // (_GROUP * split)  # logits of the row that a lane reads for the softmax
    # The gradients of logits need the powers again, which the compiler may have kept.
    kept = architecture >= 100
    powers = own + stages + (stages if points and not kept else 0)
    interior = interior._replace(passes=passes | {r"STS\.64": stages, _POWER: powers})
    return _with_references(interior, size, coordinates, stages)


def _loads(num_bytes: int) -> str:
    """The pattern of a load of so many bytes."""
    width = {2: "U16", 4: "CONSTANT", 8: "64", 16: "128"}[num_bytes]
    return rf"LDG\.E\.{width}"


def _with_references(interior: Interior, size: int, coordinates: int, stages: int) -> Interior:
    """The same and, fused, a load of a reference point in each stage, if it is as wide as a gather."""
    gather = rf"^{_loads(coordinates * size)}" if coordinates else ""
    if gather not in interior.passes:
        return interior
    passes = interior.passes | {gather: interior.passes[gather] + stages}
    first = gather == next(iter(passes))
    return interior._replace(passes=passes, whole_points=interior.whole_points and not first)


def _binned(size: int, architecture: int, coordinates: int = 0) -> Interior:
    """Every point in a cell of its own. A turn takes one descriptor of every lane, all turns the points of 16 rows."""
    additions = 1 if architecture >= 90 else 4
    rows = BINNED_QUERIES // 8  # of the 8 warps
    turns = _K * rows // (4 * _GROUP)  # by the 4 groups of a warp
    own = _K * rows // 32  # points of a lane
    staged = 32 * size * rows // (16 * 32)  # pieces of grad_output that a lane copies
    # Of a later turn: location and weight; fused, also reference points, which are as wide as offsets.
    pairs = 2 if coordinates else 1
    passes = {r"^REDG?\.": 4 * _GROUP * additions, _loads(2 * size): pairs, _loads(size): 1}
    once = {_loads(2 * size): pairs * (own + 1), _loads(size): 1, _loads(16): staged}
    once |= {r"^ATOMS\.": own, r"STS\.U16": own}
    if coordinates:  # the softmax before all turns, and a weight in each
        passes[_POWER] = 1
        once |= {_loads(size): own + 1, _POWER: own}
    return Interior(passes, additions, False, rows, turns, tuple(once.items()))


def _binned_fixed_point() -> Interior:
    """One turn of _binned, by its additions alone."""
    return Interior({r"^REDG?\.": 16 * _GROUP}, 4, whole_points=False)


def _tiled() -> Interior:
    """One turn of the loop over pairs: it reads four pairs, and an accumulator for each."""
    return Interior({r"LDS\.(U\.)?64": 8}, whole_points=False)


def kernels(dtype: str, architecture: int) -> dict[str, tuple[Kernel, Interior | None]]:
    """The kernels of the table by name. None: no inner loop over corners."""
    size, on = DTYPES[dtype], architecture
    plain = test_nvrtc.kernels("detr", dtype)
    scale, fixed, finish = test_nvrtc.fixed_point_kernels("detr", dtype)
    binned = test_nvrtc.binned_fixed_point_kernel("detr", dtype)
    rounding: dict[str, tuple[Kernel, Interior | None]] = {}
    if dtype in test_nvrtc.ROUNDED:
        rounding["round"] = test_nvrtc.round_kernel(dtype), None
    return {
        **{name: (plain[name], interior) for name, interior in _interiors(size, on).items()},
        "fixed-point-scale": (scale, None),
        "backward-fixed-point": (fixed, _backward(size, on, fixed=True)),
        "fixed-point-finish": (finish, None),
        "backward-value-binned": (plain["backward-value-binned"], _binned(size, on)),
        "backward-value-binned-fixed-point": (binned, _binned_fixed_point()),
        "backward-value-tiled": (test_nvrtc.tiled_kernel("detr", dtype), _tiled()),
        **rounding,
        **_fused(dtype, on),
    }


def _interiors(size: int, on: int, coordinates: int = 0) -> dict[str, Interior]:
    """The paths through the kernels of rows."""
    of_points = _backward(size, on, value=False, coordinates=coordinates)
    persistent = _forward(size, 1, coordinates)._replace(turns=None)
    return {
        "forward": _forward(size, 1, coordinates),
        "forward-query-tiles": _forward(size, 1, coordinates),
        "forward-persistent": persistent,
        "forward-split-k": _forward(size, 32 // (2 * size), coordinates),
        "backward": _backward(size, on, coordinates=coordinates),
        "backward-split-k": _backward(size, on, split=2, coordinates=coordinates),
        "backward-value": _backward(size, on, points=False, coordinates=coordinates),
        "backward-points": of_points,
        "backward-points-persistent": of_points._replace(turns=None),
    }


def _fused(dtype: str, architecture: int) -> dict[str, tuple[Kernel, Interior | None]]:
    """Kernels of fused calls; with boxes, the two that show what these add."""
    size = DTYPES[dtype]
    of_coordinates = {
        coordinates: test_nvrtc.references_of("detr", test_nvrtc.DTYPES[dtype][0], coordinates)
        for coordinates in (2, 4)
    }
    found: dict[str, tuple[Kernel, Interior | None]] = {}
    for coordinates, references in of_coordinates.items():
        kernels = test_nvrtc.kernels("detr", dtype, references)
        paths = _interiors(size, architecture, coordinates)
        paths["backward-value-binned"] = _binned(size, architecture, coordinates)
        for name, path in paths.items():
            if coordinates == 2:
                found[f"fused-{name}"] = kernels[name], path
            elif name in ("forward", "backward"):
                found[f"fused-boxes-{name}"] = kernels[name], path
    kernel = test_nvrtc.reference_gradient("detr", dtype, of_coordinates[4])
    return found | {"fused-boxes-reference-gradient": (kernel, None)}


def row_keys(dtype: str, architecture: int) -> list[Key]:
    """The rows of the table for a dtype and an architecture."""
    return [Key(name, dtype, architecture) for name in kernels(dtype, architecture)]


def measure(dtype: str, architecture: int) -> dict[Key, Figures]:
    """Compile the kernels, as many at a time as there are cores, and count."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        figures = pool.map(
            lambda case: measure_one(*case, architecture), kernels(dtype, architecture).values()
        )
        return dict(zip(row_keys(dtype, architecture), figures, strict=True))


def measure_one(kernel: Kernel, interior: Interior | None, architecture: int) -> Figures:
    """Compile a kernel, hold it to the bounds that need no table, and count."""
    used, code = test_nvrtc.check_budget(kernel, architecture)
    figures = Figures(used.registers, used.spill_bytes)
    if interior is None or sass.disassembler() is None:
        return figures
    corner, times = next(iter(interior.passes)), interior.per_corner
    at_least = 4 * times if interior.whole_points else 1
    graph = sass.basic_blocks(sass.disassemble(code))

    def path(turns: int) -> tuple[sass.Block, ...]:
        passes = {mark: turns * count for mark, count in interior.passes.items()}
        for mark, count in interior.once:
            passes[mark] = passes.get(mark, 0) + count
        found = sass.cheapest_path(graph, passes, at_least)
        assert found, f"{kernel.name} on sm_{architecture}: no path meets {passes}"
        return found

    first = path(1)
    cost = sass.total_cost(first)
    if interior.turns != 1:
        turn = sass.total_cost(path(2)) - cost
        cost = turn if interior.turns is None else cost + (interior.turns - 1) * turn
    per_corner = sass.densest_cost(first, corner, _TURN * times) * times
    per_row = round(cost / interior.rows, 2) if interior.rows else None
    return figures._replace(per_corner=round(per_corner, 2), per_row=per_row)


def worse(measured: dict[Key, Figures], budget: dict[Key, Figures]) -> list[str]:
    """What got worse, with both numbers; a figure that either side lacks cannot."""
    return [
        f"{key}: {name.replace('_', ' ')} {now:g}, budget {most:g}"
        for key, figures in measured.items()
        for name, now, most in zip(Figures._fields, figures, budget[key], strict=True)
        if now is not None and most is not None and now > most
    ]


def compiler_version() -> str:
    """NVRTC's, with the patch level that only its wheel knows."""
    major, minor = test_nvrtc.nvrtc.getVersion()
    for wheel in (f"nvidia-cuda-nvrtc-cu{major}", "nvidia-cuda-nvrtc"):
        try:
            version = metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
        if version.startswith(f"{major}.{minor}."):
            return version
    return f"{major}.{minor}"


_HEAD = """\
# What the specialised kernels cost

Figures of the machine code that NVRTC {version} generates for M=8, D=32, L=4, P=4 and one dtype for all inputs. CI
measures a part of them (`tests/test_kernel_budget.py`) and fails if one gets worse; `python -m tests.kernel_budget`
writes this file.
"-split-k": as many groups to a row as there can be. "-fixed-point": the accumulator is in fixed point. "fused-": from
reference points for each level, (x, y) or, "-boxes", (x, y, w, h).

* Registers per thread, and bytes that a thread spills.
* Instructions that a warp issues if all its points are interior: on the cheapest path from entry to exit that takes
  every corner without a predicate, makes every descriptor and stores every result. NOP is not counted, nor the load of
  the level table, which one warp of a block does.
* Per corner: the instructions of the inner loop, or of its unrolled body, divided by the corners that it takes.
  "backward-value-tiled": the loop that adds to the tile; each of its points has two corners in a column.
  "backward-value-binned": every point lies in a cell of its own, which is the worst case.
* Per row: all instructions divided by the rows (n, q, m) of the warp. "-persistent": what one more row adds, without
  the tile scheduler, which places one row per lane at a time.

| kernel | dtype | sm | registers | spill bytes | instructions per corner | per row |
| --- | --- | --- | --- | --- | --- | --- |
"""


def read_table() -> tuple[str, dict[Key, Figures]]:
    """The version of NVRTC, and the rows."""
    text = TABLE.read_text(encoding="utf-8")
    version = text.partition("NVRTC ")[2].split()[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return version, {
        Key(kernel, dtype, int(architecture)): Figures(
            int(registers), int(spill), *(float(cell) if cell else None for cell in counts)
        )
        for kernel, dtype, architecture, registers, spill, *counts in cells[2:]
    }


def write_table(figures: dict[Key, Figures]) -> None:
    """Write the file: the architectures of a kernel and dtype in rows that follow one another."""
    names = list(dict.fromkeys(key.kernel for key in figures))
    order = sorted(
        figures, key=lambda key: (names.index(key.kernel), list(DTYPES).index(key.dtype))
    )
    rows = [
        " | ".join(
            [*map(str, key), *("" if count is None else f"{count:g}" for count in figures[key])]
        )
        for key in order
    ]
    body = "".join(f"| {row} |\n" for row in rows)
    TABLE.write_text(_HEAD.format(version=compiler_version()) + body, encoding="utf-8")


def main() -> None:
    """Measure everything and write the table."""
    if sass.disassembler() is None:
        sys.exit("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    everything: dict[Key, Figures] = {}
    for dtype in DTYPES:
        for architecture in test_nvrtc.ARCHITECTURES:
            everything |= measure(dtype, architecture)
    write_table(everything)


if __name__ == "__main__":
    main()
