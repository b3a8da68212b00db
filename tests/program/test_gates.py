"""Products of signals that lie between limits: gated units, squeeze and excitation, and what stays refused."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import THOROUGH, count_case

import opnorm_jax as oj
from opnorm_jax._program import lipschitz, ranges
from opnorm_jax._program.signals import Signal

CASES = 400 if THOROUGH else 10
BATCH = 10
BOUNDED = {
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "relu6": jax.nn.relu6,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_tanh": jax.nn.hard_tanh,
    "soft_sign": jax.nn.soft_sign,
    "clip": lambda x: jnp.clip(x, -1.5, 2.0),
    "sine": lambda x: 2 - jnp.sin(x) / 2,
    "softmax": jax.nn.softmax,
    "swish of clipped": lambda x: jax.nn.silu(jnp.clip(x, -3, 3)),
    "sum": lambda x: jnp.tanh(x) - 3 * jax.nn.sigmoid(x) + 0.5,
}
GATES = {
    "product": lambda u, v: u * v,
    "difference": lambda u, v: (u - v) * (0.5 - v),
    "quotient": lambda u, v: u / (jnp.abs(v) + 1.5),
    "reciprocal": lambda u, v: 1 / (3 + u * u) + v,
    "excitation": lambda u, v: u * jnp.mean(v) + jnp.max(v) * u,
    "squares": lambda u, v: u**2 - jnp.square(v) * u**3,
    "exponential": lambda u, v: jnp.exp(u) * jax.nn.sigmoid(v),
    "root": lambda u, v: jnp.sqrt(1 + u * u) * jax.lax.rsqrt(2 + jnp.abs(v)) + jnp.log(v * v + 0.5) + jnp.log1p(u * u),
    "concatenated": lambda u, v: jnp.concatenate([u, v]) * jnp.pad(v, (0, len(u)), constant_values=3.0),
    "chosen": lambda u, v: jnp.where(jnp.arange(len(u)) % 2 == 0, u, v) * jnp.minimum(v, u),
}


class Case:
    """Two random maps, each bounded by a function of the table, and a gate that joins them."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.names = [str(name) for name in rng.choice(list(BOUNDED), 2)]
        self.gate = str(rng.choice(list(GATES)))
        size = int(rng.integers(2, 5))
        self.params = [
            rng.standard_normal((size, size)) * 2,
            rng.standard_normal((size, size)),
            rng.standard_normal(size),
        ]
        self.size = size

    def fn(self, params, x):
        first, second, bias = params
        u = BOUNDED[self.names[0]](x @ first + bias)
        return GATES[self.gate](u, BOUNDED[self.names[1]](x @ second))

    def steepest(self, rng):
        """The largest Jacobian near many random points, in double precision: by sampling, then by climbing."""
        with jax.enable_x64(True):
            params = [jnp.asarray(param, jnp.float64) for param in self.params]
            norm = lambda x: jnp.linalg.norm(jax.jacfwd(lambda x: self.fn(params, x))(x).reshape(-1, self.size), 2)
            norms = jax.jit(jax.vmap(norm))
            points = rng.standard_normal((512, self.size)) * 10.0 ** rng.uniform(-1, 1, (512, 1))
            best = 0.0
            for step in (1.0, 0.3, 0.1, 0.03, 0.01):
                found = np.nan_to_num(np.asarray(norms(points)))
                best = max(best, found.max())
                top = points[np.argsort(found)[-16:]]
                points = np.repeat(top, 32, 0) + step * rng.standard_normal((512, self.size))
        return best


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BATCH, CASES, BATCH))])
def test_no_gated_unit_is_steeper_than_its_bound(start):
    failures, ratios = [], []
    for seed in range(start, start + BATCH):
        case = Case(seed)
        params = [jnp.asarray(param, jnp.float32) for param in case.params]
        bound = float(oj.lipschitz_bound(case.fn, params, jnp.zeros(case.size)))
        found = case.steepest(np.random.default_rng(seed))
        count_case("gated units", case.gate)
        ratios.append(found / bound)
        if not found * (1 - 1e-6) <= bound < math.inf:
            failures.append(f"seed {seed}: {case.gate} of {case.names}: {found} found, bound {bound}")
    assert not failures, "\n".join(failures)
    assert max(ratios) > 0.5 and np.mean(ratios) > 0.1  # the test would be weak if all bounds were far too large


def test_squeeze_and_excitation():
    """With a bounded activation before the gate; without one it is refused, and the error says what would help."""

    class Block(nn.Module):
        bounded: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.relu6(x) if self.bounded else nn.relu(x)
            gate = nn.sigmoid(nn.Dense(4)(nn.relu(nn.Dense(2)(x.mean((1, 2))))))
            return x * gate[:, None, None]

    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    model = Block(True)
    params = model.init(jax.random.key(0), x)
    bound = float(oj.lipschitz_bound(model.apply, params, x))
    jacobian = jax.jit(jax.jacobian(lambda x: model.apply(params, x)))
    steepest = max(np.linalg.norm(np.asarray(jacobian(t * x)).reshape(64, -1), 2) for t in (0.1, 1.0, 3.0))
    assert steepest <= bound < 40 * steepest
    with pytest.raises(ValueError, match="mul on .* has none unless both lie between limits"):
        oj.lipschitz_bound(Block(False).apply, params, x)


def test_gated_units_of_wavenet_count_each_path():
    """tanh(a) sigmoid(b) changes by at most the change of a and a quarter of that of b."""
    net = lambda p, x: jnp.tanh(p[0] * x) * jax.nn.sigmoid(p[1] * x)
    assert np.isclose(oj.lipschitz_bound(net, (jnp.float32(2), jnp.float32(4)), jnp.ones(3)), 2 + 4 / 4, rtol=1e-5)


REFUSED = {
    "a linear gate": (lambda x: jax.nn.glu(jnp.concatenate([x, x])), "mul"),
    "a product with the input": (lambda x: x * jnp.tanh(x), "mul"),
    "a square": (lambda x: x**2, "integer_pow"),
    "an exponential": (lambda x: jnp.exp(x), "exp"),
    "bounded from one side only": (lambda x: jnp.exp(jnp.maximum(x, 1.0)), "exp"),
    "a root at zero": (lambda x: jnp.sqrt(jnp.abs(jnp.tanh(x))), "sqrt"),
    "a logarithm at zero": (lambda x: jnp.log(jax.nn.sigmoid(x)), "log"),
    "a quotient by what may vanish": (lambda x: 1 / jnp.tanh(x), "div"),
    "an unbounded numerator": (lambda x: x / (1 + jnp.tanh(x) ** 2), "div"),
    "a negative power": (lambda x: jnp.tanh(x) ** -2, "integer_pow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_limits_is_refused(name):
    fn, operation = REFUSED[name]
    with pytest.raises(ValueError, match=rf"; {operation} on"):
        oj.lipschitz_bound(lambda _, x: fn(x), None, jnp.ones(4))


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(), nn.GroupNorm(2), nn.InstanceNorm(), nn.RMSNorm(), nn.BatchNorm(False)]
)
def test_normalisation_by_the_input_is_refused_with_a_remedy(layer):
    x = jnp.ones((2, 4, 4, 4))
    params = layer.init(jax.random.key(0), x)
    fn = lambda params, x: layer.apply(params, x, mutable=["batch_stats"])[0]
    with pytest.raises(ValueError, match="divided by something .* group .* Normalise by fixed numbers"):
        oj.lipschitz_bound(fn, params, x)


T = (0.2, 0.5)  # what the signal is held between, in the table of ranges
RANGES = {
    "abs": (lambda t: jnp.abs(t - 0.4), 0.0, 0.2),
    "add": (lambda t: t + 2 * t, 0.6, 1.5),
    "atan": (lambda t: jnp.arctan(t), -np.pi / 2, np.pi / 2),
    "broadcast": (lambda t: jnp.broadcast_to(t, (3, 4)), 0.2, 0.5),
    "clamp": (lambda t: jax.lax.clamp(0.3, t, 0.4), 0.3, 0.4),
    "concatenate": (lambda t: jnp.concatenate([-t, 3 * t]), -0.5, 1.5),
    "cos": (lambda t: jnp.cos(t), -1.0, 1.0),
    "div": (lambda t: (t - 0.3) / t, -0.5, 1.0),
    "erf": (lambda t: jax.lax.erf(t), -1.0, 1.0),
    "erfc": (lambda t: jax.lax.erfc(t), 0.0, 2.0),
    "exp": (lambda t: jnp.exp(t), 0.0, np.exp(0.5)),
    "hard_tanh": (lambda t: jax.nn.hard_tanh(t), -1.0, 1.0),
    "integer_pow, even": (lambda t: (t - 0.4) ** 2, 0.0, 0.04),
    "integer_pow, odd": (lambda t: (t - 0.3) ** 3, -0.008, 0.008),
    "logistic": (lambda t: jax.nn.sigmoid(t), 0.0, 1.0),
    "max": (lambda t: jnp.maximum(t, 0.3), 0.3, 0.5),
    "min": (lambda t: jnp.minimum(t, 0.3), 0.2, 0.3),
    "mul": (lambda t: (t - 0.4) * (2 * t), -0.2, 0.1),
    "neg": (lambda t: -t, -0.5, -0.2),
    "pad": (lambda t: jnp.pad(t, 1, constant_values=-1.0), -1.0, 0.5),
    "reduce_max": (lambda t: jnp.max(t), 0.2, 0.5),
    "reduce_sum": (lambda t: jnp.sum(t), 0.8, 2.0),
    "reduce_window_sum": (lambda t: jax.lax.reduce_window(t, 0.0, jax.lax.add, (2,), (1,), "SAME"), 0.0, 1.0),
    "rsqrt": (lambda t: jax.lax.rsqrt(t), 0.5**-0.5, 0.2**-0.5),
    "select_n": (lambda t: jnp.where(jnp.arange(4) > 1, t, 2 * t), 0.2, 1.0),
    "sin": (lambda t: jnp.sin(t), -1.0, 1.0),
    "soft_sign": (lambda t: jax.nn.soft_sign(t), -1.0, 1.0),
    "softmax": (lambda t: jax.nn.softmax(t), 0.0, 1.0),
    "sqrt": (lambda t: jnp.sqrt(t), 0.2**0.5, 0.5**0.5),
    "square": (lambda t: jnp.square(t - 0.4), 0.0, 0.04),
    "square by mul": (lambda t: (t - 0.4) * (t - 0.4), 0.0, 0.04),
    "sub": (lambda t: 1 - t - 2 * t, -0.5, 0.4),
    "tanh": (lambda t: jnp.tanh(t), -1.0, 1.0),
    "unknown": (lambda t: jnp.cumsum(t), -np.inf, np.inf),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", RANGES)
def test_ranges(name):
    """Each rule alone: the range is what it should be, and no value is outside."""
    fn, low, high = RANGES[name]
    whole = lambda x: fn(jnp.clip(x, *T))
    program = jax.make_jaxpr(whole)(jnp.zeros(4))
    (signal,) = lipschitz._Run().run(program, [Signal((4,), bound=1.0)])
    # Limits in the program are numbers of single precision.
    np.testing.assert_allclose(signal.range, (low, high), rtol=1e-6, atol=1e-6)
    values = jax.vmap(whole)(jax.random.uniform(jax.random.key(0), (1000, 4), minval=-1, maxval=1))
    assert signal.range[0] - 1e-6 <= values.min() and values.max() <= signal.range[1] + 1e-6


def test_limits_may_be_as_wide_as_floats():
    """Limits that are no limits give no bound, and no overflow."""
    assert ranges.slope_between("exp", None, (0.0, 1e300)) == math.inf
    assert ranges.slope_between("integer_pow", 3, (-1e200, 1e200)) == math.inf
    assert ranges.slope_between("rsqrt", None, (0.0, 1.0)) == math.inf
    with pytest.raises(ValueError, match="; exp on"):
        oj.lipschitz_bound(lambda _, x: jnp.exp(jnp.clip(x, -1e30, 1e30)), None, jnp.ones(4))
    with pytest.raises(ValueError, match="; mul on"):  # limits that are not known yet are none
        jax.jit(lambda t: oj.lipschitz_bound(lambda t, x: jnp.clip(x, -t, t) * jnp.tanh(x), t, jnp.ones(4)))(2.0)
