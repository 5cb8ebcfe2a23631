# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels: which ones a problem takes, how they are compiled and launched."""
