"""Finds the batch normalisation that follows a convolution in a checkpoint, and what it multiplies the channels by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from opnorm_jax._cli.checkpoint import Checkpoint, UserError
from opnorm_jax._conv import Conv, member_shape, stacked_axes

EPSILON = 1e-5
"""What PyTorch and Flax add to a variance by default."""

_VARIANCE = re.compile(r"^(?:.*\bbatch_stats/)?(.+?)(?:\.running_var|/var)(?:/value)?$")
_SCALE = re.compile(r"^(.+?)[./](?:weight|scale)(?:/value)?$")


def variances(names: Iterable[str]) -> dict[str, str]:
    """Finds the batch normalisations among a checkpoint's arrays: the name of each layer's variance, by the layer."""
    layers: dict[str, str] = {}
    for name in names:
        if found := _VARIANCE.match(name):
            if found[1] in layers:
                raise UserError(f"{found[1]}: two arrays hold its variance, {layers[found[1]]} and {name}.")
            layers[found[1]] = name
    return layers


def follower(layer: str, norms: Iterable[str]) -> str | None:
    """Returns the batch normalisation whose name says that it belongs behind a convolution; None if none's does.

    In one folder these belong together: ``conv1`` and ``bn1``, ``Conv_0`` and ``BatchNorm_0``, ``conv`` and ``norm``;
    in a sequence, each number and the next.
    """
    folder, last = _split(layer)
    rest = _rest(last, "conv(olution)?")
    for norm in norms:
        theirs, name = _split(norm)
        if last.isdigit() and name.isdigit():
            follows = int(name) == int(last) + 1
        else:
            follows = rest is not None and rest == _rest(name, "bn|batch_?norm|norm")
        if theirs == folder and follows:
            return norm
    return None


def _split(layer: str) -> tuple[str, str]:
    folder, _, last = layer.replace("/", ".").rpartition(".")
    return folder, last


def _rest(name: str, word: str) -> str | None:
    """Returns what a name has besides a word; None if the word is not in it."""
    rest, found = re.subn(word, "", name.lower(), count=1)
    return rest if found else None


def factors(
    checkpoint: Checkpoint,
    convs: Mapping[str, Conv],
    norms: Mapping[str, str],
    epsilon: float,
) -> dict[str, np.ndarray]:
    """Returns what batch normalisations multiply output channels by: scale / sqrt(variance + epsilon).

    Args:
      checkpoint: where the arrays are.
      convs: what the kernels are, by name.
      norms: for a kernel's name, that of the batch normalisation behind it.
      epsilon: what the normalisation adds to the variance. Files do not hold it.

    Returns:
      The factors of some of the kernels, by name.
    """
    found = variances(checkpoint.names)
    scales = {match[1]: name for name in checkpoint.entries if (match := _SCALE.match(name)) and match[1] in found}
    for name, norm in norms.items():
        if norm not in found:
            known = f"; found {', '.join(sorted(found)[:4])}" if found else "; found none"
            raise UserError(f"{name}: expected {norm!r} to be a batch normalisation, a layer with a variance{known}.")
    if not norms:
        return {}
    wanted = {names[norm] for norm in norms.values() for names in (found, scales) if norm in names}
    arrays, result = checkpoint.read(wanted), {}  # at once: some formats are restored whole
    for name, norm in norms.items():
        variance, scale = arrays[found[norm]], arrays[scales[norm]] if norm in scales else None
        shape, conv = checkpoint.entries[name].shape, convs[name]
        members = [shape[axis] for axis in stacked_axes(conv)]
        expected = (*members, member_shape(shape, conv)[conv.kernel_layout.index("O")])
        if variance.shape != expected or scale is not None and scale.shape != expected:
            raise UserError(
                f"{name}: expected the batch normalisation {norm!r} to have {expected[-1]} channels, got shape "
                f"{variance.shape}."
            )
        variance = variance.astype(np.float64) + epsilon
        if not (variance > 0).all():
            raise UserError(f"{name}: expected the variances of {norm!r} to be positive, got {variance.min():.3g}.")
        factor = 1 / np.sqrt(variance)
        result[name] = factor if scale is None else factor * scale.astype(np.float64)
    return result
