# SPDX-License-Identifier: Apache-2.0
"""CPU arrays: the Numba kernels, else the reference."""
