# SPDX-License-Identifier: Apache-2.0
"""No kernel of those measured costs more than kernels/BUDGET.md says, by the machine code that NVRTC makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import kernel_budget, sass
from tests.kernel_budget import DTYPES, Figures, Key
from tests.test_nvrtc import ARCHITECTURES

WITHOUT_DISASSEMBLER = "needs nvdisasm of the wheel nvidia-cuda-nvdisasm to count instructions"


# A row of the table takes about a second to measure. The machine code of sm_86 and sm_89 is that of sm_80 but for a few
# instructions, and that of 16-bit dtypes differs from one to another in the conversions only.
MEASURED = [
    *(("f32", architecture) for architecture in (75, 80, 90, 100, 120)),
    *(("f16", 80), ("f16", 90), ("bf16", 75), ("bf16", 90)),
]


@pytest.mark.parametrize(("dtype", "architecture"), MEASURED)
def test_no_figure_is_worse_than_in_the_table(dtype: str, architecture: int) -> None:
    measured = kernel_budget.measure(dtype, architecture)
    version, budget = kernel_budget.read_table()
    if version != kernel_budget.compiler_version():
        pytest.skip(f"the table is for NVRTC {version}: only the bounds of test_nvrtc.py hold here")
    worse = kernel_budget.worse(measured, budget)
    assert not worse, "\n".join(worse)
    if sass.disassembler() is None:
        pytest.skip(WITHOUT_DISASSEMBLER)


def test_the_table_has_a_row_for_every_kernel() -> None:
    _, budget = kernel_budget.read_table()
    assert set(budget) == {
        key
        for dtype in DTYPES
        for architecture in ARCHITECTURES
        for key in kernel_budget.row_keys(dtype, architecture)
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("registers", "kernel forward f32 sm_90: registers 63, budget 62"),
        ("spill_bytes", "kernel forward f32 sm_90: spill bytes 0, budget -1"),
        ("per_corner", "kernel forward f32 sm_90: per corner 8, budget 7"),
        ("per_row", "kernel forward f32 sm_90: per row 193, budget 192"),
    ],
)
def test_a_worse_figure_is_told_with_both_numbers(name: str, message: str) -> None:
    key, now = Key("forward", "f32", 90), Figures(63, 0, 8.0, 193.0)
    assert kernel_budget.worse({key: now}, {key: now}) == []
    doctored = now._replace(**{name: getattr(now, name) - 1})
    assert kernel_budget.worse({key: now}, {key: doctored}) == [message]
    assert kernel_budget.worse({key: doctored}, {key: now}) == []


@pytest.mark.skipif(sass.disassembler() is None, reason=WITHOUT_DISASSEMBLER)
def test_a_kernel_over_its_budget_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("forward", "f32", 90)
    now = kernel_budget.measure_one(*kernel_budget.kernels(*key[1:])[key.kernel], key.architecture)
    assert None not in now
    monkeypatch.setattr(kernel_budget, "TABLE", tmp_path / "BUDGET.md")
    kernel_budget.write_table({key: now})
    version, budget = kernel_budget.read_table()
    assert version == kernel_budget.compiler_version()
    assert kernel_budget.worse({key: now}, budget) == []
    kernel_budget.write_table({key: Figures(*(figure - 1 for figure in now))})
    _, doctored = kernel_budget.read_table()
    assert len(kernel_budget.worse({key: now}, doctored)) == len(now)


# Stages of points with two corners each, taken one by one at .L_edge; at .L_5 a warp votes that came apart.
LOOP = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
.L_1:
        /*0020*/                   STS.128 [R2], R4 ;
        /*0030*/                   BRA.DIV UR4, `(.L_5) ;
.L_2:
        /*0040*/               @P1 BRA `(.L_edge) ;
.L_3:
        /*0050*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0060*/                   NOP ;
        /*0070*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x400] ;
        /*0080*/                   BRA.U UP0, `(.L_3) ;
        /*0090*/                   BRA `(.L_4) ;
.L_edge:
        /*00a0*/               @P2 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*00b0*/               @P2 BRA `(.L_edge) ;
.L_4:
        /*00c0*/               @!P3 CALL.REL.NOINC `(.L_7) ;
        /*00c8*/                   BRA `(.L_1) ;
.L_7:
        /*00d0*/                   STG.E [R2], R4 ;
        /*00e0*/                   EXIT ;
.L_5:
        /*00f0*/                   CALL.REL.NOINC `($vote) ;
        /*0100*/                   BRA `(.L_2) ;
.L_6:
        /*0110*/                   BRA `(.L_6);
"""


def test_the_cheapest_path_takes_what_it_must() -> None:
    graph = sass.basic_blocks(LOOP)
    gather = r"^LDG\.E\.128"
    path = sass.cheapest_path(graph, {gather: 8, "STS": 2, "STG": 1})
    assert path
    assert sass.total_cost(path) == 2 + 2 * (3 + 2 * 3 + 1 + 1) + 1 + 2
    assert sass.densest_cost(path, gather, 2) == 1.5
    assert sass.cheapest_path(graph, {gather: 7, "STS": 2, "STG": 1}) is None


def test_blocks_with_fewer_than_all_corners_of_a_point_are_avoided() -> None:
    graph = sass.basic_blocks(LOOP)
    passes = {r"LDG\.E\.128": 3, "STG": 1}
    assert sass.cheapest_path(graph, passes)
    assert sass.cheapest_path(graph, passes, at_least=2) is None
