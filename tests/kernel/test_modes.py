"""The library under the modes that others run it in: checked for tracer leaks, optimised Python, several processes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import opnorm_jax as oj

CONV = oj.Conv((6, 6), padding="SAME")

FUNCTIONS = {
    "singular_values": lambda k: oj.singular_values(k, (6, 6)),
    "operator_norm": lambda k: oj.operator_norm(k, CONV),
    "operator_norm_bounds": lambda k: oj.operator_norm_bounds(k, CONV),
    "operator_norm_upper_bound": oj.operator_norm_upper_bound,
    "clip": lambda k: oj.clip_operator_norm(k, CONV, 1.0),
    "rescale": lambda k: oj.rescale_operator_norm(k, CONV, 1.0),
    "project": lambda k: oj.project_operator_norm(k, CONV, 1.0, max_iterations=10),
    "constrain": lambda k: oj.constrain({"a": k, "b": k}, 1.0, {"a": CONV, "b": oj.Conv((12, 12))}),
    "lipschitz_bound": lambda k: oj.lipschitz_bound(network, {"k": k}, jnp.ones((1, 6, 6, 3))),
}


def network(params, x):
    return jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tracer_leaks(name):
    """Under jit, vmap and, where there is one, the derivative: leaks are of tracing, so nothing is compiled."""
    function, kernel = FUNCTIONS[name], jnp.ones((3, 3, 3, 5))
    jax.clear_caches()  # what was traced before is not checked
    with jax.checking_leaks():
        jax.eval_shape(jax.jit(function), kernel)
        if name not in ("project", "lipschitz_bound"):
            jax.eval_shape(jax.vmap(function), jnp.stack([kernel, 2 * kernel]))
            total = lambda k: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(k)))
            jax.eval_shape(jax.grad(total), kernel)


OPTIMISED = """
import sys
import jax, jax.numpy as jnp, opnorm_jax as oj

def need(condition):
    if not condition:
        sys.exit("failed")

try:
    assert False
except AssertionError:
    sys.exit("asserts are on")
kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 5))
conv = oj.Conv((6, 6), padding="SAME")
for function in (oj.rescale_operator_norm, oj.project_operator_norm):
    need(oj.operator_norm_bounds(function(kernel, conv, 1.0), conv).upper <= 1 + 1e-5)
for call in (
    lambda: oj.Conv((0, 6), padding="CIRCULAR"),
    lambda: oj.singular_values(kernel, conv),
    lambda: oj.operator_norm(kernel[..., 0], conv),
    lambda: oj.clip_operator_norm(kernel, conv, -1.0),
    lambda: oj.constrain({"k": kernel}, 1.0, {"other": conv}),
):
    try:
        call()
    except (ValueError, TypeError) as error:
        need("expected" in str(error))
    else:
        sys.exit("no error")
print("done")
"""


@pytest.mark.slow
def test_optimised_mode():
    """Nothing rests on an assert: errors and bounds are the same under ``python -O``."""
    done = subprocess.run([sys.executable, "-O", "-c", OPTIMISED], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "done", done.stdout + done.stderr[-2000:]


def test_import_is_quiet_and_light():
    """No warning, no device started, nothing but jax, jaxtyping and optax behind it."""
    code = """
import sys, opnorm_jax
import jax._src.xla_bridge as bridge
heavy = [name for name in ("flax", "matplotlib", "rich", "scipy.stats", "orbax", "torch") if name in sys.modules]
print("done", heavy, bool(bridge._backends))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "done [] False" and not done.stderr, done.stdout + done.stderr[-2000:]
