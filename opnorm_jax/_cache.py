"""A cache of static arrays that is bounded by their bytes, not by their number."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import numpy as np

LIMIT = 2**26
"""Bytes that each cached function keeps, besides its latest result."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def cached_arrays(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keeps the results of a function of hashable arguments: arrays, or tuples with arrays in them.

    The results that were asked for longest ago go first, once all of them take more than ``LIMIT`` bytes. The latest
    one stays, whatever its size. Threads may call it at the same time.
    """
    kept: collections.OrderedDict[Hashable, tuple[_R, int]] = collections.OrderedDict()
    lock = threading.Lock()

    @functools.wraps(function)
    def cached(*args, **kwargs):
        key = args, tuple(kwargs.items())
        with lock:
            if key in kept:
                kept.move_to_end(key)
                return kept[key][0]
        result = function(*args, **kwargs)
        with lock:
            kept[key] = result, _bytes(result)
            total = sum(size for _, size in kept.values())
            while total > LIMIT and len(kept) > 1:
                total -= kept.popitem(last=False)[1][1]
        return result

    cached.kept = kept  # type: ignore[attr-defined]
    return cached  # type: ignore[return-value]


def _bytes(result: Any) -> int:
    """Returns the size of the arrays in a result, and something for what holds them."""
    if isinstance(result, np.ndarray):
        return result.nbytes + 200
    return 200 + (sum(map(_bytes, result)) if isinstance(result, tuple) else 0)
