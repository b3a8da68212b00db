"""Bounds on whole networks: the product of the layers' norms, the semidefinite bound, and what was seen.

    python -m benchmarks lipschitz [--quick]

Chains and residual networks have random kernels of norm about 2 and 1.3; ResNets are as initialised, with batch
normalisation on its initial statistics. "sdp, jit" has one multiplier for each activation, chosen stage after stage.
``seen`` is the largest norm of a Jacobian at 8 random inputs, by power iteration. Seconds are wall time of one call,
with what it compiles.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import opnorm_jax as oj
from benchmarks.measure import show
from benchmarks.networks import NETWORKS, largest_jacobian


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def chain(kernels, x):
    for kernel in kernels[:-1]:
        x = jax.nn.relu(conv(x, kernel))
    return conv(x, kernels[-1])


def residual(kernels, x):
    for first, second in zip(kernels[::2], kernels[1::2]):
        x = x + conv(jax.nn.relu(conv(jax.nn.relu(x), first)), second)
    return x


def cases(quick):
    """Names, functions, parameters and inputs."""
    rng = np.random.default_rng(0)
    kernels = lambda count, norm: [
        jnp.asarray(norm * rng.standard_normal((3, 3, 3, 3)) / 9, jnp.float32) for _ in range(count)
    ]
    small = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    for layers in (2, 3, 5, 8):
        yield f"{layers} layers and ReLU, 3 channels", chain, kernels(layers, 2.0), small
    for blocks in (1, 3, 5):
        yield f"{blocks} residual block{'s' * (blocks > 1)}, 3 channels", residual, kernels(2 * blocks, 1.3), small
    for name in ("ResNet-8",) if quick else ("ResNet-8", "ResNet-32"):
        x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        model = NETWORKS[name]()
        variables = jax.jit(lambda model=model: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))()
        rest = {key: value for key, value in variables.items() if key != "params"}
        fn = lambda p, x, model=model, rest=rest: model.apply({"params": p, **rest}, x, train=False)
        yield f"{name}, 32 x 32", fn, variables["params"], x


def run(options):
    rows = []
    for name, fn, params, x in cases(options.quick):
        row = {"network": name}
        for method in ("product", "sdp"):
            began = time.perf_counter()
            row[method] = float(oj.lipschitz_bound(fn, params, x, method=method))
            row[f"{method}_seconds"] = time.perf_counter() - began
        if "ResNet" not in name:
            row["sdp, jit"] = float(jax.jit(oj.lipschitz_bound, static_argnums=0)(fn, params, x))
        points = jax.random.normal(jax.random.key(0), (8, *x.shape[1:]))
        row["seen"] = largest_jacobian(fn, params, points, 30)
        rows.append(row)
        show(row)
    return rows
