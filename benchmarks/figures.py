"""The pictures of the documentation, from the JSON lines in results/."""

from benchmarks.rivals import METHODS as NORMS
from benchmarks.spectrum import METHODS
from benchmarks.tables import DOCS, read

ON_THE_SITE = ("optimizers", "rivals")


def draw(folder):
    """Those whose results are there, beside them or on the site; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for maker in (spectrum, scaling, optimizers, rivals):
        name = maker.__name__
        if rows := read(folder, name):
            drawn.append((DOCS if name in ON_THE_SITE else folder) / f"{name}.png")
            figure = maker(rows, plt)
            figure.savefig(drawn[-1], dpi=120)
            plt.close(figure)
    return drawn


def spectrum(rows, plt):
    """Seconds against channels, one panel per kernel size, with the newest jax that was measured."""
    newest = max(row["jax"] for row in rows)
    rows = [row for row in rows if row["jax"] == newest]
    panels = sorted({(tuple(row["taps"]), tuple(row["map"])) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (taps, size) in zip(axes[0], panels):
        here = [row for row in rows if (tuple(row["taps"]), tuple(row["map"])) == (taps, size)]
        lines(axis, here, "channels", METHODS)
        axis.set(title=f"{taps[0]}x{taps[1]} kernels, {size[0]}x{size[1]} maps")
    axes[0, 0].legend()
    figure.suptitle(f"jax {newest}")
    return figure


def scaling(rows, plt):
    """Seconds against the map's side, the channels, and the layers."""
    panels = {
        "map": ("map", "pixels along the map (64 channels)"),
        "channels": ("channels", "channels (16x16 maps)"),
        "methods": ("channels", "channels, by method (16x16 maps)"),
        "layers": ("layers", "layers alike under one transformation"),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), layout="constrained")
    for axis, (claim, (key, label)) in zip(axes, panels.items()):
        here = [row for row in rows if row["claim"] == claim]
        lines(axis, here, key, here[0]["seconds"])
        axis.set(xlabel=label)
        axis.legend(fontsize="small")
    return figure


def optimizers(rows, plt):
    """The training loss of each epoch, one panel per data set."""
    rows = [row for row in rows if "curve" in row]
    panels = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, data in zip(axes[0], panels):
        for row in (row for row in rows if row["data"] == data):
            axis.plot(range(1, 1 + row["epochs"]), row["curve"], marker="o", label=row["optimizer"])
        low, high = axis.dataLim.intervaly
        axis.set(title=data, xlabel="epoch", ylabel="training loss, mean of the seeds")
        axis.set_yscale("log" if high > 10 * low else "linear")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return figure


def rivals(rows, plt):
    """Value over the norm against time over that of our upper bound: each layer with zero padding."""
    rows = [row for row in rows if row["claim"] == "norm" and row["padding"] == "zero"]
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for number, name in enumerate(name for name in NORMS if name in rows[0]["seconds"]):
        points = [
            (row["seconds"][name] / row["seconds"]["operator_norm_bounds, upper alone"], row["ratio"][name])
            for row in rows
            if name in row["seconds"]
        ]
        axis.scatter(*zip(*points), label=name, color=f"C{number % 10}", marker="os"[number // 10], alpha=0.7)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="time, upper bound of operator_norm_bounds = 1",
        ylabel="value over the true norm",
    )
    ticks = [0.3, 0.5, 0.7, 1, 1.5, 2, 3]
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def lines(axis, rows, key, names):
    """One line for each of ``names``, with the colours in their order."""
    for color, name in enumerate(names):
        points = [(row[key], row["seconds"][name]) for row in rows if name in row["seconds"]]
        if points:
            axis.loglog(*zip(*points), marker="o", label=name, color=f"C{color}")
    measured = sorted({row[key] for row in rows})
    axis.set_xticks(measured, map(str, measured))
    axis.minorticks_off()
    axis.set(xlabel=key, ylabel="seconds")
    axis.grid(alpha=0.3)
