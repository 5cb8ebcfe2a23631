# SPDX-License-Identifier: Apache-2.0
"""The fixed-point unit leaves room for as many addends as a row of value may have, and none to spare."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cupy_msda.cuda.compile import assemble
from tests.emulator.emulator import Emulated

# The accumulator of no elements begins with the two exponent fields of its one (image, head).
BITS = """
template <typename Real>
__global__ void bits_of(FixedPoint* accumulator, const int* queries, const int* points, int* bits, int count) {
  for (int i = threadIdx.x; i < count; i += WARP)
    bits[i] = read_scale<Real>(accumulator, Shape{1, 0, 1, 1, queries[i], 1, points[i]}, 0).bits;
}
"""
MOST_BITS = 43  # an addend's magnitude, by what to_fixed can convert
ROOM = 2**62  # an accumulator's magnitude
IN_FLOAT = Fraction(4097, 4096)  # the binned kernel adds up to 4096 addends as floats
# Queries and points of a row, whose product is next to a power of two: below, at and above.
CASES = [
    (queries + more, points)
    for exponent in (10, 18, 19, 20, 21, 28, 30)
    for points in (1, 2, 16, 31, 256)
    for queries in [2**exponent // points]
    for more in (-queries // 1000, -queries // 1024, -queries // 1025, -1, 0, 1, queries // 2)
] + [(2**31 - 1, 2**31 - 1), (2**31 - 1, 1024), (1, 1)]


def bits_of(cases: list[tuple[int, int]], real: str, right: str = "", wrong: str = "") -> list[int]:
    """How many bits an addend may have, for each number of queries and of points."""
    source = assemble("fixed_point.cuh")
    assert right in source
    source = source.replace(right, wrong) if right else source
    bits = np.zeros(len(cases), np.int32)
    queries, points = np.array(cases, np.int32).T.copy()
    names = "bits_of<float>", "bits_of<double>"
    kernel = Emulated(source + BITS, f"bits_of<{real}>", together=names)
    arguments = [np.zeros(1, np.uint64), queries, points, bits, np.int32(len(cases))]
    kernel((1, 1, 1), (32, 1, 1), arguments)
    return bits.tolist()


def check(cases: list[tuple[int, int]], bits: list[int]) -> None:
    """The largest sum stays below the limit; one bit more, and it would not or the conversion could not follow."""
    for (queries, points), of_addend in zip(cases, bits, strict=True):
        largest = queries * points * Fraction(2) ** of_addend
        assert largest * IN_FLOAT < ROOM, (queries, points)
        # The margin for floats is rounded up to 2^-10.
        assert of_addend == MOST_BITS or 2 * largest * Fraction(1025, 1024) >= ROOM
        assert of_addend <= MOST_BITS


@pytest.mark.parametrize("real", ["float", "double"])
def test_the_most_bits_that_no_number_of_addends_overflows(real: str) -> None:
    bits = bits_of(CASES, real)
    check(CASES, bits)
    assert min(bits) < 2
    assert max(bits) == MOST_BITS


FAULTS = {
    "one-bit-more": ("VALID_BITS - (64", "VALID_BITS + 1 - (64"),
    "no-margin": ("addends += addends >> 10;", ""),
    "32-bit-addends": ("static_cast<long long>(p.num_queries) *", "p.num_queries *"),
}


@pytest.mark.parametrize(("right", "wrong"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_shows(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(CASES, bits_of(CASES, "float", right, wrong))
