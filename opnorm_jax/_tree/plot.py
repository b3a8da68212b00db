"""Pictures of a network's spectra."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opnorm_jax._conv import Conv, Unknown, canonical_kernel, canonical_shape
from opnorm_jax._execution import Execution, check_decomposes
from opnorm_jax._geometry import resolve
from opnorm_jax._kernel import spectrum
from opnorm_jax._tree.layers import list_layers

KINDS = ("spectra", "histogram", "all")

_POINTS = 1000  # of a curve: more cannot be seen
_BINS = 50
_NAMED = 40  # layers whose names fit beside the histograms


class _Spectrum(NamedTuple):
    path: str
    ranks: np.ndarray  # in [0, 1]
    values: np.ndarray  # descending, thinned to the ranks
    shares: np.ndarray  # of all values, in equal bins from 0 to the layer's largest


def plot_spectra(
    params: Any,
    convs: Any,
    *,
    kind: str = "all",
    title: str | None = None,
    path: str | Path | None = None,
    execution: Execution = Execution(),
) -> Any:
    """Draws the singular values of each convolution of a network, as in the paper: one curve for each layer.

    The panels show all singular values in descending order against their rank divided by their number; the same, each
    divided by its layer's largest; and the distribution of the latter, one row for each layer. Colours run with the
    depth, which is taken to be the natural order of the paths.

    Each layer is drawn as it is, with its strides and its padding. This is exact for circular padding with strides that
    divide the grid. The spectrum of a zero-padded layer has no formula: what is drawn is its circulant embedding, a
    circular convolution of which the layer is a part. The largest value drawn is the certified upper bound of
    :func:`operator_norm_bounds`, to rounding, so no curve of a constrained network passes its bound. The caption says
    for how many layers this was done.

    Args:
      params, convs: as in :func:`spectral_report`. Layers that are :class:`Unknown`, or hold a NaN or an infinity, are
        left out, and the caption says how many.
      kind: ``"spectra"`` (the two panels of curves), ``"histogram"``, or ``"all"``.
      title: above the panels.
      path: where to save the figure, if anywhere; its suffix tells the format.
      execution: how to compute; see :class:`Execution`.

    Returns:
      A ``matplotlib.figure.Figure``. It belongs to no ``pyplot`` state and needs no closing; notebooks display it.

    Raises:
      ValueError, TypeError: ``convs`` does not fit the parameters, no layer is left to draw, or an unknown ``kind``.
      ImportError: matplotlib is not installed (extra ``[plot]``).

    Cost: as :func:`singular_values` of each layer, one at a time, of which some 1000 points are kept.

    Examples:
      >>> import jax, opnorm_jax as oj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 4))}
      >>> figure = oj.plot_spectra(params, {"kernel": oj.Conv((16, 16))}, kind="spectra")
      >>> len(figure.axes[0].lines)
      1
    """
    if kind not in KINDS:
        raise ValueError(f"expected kind to be one of {KINDS}, got {kind!r}.")
    check_decomposes(execution)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot_spectra needs matplotlib: pip install 'opnorm-jax[plot]'.") from None
    layers, notes, left_out = [], {}, 0
    for name, kernel, conv in list_layers(params, convs):
        if isinstance(conv, Unknown) or not np.isfinite(np.asarray(kernel, np.float64)).all():
            left_out += 1
            continue
        if note := _note(kernel, conv):
            notes[note] = notes.get(note, 0) + 1
        layers.append(_spectrum(name, layer_values(kernel, conv, execution)))
    if not layers:
        raise ValueError("expected at least one layer to draw, got none with a Conv and finite entries.")

    panels = {"spectra": 2, "histogram": 1, "all": 3}[kind]
    height = 4.6 if kind == "spectra" else min(9.0, max(4.6, 1.6 + 0.16 * len(layers)))
    figure = Figure(figsize=(5.2 * panels + (1.2 if kind != "spectra" else 0.6), height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    if kind != "histogram":
        _curves(figure, axes[0], axes[1], layers)
    if kind != "spectra":
        _histograms(figure, axes[-1], layers)
    if title:
        figure.suptitle(title)
    caption = [f"{note} ({count} of {len(layers)} layers)" for note, count in notes.items()]
    caption += [f"{left_out} left out: unknown, or not finite"] * bool(left_out)
    if caption:
        figure.supxlabel("\n".join(caption), fontsize="small", color="0.35")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def layer_values(kernel: Any, conv: Conv, execution: Execution = Execution()) -> np.ndarray:
    """Returns the singular values of a layer's circulant embedding, descending, each once for all its repetitions.

    The layer itself where that is circular and its strides divide the grid. Otherwise the layer is a part of its
    embedding, whose largest value is the certified upper bound on the layer's norm.
    """
    geometry = resolve(dataclasses.replace(conv, kernel_layout=None), canonical_shape(kernel, conv))
    embedding = dataclasses.replace(geometry, own_plan=geometry.plan)  # where a layer has a spectrum of its own
    values = spectrum._singular_values(canonical_kernel(kernel, conv), embedding, execution)
    return np.sort(np.asarray(values), axis=None)[::-1]


def _spectrum(path: str, values: np.ndarray) -> _Spectrum:
    kept = np.unique(np.linspace(0, len(values) - 1, min(_POINTS, len(values))).round().astype(int))
    counts, _ = np.histogram(values / (values[0] or 1), bins=_BINS, range=(0, 1))
    return _Spectrum(path, kept / max(1, len(values) - 1), values[kept], counts / len(values))


def _note(kernel: Any, conv: Conv) -> str:
    """Says what is drawn, where that is not the layer alone."""
    if resolve(conv, canonical_shape(kernel, conv)).exact:
        return ""
    if conv.padding == "CIRCULAR":
        return "strides that do not divide the map: the convolution without its strides, of which the layer is a part"
    return "zero padding: the circulant embedding, of which the layer is a part; its largest value bounds the layer's"


def _curves(figure: Any, raw: Any, normalised: Any, layers: Sequence[_Spectrum]) -> None:
    colours, scale = _colours(len(layers))
    for layer, colour in zip(layers, colours):
        few = dict(marker=".", markersize=4) if len(layer.values) < 20 else {}
        raw.plot(layer.ranks, layer.values, color=colour, linewidth=1.1, label=layer.path, **few)
        largest = layer.values[0] or 1
        normalised.plot(layer.ranks, layer.values / largest, color=colour, linewidth=1.1, label=layer.path, **few)
    raw.set(title="singular values", ylabel="singular value")
    normalised.set(title="each divided by its layer's largest", ylabel="singular value / layer's largest")
    for axis in (raw, normalised):
        axis.set(xlabel="rank / number of singular values", xlim=(0, 1))
        axis.set_ylim(bottom=0)
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if len(layers) <= 8:
        normalised.legend(fontsize="small", frameon=False)
    else:
        bar = figure.colorbar(scale, ax=normalised, fraction=0.05, pad=0.02)
        bar.set_ticks([0, len(layers) - 1], labels=["first", "last"])
        bar.set_label(f"layer: {layers[0].path} to {layers[-1].path}", fontsize="small", labelpad=-14)
        bar.outline.set_visible(False)


def _histograms(figure: Any, axis: Any, layers: Sequence[_Spectrum]) -> None:
    shares = np.stack([layer.shares for layer in layers])
    edges = np.linspace(0, 1, _BINS + 1)
    roots = np.ma.masked_equal(np.sqrt(100 * shares), 0)  # their squares would leave all but the first bins blank
    mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, roots, cmap="magma_r", vmin=0, rasterized=True)
    axis.set(title="distribution of singular values", xlabel="singular value / layer's largest", xlim=(0, 1))
    axis.invert_yaxis()
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _NAMED)).round().astype(int))
    axis.set_yticks(shown, [layers[n].path for n in shown], fontsize="x-small")
    axis.tick_params(axis="y", length=0)
    axis.hlines(np.arange(1, len(layers)) - 0.5, 0, 1, color="white", linewidth=0.8)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.02)
    top = 100 * shares.max()
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50, 100) if tick <= top]
    bar.set_ticks(list(np.sqrt(ticks)), labels=[str(tick) for tick in ticks])
    bar.set_label(f"% of the layer's values in each of {_BINS} bins (white: none)", fontsize="small")
    bar.outline.set_visible(False)


def _colours(count: int) -> tuple[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    palette = ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256)))  # the palest yellow is hard to see
    scale = ScalarMappable(Normalize(0, max(1, count - 1)), palette)
    return scale.to_rgba(np.arange(count)), scale
