# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, and how they work with torch's and CuPy's streams, devices and graphs."""
