# SPDX-License-Identifier: Apache-2.0
"""The benchmark behind ``python -m cupy_msda bench``; its entry is `runner.run`."""
