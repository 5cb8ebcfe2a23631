# SPDX-License-Identifier: Apache-2.0
"""How many threads the kernels may use: what users of NumPy and Numba set."""

# Numba and threadpoolctl ship no types.
# mypy: disable-error-code="attr-defined, import-untyped"

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

from numba import config
from numba.np.ufunc import parallel


def limit() -> int:
    """The least of the limits by Numba, OMP_NUM_THREADS, threadpoolctl and the CPUs of this process."""
    limits: list[int] = [config.NUMBA_NUM_THREADS]
    # `numba.get_num_threads` would start Numba's own threads. This exists once something has.
    chosen = getattr(parallel, "_get_num_threads", None)
    if chosen is not None:
        limits.append(chosen())
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if outermost.isdecimal() and int(outermost) > 0:
        limits.append(int(outermost))
    if "threadpoolctl" in sys.modules:
        limits += (pool.num_threads for pool in _pools())
    return min(limits)


# BLIS and FlexiBLAS are left out: they say 1 where nobody has set anything.
_POOLS = ("openblas", "mkl", "openmp")


@cache
def _pools() -> list[Any]:
    """The thread pools in this process that threadpoolctl limits: of NumPy's BLAS, of OpenMP."""
    try:
        pools = sys.modules["threadpoolctl"].ThreadpoolController().lib_controllers
        return [pool for pool in pools if pool.internal_api in _POOLS and pool.num_threads]
    except Exception:  # a limit that cannot be read is none
        return []
