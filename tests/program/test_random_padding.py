"""Convolutions that random programs pad for: what is described has the right norm, whatever moved the pixels."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_padding
from conftest import THOROUGH, count_case
from jacobian import Program, conv_norm, forget

import opnorm_jax as oj

CASES = 5000 if THOROUGH else 100
BATCH = 50


def check(case, lipschitz=True):
    """What came of one case: a list of violations, and whether it was described and bounded."""
    wrong, x = [], jax.ShapeDtypeStruct(case.shape, np.float32)
    before = random_padding.function(case.before)
    shape = jax.eval_shape(lambda x: before({}, x), x)
    program = Program(case.layer, case.params, shape)
    matrix = program.linear_part()
    if matrix is None:  # padding with a maximum, say: there is no norm to be above the lower bound
        points = np.random.default_rng(case.seed).standard_normal((3, program.size))
        truth, exact = program.steepest(points, np.random.default_rng(0)), False
    else:
        truth, exact = np.linalg.norm(matrix, 2), True
    params = jax.tree.map(np.asarray, case.params)
    conv = None
    try:
        conv = oj.find_convs(case.fn, case.all_params, x, on_unknown="skip")["k"]
    except ValueError as error:
        reason = str(error)
    else:
        reason = getattr(conv, "reason", "")
    described = isinstance(conv, oj.Conv)
    if described and case.stacked == "ensemble" and conv.stacked != 1:
        wrong += _wrong_together(case, conv, shape)
    elif described:
        if conv.stacked != bool(case.stacked):
            wrong.append(f"{conv}: a parameter of {int(bool(case.stacked))} leading axes of kernels")
        conv = dataclasses.replace(conv, stacked=0)
        kernel = case.params["k"]
        norm = conv_norm(kernel, conv) if exact else None
        # Where the description's own norm, by another oracle, is not the truth, its bounds decide.
        if norm is None or abs(norm - truth) > 1e-9 * max(truth, 1e-30) or case.seed % 20 == 0:
            bounds = oj.operator_norm_bounds(kernel, conv)
            lower, upper = float(bounds.lower), float(bounds.upper)
            if upper < truth * (1 - 1e-9):
                wrong.append(f"{conv}: upper {upper} below the truth, {truth}")
            if exact and lower > truth * (1 + 1e-9):
                wrong.append(f"{conv}: lower {lower} above the truth, {truth}")
    bounded = None
    if lipschitz:
        try:
            bound = float(oj.lipschitz_bound(case.layer, params, jax.ShapeDtypeStruct(shape.shape, np.float32)))
        except ValueError as error:
            bounded = False
            reason += f" / {error}"
        else:
            bounded = True
            if not bound >= truth * (1 - 1e-6):
                wrong.append(f"lipschitz_bound {bound} below the truth, {truth}")
    return wrong, described, bounded, reason


def _wrong_together(case, conv, shape):
    """Members of one output each, which share their input, are one layer with as many outputs; an axis of 1 is left."""
    kernel = case.all_params["k"]
    (axis,) = conv.stacked
    if kernel.shape[axis] != 1:
        return [f"{conv}: its axis {axis} is no stack"]
    bounds = oj.operator_norm_bounds(np.squeeze(kernel, axis), dataclasses.replace(conv, stacked=0))
    matrix = Program(dataclasses.replace(case, before="").fn, case.all_params, shape).linear_part()
    truth = np.linalg.norm(matrix, 2)
    holds = bounds.lower <= truth * (1 + 1e-9) and truth <= bounds.upper * (1 + 1e-9)
    return [] if holds else [f"{conv}: {bounds} do not enclose the truth, {truth}"]


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BATCH, CASES, BATCH))])
def test_described_convolutions_have_the_right_norm(start):
    found, failures = collections.Counter(), []
    for seed in range(start, min(start + BATCH, CASES)):
        case = random_padding.generate(seed)
        wrong, described, _, _ = check(case, lipschitz=seed % 10 == 0 or THOROUGH)
        found[described] += 1
        count_case("random padding programs", "described" if described else "refused")
        failures += [f"seed {seed}, x {case.shape}:\n{case.before}\n{case.text}\n{what}" for what in wrong]
    forget()
    assert not failures, "\n\n".join(failures)
    assert found[True] > BATCH // 6  # the test would be empty if all were refused


IMAGES = ("drawn", "captured", "learned")


def described_in(case, name):
    """The ``Conv`` or ``Unknown`` of a case whose image is an argument, or is made inside; None if there is none."""
    fn, params, image = case.fn, case.all_params, jnp.ones(case.shape)
    programs = {
        "argument": (fn, params, image),
        "drawn": (lambda p: fn(p, jax.random.normal(jax.random.key(0), case.shape)), params),
        "captured": (lambda p, key: fn(p, image), params, jax.random.key(0)),
        "learned": (lambda p: fn(p, p["x"]), {**params, "x": image}),
    }
    try:
        return oj.find_convs(*programs[name], on_unknown="skip")["k"]
    except ValueError:
        return None


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BATCH, CASES, BATCH))])
def test_an_image_that_fn_makes_itself_is_described_alike(start):
    """As if it were an argument, or not at all: random numbers drawn inside, a captured array, a learned one."""
    failures, described = [], 0
    for seed in range(start, min(start + BATCH, CASES)):
        case = random_padding.generate(seed)
        expected, *others = (described_in(case, name) for name in ("argument", *IMAGES))
        for name, found in zip(IMAGES, others, strict=True):
            described += isinstance(found, oj.Conv)
            if isinstance(found, oj.Conv) and found != expected:
                failures.append(f"seed {seed}, {name}:\n{case.before}\n{case.text}\n{found} for {expected}")
    assert not failures, "\n\n".join(failures)
    assert described > BATCH // 3
