# SPDX-License-Identifier: Apache-2.0
"""Numba's disk cache of a kernel, whose failures cost one warning and never a result."""

# Numba ships no types.
# mypy: disable-error-code="attr-defined, import-untyped, misc, no-untyped-call"

from __future__ import annotations

import pickle
from contextlib import suppress
from hashlib import sha256
from typing import Any

from numba import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache
from numba.core.serialize import dumps

from cupy_msda.faults import reason, warn_once


def disk_cache(function: Any) -> Any:
    """The disk cache of a function to compile, or one that keeps nothing where no folder is to be had."""
    try:
        found = _DiskCache(function)
    except Exception as error:
        _warn("Numba's cache must have a folder that can be written", reason(error))
        return NullCache()
    if not found.cache_path.startswith(config.CACHE_DIR):
        contract = "NUMBA_CACHE_DIR must be a folder that can be written"
        _warn(contract, f"{config.CACHE_DIR!r} and keeps kernels in {found.cache_path}")
    return found


def _warn(contract: str, fact: str) -> None:
    """Warn of the first failure in a process."""
    remedy = "kernels that it lacks are compiled, in seconds; NUMBA_CACHE_DIR names another folder"
    warn_once("cache", f"{contract}, got {fact}: {remedy}")


class _Format(CompileResultCacheImpl):
    """What lies in a file: the pickled kernel after its checksum, since damaged machine code would run."""

    def reduce(self, result: Any) -> tuple[bytes, bytes]:
        text = dumps(super().reduce(result))
        return self._checksum(result.codegen, text), text

    def rebuild(self, context: Any, entry: tuple[bytes, bytes]) -> Any:
        checksum, text = entry
        if checksum != self._checksum(context.codegen(), text):
            raise ValueError("a kernel does not match its checksum")
        return super().rebuild(context, pickle.loads(text))

    def _checksum(self, codegen: Any, text: bytes) -> bytes:
        """Of the kernel, its name and the processor: two processes that save at once can mix up files."""
        return sha256(repr((self.filename_base, codegen.magic_tuple())).encode() + text).digest()


class _DiskCache(FunctionCache):
    """The cache of one kernel, which is compiled where it cannot be read and not kept where it cannot be written."""

    _impl_class = _Format

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception as error:
            self._warn(error)
            with suppress(Exception):
                self.flush()  # a damaged index would make each later process fail, too
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        try:
            super().save_overload(signature, result)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        contract = f"Numba's cache in {self.cache_path} must be readable and writable"
        _warn(contract, reason(error))
