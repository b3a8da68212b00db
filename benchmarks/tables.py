"""The tables of docs/speed.md, and one of docs/which_bound.md, in Markdown, from the JSON lines in results/."""

import json

from benchmarks.claims import summary
from benchmarks.projection import inside

VERSIONS = ("device", "cores", "python", "jax", "numpy", "flax", "optax", "torch")


def read(folder, name):
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(folder):
    """All of them, each with the versions and hardware it was measured with."""
    makers = {"claims": claims, "projection": projection, "training": training, "scaling": scaling, "gpu": gpu}
    makers["real_networks"] = real_networks
    parts = []
    for name, maker in makers.items():
        if rows := read(folder, name):
            where = ", ".join(f"{key} {rows[0][key]}" for key in VERSIONS if key in rows[0])
            parts.append(f"## {name} ({where})\n\n{maker(rows)}")
    return "\n\n".join(parts)


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


def real_networks(rows):
    """Bounds on published networks, seconds and memory."""
    lines = [
        [row["network"], f"{row['size']} x {row['size']}", power(row["product"]), power(row["sdp"])]
        + [f"{row['seen']:.3g}", f"{row['sdp_seconds']:.2g}", f"{row['GiB at most']:.2g}"]
        for row in rows
    ]
    return markdown(["network", "images", "product", "sdp", "largest Jacobian seen", "sdp, s", "GiB"], lines)


def power(value):
    """A number in Markdown, as a power of ten if it is large."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{value:.3g}" if value < 1e4 else f"{digits} · 10<sup>{int(exponent)}</sup>"


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
