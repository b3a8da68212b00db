"""Calls with arguments of a wrong or unusual type, shape or value: the library's own error, or the right answer."""

import decimal
import fractions
import random
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import THOROUGH, trial

import opnorm_jax as oj

K = np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)
KERNELS = [
    *(K.astype(dtype) for dtype in (np.float16, np.float64, jnp.bfloat16, ">f4", int, np.uint8, bool, complex, object, str)),
    *(K[index] for index in (0, (0, 0), (0, 0, 0), np.s_[:0], np.s_[::-1], np.s_[:, :1], np.s_[..., :1], (..., None))),
    *(np.ones(shape, np.float32) for shape in ((), (0,), (3,), (3, 3), (1, 1, 1, 1), (9, 9, 2, 2), (3, 3, 0, 2), (2,) * 6)),
    *(K * np.float32(factor) for factor in (0.0, 1e-30, 1e30, np.nan, np.inf)),
    jnp.asarray(K), jnp.zeros((3, 3, 2, 4)), np.asfortranarray(K), np.ma.masked_array(K), K.astype([("x", "f4")]),
    K.astype("datetime64[s]"), jax.ShapeDtypeStruct(K.shape, K.dtype), jax.random.key(0), memoryview(K),
    None, True, 1, 1.0, 1j, "K", b"K", [], {}, K.tolist(), [K], {"kernel": K}, iter([K]), object(), np.float32(1), K.__class__,
]  # fmt: skip
CONVS = [
    (8, 8), [8, 8], (np.int8(8), np.uint64(8)), np.array([8, 8]), (8, 8.0), (8.0, 8.0), (True, 8), ("8", "8"), (8, None), (8, 8, 8),
    (8,), (), 8, 8.0, "SAME", "88", None, True, {}, {8}, {8: 8}, range(7, 9), (0, 8), (-8, 8), (8, [8]), ((8, 8),), (1, 1), (8, 1j),
    jnp.array([8, 8]), np.array([8.0, 8.0]), object(), oj.Conv, oj.Unknown("reason"), oj.Execution(),
    oj.Conv((8, 8)), oj.Conv((8, 8), padding="VALID"), oj.Conv((2, 2), padding="VALID"), oj.Conv((5, 4), strides=3),
    oj.Conv((8,)), oj.Conv((3, 3, 3)), oj.Conv(()), oj.Conv((8, 8), stacked=1), oj.Conv((8, 8), feature_group_count=2),
    oj.Conv((8, 8), feature_group_count=3), oj.Conv((8, 8), kernel_layout="OIHW"), oj.Conv((4, 3), padding=((9, 9), (-1, 0))),
    oj.Conv((1, 1)), oj.Conv((3, 3), padding=((-2, -2), (-2, -2))), oj.Conv((8, 8), kernel_dilation=9),
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, -0.0, 0.5, 1e-300, 1e-46, 1e300, 10**400, float("nan"), float("inf"), -float("inf"), True, None, "1", b"1", 1j, [], [1.0],
    {}, (), np.float16(0.5), np.float64(0.5), np.int8(1), np.uint64(2**63), np.array(0.5), np.array([0.5]), np.bool(True), jnp.float32(0.5),
    jnp.ones(2), jnp.array(2), jnp.inf, decimal.Decimal(1), fractions.Fraction(1, 2), object(), float, np.datetime64("2020"),
]  # fmt: skip
OPTIONS = [
    *NUMBERS, "SAME", "same", "REFLECT", ("SAME", "VALID"), (1, 2), (1, 2, 3), [2, 2], ((1, 1), (0, 2)), ((1, 1),), ((1, 1, 1), (1, 1)),
    ((0.5, 1), (1, 1)), ((-9, 0), (0, 0)), "HWIO", "OIHW", "HHIO", "IO", ("H", "W", "I", "O"), {1, 2}, np.array([2, 1]), 10**9,
    oj.Execution(), oj.Execution(factorization="products"), "products",
]  # fmt: skip
SHORT = reprlib.Repr()
SHORT.maxother = 150
FIELDS = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count", "kernel_layout", "stacked")
BOUNDED = ("clip_operator_norm", "rescale_operator_norm", "project_operator_norm")
NORMS = ("operator_norm", "operator_norm_bounds")
NAMED = {"execution": OPTIONS, "tolerance": NUMBERS, "max_iterations": NUMBERS, "tight": [True, False]}


def draw(rng):
    """A function's name and its arguments, of which one or two are odd."""
    name = rng.choice(["Conv", "Conv", "singular_values", *NORMS, *BOUNDED])
    if name == "Conv":
        return (
            name,
            [rng.choice([(8, 8), rng.choice(CONVS)])],
            {f: rng.choice(OPTIONS) for f in rng.sample(FIELDS, rng.choice([1, 1, 2]))},
        )
    arguments, choices = [K, (8, 8)], [KERNELS, CONVS]
    if name in BOUNDED:
        arguments, choices = [*arguments, 1.0], [*choices, NUMBERS]
    for at in rng.sample(range(len(arguments)), rng.choice([1, 1, 2])):
        arguments[at] = rng.choice(choices[at])
    takes = {
        "project_operator_norm": ("tolerance", "max_iterations", "execution"),
        "operator_norm_bounds": ("tight", "execution"),
    }
    options = {option: rng.choice(NAMED[option]) for option in takes.get(name, ("execution",)) if rng.random() < 0.2}
    return name, arguments, options


def is_right(name, arguments, options, result):
    """Whether a call that was accepted has the answer of the dense matrix."""
    if name == "Conv":
        same = oj.Conv(result.input_shape, **{field: getattr(result, field) for field in FIELDS})
        return same == result and all(
            type(n) is int for n in (*result.input_shape, *result.strides, result.feature_group_count)
        )
    kernel, conv = np.asarray(arguments[0]), arguments[1]
    conv = conv if isinstance(conv, oj.Conv) else oj.Conv(conv, padding="CIRCULAR")
    wide, eps = kernel.astype(np.float64), 4 * max(float(jnp.finfo(kernel.dtype).eps), 1e-5)
    if not np.isfinite(wide).all():
        return all(np.isnan(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(result))
    fields = {field: getattr(conv, field) for field in FIELDS if field not in ("kernel_layout", "stacked")}
    if conv.kernel_layout == "OIHW":
        wide = wide.transpose(2, 3, 1, 0)
    truth = lambda kernel: oracle.dense_singular_values(kernel, conv.input_shape, **fields)
    true = truth(wide)[0] if conv.input_shape else np.linalg.norm(wide, 2)
    if name == "singular_values":
        return abs(np.max(np.asarray(result)) - true) <= eps * true
    if name == "operator_norm_bounds":
        return result.lower <= true <= result.upper
    if name == "operator_norm":
        return abs(float(result) - true) <= eps * true
    result, bound = np.asarray(result), float(arguments[2])
    if result.shape != kernel.shape or result.dtype != kernel.dtype.newbyteorder("="):
        return False
    wide = result.astype(np.float64)
    wide = wide.transpose(2, 3, 1, 0) if conv.kernel_layout == "OIHW" else wide
    after = truth(wide)[0] if conv.input_shape else np.linalg.norm(wide, 2)
    return name == "clip_operator_norm" or after <= min(bound, 1e308) * (1 + eps)


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(8))
def test_odd_calls(seed):
    rng, accepted, count = random.Random(seed), 0, 100 if THOROUGH else 12
    for _ in range(count):
        name, arguments, options = draw(rng)
        with trial("odd calls"):
            said = SHORT.repr((name, arguments, options))
            try:
                result = getattr(oj, name)(*arguments, **options)
            except (ValueError, TypeError) as error:
                # Two of jax's own errors are clear as well.
                known = any(word in str(error) for word in ("expected", "masked arrays are not", "'ShapeDtypeStruct'"))
                assert known and len(str(error)) < 1000, (said, error)
                continue
            except Exception as error:
                raise AssertionError(said) from error
            assert is_right(name, arguments, options, result), (said, result)
            accepted += 1
    assert accepted < count
