# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.fuzz`: random cases until the time is up, or one that failed."""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import numpy as np

from tests.fuzz.checks import check
from tests.fuzz.families import FAMILIES


def main() -> int:
    """Run; the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument(
        "--family",
        action="append",
        choices=FAMILIES,
        help="which templates, several times for more; by default three that the seed chooses",
    )
    parser.add_argument("--case", type=int, help="one case of each family alone")
    given = parser.parse_args()
    families = given.family or np.random.default_rng(given.seed).choice(
        list(FAMILIES), 3, replace=False
    )
    numbers = itertools.count() if given.case is None else [given.case]
    end = time.monotonic() + given.seconds
    failures = cases = 0
    for number in numbers:
        if given.case is None and time.monotonic() > end:
            break
        for family in families:
            cases += 1
            try:
                check(family, given.seed, number)
            except AssertionError as error:
                failures += 1
                print(error, flush=True)
    print(f"{cases} cases of {', '.join(families)}: {failures} failed")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
