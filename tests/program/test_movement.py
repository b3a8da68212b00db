"""Maps of moved numbers against what jax does to the numbers themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import opnorm_jax as oj

pytestmark = pytest.mark.quick

MOVES = {
    "edge": lambda x: jnp.pad(x, ((1, 2), (3, 0)), mode="edge"),
    "reflect": lambda x: jnp.pad(x, ((1, 2), (3, 0)), mode="reflect"),
    "symmetric": lambda x: jnp.pad(x, ((1, 2), (3, 0)), mode="symmetric"),
    "wrap": lambda x: jnp.pad(x, ((7, 2), (3, 0)), mode="wrap"),
    "interior": lambda x: lax.pad(x, 5.0, ((1, -1, 1), (0, 2, 0))),
    "tile": lambda x: jnp.tile(x, (2, 3)),
    "repeat": lambda x: jnp.repeat(x, 2, 1),
    "take": lambda x: x[jnp.array([0, 1, 1, 5])],
    "take pairs": lambda x: x[jnp.array([1, 2, 2]), jnp.array([0, 3, 3])],
    "set": lambda x: jnp.ones((9, 5)).at[2:8, 1:].set(x),
    "set twice": lambda x: x.at[jnp.array([0, 0])].set(x[:2]),
    "add": lambda x: jnp.ones((9, 5)).at[2:8, 1:].add(x),
    "nearest resize": lambda x: jax.image.resize(x, (12, 8), "nearest"),
    "roll": lambda x: jnp.roll(x, 2, 0),
    "space to depth": lambda x: x.reshape(3, 2, 2, 2).transpose(0, 2, 1, 3).reshape(6, 4),
    "concatenate": lambda x: jnp.concatenate([jnp.zeros((2, 4)), x[::-1], x[1:3]], 0),
    "stack": lambda x: jnp.stack([x, x], 1).reshape(12, 4),
    "flat": lambda x: x.reshape(-1)[3:20].reshape(17, 1),
    "padded, then flat": lambda x: jnp.pad(x, 1).reshape(-1),
    "every fifth": lambda x: x.ravel()[::5],
    "mask": lambda x: jnp.where(jnp.arange(24).reshape(6, 4) % 3 == 0, x, 0),
    "lengths of 1": lambda x: x[None, :, None, :][0, 2:3, 0, :][0],
    "dynamic slice": lambda x: lax.dynamic_slice(x, (5, 1), (2, 2)),
    "dynamic update": lambda x: lax.dynamic_update_slice(jnp.zeros((8, 8)), x, (1, 2)),
    "split": lambda x: jnp.split(x, 2, 0)[1],
    "reversed by vmap": jax.vmap(lambda row: row[::-1]),
    "one element, broadcast": lambda x: jnp.broadcast_to(x[2, 3], (3,)),
    "transposed, beside itself": lambda x: jnp.concatenate([x.T, x.reshape(4, 6)], 1),
    "a permutation": lambda x: x.ravel()[np.random.default_rng(0).permutation(24)],
}


@pytest.mark.parametrize("name", MOVES)
def test_the_norm_is_the_root_of_the_most_copies(name):
    x = jnp.arange(1.0, 25.0).reshape(6, 4)
    with jax.numpy_dtype_promotion("standard"):
        matrix = np.asarray(jax.jacfwd(lambda x: MOVES[name](x).ravel())(x)).reshape(-1, 24)
        found = float(oj.lipschitz_bound(lambda _, x: MOVES[name](x), None, x))
    truth = np.sqrt(matrix.sum(0).max())
    assert set(np.unique(matrix)) <= {0.0, 1.0} and (matrix.sum(1) <= 1).all()
    assert truth * (1 - 1e-6) <= found <= truth * (1 + 1e-6)


def test_large_images_are_followed_by_axis():
    """No array of the image's size is made: this one would not fit."""
    fn = lambda _, x: jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="wrap")[:, 1:, ::2].transpose(0, 3, 1, 2)
    bound = oj.lipschitz_bound(fn, None, jax.ShapeDtypeStruct((1024, 2048, 2048, 64), jnp.float32))
    assert np.isclose(bound, 2)
