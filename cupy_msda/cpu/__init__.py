# SPDX-License-Identifier: Apache-2.0
"""Host arrays: Numba kernels, else the reference."""
