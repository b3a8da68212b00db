"""What a network's convolutions are like: a table of norms and conditions, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from opnorm_jax._conv import Conv, Unknown, canonical_kernel
from opnorm_jax._execution import Execution, check_decomposes
from opnorm_jax._geometry import Geometry, met_pixels, resolve
from opnorm_jax._kernel.bounds import NormStatistics, norm_statistics
from opnorm_jax._rounding import product_rounding
from opnorm_jax._tree.alike import list_factors
from opnorm_jax._tree.layers import list_layers

_HEADER = ("layer", "kernel", "convolution", "lower", "upper", "smallest", "condition", "stable rank")
_NOT_FINITE = "holds a NaN or an infinity"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What a report says of one convolution.

    All numbers are floats. Where there are none they are NaN, and ``reason`` says why.

    Attributes:
      path: the path of its kernel in the parameters. That of a member of a stack ends in its index,
        ``"blocks/kernel[0]"``.
      shape: the shape of its kernel, in the kernel's own layout.
      conv: what it was taken to be; ``None`` where it is unknown.
      lower, upper: certified bounds on the operator norm, as in :func:`operator_norm_bounds`.
      norm: the operator norm, as in :func:`operator_norm`: exact if ``exact``, otherwise converged from below.
      smallest: the smallest singular value of what ``smallest_of`` says. If that is the circulant embedding, it is
        neither the layer's own value nor a bound on it (unless ``smallest_lower`` says so), but it tells how near to
        singular the layer is.
      smallest_of: ``"layer"`` if the value is the layer's own: if ``exact``, or found by ``smallest=True``. Otherwise
        ``"embedding"``.
      smallest_lower: a certified lower bound on the layer's own smallest singular value; 0 where none is known.
      condition: the largest singular value divided by the smallest one, both of the same. It is infinite where the
        smallest is no larger than its rounding error (of the embedding: 5e-6 of the largest in float32 at 64 channels;
        on GPU and TPU the square root of that).
      frobenius: the Frobenius norm, exact for every padding.
      stable_rank: ``(frobenius / norm) ** 2``.
      exact: whether the padding is circular and the strides divide the grid, so that all singular values are known.
      reason: why there are no numbers, or ``None``.
    """

    path: str
    shape: tuple[int, ...]
    conv: Conv | None
    lower: float = math.nan
    upper: float = math.nan
    norm: float = math.nan
    smallest: float = math.nan
    smallest_of: Literal["layer", "embedding"] | None = None
    smallest_lower: float = math.nan
    condition: float = math.nan
    frobenius: float = math.nan
    stable_rank: float = math.nan
    exact: bool = False
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, fit for ``json.dumps``; a number that is not finite becomes ``None``."""
        plain = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class SpectralReport:
    """The layers of a network; ``print`` it, or hand it to ``rich``, for a table."""

    layers: tuple[LayerReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data, fit for ``json.dumps``."""
        return {"layers": [layer.as_dict() for layer in self.layers]}

    def __str__(self) -> str:
        return "\n".join([format_table(_HEADER, [_cells(layer) for layer in self.layers]), *_notes(self.layers)])

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(caption="\n".join(_notes(self.layers)), caption_justify="left")
        for n, name in enumerate(_HEADER):
            table.add_column(name, justify="left" if n < 3 else "right", overflow="fold")
        for layer in self.layers:
            table.add_row(*map(escape, _cells(layer)))
        return table


def spectral_report(
    params: Any,
    convs: Any,
    *,
    scales: Any = None,
    smallest: bool = False,
    progress: bool = False,
    execution: Execution = Execution(),
) -> SpectralReport:
    r"""Reports norm bounds, smallest singular value, condition and stable rank of each convolution of a network.

    What is exact: the bounds are certified for every padding, and the Frobenius norm, :math:`\sum_j n_j |K_j|^2` with
    :math:`n_j` the pairs of an output and an input pixel that meet at tap j (taps that meet the same pixel count as
    their sum), is that of the layer really used; so the stable rank is as good as the norm. The smallest value and the
    condition have a formula only for circular padding with strides that divide the grid. For all else they are those of
    the circulant embedding (see :class:`LayerReport`), and the table marks them with ``~``; or with ``>=`` and ``<=``
    for "full" padding, where that is certified. ``smallest=True`` finds the layer's own instead: converged in double
    precision, and certified from below.

    Args:
      params: a tree of arrays of any real floating dtype.
      convs: a tree shaped like ``params``, or a prefix, with a :class:`Conv` at each kernel, and
        ``None`` elsewhere. An :class:`Unknown` gives a row with its reason.
      scales: folds what follows a layer into its row, such as batch normalisation on running statistics. A tree shaped
        like ``params``, or a prefix: the factor of each output channel at a kernel, shape ``(out_channels,)`` after any
        stacked axes, and ``None`` elsewhere. All numbers are then those of the layer and the factors together, and
        the bounds allow for the rounding of their product.
      smallest: find the smallest singular values of zero-padded layers themselves, where their sparse matrices fit in
        memory (up to 64 channels on 16 x 16, 16 on 32 x 32).
      progress: show a progress bar (needs rich).
      execution: how to compute; see :class:`Execution`.

    Returns:
      A :class:`SpectralReport`, plain data: a row per layer, and per member of a stack, in natural order of the paths.

    Raises:
      ValueError, TypeError: ``convs`` or ``scales`` does not fit the parameters (with the path), or the call is under
        ``jit``.
      ImportError: ``progress`` without rich.

    Cost: one layer at a time: the spectrum of its circulant embedding, of which only the extremes are kept, and for
    zero padding some 50 to 500 applications of the layer. With ``smallest`` also two sparse factorisations in double
    precision on the host: 4 s for 64 channels on 8 x 8, 8 s for 16 on 32 x 32, 40 s for 64 on 16 x 16. Layers of
    equal shape and geometry share a compilation.

    Examples:
      >>> import jax.numpy as jnp, opnorm_jax as oj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
      >>> convs = {"conv": {"kernel": oj.Conv((8, 8), padding="CIRCULAR"), "bias": None}}
      >>> report = oj.spectral_report(params, convs)
      >>> print(report)
      layer        kernel    convolution   lower   upper  smallest  condition  stable rank
      -----------  --------  ------------  ------  ------  --------  ---------  -----------
      conv/kernel  3x3 1->1  8x8 CIRCULAR  9.0000  9.0000     0.172       52.5        7.111
      >>> report.layers[0].exact
      True
    """
    check_decomposes(execution)
    if not isinstance(smallest, bool):
        raise TypeError(f"expected smallest to be True or False, got {smallest!r}.")
    rows = list_layers(params, convs)
    factors = {} if scales is None else list_factors(params, convs, scales)
    rows = show_progress(rows, "norms") if progress else rows
    one = lambda path, kernel, conv: _layer(path, kernel, conv, factors.get(path), smallest, execution)
    return SpectralReport(tuple(one(*row) for row in rows))


def frobenius_norm(kernel: np.ndarray, conv: Conv) -> float:
    """Computes the Frobenius norm of the layer itself in float64; ``kernel`` is HWIO."""
    scale = float(np.max(np.abs(kernel))) or 1.0
    kernel = kernel.astype(np.float64) / scale
    correlated = kernel
    for a, pixels in enumerate(met_pixels(resolve(conv, kernel.shape))):
        # At how many outputs two taps meet the same pixel: there they act as their sum.
        together = np.sum((pixels[:, None] == pixels) & (pixels >= 0), axis=-1).astype(np.float64)
        correlated = np.moveaxis(np.tensordot(together, correlated, axes=(1, a)), 0, a)
    return scale * math.sqrt(max(np.sum(kernel * correlated), 0.0))


def _layer(
    path: str, kernel: Any, conv: Conv | Unknown, factor: Any, smallest: bool, execution: Execution
) -> LayerReport:
    shape = tuple(map(int, getattr(kernel, "shape", ())))
    if isinstance(conv, Unknown):
        return LayerReport(path, shape, None, reason=conv.reason)
    wide = canonical_kernel(kernel, conv)
    plain = dataclasses.replace(conv, kernel_layout=None)  # layers that differ only in their layout are alike
    wide = wide if factor is None else wide * jnp.broadcast_to(jnp.asarray(factor, wide.dtype), wide.shape)
    host = np.asarray(wide)
    slack = 0.0 if factor is None else product_rounding(host)
    if not np.isfinite(host).all():
        return LayerReport(path, shape, conv, reason=_NOT_FINITE)
    geometry = resolve(plain, host.shape)
    found = jax.tree.map(float, norm_statistics(wide, geometry, execution))
    frobenius = frobenius_norm(host, plain)
    return LayerReport(
        path,
        shape,
        conv,
        lower=max(found.bounds.lower - slack, 0.0),
        upper=found.bounds.upper + slack,
        norm=found.norm,
        **_smallest(host, geometry, found, smallest, slack),
        frobenius=frobenius,
        stable_rank=(frobenius / found.norm) ** 2 if found.norm else 0.0,
        exact=geometry.exact,
    )


def _smallest(kernel: np.ndarray, geometry: Geometry, found: NormStatistics, own: bool, slack: float) -> dict[str, Any]:
    """Returns what a report says of the smallest singular value; ``found`` is of the circulant embedding."""
    from opnorm_jax._kernel.smallest import smallest_singular_value  # loads SciPy, hence OpenBLAS: not before its use

    resolved = found.smallest > found.resolution
    certified = found.smallest - found.resolution - slack if resolved and (geometry.exact or geometry.full) else 0.0
    if own and not geometry.exact and (layers := smallest_singular_value(kernel, geometry)) is not None:
        condition = found.norm / layers.value if layers.lower > 0 else math.inf
        lower = max(certified, layers.lower - slack, 0.0)
        return dict(smallest=layers.value, smallest_of="layer", smallest_lower=lower, condition=condition)
    return dict(
        smallest=found.smallest,
        smallest_of="layer" if geometry.exact else "embedding",
        smallest_lower=max(certified, 0.0),
        condition=found.largest / found.smallest if resolved else math.inf,
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 3) -> str:
    """Formats a table in plain text.

    A row may be shorter than the header; its last cell then takes no part in the columns' widths.
    """
    whole = [row if len(row) == len(header) else row[:-1] for row in (header, *rows)]
    widths = [max(len(row[n]) for row in whole if n < len(row)) for n in range(len(header))]
    pad = lambda n, cell: cell.ljust(widths[n]) if n < left else cell.rjust(widths[n])
    lines = ["  ".join(pad(n, cell) for n, cell in enumerate(row)).rstrip() for row in (header, *rows)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def printable(text: str) -> str:
    """Returns the text with an escape for every character that a terminal might obey: names come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_progress(rows: list, what: str) -> Iterable:
    """Returns the rows, with a progress bar on stderr while they are taken."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        raise ImportError("progress=True needs rich: pip install 'opnorm-jax[cli]'.") from None
    return track(rows, what, console=Console(stderr=True), transient=True)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    path = printable(layer.path)
    if layer.conv is None:
        return path, "x".join(map(str, layer.shape)), f"({layer.reason})"
    cells = path, _format_kernel(layer.shape, layer.conv), format_conv(layer.conv)
    if layer.reason:
        return *cells[:2], f"{cells[2]} ({layer.reason})"
    below, above = _marks(layer)
    smallest = layer.smallest_lower if below == ">=" else layer.smallest
    bounds = (f"{value:#.5g}" for value in (layer.lower, layer.upper))
    return (
        *cells,
        *bounds,
        f"{below}{smallest:.3g}",
        f"{above}{layer.condition:.3g}",
        f"{layer.stable_rank:.4g}",
    )


def _marks(layer: LayerReport) -> tuple[str, str]:
    """Returns the marks of the smallest value and of the condition."""
    if layer.smallest_of == "layer":
        return ("", "") if layer.exact else ("*", "*")
    return (">=", "<=") if layer.smallest_lower > 0 else ("~", "~")


def _notes(layers: tuple[LayerReport, ...]) -> list[str]:
    notes = {
        "~": "~ of the circulant embedding, not of the layer itself",
        "*": "* converged; a certified lower bound is smallest_lower",
    }
    marks = {_marks(layer)[0] for layer in layers if not layer.reason}
    return [note for mark, note in notes.items() if mark in marks]


def _format_kernel(shape: tuple[int, ...], conv: Conv) -> str:
    size = dict(zip(conv.kernel_layout, shape))
    taps = "x".join(str(size[letter]) for letter in "DHW" if letter in size)
    return f"{taps} {size['I'] * conv.feature_group_count}->{size['O']}".strip()


def format_conv(conv: Conv) -> str:
    """Describes a convolution in a few words, without what is the default."""
    if not conv.input_shape:
        return "dense"
    per_axis = lambda values: str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
    words = ["x".join(map(str, conv.input_shape))]
    for name, values in (("/", conv.strides), ("dilated ", conv.kernel_dilation), ("upsampled ", conv.input_dilation)):
        if set(values) != {1}:
            words.append(name + per_axis(values))
    if conv.feature_group_count > 1:
        words.append(f"groups {conv.feature_group_count}")
    if isinstance(conv.padding, str):
        words.append(conv.padding)
    else:
        shown = lambda pad: pad if isinstance(pad, str) else str(pad[0]) if pad[0] == pad[1] else f"{pad[0]}:{pad[1]}"
        pairs = list(map(shown, conv.padding))
        words.append("pad " + per_axis(pairs))
    return " ".join(words)
