"""The same numbers by every method and on every number of devices, each of which does its share."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import opnorm_jax as oj

K = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 5, 7)), jnp.float32)


@pytest.fixture(params=["cpu", "accelerator"])
def route(request, monkeypatch):
    """The route taken on a CPU, or that of other platforms forced on a CPU."""
    if request.param == "accelerator":
        jax.clear_caches()  # of functions traced for the CPU's route
        monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **branches: default(*args))
    yield request.param
    if request.param == "accelerator":
        jax.clear_caches()


def test_routes_agree_with_the_truth(route):
    truth = np.sort(oracle.dense_singular_values(K, (6, 6)))
    values = np.sort(np.ravel(oj.singular_values(K, (6, 6))))
    np.testing.assert_allclose(values, truth, atol=1e-5 * truth[-1] if route == "cpu" else 1e-3 * truth[-1])
    np.testing.assert_allclose(oj.operator_norm(K, (6, 6)), truth[-1], rtol=1e-5)
    zero_padded = oj.Conv((6, 6), padding="SAME")
    lower, upper = oj.operator_norm_bounds(K, zero_padded)
    assert lower <= oracle.dense_singular_values(K, (6, 6), padding="SAME")[0] <= upper
    assert truth[-1] <= oj.operator_norm_upper_bound(K) * (1 + 1e-6)
    assert np.isfinite(jax.grad(lambda k: oj.operator_norm(k, (6, 6)))(K)).all()


def test_the_route_is_the_one_forced(route):
    program = str(jax.make_jaxpr(lambda k: oj.singular_values(k, (6, 6)))(K))
    assert ("svd" in program) == (route == "cpu")


def test_an_execution_is_static_and_hashable():
    execution = oj.Execution(factorization="decompose")
    assert execution == oj.Execution(factorization="decompose") != oj.Execution() and hash(execution)
    norm = jax.jit(lambda k, execution: oj.operator_norm(k, (6, 6), execution=execution), static_argnums=1)
    np.testing.assert_allclose(norm(K, execution), norm(K, oj.Execution(factorization="products")), rtol=1e-5)


EIGHT_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    import opnorm_jax as oj
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    k = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 6, 5)), jnp.float32)
    same, whole = oj.Conv((9, 10), padding="SAME"), (9, 10)
    functions = {
        "singular_values": lambda k, mesh: oj.singular_values(k, whole, execution=oj.Execution(mesh=mesh)),
        "in chunks": lambda k, mesh: oj.singular_values(k, whole, execution=oj.Execution(mesh=mesh, chunk_bytes=1000)),
        "bounds": lambda k, mesh: oj.operator_norm_bounds(k, same, execution=oj.Execution(mesh=mesh)),
        "upper bound": lambda k, mesh: oj.operator_norm_upper_bound(k, execution=oj.Execution(mesh=mesh)),
        "clip": lambda k, mesh: oj.clip_operator_norm(k, same, 1.0, execution=oj.Execution(mesh=mesh)),
        "project": lambda k, mesh: oj.project_operator_norm_info(k, same, 1.0, execution=oj.Execution(mesh=mesh))[0],
        "rescale": lambda k, mesh: oj.rescale_operator_norm(k, same, 1.0, execution=oj.Execution(mesh=mesh)),
        "gradient": lambda k, mesh: jax.grad(lambda k: oj.operator_norm(k, whole, execution=oj.Execution(mesh=mesh)))(k),
        "vmap": lambda k, mesh: jax.vmap(lambda k: oj.clip_operator_norm(k, whole, 1.0, execution=oj.Execution(mesh=mesh)))(jnp.stack([k, -k])),
    }
    for name, function in functions.items():
        for one, eight in zip(jax.tree.leaves(function(k, None)), jax.tree.leaves(jax.jit(function, static_argnums=1)(k, mesh))):
            # A projection stops at a gap of 1e-3, within which rounding errors lead its iterations elsewhere.
            np.testing.assert_allclose(one, eight, atol=2e-4 if name == "project" else 1e-5, err_msg=name)
    # Each device has its share: of 9 * 10 frequencies half (and the self-conjugate one) are computed, 46 in all.
    stacks = jax.make_jaxpr(lambda k: functions["singular_values"](k, mesh))(k)
    text = str(stacks)
    assert "c64[6,6,5]" in text and "c64[46,6,5]" not in text and "c64[48,6,5]" not in text, text
    print("equal")
"""


def run(code, *arguments, **environment):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.slow
def test_eight_devices():
    assert "equal" in run(EIGHT_DEVICES)


MESHES = """
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    import opnorm_jax as oj
    k = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 4, 2)), jnp.float32)
    same, whole = oj.Conv((6, 5), padding="SAME"), (6, 5)
    functions = {
        "singular_values": lambda k, e: oj.singular_values(k, whole, execution=e),
        "norm": lambda k, e: oj.operator_norm(k, same, execution=e),
        "bounds": lambda k, e: oj.operator_norm_bounds(k, same, execution=e),
        "upper bound": lambda k, e: oj.operator_norm_upper_bound(k, slack=0.1, execution=e),
        "clip": lambda k, e: oj.clip_operator_norm(k, same, 1.0, execution=e),
        "project": lambda k, e: oj.project_operator_norm(k, same, 1.0, execution=e),
        "rescale": lambda k, e: oj.rescale_operator_norm(k, same, 1.0, execution=e),
        "gradient": lambda k, e: jax.grad(lambda k: oj.operator_norm(k, whole, execution=e))(k),
        "gradient of SAME": lambda k, e: jax.grad(lambda k: oj.operator_norm(k, same, execution=e))(k),
        "vmap": lambda k, e: jax.vmap(lambda k: oj.clip_operator_norm(k, whole, 1.0, execution=e))(jnp.stack([k, -k])),
    }
    # A projection stops at a gap of 1e-3; the vector of a SAME layer's norm has half of the digits of its value.
    tolerances = {"project": 2e-4, "gradient of SAME": 1e-3}
    cases = 0
    for kind in ("Explicit", "Auto"):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
        for factorization in ("auto", "products"):
            with_mesh = oj.Execution(mesh=mesh, factorization=factorization)
            for name, function in functions.items():
                if factorization == "products" and name not in ("bounds", "clip", "gradient"):
                    continue
                want = jax.tree.leaves(jax.device_get(function(k, oj.Execution())))
                split_on = {"bounds": 3, "upper bound": 3}.get(name, 2)  # over outputs, or over inputs
                sharding = jax.NamedSharding(mesh, jax.P(*(None,) * split_on, "d"))
                split = jax.device_put(k, sharding)
                whole_by = {"whole": (k, with_mesh), "split": (split, with_mesh), "split, no mesh": (split, oj.Execution())}
                for how, (kernel, execution) in whole_by.items():
                    if kind == "Auto" and how != "split":
                        continue
                    if how == "whole" and name not in ("norm", "clip", "gradient"):
                        continue
                    compiled = jax.jit(function, static_argnums=1)
                    for call in (function, compiled) if name in ("singular_values", "clip") else (compiled,):
                        found = call(kernel, execution)
                        for one, two in zip(want, jax.tree.leaves(found), strict=True):
                            np.testing.assert_allclose(one, two, atol=tolerances.get(name, 1e-5), err_msg=f"{kind} {name} {how}")
                        if kind == "Explicit" and name in ("clip", "project", "rescale", "gradient") and how != "whole":
                            assert jax.typeof(found).sharding == jax.typeof(kernel).sharding, (name, jax.typeof(found))
                        cases += 1
    with jax.set_mesh(jax.make_mesh((2,), ("d",))):  # without it, jax's own gradient of a scalar fails outside jit
        gradient = functions["gradient"](jax.sharding.reshard(k, jax.P(None, None, "d")), oj.Execution())
        np.testing.assert_allclose(gradient, functions["gradient"](np.asarray(k), oj.Execution()), atol=1e-5)
    print("equal", cases)
"""


@pytest.mark.slow
def test_meshes_of_either_axis_type_and_kernels_divided_along_any_axis():
    assert int(run(MESHES).split()[-1]) > 50


def test_an_empty_stack():
    """Of no kernels, no results: under vmap, for every function."""
    functions = (
        lambda k: oj.singular_values(k, (6, 6)),
        lambda k: oj.operator_norm(k, (6, 6)),
        lambda k: oj.operator_norm_bounds(k, oj.Conv((6, 6))),
        lambda k: oj.clip_operator_norm(k, (6, 6), 1.0),
        lambda k: oj.rescale_operator_norm(k, (16, 16), 1.0),
        jax.grad(lambda k: oj.operator_norm(k, (6, 6))),
    )
    for function in functions:
        for leaf in jax.tree.leaves(jax.jit(jax.vmap(function))(jnp.zeros((0, *K.shape)))):
            assert leaf.shape[0] == 0


TWO_PROCESSES = """
    import sys, jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    import opnorm_jax as oj
    assert jax.device_count() == 2 and jax.local_device_count() == 1
    mesh = jax.make_mesh((2,), ("frequency",), axis_types=(jax.sharding.AxisType.Auto,))
    k = np.random.default_rng(0).standard_normal((3, 3, 6, 5)).astype(np.float32)
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    kernel = jax.make_array_from_callback(k.shape, everywhere, lambda index: k[index])
    clip = jax.jit(lambda k: oj.clip_operator_norm(k, (9, 10), 1.0, execution=oj.Execution(mesh=mesh)), out_shardings=everywhere)
    both = np.asarray(clip(kernel).addressable_data(0))
    np.testing.assert_allclose(both, oj.clip_operator_norm(k, (9, 10), 1.0), atol=1e-5)
    print("equal")
"""


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(2)]
    try:
        for process in processes:
            out, error = process.communicate(timeout=200)
            assert process.returncode == 0 and "equal" in out, error[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("function", [oj.clip_operator_norm, oj.rescale_operator_norm])
def test_memory_is_about_chunk_bytes(function):
    """As the compiler plans it. All blocks would take eight times as much."""
    execution = oj.Execution(chunk_bytes=2**23)
    kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
    compiled = jax.jit(lambda kernel: function(kernel, (32, 32), 1.0, execution=execution)).lower(kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * execution.chunk_bytes
