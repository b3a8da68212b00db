"""One kernel in an encoder and in its transpose: one layer to constrain, as their norms agree; all else is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import THOROUGH, count_case
from jacobian import conv_norm, linear_norm
from jax import lax

import opnorm_jax as oj

CASES = 300 if THOROUGH else 20


class Case:
    """A random layer and a kernel for it."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        rank = int(rng.integers(1, 3))
        integers = lambda low, high: tuple(int(n) for n in rng.integers(low, high, rank))
        taps = integers(1, 5)
        self.letters, self.shape = "HW"[2 - rank :], integers(5, 9)
        self.strides, self.dilation = integers(1, 4), integers(1, 3)
        layout = rng.permutation(list("S" * rank + "IO"))
        taken = iter(self.letters)  # jax takes the spatial axes in the order in which they lie in the kernel
        self.layout = "".join(next(taken) if letter == "S" else letter for letter in layout)
        self.groups = int(rng.choice([1, 1, 2]))  # two are depthwise
        sizes = dict(zip(self.letters, taps)) | {"I": 2 // self.groups, "O": 3 if self.groups == 1 else 2}
        self.kernel = rng.standard_normal([sizes[letter] for letter in self.layout])
        pads = [(int(low), int(high)) for low, high in rng.integers(-1, 4, (rank, 2))]
        reach = [d * (k - 1) for d, k in zip(self.dilation, taps)]
        self.circular = bool(rng.random() < 0.2) and all(n % s == 0 for n, s in zip(self.shape, self.strides))
        if self.circular:
            self.pads, self.wrap = [(0, 0)] * rank, [(0, r) for r in reach]
        else:
            self.pads = [pad if n + sum(pad) > r else (r, 0) for pad, n, r in zip(pads, self.shape, reach)]
            self.wrap = [(0, 0)] * rank

    def encode(self, kernel, x):
        x = jnp.pad(x, [(0, 0), *self.wrap, (0, 0)], mode="wrap")
        numbers = (f"N{self.letters}C", self.layout, f"N{self.letters}C")
        return lax.conv_general_dilated(
            x, kernel, self.strides, self.pads, rhs_dilation=self.dilation, dimension_numbers=numbers,
            feature_group_count=self.groups,
        )  # fmt: skip

    def decode(self, kernel, y):
        x = jax.ShapeDtypeStruct((1, *self.shape, 2), y.dtype)
        return jax.linear_transpose(lambda x: self.encode(kernel, x), x)(y)[0]

    def fn(self, kernel, x):
        return self.decode(kernel, jnp.tanh(self.encode(kernel, x)))

    def norm(self):
        return linear_norm(lambda x: self.encode(self.kernel, x), (*self.shape, 2))


def test_an_encoder_and_its_transpose_are_one_layer():
    failures, found = [], 0
    for seed in range(CASES):
        case = Case(seed)
        kernel, norm = jnp.asarray(case.kernel, jnp.float32), case.norm()
        image = jnp.ones((1, *case.shape, 2))
        for name, fn, x in (
            ("encoder first", case.fn, image),
            ("decoder first", lambda p, y, c=case: c.encode(p, c.decode(p, y)), case.encode(kernel, image)),
        ):
            try:
                conv = oj.find_convs(fn, kernel, x)
            except ValueError as error:
                failures += [f"seed {seed}, {name}: {error}"] * (not case.circular)
                continue
            found += 1
            count_case("tied kernels", name)
            if not np.isclose(conv_norm(case.kernel, conv), norm, rtol=1e-9):
                failures.append(f"seed {seed}, {name}: {norm} is not the norm of {conv}")
    assert not failures, "\n".join(failures)
    assert found > 1.5 * CASES


def test_tied_autoencoders():
    """As users write them: Flax's transposed layers with transpose_kernel, and matrices."""

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (3, 3, 2, 6))
            matrix = self.param("matrix", nn.initializers.normal(), (6, 4))
            numbers = ("NHWC", "HWIO", "NHWC")
            y = nn.relu(lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers))
            y = nn.relu(y @ matrix) @ matrix.T
            return lax.conv_transpose(y, kernel, (2, 2), "SAME", dimension_numbers=numbers, transpose_kernel=True)

    x, model = jnp.ones((1, 8, 8, 2)), Autoencoder()
    params = model.init(jax.random.key(0), x)
    convs = oj.find_convs(model.apply, params, x, dense=True)["params"]
    assert convs["kernel"] == oj.Conv((8, 8), strides=2, padding=((0, 1), (0, 1)))
    assert convs["matrix"] == oj.Conv(())
    gradient = lambda params, x: jax.grad(lambda x: model.apply(params, x).sum())(x)
    assert oj.find_convs(gradient, params, x, dense=True)["params"] == convs


def test_what_is_no_transpose_is_refused():
    kernel = jnp.ones((3, 3, 2, 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    encode = lambda p, x, stride=1: lax.conv_general_dilated(x, p, (stride, stride), "SAME", dimension_numbers=numbers)
    for fn in (
        lambda p, x: lax.conv_transpose(encode(p, x, 2), p, (2, 2), "SAME", dimension_numbers=numbers),
        lambda p, x: lax.conv_transpose(
            encode(p, x), p, (2, 2), "SAME", dimension_numbers=numbers, transpose_kernel=True
        ),
        lambda p, x: encode(jnp.swapaxes(p, 2, 3), encode(p, x), 2),
    ):
        with pytest.raises(ValueError, match="used with 2 geometries"):
            oj.find_convs(fn, kernel, jnp.ones((1, 8, 8, 2)))
