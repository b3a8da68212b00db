"""What a machine without an accelerator can show of them: everything lowers for CUDA, ROCm and TPU, and the allowance for
rounding covers a factorisation as rough as theirs are documented to be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import export, lax

import opnorm_jax as oj
from opnorm_jax._blocks import factor

CIRCULAR = oj.Conv((8, 8), padding="CIRCULAR")
SAME = oj.Conv((8, 8))
PRODUCTS = oj.Execution(factorization="products")
KERNEL = jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)
PARAMS = {"kernel": KERNEL, "head": jax.ShapeDtypeStruct((8, 3), jnp.float32)}
CONVS = {"kernel": SAME, "head": oj.Conv(())}


def net(params, x):
    x = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(x).mean((1, 2)) @ params["head"]


def step(tx, params, gradient):
    updates, _ = tx.update(gradient, tx.init(params), params)
    return optax.apply_updates(params, updates)


def loss(params):
    return (oj.normalize(net, 0.5, dense=True)(params, jnp.ones((2, 8, 8, 8))) ** 2).sum()


# name: (function, its operands)
FUNCTIONS = {
    "singular_values": (lambda k: oj.singular_values(k, CIRCULAR), KERNEL),
    "operator_norm, circular": (lambda k: oj.operator_norm(k, CIRCULAR), KERNEL),
    "operator_norm, SAME": (lambda k: oj.operator_norm(k, SAME), KERNEL),
    "operator_norm_bounds": (lambda k: oj.operator_norm_bounds(k, SAME), KERNEL),
    "operator_norm_bounds, tight": (lambda k: oj.operator_norm_bounds(k, SAME, tight=True), KERNEL),
    "operator_norm_upper_bound": (oj.operator_norm_upper_bound, KERNEL),
    "clip_operator_norm": (lambda k: oj.clip_operator_norm(k, SAME, 1.0), KERNEL),
    "rescale_operator_norm": (lambda k: oj.rescale_operator_norm(k, SAME, 1.0), KERNEL),
    "project_operator_norm": (lambda k: oj.project_operator_norm(k, SAME, 1.0), KERNEL),
    "project_operator_norm_info": (lambda k: oj.project_operator_norm_info(k, SAME, 1.0), KERNEL),
    "clip_singular_values": (lambda k: oj.clip_singular_values(k, CIRCULAR, 0.5, 1.0), KERNEL),
    "steepest_direction": (lambda k: oj.steepest_direction(k, SAME, exact=True), KERNEL),
    "log_abs_det": (lambda k: oj.log_abs_det(k, CIRCULAR), KERNEL),
    "solve": (lambda k, y: oj.solve(k, CIRCULAR, y), KERNEL, jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)),
    "products": (lambda k: oj.project_operator_norm(k, SAME, 1.0, execution=PRODUCTS), KERNEL),
    "gradient of singular_values": (jax.grad(lambda k: oj.singular_values(k, CIRCULAR).sum()), KERNEL),
    "gradient of operator_norm": (jax.grad(lambda k: oj.operator_norm(k, SAME)), KERNEL),
    "gradient of clip_operator_norm": (jax.grad(lambda k: oj.clip_operator_norm(k, SAME, 1.0).sum()), KERNEL),
    "gradient of log_abs_det": (jax.grad(lambda k: oj.log_abs_det(k, CIRCULAR)), KERNEL),
    "gradient of normalize": (jax.grad(loss), PARAMS),
    "lipschitz_bound": (lambda p: oj.lipschitz_bound(net, p, jnp.ones((1, 8, 8, 8))), PARAMS),
    "constrain_operator_norm": (functools.partial(step, oj.constrain_operator_norm(1.0, CONVS)), PARAMS, PARAMS),
    "constrain": (lambda p: oj.constrain(p, 1.0, CONVS), PARAMS),
    "certified_radius": (
        lambda logits, labels: oj.certified_radius(logits, labels, 2.0),
        jax.ShapeDtypeStruct((5, 3), jnp.float32),
        jax.ShapeDtypeStruct((5,), jnp.int32),
    ),
    "conv_muon": (functools.partial(step, oj.conv_muon(0.1, CONVS)), PARAMS, PARAMS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_lowers_for_accelerators(name):
    function, *operands = FUNCTIONS[name]
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction
        exported = export.export(jax.jit(function), platforms=["cuda", "rocm", "tpu"])(*operands)
    assert exported.platforms == ("cuda", "rocm", "tpu")
    assert "lapack" not in exported.mlir_module()  # no call of the CPU's
    read = export.deserialize(exported.serialize())
    assert (read.in_tree, read.in_avals, read.out_tree, read.out_avals, read.platforms) == (
        exported.in_tree,
        exported.in_avals,
        exported.out_tree,
        exported.out_avals,
        exported.platforms,
    )


@pytest.mark.parametrize("name", ["clip_operator_norm", "project_operator_norm", "constrain_operator_norm"])
def test_no_complex_cholesky_factorisation_on_a_tpu(name):
    """libtpu ends the process where it compiles one for several chips."""
    function, *operands = FUNCTIONS[name]
    module = export.export(jax.jit(function), platforms=["tpu"])(*operands).mlir_module()
    factorisations = [line for line in module.splitlines() if "stablehlo.cholesky" in line]
    assert factorisations and not any("complex" in line for line in factorisations)


def test_definite_as_real_matrices():
    rng = np.random.default_rng(0)
    half = rng.standard_normal((200, 6, 6)) + 1j * rng.standard_normal((200, 6, 6))
    matrices = (half @ half.conj().swapaxes(1, 2)).astype(np.complex64)
    matrices -= rng.choice([0, 1.0, 3.0], (200, 1, 1)).astype(np.float32) * np.eye(6, dtype=np.complex64)
    values = np.linalg.eigvalsh(matrices)[:, 0]
    clear = abs(values) > 1e-4
    for decide in (factor._is_definite, factor._is_definite_as_real):
        assert np.array_equal(np.asarray(decide(jnp.asarray(matrices)))[clear], values[clear] > 0)
    assert 20 < np.sum(values[clear] > 0) < 180
    assert not factor._is_definite_as_real(jnp.full((1, 2, 2), jnp.nan, jnp.complex64)).any()


def test_every_function_that_can_be_traced_is_among_them():
    reads_programs_or_prints = {"find_convs", "plot_spectra", "spectral_report", "scale_by_conv_muon"}
    named = {word for name in FUNCTIONS for word in name.replace(",", "").split()}
    functions = {name for name in oj.__all__ if name.islower() and callable(getattr(oj, name))}
    assert functions - reads_programs_or_prints <= named


@pytest.mark.parametrize("channels", [4, 32, 64])
def test_certificates_hold_though_eigenvalues_are_rough(channels, monkeypatch):
    """TPU's eigh of sides up to 256 stops at 1e-6 of the Frobenius norm. Every eigenvalue is made too small by that."""
    exact = factor.batched_eigh

    def rough(matrix):
        values, vectors = exact(matrix)
        size = jnp.sqrt(jnp.sum(matrix.real**2 + matrix.imag**2, axis=(-1, -2)))
        return values - 1e-6 * size[..., None], vectors

    monkeypatch.setattr(factor, "batched_eigh", rough)
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **branches: default(*args))
    jax.clear_caches()
    try:
        shape = (3, 3, channels, channels)
        # orthogonal at every frequency: the Frobenius norm of the Gram matrix is as large as it can be
        flat = np.zeros(shape)
        flat[1, 1] = np.linalg.qr(np.random.default_rng(0).standard_normal((channels, channels)))[0]
        for kernel in (flat, np.random.default_rng(1).standard_normal(shape)):
            kernel = jnp.asarray(kernel, jnp.float32)
            truth = oracle.paper_singular_values(np.asarray(kernel, np.float64), (4, 4)).max()
            conv = oj.Conv((4, 4), padding="CIRCULAR")
            assert oj.operator_norm_bounds(kernel, conv).upper >= truth
            rescaled = oj.rescale_operator_norm(kernel, conv, 0.5)
            assert oracle.paper_singular_values(np.asarray(rescaled, np.float64), (4, 4)).max() <= 0.5 * (1 + 1e-6)
    finally:
        jax.clear_caches()
