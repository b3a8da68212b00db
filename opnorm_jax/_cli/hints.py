"""Says which layers of a checkpoint look as if they were something else than they are described as."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from opnorm_jax._cli.checkpoint import Entry
from opnorm_jax._conv import Conv, member_shape

_TRANSPOSED = re.compile(r"transpose|deconv|upconv|convt|(^|_)up(sample)?(_|\d|$)", re.IGNORECASE)
_SHORTCUT = re.compile(r"downsample|shortcut|skip|proj", re.IGNORECASE)


def hints(convs: Mapping[str, Conv], entries: Mapping[str, Entry]) -> list[str]:
    """Compares each kernel with its name, and with how many channels the kernel before it gives.

    Files hold neither groups nor directions, so that a depthwise layer looks like one of a single input channel, and a
    transposed one like its own adjoint. These are guesses, and nothing is changed by them.

    Args:
      convs: what the kernels are described as, in natural order of their names.
      entries: their arrays, by name.
    """
    found = []
    sizes = {
        name: dict(zip(conv.kernel_layout, member_shape(entries[name].shape, conv)))
        for name, conv in convs.items()
        if conv.input_shape and not _SHORTCUT.search(name)
    }
    inputs = {name: size["I"] * convs[name].feature_group_count for name, size in sizes.items()}
    names = list(sizes)
    before, turned = 0, False  # the output channels of the kernel before, if any; whether it seems to be transposed
    for last, name, after in zip([None, *names], names, [*names[1:], None]):
        if last is None or not _follows(last, name):
            before, turned = 0, False
        conv, i, o = convs[name], inputs[name], sizes[name]["O"]
        plain = conv.feature_group_count == 1 and set(conv.input_dilation) == {1}
        several_taps = math.prod(sizes[name][letter] for letter in conv.kernel_layout if letter not in "IO") > 1
        grouped = several_taps and before > i and before % i == 0 and o % (before // i) == 0
        # A transposed layer's kernel has its input channels in the place of the output channels. The kernel after it
        # takes what stands in the place of its input channels, or has that as its own output channels.
        wanted, onward = (inputs[after], sizes[after]["O"]) if after and _follows(name, after) else (0, 0)
        goes_on, goes_on_turned = wanted == o, i in (wanted, onward)
        transposed = several_taps and o != i != before and (i > 1 or turned)
        if before == o:
            transposed = transposed and (goes_on_turned or turned or not (grouped or goes_on))
        else:
            transposed = transposed and before == 0 and goes_on_turned and not goes_on
        named = _is_named_transposed(name) and (before != i or i == o)
        turned = plain and (transposed or named)
        if turned:
            found.append(
                f'{name} may be a transposed layer: then give it its stride as "input_dilation", no "strides", k - 1 - '
                'p as "padding", and in PyTorch\'s files "IOHW" as "kernel_layout"'
            )
        elif plain and grouped:
            kind = "depthwise" if i == 1 else "grouped"
            found.append(
                f"{name} may be {kind}: its kernel has {i} input channel{'s' * (i > 1)}, and the one before it "
                f'gives {before}; then give it {before // i} as "feature_group_count"'
            )
        before = i if turned else o
    return found


def _is_named_transposed(name: str) -> bool:
    """Tells by the layer's own name: the last word before the kernel's that is no number."""
    words = [word for word in re.split("[./]", name)[:-1] if not word.isdigit() and word != "kernel"]
    return bool(words) and _TRANSPOSED.search(words[-1]) is not None


def _follows(one: str, other: str) -> bool:
    """Tells whether the order of two names is that of a sequence: they first differ by a number."""
    first, second = (re.split(r"[./]", name) for name in (one, other))
    for a, b in zip(first, second):
        if a != b:
            return re.sub(r"\d+$", "", a) == re.sub(r"\d+$", "", b)
    return False
