"""Bad trees: each wrong call raises, with the path, and says what was expected, what came, what to do."""

import flax.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opnorm_jax as oj

pytestmark = pytest.mark.quick

K = jnp.ones((3, 3, 2, 4))
PARAMS = {"conv": {"kernel": K, "bias": jnp.zeros(4)}}
CONVS = {"conv": {"kernel": oj.Conv((8, 8)), "bias": None}}


def update(params=PARAMS, convs=CONVS, max_norm=1.0, pass_params=True, **options):
    tx = oj.constrain_operator_norm(max_norm, convs, **options)
    return tx.update(params, tx.init(params), params if pass_params else None)


# name: (call, error, message)
TREES = {
    "params missing in update": (lambda: update(pass_params=False), ValueError, "not passing `params`"),
    "no conv at all": (lambda: update(convs={"conv": None}), ValueError, "holds no Conv at all"),
    "none that is known": (
        lambda: update(convs={"conv": oj.Unknown("it is masked")}),
        ValueError,
        r"no Conv at all.*\['conv'\] is unknown: it is masked",
    ),
    "extra key": (lambda: update(convs={**CONVS, "other": None}), ValueError, "structure of the parameters"),
    "missing key": (
        lambda: update(convs={"conv": {"kernel": oj.Conv((8, 8))}}),
        ValueError,
        r"convs to have the structure.*at params\['conv'\] the parameters have a dict with the keys \['kernel', 'bias'\]",
    ),
    "list for dict": (lambda: update(convs={"conv": [oj.Conv((8, 8)), None]}), ValueError, "same containers and keys"),
    "conv at a bias": (
        lambda: update(convs={"conv": {"kernel": None, "bias": oj.Conv((8, 8))}}),
        ValueError,
        r"params\['conv'\]\['bias'\] \(4,\): expected a kernel of 4 axes",
    ),
    "conv at a whole layer": (
        lambda: update(convs={"conv": oj.Conv((8, 8))}),
        ValueError,
        r"params\['conv'\]\['bias'\]",
    ),
    "string for a conv": (
        lambda: update(convs={"conv": {"kernel": "SAME", "bias": None}}),
        TypeError,
        r"convs\['conv'\]\['kernel'\]: expected a Conv, or None.*got 'SAME'",
    ),
    "a tuple for a conv": (
        lambda: update(convs={"conv": {"kernel": (8, 8), "bias": None}}),
        TypeError,
        r"convs\['conv'\]\['kernel'\]: expected a Conv.*got \(8, 8\). Write opnorm_jax.Conv\(\(8, 8\), padding=",
    ),
    "a list for a conv": (
        lambda: oj.constrain({"k": K}, 1.0, {"k": [8, 8]}),
        TypeError,
        r"convs\['k'\]: expected a Conv.*got \[8, 8\]",
    ),
    "an int for a conv": (lambda: oj.constrain({"k": K}, 1.0, {"k": 8}), TypeError, r"convs\['k'\]: expected a Conv"),
    "a tuple in a report": (
        lambda: oj.spectral_report({"k": K}, {"k": (8, 8)}),
        TypeError,
        r"convs\['k'\]: expected a Conv",
    ),
    "another key in a FrozenDict": (
        lambda: oj.constrain(flax.core.FrozenDict({"a": {"k": K}, "b": K}), 1.0, {"a": oj.Conv((8, 8))}),
        ValueError,
        r"at params the parameters have a FrozenDict with the keys \['a', 'b'\] and convs has a dict with the keys \['a'\]",
    ),
    "1-D conv at a 2-D kernel": (
        lambda: update(convs={"conv": {"kernel": oj.Conv((8,)), "bias": None}}),
        ValueError,
        r"params\['conv'\]\['kernel'\] \(3, 3, 2, 4\)",
    ),
    "a container at a kernel": (
        lambda: update(convs={"conv": {"kernel": {"inner": oj.Conv((8, 8))}, "bias": None}}),
        ValueError,
        r"at params\['conv'\]\['kernel'\] the parameters have",
    ),
    "integer parameters": (
        lambda: update(params={"conv": {"kernel": K.astype(int), "bias": jnp.zeros(4)}}),
        TypeError,
        r"params\['conv'\]\['kernel'\].*real floating dtype",
    ),
    "unknown constraint": (
        lambda: update(constraint="svd"),
        ValueError,
        r"constraint to be one of \('clip', 'project', 'rescale'\), got 'svd'",
    ),
    "unknown constraint in the pure form": (
        lambda: oj.constrain(PARAMS, 1.0, CONVS, constraint="none"),
        ValueError,
        "constraint to be one of.*'none'",
    ),
    "NumPy's zero every": (lambda: update(every=np.int64(0)), ValueError, "every to be at least 1, got 0"),
    "an array of zero for every": (lambda: update(every=jnp.int32(0)), ValueError, "every to be at least 1, got 0"),
    "NumPy's float every": (lambda: update(every=np.float32(0.5)), TypeError, "every to be an int, got .*0.5"),
    "NumPy's whole float every": (lambda: update(every=np.float32(2)), TypeError, "every to be an int, got .*2.0"),
    "an array of a half for every": (
        lambda: update(every=jnp.float32(0.5)),
        TypeError,
        "every to be an int, got .*0.5",
    ),
    "NumPy's bool every": (lambda: update(every=np.bool(True)), TypeError, "every to be an int"),
    "an axis of every": (lambda: update(every=jnp.ones(2, int)), TypeError, "every to be an int"),
    "NumPy's negative bound": (lambda: update(max_norm=np.float32(-1)), ValueError, "max_norm to be positive, got -1"),
    "a bound of NaN": (lambda: update(max_norm=float("nan")), ValueError, "max_norm to be positive, got nan"),
    "an array of a bound of 0": (lambda: update(max_norm=jnp.float32(0)), ValueError, "max_norm to be positive, got 0"),
    "zero every": (lambda: update(every=0), ValueError, "every to be at least 1, got 0"),
    "float every": (lambda: update(every=1.5), TypeError, "every to be an int, got 1.5"),
    "bool every": (lambda: update(every=True), TypeError, "every to be an int, got True"),
    "negative bound in a tree": (
        lambda: update(max_norm={"conv": {"kernel": -2.0, "bias": None}}),
        ValueError,
        r"max_norm\['conv'\]\['kernel'\]: expected max_norm to be positive",
    ),
    "string bound in a tree": (
        lambda: update(max_norm={"conv": "1"}),
        TypeError,
        r"max_norm\['conv'\]: expected max_n",
    ),
    "bounds of another structure": (
        lambda: update(max_norm={"convs": 1.0}),
        ValueError,
        "max_norm to have the structure of the parameters",
    ),
    "schedule in the pure form": (
        lambda: oj.constrain(PARAMS, lambda count: 1.0, CONVS),
        TypeError,
        "max_norm: expected max_norm to be a positive number",
    ),
    "pure form, mismatch": (lambda: oj.constrain({"x": K}, 1.0, CONVS), ValueError, "structure of the parameters"),
    "no output, in a tree": (
        lambda: update(convs={"conv": {"kernel": oj.Conv((2, 2), padding="VALID"), "bias": None}}),
        ValueError,
        r"params\['conv'\]\['kernel'\].*at least one output pixel",
    ),
    "updates of another structure": (
        lambda: oj.constrain_operator_norm(1.0, CONVS).update({"conv": K}, optax.EmptyState(), PARAMS),
        ValueError,
        "dict",
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_wrong_call(name):
    call, error, message = TREES[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()
