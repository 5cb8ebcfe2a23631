# SPDX-License-Identifier: Apache-2.0
"""Random calls of the emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.fuzz --seconds 600 --seed 1

`families.py`: the templates. `cases.py`: a random problem of one. `checks.py`: every candidate of it, against the reference.
"""
