"""Says which layers of a checkpoint look as if they were something else than they are described as."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from opnorm_jax._cli.checkpoint import Entry
from opnorm_jax._conv import Conv, member_shape

_TRANSPOSED = re.compile(r"transpose|deconv|upconv|convt|(^|[./_])up(sample)?([./_\d]|$)", re.IGNORECASE)
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
    before = 0  # the output channels of the kernel before
    for name, after in zip(names, [*names[1:], None]):
        conv, i, o = convs[name], inputs[name], sizes[name]["O"]
        plain = conv.feature_group_count == 1 and set(conv.input_dilation) == {1}
        wanted = inputs[after] if after else None
        several_taps = math.prod(sizes[name][letter] for letter in conv.kernel_layout if letter not in "IO") > 1
        grouped = several_taps and before > i and before % i == 0 and o % (before // i) == 0
        transposed = before == o != i and i > 1 and (wanted == i or not grouped)
        if plain and (transposed or _TRANSPOSED.search(name)):
            found.append(
                f'{name} may be a transposed layer: then give it its stride as "input_dilation", no "strides", k - 1 - '
                'p as "padding", and in PyTorch\'s files "IOHW" as "kernel_layout"'
            )
            o = i
        elif plain and grouped:
            kind = "depthwise" if i == 1 else "grouped"
            found.append(
                f"{name} may be {kind}: its kernel has {i} input channel{'s' * (i > 1)}, and the one before it "
                f'gives {before}; then give it {before // i} as "feature_group_count"'
            )
        before = o
    return found
