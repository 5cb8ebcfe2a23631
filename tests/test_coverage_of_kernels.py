# SPDX-License-Identifier: Apache-2.0
"""How branches are counted over instantiations, and that the committed report explains what it misses."""

from __future__ import annotations

from pathlib import Path

from tests.coverage_of_kernels import REASONS, REPORT, ROOT, Line, collect, merged, read, report


def test_a_branch_counts_if_one_instantiation_takes_it() -> None:
    assert merged([Line(2, (2, 0)), Line(1, (0, 1))]) == Line(3, (2, 1))


def test_an_instantiation_that_knows_the_condition_has_no_say() -> None:
    assert merged([Line(2, ()), Line(1, (1, 0)), Line(5, ())]) == Line(8, (1, 0))


def test_a_miss_without_a_reason_is_told() -> None:
    place = ("kernels/round.cu", 20)
    assert report({place: Line(1, (1, 1))})[1]
    text, is_enough = report({place: Line(1, (1, 0))})
    assert not is_enough
    assert "no reason given" in text
    assert "no reason given" not in REPORT.read_text(encoding="utf-8")


def test_reasons_are_about_lines_that_are_there() -> None:
    for file, line in REASONS:
        assert line in (ROOT / file).read_text(encoding="utf-8")


def test_counters_of_a_run(tmp_path: Path) -> None:
    """Of a kernel that has nothing to do: its loop ends at once."""
    collect(tmp_path, ["tests/emulator/test_round.py::test_nothing_to_round"])
    lines = {place: line for place, line in read(tmp_path).items() if "round.cu" in place[0]}
    (loop,) = [line for line in lines.values() if len(line.branches) == 2 and 0 in line.branches][
        :1
    ]
    assert loop.runs > 0
    assert max(loop.branches) > 0
