"""Generated convolutions: dimension, kernel, input, strides, dilation, groups, channels, layout, padding."""

import dataclasses

import numpy as np
import oracle

import opnorm_jax as oj

_LETTERS = {1: "W", 2: "HW", 3: "DHW"}


@dataclasses.dataclass(frozen=True)
class Geometry:
    conv: oj.Conv
    taps: tuple[int, ...]
    channels: tuple[int, int]  # per group in, all out

    @property
    def options(self):
        """As keywords of the oracle."""
        conv = self.conv
        return {
            "strides": conv.strides,
            "padding": conv.padding,
            "input_dilation": conv.input_dilation,
            "kernel_dilation": conv.kernel_dilation,
            "feature_group_count": conv.feature_group_count,
        }

    @property
    def exact(self):
        conv = self.conv
        divides = all(n * e % s == 0 for n, e, s in zip(conv.input_shape, conv.input_dilation, conv.strides))
        return divides and (conv.padding == "CIRCULAR" or self._tiles)

    @property
    def _tiles(self):
        """Whether the outputs' patches are as far apart as they are large, or farther, and none meets padding."""
        conv = self.conv
        pads = oracle.resolve_padding(conv.padding, conv.input_shape, self.taps, conv.strides, conv.kernel_dilation)
        apart = all(d * (k - 1) < s for d, k, s in zip(conv.kernel_dilation, self.taps, conv.strides))
        return apart and not np.any(pads) and max(conv.input_dilation) == 1

    def kernels(self, rng, count, dtype=np.float32):
        """``count`` random kernels in the layout of ``conv``; some of low rank, some of extreme scale."""
        canonical = rng.standard_normal((count, *self.taps, *self.channels))
        canonical[1::4] = rng.standard_normal((len(canonical[1::4]), *self.taps, 1, 1))  # rank one, and ties
        canonical *= 10.0 ** rng.integers(-3, 4, size=(count,) + (1,) * (len(self.taps) + 2))
        canonical = canonical.astype(dtype)
        letters = _LETTERS[len(self.taps)] + "IO"
        order = [0] + [1 + letters.index(letter) for letter in self.conv.kernel_layout]
        return canonical, np.ascontiguousarray(canonical.transpose(order))

    def oracle(self, canonical):
        return oracle.dense_singular_values(canonical, self.conv.input_shape, **self.options)


def generate(seed, exact=None):
    """One geometry; ``exact`` asks for circular padding with strides that divide the grid, or for anything else."""
    rng = np.random.default_rng(seed)
    while True:
        rank = int(rng.choice([1, 2, 2, 3]))
        draw = lambda low, high, rank=rank: tuple(int(v) for v in rng.integers(low, high, rank))
        one = (1,) * rank
        strides = draw(1, 4) if rng.random() < 0.6 else one
        input_dilation = draw(1, 3) if rng.random() < 0.25 else one
        kernel_dilation = draw(1, 4) if rng.random() < 0.4 else one
        taps = draw(1, 5 if rank < 3 else 3)
        shape = draw(2, 8 if rank < 3 else 4)
        padding = rng.choice(["CIRCULAR", "SAME", "VALID", "explicit"])
        if exact:
            padding = "CIRCULAR"
            shape = tuple(min(n, 4) * s for n, s in zip(shape, strides))
        if padding in ("SAME", "VALID") and max(input_dilation) > 1:
            padding = "explicit"
        if padding == "explicit":
            padding = tuple((int(low), int(high)) for low, high in rng.integers(-1, 4, (rank, 2)))
        groups = int(rng.choice([1, 1, 2, 3]))
        layout = "".join(rng.permutation(list(_LETTERS[rank] + "IO")))
        conv = oj.Conv(
            shape,
            strides=strides,
            padding=padding if isinstance(padding, tuple) else str(padding),
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=groups,
            kernel_layout=layout,
        )
        channels = (int(rng.integers(1, 4)), int(rng.integers(1, 4)) * groups)
        geometry = Geometry(conv, taps, channels)
        if (exact is not None and exact != geometry.exact) or int(np.prod(shape)) * channels[0] * groups > 400:
            continue
        try:
            matrix = oracle.dense_matrix(np.ones((*taps, *channels)), shape, **geometry.options)
        except ValueError:  # no output
            continue
        if matrix.size and matrix.any():
            return geometry
