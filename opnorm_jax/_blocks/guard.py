"""Derivatives that do not exist raise an error that names the function, rather than give wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def forbid_derivative(message: str) -> Callable[[Any], Any]:
    """Makes an identity function whose derivative raises ``NotImplementedError`` with this message.

    Inside a ``custom_jvp`` rule, arrays that pass through it may be used but not be differentiated again, in whichever
    order derivatives are nested: the rule is given them without a derivative, unless there is one further out.
    """

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def rule(primals, tangents):
        raise NotImplementedError(message)

    return identity
