"""The paper's section 4.2, with error bars: ResNet-32 with batch norm on CIFAR-10, clipped every 100 steps or not.

    python train/headline.py --data-dir DIR                    four arms, three seeds each, 250 epochs
    python train/headline.py --data-dir DIR --minutes 9        stop cleanly after so long; the same command goes on
    python train/headline.py --data-dir DIR --epochs 2 --depth 8 --max-steps 20     to see that it works

The arms share everything but the constraint: none, clip at 0.5 and at 1.0 (the paper's; it reports 5.3 % and 5.5 %
against 6.2 %), and the nearest projection to 1.0, which holds the norm of the zero-padded layers themselves. First the
throughput of one seed and of several at once is measured, unless it was before. Each arm's last epoch counts, not its
best.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in cifar.py
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cifar
import numpy as np
import options
import report
import tyro
from rich.console import Console
from rich.table import Table

ARMS = {
    "none": {"constraint": "none"},
    "clip 0.5": {"constraint": "clip", "max_norm": 0.5},
    "clip 1.0": {"constraint": "clip", "max_norm": 1.0},
    "project 1.0": {"constraint": "project", "max_norm": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Headline:
    """Options."""

    data_dir: Path | None = None
    """CIFAR-10, as for train/cifar.py; without it, digits."""
    out_dir: Path = Path("runs/headline")
    """Where the arms' folders and headline.jsonl are kept."""
    seeds: int = 3
    """Networks an arm, trained at once."""
    epochs: int | None = None
    """Default: 250, for digits 15."""
    depth: int | None = None
    """Default: 32, for digits 8."""
    bf16: bool = False
    """Compute in bfloat16."""
    max_steps: int | None = None
    """Stop each arm after so many steps, on the unchanged schedule."""
    minutes: float | None = None
    """Stop cleanly after so long, as on SIGTERM."""
    throughput_steps: int = 400
    """How many steps the throughput is measured over; 0 leaves it out."""


def main(headline: Headline, console: Console | None = None) -> list[dict[str, Any]]:
    """All arms, and the table."""
    console = console or Console()
    if headline.minutes is not None:
        timer = threading.Timer(60 * headline.minutes, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    if headline.throughput_steps:
        for seeds in dict.fromkeys((1, headline.seeds)):
            steps = headline.throughput_steps
            config = configure(headline, f"throughput{seeds}", seeds=seeds, constraint="none", max_steps=steps)
            row = run(config, console)
            console.print(f"throughput, {seeds} at once: {row['images_per_second']:,.0f} images/s in all")
    rows = []
    for arm, choice in ARMS.items():
        config = configure(headline, arm.replace(" ", ""), seeds=headline.seeds, **choice)
        rows.append({"arm": arm, **row_of(run(config, console))})
        show(rows, console)
    headline.out_dir.mkdir(parents=True, exist_ok=True)
    (headline.out_dir / "headline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def configure(headline: Headline, name: str, **choice: Any) -> options.Config:
    """One arm's options for the trainer."""
    dataset = "digits" if headline.data_dir is None else "cifar10"
    shared = {
        "epochs": headline.epochs,
        "depth": headline.depth,
        "bf16": headline.bf16,
        "every": 100,
        "save_minutes": 2,
    }
    shared |= {"dataset": dataset, "data_dir": headline.data_dir, "out_dir": headline.out_dir / name}
    return options.Config(**{"max_steps": headline.max_steps, **shared, **choice})


def run(config: options.Config, console: Console) -> dict[str, Any]:
    """The arm's summary: at once if it is there, else after training from where it was left."""
    path = config.out_dir / "summary.json"
    if path.exists():
        summary = report.load_json(path)
        options.check_same(options.resolve(config), summary["config"])
        if summary["config"]["max_steps"] == config.max_steps:
            return summary
    return cifar.main(config, console)


def row_of(summary: dict[str, Any]) -> dict[str, Any]:
    """What is reported of an arm: mean, standard error, and the 95 % interval of Student's t."""
    from scipy import stats

    errors = np.atleast_1d(summary.get("test_errors", summary["test_error"]))
    row = {"test_errors": errors.tolist(), "mean": float(errors.mean())}
    if len(errors) > 1:
        row["standard_error"] = float(errors.std(ddof=1) / len(errors) ** 0.5)
        half = float(stats.t.ppf(0.975, len(errors) - 1)) * row["standard_error"]
        row["interval_95"] = [row["mean"] - half, row["mean"] + half]
    kept = ("steps", "images_per_second", "constraint_share", "compile_seconds", "environment", "config")
    return {**row, **{name: summary[name] for name in kept}}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table so far."""
    table = Table(title="test error after the last epoch")
    for column in ("arm", "seeds", "mean", "standard error", "95 % interval", "of a step"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = ["", ""]
        if "interval_95" in row:
            low, high = (100 * end for end in row["interval_95"])
            spread = [f"{100 * row['standard_error']:.2f}", f"{low:.2f} to {high:.2f} %"]
        share = f"{100 * row['constraint_share']:.2f} %"
        table.add_row(row["arm"], str(len(row["test_errors"])), f"{100 * row['mean']:.2f} %", *spread, share)
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Headline, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
