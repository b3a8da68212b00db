"""Loss and errors of several runs against the epoch, as one picture.

python train/curves.py runs/one runs/other --out curves.png
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import report
import tyro


@dataclasses.dataclass(frozen=True)
class Curves:
    """Options."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of train/cifar.py, each with its metrics.jsonl and config.json."""
    out: Path = Path("curves.png")
    """The picture."""


def main(curves: Curves) -> None:
    """Draws it. Of several seeds: the mean, and their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"train_loss": "training loss", "train_error": "training error", "test_error": "test error"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for run in curves.runs:
        label, epochs, rows = read(run)
        for axis, (name, title) in zip(axes, panels.items()):
            values = np.array([np.atleast_1d(row[name]) for row in rows])
            axis.plot(epochs, values.mean(1), marker="." if len(epochs) < 30 else None, label=label)
            if values.shape[1] > 1:
                axis.fill_between(epochs, values.min(1), values.max(1), alpha=0.2)
            axis.set(title=title, xlabel="epoch")
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(curves.out, dpi=120)
    print(f"drawn to {curves.out}")


def read(run: Path) -> tuple[str, list[int], list[dict[str, float]]]:
    """Label, epochs and rows of one run."""
    for name in ("metrics.jsonl", "config.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"expected the folder of a run, with {name}, got {run}.")
    config = report.load_json(run / "config.json")
    label = config["constraint"] + ("" if config["constraint"] == "none" else f" {config['max_norm']:g}")
    rows = report.read_lines(run / "metrics.jsonl")
    return label, [row["epoch"] for row in rows], rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Curves, description=__doc__))
    except OSError as error:
        sys.exit(f"error: {error}")
