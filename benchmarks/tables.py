"""The tables of the documentation, in Markdown, from the JSON lines in results/."""

import re
from pathlib import Path

import numpy as np

from benchmarks import spectrum
from benchmarks.claims import summary
from benchmarks.measure import geometric_mean, read
from benchmarks.projection import inside
from benchmarks.rivals import METHODS

VERSIONS = ("device", "cores", "python", "jax", "numpy", "flax", "optax", "torch")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "train" / "reproduce.md"]
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+), (\w+) -->\n.*?(?=<!-- end of table -->)", re.DOTALL)


def tables(folder):
    """All of them, each with the versions and hardware it was measured with."""
    makers = {"claims": claims, "projection": projection, "training": training, "scaling": scaling, "gpu": gpu}
    parts = []
    for name, maker in makers.items():
        if rows := read(folder, name):
            where = ", ".join(f"{key} {rows[0][key]}" for key in VERSIONS if key in rows[0])
            parts.append(f"## {name} ({where})\n\n{maker(rows)}")
    return "\n\n".join(parts)


def filled(page, folder):
    """The text of a page, whose tables are made anew. The comment before each names its results and its function."""

    makers = (
        spectrum_times,
        spectrum_ratios,
        lipschitz,
        real_networks,
        trained_networks,
        rival_norms,
        rival_circular,
        rival_clips,
        tpu_programs,
        miniature,
    )
    of = {maker.__name__: maker for maker in makers}

    def table(found):
        name, maker = found.groups()
        rows = read(folder, name)
        return f"{name}, {maker} -->\n{of[maker](rows)}\n" if rows else found[0]

    return MARKED.sub(table, page.read_text())


def write_pages(folder):
    """Those pages of the documentation whose tables are no longer those of the results; returns their paths."""
    changed = [(page, text) for page in PAGES if (text := filled(page, folder)) != page.read_text()]
    for page, text in changed:
        page.write_text(text)
    return [page for page, _ in changed]


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def claims(rows):
    """Times faster than each rival: geometric mean (least)."""
    found = summary(rows)
    rivals = list(dict.fromkeys(rival for _, _, rival, *_ in found))
    lines = []
    for claim, ours in dict.fromkeys((claim, ours) for claim, ours, *_ in found):
        cells = {r: f"{mean:.3g} ({least:.3g})" for c, o, r, mean, least, _ in found if (c, o) == (claim, ours)}
        lines.append([f"{claim}; {ours}", *(cells.get(rival, "") for rival in rivals)])
    return markdown(["times faster than", *rivals], lines)


def projection(rows):
    """Clips a projection takes, and times faster than the paper's clip inside the ball, for each version of jax."""
    parts = []
    for version in dict.fromkeys(row["jax"] for row in rows):
        own = [row for row in rows if row["jax"] == version]
        lines = [
            [start, f"{row['channels']}@{row['map']}", row["iterations"], f"{row['clips']:.3g}"]
            for start in ("cold", "drift")
            for row in own
            if row["start"] == start
        ]
        parts.append(f"jax {version}\n\n" + markdown(["start", "channels@map", "iterations", "clips"], lines))
        lines = [[norm, name, f"{mean:.3g} ({least:.3g})"] for norm, name, mean, least in inside(own)]
        parts.append(markdown(["norm", "function", "times faster"], lines))
    return "\n\n".join(parts)


def training(rows):
    """Shares of a step."""
    lines = []
    for row in (row for row in rows if row["claim"] == "training"):
        for method, share in row["share"].items():
            step = f"{row['seconds']['step']:.3g}"
            shares = [f"{100 * share[every]:.2g} %" for every in ("every=100", "every=1")]
            lines.append([f"{row['network']}, batch {row['batch']}", step, method, *shares])
    return markdown(["network", "step, s", "method", "every=100", "every=1"], lines)


def scaling(rows):
    """Milliseconds, and peaks of memory."""
    names = {"map": "map", "channels": "channels", "layers": "layers", "devices": "used", "methods": "channels"}
    parts = []
    for claim, key in names.items():
        chosen = [row for row in rows if row["claim"] == claim]
        header = [claim, *chosen[0]["seconds"]]
        lines = [[row[key], *(f"{1e3 * seconds:.3g}" for seconds in row["seconds"].values())] for row in chosen]
        parts.append("milliseconds\n\n" + markdown(header, lines))
    chosen = [row for row in rows if row["claim"] == "memory"]
    keys = ["channels", "map", "GiB of all blocks", "GiB before", "GiB at most"]
    lines = [[row[key] if isinstance(row[key], int) else f"{row[key]:.2f}" for key in keys] for row in chosen]
    return "\n\n".join([*parts, markdown(keys, lines)])


def spectrum_times(rows):
    """Milliseconds for all singular values, for each version of jax."""
    versions = sorted({row["jax"] for row in rows})
    of = {(row["jax"], row["channels"], *row["taps"], *row["map"]): row["seconds"] for row in rows}
    lines = []
    for channels, *sizes in dict.fromkeys(key[1:] for key in of):
        seconds = [of[version, channels, *sizes] for version in versions]
        cells = [f"{1e3 * each[name]:.3g}" if name in each else "-" for each in seconds for name in spectrum.METHODS]
        lines.append(["{} × {}, {} × {}, {}".format(*sizes, channels), *cells])
    header = [f"{name}, jax {version}" for version in versions for name in spectrum.METHODS]
    return markdown(["kernel, map, channels", *header], lines)


def spectrum_ratios(rows):
    """Times faster than each rival, for each version of jax: the geometric mean (least)."""
    lines = []
    for version in sorted({row["jax"] for row in rows}):
        found = [*spectrum.summary([row for row in rows if row["jax"] == version])]
        lines.append([version, *(f"{mean:.3g} ({least:.3g})" for _, mean, least in found)])
    return markdown(["jax", *(f"than {rival}" for rival, *_ in found)], lines)


def lipschitz(rows):
    """Bounds on networks with random weights."""
    number = lambda row, key: power(row[key]) if key in row else ""
    keys = ("product", "sdp", "sdp, jit", "seen")
    lines = [[row["network"], *(number(row, key) for key in keys)] for row in rows]
    return markdown(["network", "product", "sdp", "sdp under `jit`", "largest Jacobian norm at random points"], lines)


def real_networks(rows):
    """Bounds on published networks, seconds and memory."""
    lines = [
        [row["network"], f"{row['size']} x {row['size']}", power(row["product"]), power(row["sdp"])]
        + [f"{row['seen']:.3g}", power(float(f"{row['sdp_seconds']:.2g}")), f"{row['GiB at most']:.2g}"]
        for row in rows
    ]
    return markdown(["network", "images", "product", "sdp", "largest Jacobian norm seen", "sdp, s", "GiB"], lines)


def trained_networks(rows):
    """Of each network's layers with the same map and stride: norms, and how fast their singular values fall."""
    groups = {}
    for row in rows:
        first = row["channels"][0] <= 3
        groups.setdefault((row["network"], first, row["map"], row["stride"]), []).append(row)

    def spread(values, form):
        low, high = (form.format(value) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    lines = []
    for (network, first, size, stride), own in groups.items():
        layers = f"{len(own)} of {size} x {size}" + f", stride {stride}" * (stride > 1) + ", the first" * first
        norms, clipped = [row["norm"] for row in own], [row["after a clip"][0] for row in own]
        shares = [spread([100 * row[f"above {share}"] for row in own], "{:.3g} %") for share in (0.5, 0.01)]
        lines.append([network, layers, spread(norms, "{:.3g}"), *shares, spread(clipped, "{:.3g}")])
    header = ["network", "layers", "norm", "values above half of the largest", "above a hundredth"]
    return markdown([*header, "one clip at half of the norm leaves, over its bound"], lines)


def power(value):
    """A number in Markdown, as a power of ten if it is large."""
    digits, exponent = f"{value:.1e}".split("e")
    if value >= 1e4:
        return f"{digits} · 10<sup>{int(exponent)}</sup>"
    return f"{value:.3g}" if value < 1e3 else f"{value:,.0f}"


def gpu(rows):
    """Throughput, times faster than the plain two-liner, factorisations and their errors, and shares of a step."""
    of = lambda claim: [row for row in rows if row["claim"] == claim]
    parts = []
    lines = [
        [row["networks"], row["computed in"], row["constraint"], f"{1e3 * row['seconds']['step']:.3g}"]
        + [f"{row['images per second']:,.0f}", f"{row['minutes for 250 epochs']:.3g}"]
        + [f"{row['compile_seconds']['step']:.0f}", f"{row['profile']['kernels a step']:.0f}"]
        for row in of("throughput")
    ]
    header = [
        "networks",
        "in",
        "constraint",
        "step, ms",
        "images/s",
        "250 epochs, minutes",
        "compilation, s",
        "kernels a step",
    ]
    parts.append(markdown(header, lines))
    lines = [
        [f"{row['channels']}@{row['map']}", name, f"{1e3 * row['seconds'][name]:.3g}", f"{times:.3g}"]
        for row in of("kernels")
        for name, times in row["times faster"].items()
    ]
    parts.append(markdown(["channels@map", "function", "ms", "times faster"], lines))
    calls = ("eigh", "cholesky", "product")
    lines = [
        [row["side"], row["matrices"], *(f"{1e3 * row['seconds'][call]:.3g}" for call in calls)]
        + [f"{row['errors in eps']['eigenvalues']:.2g}"]
        for row in of("factorizations")
    ]
    parts.append(markdown(["side", "matrices", *(f"{call}, ms" for call in calls), "eigenvalues' error, eps"], lines))
    return "\n\n".join([*parts, training(rows)] if of("training") else parts)


def rival_norms(rows):
    """Of each set of layers with zero padding: each value over the norm, and its time over that of our upper bound."""
    rows = [row for row in rows if row["claim"] == "norm" and row["padding"] == "zero"]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    time = lambda row, method: row["seconds"][method] / row["seconds"]["operator_norm_bounds, upper alone"]
    lines = []
    for method, bound in METHODS.items():
        everywhere = [row["ratio"][method] for row in rows if method in row["ratio"]]
        cells = [bound, f"{sum(ratio < 1 for ratio in everywhere)} of {len(everywhere)}"]
        for name in sets:
            own = [row for row in rows if row["set"] == name and method in row["ratio"]]
            ratios = [row["ratio"][method] for row in own]
            times = [time(row, method) for row in own if method in row["seconds"]]
            spread = f" ({min(ratios):.4g} to {max(ratios):.4g})" if len(ratios) > 1 else ""
            cells.append(f"{geometric_mean(ratios):.4g}{spread}" if own else "-")
            cells.append(f"{geometric_mean(times):.2g}" if times else "-")
        lines.append([code(method), *cells])
    header = ["method", "an upper bound?", "below the truth"]
    return markdown([*header, *(f"{name}{what}" for name in sets for what in ("", ", time"))], lines)


def rival_circular(rows):
    """Of the layer with circular padding: each method's value over the norm, and milliseconds."""
    row = next(row for row in rows if row["claim"] == "norm" and row["padding"] == "circular")
    lines = [
        [code(name), f"{ratio:.5f}", f"{1e3 * row['seconds'][name]:.3g}" if name in row["seconds"] else ""]
        for name, ratio in row["ratio"].items()
    ]
    return markdown(["method", "value over the norm", "ms"], lines)


def rival_clips(rows):
    """What each leaves of the norm, how far the kernel moved, and milliseconds."""
    rows = [row for row in rows if row["claim"] == "clip"]
    header = ["method", *(f"{row['layer']}: {what}" for row in rows for what in ("norm", "moved", "ms"))]
    cells = lambda row, name: (row["norm"][name], row["moved"][name], 1e3 * row["seconds"][name])
    lines = [[code(name), *(f"{cell:.4g}" for row in rows for cell in cells(row, name))] for name in rows[0]["norm"]]
    return markdown(header, lines)


def code(name):
    """A name with those of functions as code."""
    return re.sub(r"\b[a-z]+(_[a-z]+)+\b", r"`\g<0>`", name)


def tpu_programs(rows):
    """What XLA counts of each program, on one chip and on four."""
    of = {(row["program"], row["chips"]): row for row in rows}
    shown = {1: ("GFLOP", "MB accessed", "MiB temporary", "compile_seconds"), 4: ("GFLOP", "MiB temporary")}
    lines = []
    for name in dict.fromkeys(row["program"] for row in rows):
        one, four = (of.get((name, chips), {}) for chips in shown)
        counts = [(row, key) for row, keys in zip((one, four), shown.values()) for key in keys]
        cells = [f"{row[key]:.3g}" if key in row else "-" for row, key in counts]
        if "error" in one:
            cells[3] = one["error"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in four.get("collectives", {}).items())
        lines.append([code(name), *cells, kinds or four.get("error", "none" if four else "-")])
    header = ["program", "GFLOP", "MB accessed", "MiB temporary", "compilation, s"]
    return markdown([*header, "4 chips: GFLOP each", "4 chips: MiB each", "4 chips: collectives"], lines)


def miniature(rows):
    """Of each arm: its tuning, the test errors of its seeds, how far they are from the arm without, and its norms."""
    of = lambda stage, arm: [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
    percent = lambda values: " ".join(f"{100 * value:.2f}" for value in values)

    def spread(values):
        error = 100 * np.std(values, ddof=1) / len(values) ** 0.5
        return f"{100 * np.mean(values):.2f} ± {error:.2f}"

    rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
    without = np.array([row["error"] for row in of("test", "none")])
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = of("test", arm)
        errors = np.array([row["error"] for row in own])
        tuning = percent(row["error"] for row in of("tuning", arm))
        norms = [row["largest_norm"] for row in own]
        lines.append([re.sub(r"(?=\d)", " ", arm, count=1), tuning, f"{own[0]['learning_rate']:g}", percent(errors)])
        lines[-1] += [spread(errors), "" if arm == "none" else spread(errors - without)]
        lines[-1] += [f"{min(norms):.4g} to {max(norms):.4g}"]
    header = ["arm", f"held-out errors at rates {', '.join(f'{rate:g}' for rate in rates)}, %", "rate taken"]
    header += ["test errors of the seeds, %", "mean ± standard error, %", "minus none, seed by seed"]
    return markdown([*header, "largest norm of a layer"], lines)
