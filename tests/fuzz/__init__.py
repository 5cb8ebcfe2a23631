# SPDX-License-Identifier: Apache-2.0
"""Random calls of the emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.fuzz --seconds 600 --seed 1

`families.py` has the templates, `cases.py` makes a random problem of one, `checks.py` runs every candidate of it and
compares.
"""
