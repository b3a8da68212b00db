"""optax's own common tests of contributed optimizers, with conv_muon in the place of ``optax.contrib.muon``."""

import jax
import jax.numpy as jnp
import optax
import pytest

import opnorm_jax as oj

common = pytest.importorskip("optax.contrib._common_test")
NAMES = [
    name
    for name in dir(common.ContribTest)
    if "'muon'" in getattr(getattr(common.ContribTest, name), "__x_params_repr__", "")
]
CONVS = {2: oj.Conv(()), 3: oj.Conv((8,))}  # of the tests' matrices, and of their array of three axes


def conv_muon(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Beside the parameters it moves a kernel of its own: conv_muon wants one at least, and some tests have vectors."""
    kernel = jnp.ones((3, 2, 2))

    def inner(params):
        convs = jax.tree.map(lambda leaf: CONVS.get(jnp.ndim(leaf)), params)
        return optax.with_extra_args_support(oj.conv_muon(learning_rate, (convs, oj.Conv((8,)))))

    def init(params):
        return inner(params).init((params, kernel))

    def update(updates, state, params=None, **extra_args):
        (out, _), state = inner(updates).update((updates, kernel), state, (params, kernel), **extra_args)
        return out, state

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "optimizers" in n else ()) for n in NAMES])
def test_as_optax_tests_its_own(name, monkeypatch):
    monkeypatch.setattr(optax.contrib, "muon", conv_muon)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        common.ContribTest(name).debug()


def test_all_of_them_are_there():
    assert len(NAMES) >= 12
