"""Many factorisations in one jitted program must not hang: each script runs alone, under a time limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import THOROUGH, count_trials

STEPS = 500 if THOROUGH else 60

TRANSFORMATION = """
import jax, jax.numpy as jnp, optax, opnorm_jax as oj
keys = jax.random.split(jax.random.key(0), 20)
params = {str(n): jax.random.normal(keys[n], (3, 3, 3 + n % 5, 3 + n)) for n in range(20)}  # 20 shapes
convs = {name: oj.Conv((5 + int(name) % 3, 6), padding="SAME") for name in params}
tx = optax.chain(optax.sgd(0.1), oj.constrain_operator_norm(1.0, convs, constraint="clip"))

@jax.jit
def step(params, state, key):
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    moves, state = tx.update(grads, state, params)
    return optax.apply_updates(params, moves), state

state = tx.init(params)
for n in range(STEPS):
    params, state = step(params, state, jax.random.key(n))
    if n % 20 == 0:
        jax.block_until_ready(params)
print("done", int(state[-1].count), all(bool(jnp.isfinite(p).all()) for p in params.values()))
"""

FREE_COMPOSITION = """
import jax, jax.numpy as jnp, opnorm_jax as oj
kernels = [jax.random.normal(jax.random.key(n), (3, 3, 4 + n, 6 + n)) for n in range(10)]

@jax.jit
def step(kernels):
    clipped = [oj.clip_operator_norm(k, (6, 6), 1.0) for k in kernels]
    norms = [oj.operator_norm(k, (6, 6)) for k in clipped]
    batch = jax.vmap(lambda k: oj.clip_operator_norm(k, (6, 6), 1.0))(jnp.stack(kernels[:1] * 3))
    return [k * 1.1 for k in clipped], jnp.stack(norms), batch

for n in range(STEPS):
    kernels, norms, _ = step(kernels)
    jax.block_until_ready(norms)
print("done", STEPS, bool(jnp.isfinite(norms).all()))
"""

THREADS = """
import threading, jax, jax.numpy as jnp, opnorm_jax as oj
kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 12))
function = jax.jit(lambda k, b: oj.clip_operator_norm(k, (6, 6), b))
want = function(kernel, 1.0)
wrong = []
def work():
    for _ in range(STEPS // 4):
        if not (function(kernel, 1.0) == want).all():
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print("done", STEPS, not wrong)
"""


SOAK = """
import resource, jax, jax.numpy as jnp, numpy as np, optax, opnorm_jax as oj, oracle
from geometries import generate
from opnorm_jax import _cache

_cache.LIMIT = 2**16  # bytes: results go, and are made again

def network(number):
    geometries = {str(n): generate(LAYERS * number + n) for n in range(LAYERS)}
    convs = {name: geometry.conv for name, geometry in geometries.items()}
    constraint = ("rescale", "clip", "project")[number % 3]
    tx = optax.chain(optax.adam(0.01), oj.constrain_operator_norm(1.0, convs, constraint=constraint, every=1 + number % 2))

    @jax.jit
    def step(params, state, key):
        moves, state = tx.update(jax.tree.map(lambda p: jax.random.normal(key, p.shape), params), state, params)
        return optax.apply_updates(params, moves), state

    rng = np.random.default_rng(number)
    params = {name: jnp.asarray(geometry.kernels(rng, 1)[1][0]) for name, geometry in geometries.items()}
    return geometries, step, params, tx.init(params), constraint != "clip" and number % 2 == 0

def train(parts):
    geometries, step, params, state, inside = parts
    key = jax.random.key(0)
    for n in range(STEPS):
        params, state = step(params, state, jax.random.fold_in(key, n))
    jax.block_until_ready(params)
    return geometries, step, params, state, inside

def resident():  # MiB now
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def norm(geometry, kernel):
    order = [geometry.conv.kernel_layout.index(c) for c in ("W", "HW", "DHW")[len(geometry.taps) - 1] + "IO"]
    return geometry.oracle(np.asarray(kernel, np.float64).transpose(order))[0]

networks = [train(network(n)) for n in range(NETWORKS)]
networks, early = list(map(train, networks)), resident()
networks = list(map(train, networks))
grown = resident() - early
norms = [norm(g[name], params[name]) for g, _, params, _, inside in networks if inside for name in g]
print("done", f"{grown:.1f} MiB grown, norms up to {max(norms)},", grown < 8 and max(norms) <= 1 + 1e-6)
"""

FORK = """
import os, warnings, jax, jax.numpy as jnp, opnorm_jax as oj
norm = jax.jit(lambda k: oj.operator_norm(k, (6, 6)))
want = norm(jnp.ones((3, 3, 5, 5)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    child = os.fork()
    if child == 0:
        os._exit(0)
_, status = os.waitpid(child, 0)
warned = any("os.fork() was called" in str(w.message) for w in caught)
others = [str(w.message) for w in caught if "fork()" not in str(w.message)]
print("done", others, status == 0 and warned and not others and bool(norm(jnp.ones((3, 3, 5, 5))) == want))
"""


def run(code, timeout=400):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])  # the tests' own modules
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout)
    assert done.stdout.startswith("done") and done.stdout.strip().endswith("True"), done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory in use from Linux's /proc")
def test_soak():
    """The same memory after thousands of steps of networks of many geometries, though the caches hold little."""
    networks, layers, steps = (10, 5, 700) if THOROUGH else (2, 2, 170)
    count_trials("constrained steps in one process", tried=3 * networks * steps)
    run(f"NETWORKS, LAYERS, STEPS = {networks}, {layers}, {steps}\n" + SOAK, timeout=1000)
    count_trials("constrained steps in one process", held=3 * networks * steps)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_fork_after_import():
    """jax's own warning, once, and both processes go on."""
    run(FORK)


@pytest.mark.parametrize("blas_threads", ["1", None], ids=["1 BLAS thread", "default BLAS threads"])
@pytest.mark.parametrize("affinity", [1, 2, None], ids=["1 core", "2 cores", "all cores"])
@pytest.mark.parametrize("script", ["TRANSFORMATION", "FREE_COMPOSITION", "THREADS"])
def test_does_not_hang(script, affinity, blas_threads):
    if not THOROUGH and (affinity, blas_threads) != (None, "1"):
        pytest.skip("only in the thorough profile")
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    if blas_threads:
        env["OPENBLAS_NUM_THREADS"] = blas_threads
    limit = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{affinity}])\n" if affinity else ""
    code = limit + f"STEPS = {STEPS}\n" + globals()[script]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=400)
    assert done.stdout.startswith("done") and done.stdout.strip().endswith("True"), done.stderr[-2000:]
