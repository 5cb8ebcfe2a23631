# SPDX-License-Identifier: Apache-2.0
"""The machine code of a kernel as a graph, and the cheapest path of a warp through it."""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^(\.\S+):$|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.MULTILINE)
_OPERATION = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z0-9]+)")
_TARGET = re.compile(r"`\((\.\S+)\)")
# A branch that may not be taken has a predicate, before it or as an operand, or asks whether the warp is together.
_CONDITIONAL = re.compile(r"@|\w+\.(?:DIV|CONV)|\S+ !?U?P\d")


class Block(NamedTuple):
    """Instructions that always follow one another."""

    code: tuple[str, ...]
    following: tuple[int, ...]  # blocks that may come next
    may_exit: bool

    @property
    def cost(self) -> int:
        """Instructions that a warp issues, without NOP, which only fills a place."""
        return sum(not line.startswith("NOP") for line in self.code)

    def count(self, pattern: str) -> int:
        """How many instructions, their predicates included, meet the pattern."""
        return sum(bool(re.search(pattern, line)) for line in self.code)


@cache
def disassembler() -> Path | None:
    """nvdisasm of the wheel nvidia-cuda-nvdisasm, in the folder of whichever CUDA."""
    folder = Path(sysconfig.get_path("platlib"), "nvidia")
    return next(iter(sorted(folder.glob("*/bin/**/nvdisasm*"))), None)


def disassemble(cubin: bytes) -> str:
    """The assembly of a kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = (str(disassembler()), "--print-code", "--no-dataflow", str(file))
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def basic_blocks(assembly: str) -> list[Block]:
    """The basic blocks of the one kernel in `assembly`, the entry first."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for match in _LINE.finditer(assembly):
        if match[1]:
            labels[match[1]] = len(code)
        else:
            code.append(match[2])
    leaves = {i: _leave(line, labels) for i, line in enumerate(code)}
    ends = {i: leave for i, leave in leaves.items() if leave is not None}
    starts = {0, *(i + 1 for i in ends), *(to for _, to in ends.values() if to is not None)}
    edges = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(edges)}
    result = []
    for start, end in itertools.pairwise([*edges, len(code)]):
        falls_through, target = ends.get(end - 1, (True, None))
        following = [target] if target is not None else []
        if falls_through and end < len(code):
            following.append(end)
        may_exit = _operation(code[end - 1]) == "EXIT"
        result.append(Block(tuple(code[start:end]), tuple(number[i] for i in following), may_exit))
    return result


def _operation(line: str) -> str:
    """What an instruction does, without predicate and modifiers."""
    match = _OPERATION.match(line)
    return match[1] if match else ""


def _leave(line: str, labels: dict[str, int]) -> tuple[bool, int | None] | None:
    """For an instruction that ends a block: whether the next one may follow, and where else it may go."""
    operation = _operation(line)
    if operation not in ("BRA", "CALL", "EXIT", "RET"):
        return None
    # A called function is not in `labels`: a path that stays in the kernel cannot lead there.
    target = _TARGET.search(line) if operation in ("BRA", "CALL") else None
    return bool(_CONDITIONAL.match(line)), labels[target[1]] if target else None


def cheapest_path(
    graph: list[Block], passes: dict[str, int], at_least: int = 1
) -> tuple[Block, ...] | None:
    """The path from entry to exit with the fewest instructions that meets each pattern as often as `passes` says.

    Blocks that meet the first pattern, but fewer than `at_least` times, are avoided.
    """
    met = [tuple(map(block.count, passes)) for block in graph]
    ahead = _still_met(graph, met)
    wanted = tuple(passes.values())
    queue = [(0, 0, (0,) * len(wanted), -1)]
    steps: list[tuple[int, int]] = []  # the block that each step takes, and the step before it
    seen = set()
    while queue:
        cost, block, count, before = heapq.heappop(queue)
        if (block, count) in seen or 0 < met[block][0] < at_least:
            continue
        seen.add((block, count))
        count = tuple(map(sum, zip(count, met[block], strict=True)))
        if any(map(int.__gt__, count, wanted)):
            continue
        if any(
            now < want and not more
            for now, want, more in zip(count, wanted, ahead[block], strict=True)
        ):
            continue
        steps.append((block, before))
        if graph[block].may_exit and count == wanted:
            return _walked(graph, steps)
        for following in graph[block].following:
            step = cost + graph[block].cost, following, count, len(steps) - 1
            heapq.heappush(queue, step)
    return None


def _still_met(graph: list[Block], met: list[tuple[int, ...]]) -> list[tuple[bool, ...]]:
    """For each block and pattern: whether a path from the end of the block may still meet it."""
    before: list[list[int]] = [[] for _ in graph]
    for number, block in enumerate(graph):
        for following in block.following:
            before[following].append(number)
    columns = []
    for counts in zip(*met, strict=True):
        found: set[int] = set()
        waiting = [number for number, count in enumerate(counts) if count]
        while waiting:
            new = set(before[waiting.pop()]) - found
            found |= new
            waiting += new
        columns.append([number in found for number in range(len(graph))])
    return list(zip(*columns, strict=True))


def _walked(graph: list[Block], steps: list[tuple[int, int]]) -> tuple[Block, ...]:
    """The blocks of the path that ends with the last step."""
    walked, step = [], len(steps) - 1
    while step >= 0:
        block, step = steps[step]
        walked.append(graph[block])
    return tuple(reversed(walked))


def total_cost(path: tuple[Block, ...]) -> int:
    """Instructions that a warp issues on the path."""
    return sum(block.cost for block in path)


def densest_cost(path: tuple[Block, ...], pattern: str, at_least: int) -> float:
    """Instructions per match of the pattern, in the run of blocks on the path with the fewest of them.

    Only runs with so many matches count: one turn of an inner loop, or its unrolled body.
    """
    costs = [0, *itertools.accumulate(block.cost for block in path)]
    matches = [0, *itertools.accumulate(block.count(pattern) for block in path)]
    return min(
        (costs[end] - costs[start]) / (matches[end] - matches[start])
        for start, end in itertools.combinations(range(len(costs)), 2)
        if matches[end] - matches[start] >= at_least
    )
