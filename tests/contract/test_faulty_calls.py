# SPDX-License-Identifier: Apache-2.0
"""Whatever an argument is given, the error is a TypeError or ValueError that names it.

FAULTY_CALLS=2000 tries that many calls of each function, not a few.
"""

from __future__ import annotations

import os
import random
import re

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from tests.contract.faulty import FUNCTIONS, OTHER_NAMES, TAKEN, names, thing

CALLS = int(os.environ.get("FAULTY_CALLS", "60"))


def complaint(function, wrong):
    """What is wrong with the outcome of a call with these things by argument, or None."""
    arguments = function.arguments() | {name: thing(given) for name, given in wrong.items()}
    try:
        function(arguments)
    except (TypeError, ValueError) as error:
        named = [OTHER_NAMES.get(name, name) for name in wrong]
        if not re.match(r"\w+ (and \w+ )?must ", str(error)) or not any(
            name in str(error) for name in named
        ):
            return repr(error)
    except Exception as error:
        return repr(error)
    else:
        if not all(given in TAKEN.get(name, ()) for name, given in wrong.items()):
            return "no error"
    return None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_faulty_call_ends_in_an_error_that_names_the_argument(name):
    function = FUNCTIONS[name]
    choose = random.Random(name)
    known = list(function.arguments())
    complaints = {}
    for number in range(CALLS):
        # Every third call has two faults.
        faulty = choose.sample(known, 2 if number % 3 == 2 else 1)
        wrong = {argument: choose.choice(names()) for argument in faulty}
        problem = complaint(function, wrong)
        if problem is not None:
            complaints[str(wrong)] = problem
    assert not complaints


def test_the_things_are_many():
    assert len(names()) > 150
    assert set(TAKEN) <= {name for function in FUNCTIONS.values() for name in function.arguments()}
    assert {given for taken in TAKEN.values() for given in taken} <= set(names())
