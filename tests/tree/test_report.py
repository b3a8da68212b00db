"""Reports and pictures: every figure against the dense oracle, and nothing claimed to be exact that is not."""

import dataclasses
import io
import json
import math
import sys

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.extend.core import jaxprs_in_params

import opnorm_jax as oj
from opnorm_jax._geometry import resolve
from opnorm_jax._kernel import bounds
from opnorm_jax._tree import report

RNG = np.random.default_rng(0)
K = RNG.standard_normal((3, 3, 2, 4)).astype(np.float32)
CIRCLE = oj.Conv((8, 8), padding="CIRCULAR")


def only(kernel, conv, **options):
    (row,) = oj.spectral_report({"kernel": kernel}, {"kernel": conv}, **options).layers
    return row


@pytest.mark.parametrize("seed", range(14))
def test_figures_against_dense(seed):
    geometry = geometries.generate(300 + seed, exact=seed % 3 == 0)
    (canonical,), (kernel,) = geometry.kernels(np.random.default_rng(seed), 1)
    row = only(kernel, geometry.conv)
    matrix = oracle.dense_matrix(canonical, geometry.conv.input_shape, **geometry.options)
    values = np.linalg.svd(matrix, compute_uv=False)
    frobenius = np.linalg.norm(matrix)
    assert row.lower <= values[0] <= row.upper
    assert row.exact == geometry.exact
    np.testing.assert_allclose(row.norm, values[0], rtol=1e-5)
    np.testing.assert_allclose(row.frobenius, frobenius, rtol=1e-6)  # exact but for the kernel's own rounding
    np.testing.assert_allclose(row.stable_rank, (frobenius / values[0]) ** 2, rtol=3e-5)
    if row.exact:
        np.testing.assert_allclose(row.smallest, values[-1], atol=1e-5 * values[0])
        if values[-1] > 1e-3 * values[0]:
            np.testing.assert_allclose(row.condition, values[0] / values[-1], rtol=1e-2)


def test_smallest_values_of_the_layers_themselves():
    """On request; the table says of which each value is, and which are bounds."""
    convs = {
        "circular": CIRCLE,
        "full": oj.Conv((8, 8), padding=2),
        "same": oj.Conv((8, 8)),
    }
    params = dict.fromkeys(convs, K)
    before, after = (oj.spectral_report(params, convs, smallest=smallest) for smallest in (False, True))
    assert [row.smallest_of for row in before.layers] == ["layer", "embedding", "embedding"]
    assert [row.smallest_of for row in after.layers] == ["layer"] * 3
    for row, early in zip(after.layers, before.layers):
        options = {"padding": convs[row.path].padding}
        values = oracle.dense_singular_values(K, (8, 8), **options)
        np.testing.assert_allclose(row.smallest, values[-1], rtol=1e-5)
        np.testing.assert_allclose(row.condition, values[0] / values[-1], rtol=1e-4)
        assert values[-1] * 0.99 <= row.smallest_lower <= values[-1] and early.smallest_lower <= values[-1]
    lines = str(before).splitlines()
    assert ">=" in lines[3] and "<=" in lines[3] and lines[4].count("~") == 2 and lines[-1].startswith("~")
    assert not any(mark in str(after) for mark in ("~", ">="))
    assert "* converged; a certified lower bound is smallest_lower" in str(after)
    assert before.layers[1].as_dict()["smallest_lower"] > 0
    with pytest.raises(TypeError, match="smallest to be True or False"):
        oj.spectral_report(params, convs, smallest=1)


@pytest.mark.parametrize("shape", [(2,), (3,), (5,)])
def test_frobenius_where_taps_fold(shape):
    """Circles smaller than the kernel: taps meet and add, and their squares alone would be wrong."""
    kernel = RNG.standard_normal((5, 2, 3))
    for dilation in (1, 2):
        matrix = oracle.dense_matrix(kernel, shape, kernel_dilation=dilation)
        found = report.frobenius_norm(kernel, oj.Conv(shape, kernel_dilation=dilation, padding="CIRCULAR"))
        np.testing.assert_allclose(found, np.linalg.norm(matrix), rtol=1e-12)


def test_bounds_are_those_of_operator_norm_bounds():
    conv = oj.Conv((9, 7), strides=2, padding="SAME")
    row, (lower, upper) = only(K, conv), oj.operator_norm_bounds(jnp.asarray(K), conv)
    assert (row.lower, row.upper) == pytest.approx((float(lower), float(upper)), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_batch_norm_is_folded_on_request(seed):
    """The bounds and norms of layer and factors together, against the dense matrix with its rows multiplied."""
    geometry, rng = geometries.generate(500 + seed, exact=seed % 2 == 0), np.random.default_rng(seed)
    (canonical,), (kernel,) = geometry.kernels(rng, 1)
    factor = (rng.standard_normal(canonical.shape[-1]) * 10.0 ** rng.integers(-2, 3)).astype(np.float32)
    row = only(kernel, geometry.conv, scales={"kernel": factor})
    matrix = oracle.dense_matrix(canonical * factor.astype(np.float64), geometry.conv.input_shape, **geometry.options)
    norm = np.linalg.norm(matrix, 2)
    assert row.lower <= norm <= row.upper
    np.testing.assert_allclose(row.norm, norm, rtol=1e-5)
    np.testing.assert_allclose(row.frobenius, np.linalg.norm(matrix), rtol=1e-6)
    plain = only(kernel, geometry.conv)
    assert only(kernel, geometry.conv, scales={"kernel": None}) == plain
    assert plain.norm != row.norm


def test_factors_of_stacks_and_what_has_none():
    stacked, factors = np.stack([K, K]), np.stack([np.full(4, 2.0, np.float32), np.full(4, -0.5, np.float32)])
    params = {"blocks": {"kernel": stacked, "bias": np.zeros(4)}, "alone": K, "odd": K}
    convs = {"blocks": {"kernel": oj.Conv((8, 8), stacked=1, padding="CIRCULAR"), "bias": None}, "alone": CIRCLE}
    convs["odd"] = oj.Unknown("standardised")
    scales = {"blocks": {"kernel": factors, "bias": None}, "alone": None, "odd": None}
    alone, first, second, odd = oj.spectral_report(params, convs, scales=scales).layers
    assert (first.norm, second.norm) == pytest.approx((2 * alone.norm, 0.5 * alone.norm), rel=1e-6)
    assert odd.reason == "standardised"


def test_zero_padding_is_marked_not_claimed():
    conv = oj.Conv((8, 8), padding="SAME")
    row = only(K, conv)
    circle = oracle.dense_singular_values(K, (9, 9))
    assert not row.exact
    np.testing.assert_allclose(row.smallest, circle[-1], atol=1e-5 * circle[0])
    np.testing.assert_allclose(row.condition, circle[0] / circle[-1], rtol=1e-3)
    text = str(oj.spectral_report({"kernel": K}, {"kernel": conv}))
    assert f"~{row.smallest:.3g}" in text and f"~{row.condition:.3g}" in text and "~ of the circulant embedding" in text
    assert "~" not in str(oj.spectral_report({"kernel": K}, {"kernel": CIRCLE}))


def test_singular_to_working_precision():
    kernel = np.repeat(K[..., :1], 2, axis=-1)  # two equal outputs: rank one at each frequency
    assert only(kernel, oj.Conv((8, 8), padding="CIRCULAR")).condition == math.inf
    zero = only(np.zeros_like(K), oj.Conv((8, 8), padding="SAME"))
    assert (zero.upper, zero.smallest, zero.stable_rank, zero.condition) == (0, 0, 0, math.inf)


def test_rows_stacks_unknown_and_not_finite():
    stacked = np.stack([K, 2 * K])
    params = {
        **{f"Conv_{n}": {"kernel": K, "bias": np.zeros(4)} for n in (10, 2)},
        "blocks": {"kernel": stacked},
        "broken": np.full_like(K, np.nan),
        "odd": K,
    }
    convs = {
        **{f"Conv_{n}": {"kernel": CIRCLE, "bias": None} for n in (10, 2)},
        "blocks": {"kernel": oj.Conv((8, 8), stacked=1, padding="CIRCULAR")},
        "broken": CIRCLE,
        "odd": oj.Unknown("standardised"),
    }
    report = oj.spectral_report(params, convs)
    paths = ["Conv_2/kernel", "Conv_10/kernel", "blocks/kernel[0]", "blocks/kernel[1]", "broken", "odd"]
    assert [row.path for row in report.layers] == paths
    first, second = report.layers[2:4]
    assert second.norm == 2 * first.norm and second.shape == K.shape
    broken, odd = report.layers[4:]
    assert math.isnan(broken.upper) and "NaN" in broken.reason
    assert odd.conv is None and odd.reason == "standardised" and "(standardised)" in str(report)
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["layers"][0]["norm"] == report.layers[0].norm and plain["layers"][4]["norm"] is None
    assert plain["layers"][0]["conv"]["input_shape"] == [8, 8]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.layers[0].norm = 0.0  # type: ignore[misc]


def test_table_in_plain_text_and_in_rich(monkeypatch):
    from rich.console import Console

    report = oj.spectral_report({"a": {"kernel": K}, "b": K}, {"a": {"kernel": CIRCLE}, "b": oj.Unknown("[odd]")})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    rich = console.export_text()
    for name in ("rich", "rich.table", "rich.console", "rich.progress"):  # imported by another test, perhaps
        monkeypatch.setitem(sys.modules, name, None)
    for text in (str(report), rich):
        assert "a/kernel" in text and "3x3 2->4" in text and "8x8 CIRCULAR" in text and "[odd]" in text
        assert f"{report.layers[0].upper:.5g}" in text
    with pytest.raises(ImportError, match=r"pip install 'opnorm-jax\[cli\]'"):
        oj.spectral_report({"b": K}, {"b": CIRCLE}, progress=True)


def test_equal_layers_share_a_compilation():
    layers = {str(n): RNG.standard_normal((3, 3, 3, 5)).astype(np.float32) for n in range(3)}
    layers["pytorch"] = layers["0"].transpose(3, 2, 0, 1)
    convs = {name: oj.Conv((6, 5), padding="SAME") for name in "012"}
    convs["pytorch"] = oj.Conv((6, 5), padding="SAME", kernel_layout="OIHW")
    before = bounds.norm_statistics._cache_size()
    rows = oj.spectral_report(layers, convs).layers
    assert bounds.norm_statistics._cache_size() == before + 1
    assert rows[0].upper == rows[3].upper


def test_the_spectrum_is_not_kept():
    """With 64 x 64 pixels and 8 channels there are 32768 values; nothing that large may be made."""

    def largest(jaxpr):
        sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
        return max(
            [*sizes, *(largest(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))], default=0
        )

    kernel, conv = jnp.ones((3, 3, 8, 8)), oj.Conv((64, 64), padding="CIRCULAR")
    program = jax.make_jaxpr(
        lambda k: bounds.norm_statistics(k, resolve(conv, k.shape), oj.Execution(chunk_bytes=2**14))
    )(kernel).jaxpr
    full = jax.make_jaxpr(lambda k: oj.singular_values(k, conv, execution=oj.Execution(chunk_bytes=2**14)))(
        kernel
    ).jaxpr
    assert largest(program) < 64 * 64 * 8 <= largest(full)


ERRORS = {
    "path and shape": (
        lambda: only(K[0], oj.Conv((8, 8), padding="CIRCULAR")),
        ValueError,
        r"params\['kernel'\] \(3, 2, 4\): expected a ker",
    ),
    "no convs": (lambda: oj.spectral_report({"a": K}, {"a": None}), ValueError, "holds no Conv at all"),
    "structure": (lambda: oj.spectral_report({"a": K}, {"b": CIRCLE}), ValueError, "structure of the parameters"),
    "factors": (lambda: only(K, CIRCLE, scales={"kernel": jnp.ones(3)}), ValueError, r"float32 of shape \(3,\)"),
    "places of factors": (
        lambda: only(K, CIRCLE, scales={"k": None}),
        ValueError,
        "expected scales to have the struct",
    ),
    "no numbers": (
        lambda: only(jax.ShapeDtypeStruct(K.shape, K.dtype), CIRCLE),
        TypeError,
        "expected an array of numb",
    ),
    "traced": (lambda: jax.jit(lambda k: only(k, CIRCLE).norm)(K), TypeError, "outside jit"),
    "execution": (lambda: only(K, CIRCLE, execution="products"), TypeError, "expected execution to be"),
    "products": (
        lambda: only(K, CIRCLE, execution=oj.Execution(factorization="products")),
        ValueError,
        "got 'products'",
    ),
    "kind": (lambda: oj.plot_spectra({"k": K}, {"k": CIRCLE}, kind="pie"), ValueError, "kind to be one of.*'pie'"),
    "nothing to draw": (
        lambda: oj.plot_spectra({"k": np.full_like(K, np.nan)}, {"k": CIRCLE}),
        ValueError,
        "at least one layer to draw",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_curves_are_the_spectra(tmp_path):
    other = RNG.standard_normal((3, 3, 3, 3)).astype(np.float32)
    convs = {"b": oj.Conv((6, 8), padding="SAME"), "a": oj.Conv((5, 5), padding="CIRCULAR"), "c": oj.Unknown("odd")}
    figure = oj.plot_spectra({"a": other, "b": K, "c": K}, convs, path=tmp_path / "spectra.png", title="A title")
    raw, normalised, rows = figure.axes[:3]
    for n, (kernel, shape) in enumerate(((other, (5, 5)), (K, (7, 9)))):
        expected = np.sort(oracle.paper_singular_values(kernel, shape).ravel())[::-1]
        np.testing.assert_allclose(raw.lines[n].get_ydata(), expected, atol=1e-5 * expected[0])
        np.testing.assert_allclose(normalised.lines[n].get_ydata(), expected / expected[0], atol=1e-5)
        assert raw.lines[n].get_xdata()[[0, -1]].tolist() == [0, 1]
    assert [line.get_label() for line in raw.lines] == ["a", "b"]
    assert [tick.get_text() for tick in rows.get_yticklabels()] == ["a", "b"]
    np.testing.assert_allclose((rows.collections[0].get_array().filled(0) ** 2).sum(axis=1), 100, rtol=1e-6)
    caption = figure.get_supxlabel()
    assert "the circulant embedding" in caption and "1 of 2 layers" in caption and "1 left out" in caption
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_layers_are_drawn_with_their_strides():
    """The largest value drawn is the certified bound, so that no curve of a constrained network passes it."""
    conv = oj.Conv((9, 7), strides=2, padding="SAME")
    line = oj.plot_spectra({"k": K}, {"k": conv}, kind="spectra").axes[0].lines[0]
    expected = oracle.dense_singular_values(K, (10, 8), strides=2)  # on the smallest even circle with room for the pads
    np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-5 * expected[0])
    assert line.get_ydata()[0] == pytest.approx(float(oj.operator_norm_bounds(jnp.asarray(K), conv).upper), rel=1e-5)
    assert line.get_ydata()[0] >= oracle.dense_singular_values(K, (9, 7), strides=2, padding="SAME")[0]
    held = oj.constrain({"k": jnp.asarray(K)}, 1.0, {"k": conv})
    assert oj.plot_spectra(held, {"k": conv}, kind="spectra").axes[0].lines[0].get_ydata()[0] <= 1


def test_long_spectra_are_thinned_and_strides_that_do_not_divide_are_told():
    figure = oj.plot_spectra({"k": K}, {"k": oj.Conv((45, 45), padding="SAME")}, kind="spectra")
    line = figure.axes[0].lines[0]
    expected = np.sort(oracle.paper_singular_values(K, (46, 46)).ravel())[::-1]
    assert len(line.get_ydata()) == 1000 < len(expected)
    np.testing.assert_allclose(line.get_ydata()[[0, -1]], expected[[0, -1]], atol=1e-4)
    figure = oj.plot_spectra({"k": K}, {"k": oj.Conv((9, 9), strides=2, padding="CIRCULAR")}, kind="spectra")
    expected = np.sort(oracle.paper_singular_values(K, (9, 9)).ravel())[::-1]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), expected, atol=1e-4)
    assert "without its strides" in figure.get_supxlabel()
    assert len(oj.plot_spectra({"k": K}, {"k": CIRCLE}, kind="histogram").axes) == 2  # panel and colour bar


def test_many_layers_have_a_colour_bar_in_place_of_a_legend():
    names = [f"layer{n}" for n in range(9)]
    figure = oj.plot_spectra(dict.fromkeys(names, K), dict.fromkeys(names, CIRCLE), kind="spectra")
    assert not any(axis.get_legend() for axis in figure.axes)
    assert any(axis.get_ylabel() == "layer: layer0 to layer8" for axis in figure.axes)


FORMATTED = {
    "dense": oj.Conv(()),
    "8x9 CIRCULAR": oj.Conv((8, 9), padding="CIRCULAR"),
    "8x9 /2 dilated 1x3 groups 2 SAME": oj.Conv(
        (8, 9), strides=2, kernel_dilation=(1, 3), feature_group_count=2, padding="SAME"
    ),
    "8x9 upsampled 2 pad 1": oj.Conv((8, 9), input_dilation=2, padding=1),
    "8x9 pad 0:1x2": oj.Conv((8, 9), padding=((0, 1), (2, 2))),
}


@pytest.mark.parametrize("words", FORMATTED)
def test_a_conv_in_words(words):
    assert report.format_conv(FORMATTED[words]) == words


def test_plot_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'opnorm-jax\[plot\]'"):
        oj.plot_spectra({"k": K}, {"k": CIRCLE})
