"""Random networks: their bounds against dense float64 matrices, with slopes chosen to make the worst of them."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import random_networks
import scipy.optimize
from conftest import THOROUGH, count_case
from jacobian import conv_norm, forget

import opnorm_jax as oj
from opnorm_jax._program import joint, signals, stages

CASES = 2000 if THOROUGH else 80
SHORTCUTS = 1000 if THOROUGH else 40
BATCH = 20
SMALL_BATCH = 10


def loose(kernel, conv):
    """A layer's norm by the oracle, and 30 % more: so no stage is left to the product only because that is exact."""
    return jnp.float32(1.3 * conv_norm(np.asarray(kernel), conv))


def bounds(net, method):
    params = [jnp.asarray(param) for param in net.params]
    return float(oj.lipschitz_bound(net.fn, params, jax.ShapeDtypeStruct((1, *net.shape), jnp.float32), method=method))


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BATCH, CASES, BATCH))])
def test_no_diagonal_of_slopes_is_steeper_than_the_bound(start, monkeypatch):
    monkeypatch.setattr(signals, "_upper", loose)
    failures, ratios = [], []
    for seed in range(start, start + BATCH):
        net = random_networks.generate(seed)
        product, bound = bounds(net, "product"), bounds(net, "sdp")
        found = net.steepest(np.random.default_rng(seed))
        count_case("random networks", "bounded")
        if not found * (1 - 1e-12) <= bound <= product:
            failures.append(f"seed {seed}: {found} found, bound {bound}, product {product}\n{net}")
        if product > 0:
            ratios.append(bound / product)
    forget()
    assert not failures, "\n\n".join(failures)
    assert np.mean(ratios) < 0.75  # the test would be weak if most bounds were the product


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(SMALL_BATCH, SHORTCUTS, SMALL_BATCH))]
)
def test_shortcuts_and_pooled_heads(start, monkeypatch, x64):
    """Networks of the kind of a CIFAR ResNet: also against their own Jacobians at random points."""
    monkeypatch.setattr(signals, "_upper", loose)
    failures, ratios = [], []
    for seed in range(start, start + SMALL_BATCH):
        net, rng = random_networks.generate_shortcuts(seed), np.random.default_rng(seed)
        product, bound = bounds(net, "product"), bounds(net, "sdp")
        found = max(net.steepest(rng), jacobian_norm(net, rng) * (1 - 1e-7))
        count_case("random networks", "with shortcuts")
        if not found * (1 - 1e-12) <= bound <= product:
            failures.append(f"seed {seed}: {found} found, bound {bound}, product {product}\n{net}")
        ratios.append(bound / product)
    forget()
    assert not failures, "\n\n".join(failures)
    assert np.mean(ratios) < 0.65  # the test would be weak if most bounds were the product


def jacobian_norm(net, rng, points=8, step=1e-6):
    """The largest norm of the network's Jacobian at random points, by differences in double precision."""
    params = [param.astype(np.float64) for param in net.params]
    at, side = rng.standard_normal((points, 1, *net.shape)), math.prod(net.shape)
    steps = step * np.concatenate([np.eye(side), -np.eye(side)]).reshape(2 * side, *net.shape)
    outs = np.asarray(jax.jit(net.fn)(params, (at + steps).reshape(-1, *net.shape))).reshape(points, 2, side, -1)
    return np.linalg.norm((outs[:, 0] - outs[:, 1]) / (2 * step), 2, (1, 2)).max()


def test_linear_circular_networks_are_exact(monkeypatch):
    """Without activations the semidefinite bound is the norm of the whole, not a product."""
    monkeypatch.setattr(signals, "_upper", loose)
    found = collections.Counter()
    for seed in range(100, 260):
        net = random_networks.generate(seed)
        linear = not any(name == "act" for name, _, _ in net.ops)
        circular = all(options["padding"] == "CIRCULAR" for name, _, options in net.ops if name == "conv")
        # Two strides need two stages.
        plain = sum(max(o.get("strides", o.get("window", [1]))) > 1 for _, _, o in net.ops) < 2
        if linear and circular and plain:
            norm = net.steepest(np.random.default_rng(seed))
            found[bool(norm * (1 - 1e-12) <= bounds(net, "sdp") <= norm * (1 + 1e-6))] += 1
    forget()
    assert not found[False] and found[True] > 5, found


def test_linear_circular_shortcuts_are_exact(monkeypatch):
    monkeypatch.setattr(signals, "_upper", loose)
    wrong, strided = [], 0
    for seed in range(200 if THOROUGH else 20):
        net = random_networks.generate_shortcuts(seed, linear=True)
        norm, bound = net.steepest(np.random.default_rng(seed)), bounds(net, "sdp")
        strided += any(max(options.get("strides", [1])) > 1 for *_, options in net.ops)
        if not norm * (1 - 1e-12) <= bound <= norm * (1 + 1e-6):
            wrong.append(f"seed {seed}: {norm} is the norm, bound {bound}\n{net}")
    forget()
    assert not wrong and strided > 5, "\n\n".join(wrong)


def test_a_shortcut_in_any_layout_and_spelling():
    """Other layouts, channels set in place, lines picked by their numbers, and a batch give the bound of the plain one."""
    rng = np.random.default_rng(0)
    shapes = ((3, 3, 2, 4), (3, 3, 4, 4), (4, 3))
    params = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def net(params, x, shortcut, layout):
        conv = lambda x, kernel, stride: jax.lax.conv_general_dilated(
            x, kernel, (stride, 1), [(1, 1), (1, 1)], dimension_numbers=(layout, "HWIO", layout)
        )
        x = jax.nn.relu(conv(jax.nn.relu(conv(x, params[0], 2)), params[1], 1) + shortcut(x))
        return x.mean((layout.index("H"), layout.index("W"))) @ params[2]

    pad = lambda x, axis: jnp.pad(x, [(1, 1) if n == axis else (0, 0) for n in range(4)])
    rows = jnp.arange(0, 6, 2)
    spellings = {
        "plain": ((1, 6, 5, 2), "NHWC", lambda x: pad(x[:, ::2], 3)),
        "torch": ((1, 2, 6, 5), "NCHW", lambda x: pad(x[:, :, ::2], 1)),
        "turned": ((1, 5, 6, 2), "NWHC", lambda x: pad(x[:, :, ::2], 3)),
        "set": ((2, 6, 5, 2), "NHWC", lambda x: jnp.zeros((2, 3, 5, 4)).at[..., 1:3].set(x[:, rows])),
        "padded first": ((1, 6, 5, 2), "NHWC", lambda x: pad(x, 3)[:, ::2]),
        "reshaped": ((1, 6, 5, 2), "NHWC", lambda x: pad(x.reshape(1, 3, 2, 5, 2)[:, :, 0], 3)),
    }
    found = {}
    for name, (shape, layout, shortcut) in spellings.items():
        fn = lambda params, x, shortcut=shortcut, layout=layout: net(params, x, shortcut, layout)
        found[name] = float(oj.lipschitz_bound(fn, params, jax.ShapeDtypeStruct(shape, jnp.float32)))
    assert max(found.values()) <= min(found.values()) * (1 + 1e-5), found
    fn = lambda params, x: net(params, x, *spellings["plain"][:0:-1])
    assert found["plain"] < 0.9 * oj.lipschitz_bound(fn, params, jnp.ones((1, 6, 5, 2)), method="product")


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_concatenated_layers(stride):
    """Two circular layers side by side, then one of both: without activations exact, with them no less."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((3, 3, 2, 3), (3, 3, 2, 2), (1, 1, 5, 2))
    params = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]

    def net(params, x, act=lambda x: x):
        conv = lambda x, kernel, strides: jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        wrapped = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        both = jnp.concatenate([conv(wrapped, params[0], 1), conv(wrapped, params[1], 1)], -1)
        return conv(act(both), params[2], stride)

    x = jnp.ones((1, 6, 6, 2))
    matrix = np.asarray(jax.jacobian(net, argnums=1)(params, x), np.float64).reshape(-1, x.size)
    norm = np.linalg.norm(matrix, 2)
    linear = oj.lipschitz_bound(net, params, x)
    assert norm * (1 - 1e-6) <= linear <= norm * (1 + 1e-4)
    bent = oj.lipschitz_bound(lambda params, x: net(params, x, jax.nn.relu), params, x)
    product = oj.lipschitz_bound(lambda params, x: net(params, x, jax.nn.relu), params, x, method="product")
    assert norm * (1 - 1e-6) <= bent <= product


def chain(kernels, shape, slopes=None):
    """The certificate of a chain of zero-padded layers and ReLUs by its recursion, in dense float64 NumPy.

    M_0 = I; A = K M^-1 Kᴴ; M' = (2 / s) I - A / s^2 where s is the largest eigenvalue of A over all frequencies.
    """
    grid = [n + 1 for n in shape]
    frequencies = [2 * np.pi * np.asarray(k) / grid for k in np.ndindex(*grid)]
    inverse = [np.eye(kernels[0].shape[-2])] * len(frequencies)
    for n, kernel in enumerate(kernels):
        matrices = []
        for frequency, before in zip(frequencies, inverse):
            taps = np.ndindex(*kernel.shape[:-2])
            symbol = sum(np.exp(1j * np.dot(frequency, tap)) * kernel[tap].astype(np.float64).T for tap in taps)
            matrices.append(symbol @ before @ symbol.conj().T)
        top = max(np.linalg.eigvalsh(matrix)[-1] for matrix in matrices)
        if n == len(kernels) - 1:
            return math.sqrt(top)
        inverse = [np.linalg.inv(2 / top * np.eye(len(matrix)) - matrix / top**2) for matrix in matrices]


@pytest.mark.parametrize("layers, shape", [(2, (5, 5)), (3, (5, 5)), (5, (4, 4)), (8, (7,))])
def test_chains_are_as_good_as_their_recursion(layers, shape):
    """The multipliers that are searched for are at least as good as those of the closed form, within 1 %."""
    rng = np.random.default_rng(layers)
    kernels = [rng.standard_normal((*[3] * len(shape), 3, 3)).astype(np.float32) / 4 for _ in range(layers)]
    letters = "DHW"[3 - len(shape) :]

    def net(kernels, x):
        for n, kernel in enumerate(kernels):
            numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
            x = jax.lax.conv_general_dilated(x, kernel, [1] * len(shape), "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x) if n < layers - 1 else x
        return x

    x = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    assert oj.lipschitz_bound(net, kernels, x) <= 1.01 * chain(kernels, shape)


@pytest.fixture
def one_multiplier(monkeypatch):
    """One for each diagonal, as where parameters are traced."""
    monkeypatch.setattr(stages, "improved", lambda legs, gain: gain)


@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_layer_is_lipsdp(seed, one_multiplier):
    """With one multiplier for the layer: the least bound that a dense matrix and a search over that number give."""
    rng, shape = np.random.default_rng(seed), (5, 4)
    kernels = [rng.standard_normal((3, 3, 2, 3)), rng.standard_normal((3, 3, 3, 2))]
    first, last = (oracle.dense_matrix(kernel, shape) for kernel in kernels)

    def bound(log):
        weight = np.exp(log)
        # the change u of the input, and that of the hidden layer, d with 2 weight d (first u - d) >= 0
        q = np.block([[np.eye(first.shape[1]), -weight * first.T], [-weight * first, 2 * weight * np.eye(len(first))]])
        out = np.hstack([np.zeros((len(last), first.shape[1])), last])
        return np.linalg.norm(np.linalg.solve(np.linalg.cholesky(q), out.T), 2)

    size = np.log(np.linalg.norm(first, 2) ** 2)
    least = scipy.optimize.minimize_scalar(bound, bounds=(-7 - size, 0.693 - size), method="bounded").fun

    def net(kernels, x):
        for n, kernel in enumerate(kernels):
            x = jnp.pad(jax.nn.relu(x) if n else x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return x

    kernels = [jnp.asarray(kernel, jnp.float32) for kernel in kernels]
    found = oj.lipschitz_bound(net, kernels, jax.ShapeDtypeStruct((1, *shape, 2), jnp.float32))
    assert least * (1 - 1e-5) <= found <= 1.003 * least


@pytest.mark.parametrize("seed", range(4))
def test_two_hidden_layers_are_lipsdp(seed):
    """With a multiplier for every neuron, by a solver of semidefinite programs: equal within 3 %, and never below.

    A mean over all shifts of a circular network's multipliers is as good: one for each channel is enough.
    """
    cvxpy = pytest.importorskip("cvxpy")
    rng, shape = np.random.default_rng(seed), (5,)
    kernels = [rng.standard_normal((3, i, o)).astype(np.float32) for i, o in ((2, 3), (3, 3), (3, 2))]
    layers = [oracle.dense_matrix(kernel, shape) for kernel in kernels]
    sides = [layers[0].shape[1], len(layers[0]), len(layers[1])]
    x, *hidden = np.split(np.eye(sum(sides)), np.cumsum(sides)[:-1])
    square, weights = cvxpy.Variable(), [cvxpy.Variable(side, nonneg=True) for side in sides[1:]]
    q = square * (x.T @ x) - (layers[2] @ hidden[1]).T @ (layers[2] @ hidden[1])
    for d, z, weight in zip(hidden, (layers[0] @ x, layers[1] @ hidden[0]), weights, strict=True):
        one = d.T @ cvxpy.diag(weight) @ (d - z)
        q = q + one + one.T
    cvxpy.Problem(cvxpy.Minimize(square), [q >> 0]).solve(solver="CLARABEL")

    def net(kernels, x):
        for n, kernel in enumerate(kernels):
            x = jnp.pad(jax.nn.relu(x) if n else x, ((0, 0), (1, 1), (0, 0)), mode="wrap")
            x = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return x

    least = math.sqrt(square.value)
    found = oj.lipschitz_bound(net, kernels, jax.ShapeDtypeStruct((1, *shape, 2), jnp.float32))
    assert least * (1 - 1e-5) <= found <= 1.03 * least


@pytest.mark.parametrize("sampled", [False, True])
def test_joint_multipliers_pay_and_never_hurt(sampled, monkeypatch):
    """Of a chain of eight layers: far less than one multiplier for each; and never more, whatever is proposed."""
    if sampled:  # few of the frequencies: the certificate looks at all
        monkeypatch.setattr(joint, "_OPERATIONS", 5e4)
    rng = np.random.default_rng(1)
    kernels = [rng.standard_normal((3, 3, 3, 3)).astype(np.float32) / 4 for _ in range(8)]

    def net(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(x)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x

    found = lambda: float(oj.lipschitz_bound(net, kernels, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)))
    together = found()
    wild = lambda own: 1e3 * np.exp(rng.standard_normal(own.size))
    proposed = lambda run, multipliers, tries: [joint._Found(wild(own), wild(own)) for own in multipliers]
    monkeypatch.setattr(joint, "_optimised", proposed)
    proposed_bound = found()
    monkeypatch.setattr(stages, "improved", lambda legs, gain: gain)
    alone = found()
    assert together < 0.8 * alone and proposed_bound <= alone


@pytest.mark.slow
def test_traced_bounds_hold_too(x64, one_multiplier):
    """Under jit the certificate is computed in the network's precision, here double; its derivative is right."""
    net = random_networks.Network((5, 2))
    rng = np.random.default_rng(0)
    for n, channels in enumerate((3, 2)):
        net.params.append(rng.standard_normal((3, net.shapes[-1][-1], channels)))
        options = dict(padding="SAME", strides=[1], kernel_dilation=[1], feature_group_count=1, kernel=n)
        net.add(("conv", (len(net.ops),), options), (5, channels))
        net.add(("act", (len(net.ops),), {"name": "relu"}), (5, channels))
    net.add(("sum", (len(net.ops), 0), {}), (5, 2))
    bound = jax.jit(lambda params: oj.lipschitz_bound(net.fn, params, jnp.zeros((1, 5, 2))))
    value, gradient = jax.value_and_grad(bound)(net.params)
    known = oj.lipschitz_bound(net.fn, net.params, jnp.zeros((1, 5, 2)))
    assert abs(value - known) <= 1e-9 * known  # the allowances for rounding are not the same
    direction = [rng.standard_normal(param.shape) for param in net.params]
    moved = lambda t: bound([param + t * d for param, d in zip(net.params, direction)])
    slope = sum(np.sum(g * d) for g, d in zip(gradient, direction))
    # The multipliers are found anew for every kernel, near a minimum: so their change hardly matters.
    assert np.isclose((moved(1e-4) - moved(-1e-4)) / 2e-4, slope, rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("generate, cases", [(random_networks.generate, 4), (random_networks.generate_shortcuts, 2)])
def test_single_precision_certificates_hold(generate, cases, one_multiplier):
    for seed in range(100 if THOROUGH else cases):
        net = generate(seed)
        params, x = [jnp.asarray(param) for param in net.params], jax.ShapeDtypeStruct((1, *net.shape), jnp.float32)
        bound = float(jax.jit(lambda params, x=x, net=net: oj.lipschitz_bound(net.fn, params, x))(params))
        known = float(oj.lipschitz_bound(net.fn, params, x))
        found = net.steepest(np.random.default_rng(seed))
        assert found * (1 - 1e-6) <= bound <= 1.02 * known, (seed, found, bound, known)
        forget()


def cancelling(rng):
    """A network in which large numbers cancel: a function, its parameters, its input, and its true constant."""
    size, kind = 10.0 ** rng.uniform(0, 5), rng.choice(["convolutions", "matrices", "one behind the other"])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    if kind == "convolutions":
        first = np.float32(size) * normal(3, 3, 2, 2)
        params = [first, first + np.float32(0.01) * normal(3, 3, 2, 2)]
        wrapped = lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        conv = lambda x, k: jax.lax.conv_general_dilated(
            wrapped(x), k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        fn, x = lambda p, x: conv(x, p[0]) - conv(x, p[1]), jax.ShapeDtypeStruct((1, 4, 5, 2), jnp.float32)
        matrix = oracle.dense_matrix(np.subtract(*params, dtype=np.float64), (4, 5), padding="CIRCULAR")
    elif kind == "matrices":
        params = [np.float32(size) * normal(6, 4)]
        params += [params[0] + np.float32(0.01) * normal(6, 4)]
        fn, matrix = lambda p, x: x @ p[0] - x @ p[1], np.subtract(*params, dtype=np.float64)
    else:  # the columns of the second are nearly orthogonal to the rows of the first
        first = np.float32(size) * normal(6, 8)
        nearly = np.linalg.svd(first.astype(np.float64))[2][6:].T + 1e-4 * rng.uniform() * rng.standard_normal((8, 2))
        params = [first, nearly.astype(np.float32)]
        fn, matrix = lambda p, x: (x @ p[0]) @ p[1], np.matmul(*params, dtype=np.float64)
    if rng.uniform() < 0.5:
        return fn, params, x, np.linalg.norm(matrix, 2)
    return lambda p, x: jax.nn.leaky_relu(fn(p, x), 0.9), params, x, 0.9 * np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("seed", range(300 if THOROUGH else 12))
def test_what_cancels_is_allowed_for(seed):
    """In single precision under jit, and in double precision: rounding grows with the terms, not with their sum."""
    fn, params, x, true = cancelling(np.random.default_rng(seed))
    traced = float(jax.jit(oj.lipschitz_bound, static_argnums=0)(fn, params, x))
    known, product = (float(oj.lipschitz_bound(fn, params, x, method=method)) for method in ("sdp", "product"))
    assert true <= known <= product and true <= traced <= product * (1 + 1e-5)
    if product < 1e3 * true:
        assert known <= 1.12 * true  # the slopes of 0.9 and 1 are all that is between them
    forget()
