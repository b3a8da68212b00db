"""What a run says and leaves: the layers' norms, the table at the end, the picture of the spectra, the weights."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import opnorm_jax as oj
from opnorm_jax._tree.plot import layer_values


def layers(params: Any, convs: Any) -> list[tuple[str, jax.Array, oj.Conv]]:
    """(name, kernel, Conv) of each convolution, from the input on."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    found = [
        (jax.tree_util.keystr(path[:-1], simple=True, separator="/"), kernel, conv)
        for (path, kernel), conv in zip(paths, treedef.flatten_up_to(convs))
        if conv is not None
    ]
    return sorted(found, key=lambda layer: (layer[0] != "stem", layer[0]))


def norms(networks: list[Any], convs: Any) -> dict[str, tuple[float, float]]:
    """Returns certified (lower, upper) bounds on each convolution's operator norm, of several networks the largest.

    NaN where a kernel is not finite.
    """
    found: dict[str, tuple[float, float]] = {}
    for params in networks:
        for name, kernel, conv in layers(params, convs):
            lower, upper = map(float, oj.operator_norm_bounds(kernel, conv))
            found[name] = tuple(np.maximum(found.get(name, 0.0), (lower, upper)).tolist())  # NaN wins, unlike in max
    return found


def is_finite(tree: Any) -> bool:
    """Tells whether no array of the tree holds a NaN or an infinity."""
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def mean_and_error(values: Any) -> dict[str, Any]:
    """What a summary says of one figure: of several seeds each one's, their mean, and the mean's standard error."""
    values = np.atleast_1d(values)
    if len(values) == 1:
        return {"test_error": float(values[0])}
    error = float(values.std(ddof=1) / len(values) ** 0.5)
    return {"test_error": float(values.mean()), "test_error_standard_error": error, "test_errors": values.tolist()}


def environment() -> dict[str, str]:
    """Versions and hardware, to stand beside every figure."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "opnorm_jax": oj.__version__,
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
    }


def print_table(console: Console, summary: Mapping[str, Any]) -> None:
    """The closing table: norms before and after, then the run's figures."""
    config = summary["config"]
    bound = config["max_norm"] if config["constraint"] != "none" else None
    kind = "certified" if config["norm_of"] == "layer" else "circular stand-in, strides ignored"
    title = f"operator norms, lower and upper bounds ({kind})" + (f", max_norm {bound:g}" if bound else "")
    seeds = config["seeds"]
    table = Table(title=title + (f", largest of {seeds} seeds" if seeds > 1 else ""))
    table.add_column("layer", no_wrap=True)
    for column in ("before ≤", "after ≥", "after ≤", "within"):
        table.add_column(column, justify="right")
    for name, (_, before) in summary["norms_before"].items():
        lower, after = summary["norms_after"][name]
        within = "" if bound is None else "yes" if after <= bound * (1 + 1e-5) else "no"
        table.add_row(name, f"{before:.4f}", f"{lower:.6f}", f"{after:.6f}", within)
    console.print(table)
    figures = Table(show_header=False)
    spread = f" ± {100 * summary['test_error_standard_error']:.2f}" if seeds > 1 else ""
    if seeds > 1:
        each = " ".join(f"{100 * error:.2f}" for error in summary["test_errors"])
        figures.add_row("test error of each seed", each)
    figures.add_row("test error", f"{100 * summary['test_error']:.2f}{spread} %")
    figures.add_row("test accuracy", f"{100 * (1 - summary['test_error']):.2f}{spread} %")
    figures.add_row("images/s while training", f"{summary['images_per_second']:.0f}")
    figures.add_row("compilation", f"{summary['compile_seconds']:.1f} s")
    figures.add_row("in all", f"{summary['total_seconds']:.1f} s")
    if summary["diverged"]:
        figures.add_row("diverged", summary["diverged"])
    if bound is not None:
        share = f"{100 * summary['constraint_share']:.2f} %"
        figures.add_row("constraining, share of a step (timed alone, over every)", share)
    console.print(figures)
    if "certificate" in summary:
        print_certificate(console, summary["certificate"])


def plot_spectra(before: Any, after: Any, convs: Any, path: Path) -> None:
    """Draws each layer's singular values in descending order against their rank, as the paper does.

    A zero-padded layer is drawn as its circulant embedding, with its strides: no curve passes a bound that holds.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, params, title in ((axes[0], before, "before training"), (axes[1], after, "after")):
        # As in the paper, 1x1 layers are left out.
        chosen = [layer for layer in layers(params, convs) if layer[1].shape[0] > 1]
        for depth, (name, kernel, conv) in enumerate(chosen):
            values = layer_values(kernel, conv)
            color = plt.get_cmap("viridis")(depth / max(1, len(chosen) - 1))
            label = name if depth in (0, len(chosen) - 1) else None
            axis.plot(np.linspace(0, 1, len(values)), values, color=color, label=label, linewidth=1.2)
        axis.set(title=title, xlabel="rank / number of singular values")
    axes[0].set_ylabel("singular value")
    axes[1].legend(title="from (dark) to (light)")
    figure.suptitle("Spectra of the 3x3 layers, strides included (zero-padded layers: their circulant embeddings)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_certificate(console: Console, certificate: Mapping[str, Any]) -> None:
    """The table of certified accuracy, and what the attack says of it."""
    constants = certificate["lipschitz"]
    title = (
        f"{certificate['images']} test images, {100 * certificate['right']:.1f} % right; Lipschitz constant at most "
        f"{constants['sdp']:.4g} (product of norms {constants['product']:.4g})"
    )
    table = Table(title=title)
    for column in ("radius, pixels from 0 to 1", "certified", "by the product", "right when attacked"):
        table.add_column(column, justify="right")
    for row in certificate["radii"]:
        shares = (row[name] for name in ("certified", "certified_by_product", "under_attack"))
        table.add_row(f"{255 * row['radius']:.0f}/255", *(f"{100 * share:.1f} %" for share in shares))
    console.print(table)
    attacks = certificate["attacks_inside"]
    console.print(f"attacks inside a certified radius: {attacks['tried']}, of which succeeded: {attacks['succeeded']}")


def valid_json(content: Any) -> Any:
    """Returns the content with None for every number that is not finite: JSON has no name for those."""
    if isinstance(content, dict):
        return {key: valid_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [valid_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_json(path: Path, content: Any) -> None:
    """Writes one JSON document, whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(valid_json(content), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(valid_json(row), allow_nan=False) + "\n" for row in rows))
    part.replace(path)


def save_params(path: Path, params: Any, batch_stats: Any) -> None:
    """Weights and batch statistics, flat names, without pickle."""
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_flatten_with_path({"params": params, "batch_stats": batch_stats})[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in named.items()}, path)


def load_json(path: Path) -> Any:
    """One JSON object; an error names the file."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {str(error):.200}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}.")
    return found
