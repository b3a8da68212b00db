"""The paper's section 4.2 in miniature, for one CPU core: ResNet-8 on CIFAR-10 halved to 16x16, 10,000 training images.

    python train/miniature.py --data-dir DIR      40 networks, an hour; stop it at will, the same command goes on
    python train/miniature.py                     the bundled digits, to see that it works

The arms are those of train/headline.py. Every arm has the same tuning: each of three learning rates with one seed,
judged on a tenth of the training set that no network trains on. The best is trained again with five other seeds, and
those networks see the test set, once, after the last step. As in the paper a constraint acts about four times an epoch.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in cifar.py
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cifar
import datasets
import headline
import jax
import numpy as np
import options
import report
import tyro
from rich.console import Console

LEARNING_RATES = (0.03, 0.1, 0.3)
MONITORED = 500  # held-out images that are looked at after every epoch


@dataclasses.dataclass(frozen=True)
class Miniature:
    """Options."""

    data_dir: Path | None = None
    """CIFAR-10, as for train/cifar.py; without it, digits."""
    out_dir: Path = Path("runs/miniature")
    """Where miniature.jsonl and the networks under way are kept."""
    images: int = 10_000
    """To train on, at most nine tenths of the training set."""
    epochs: int = 10
    """Of each network; the learning rate falls tenfold at 40 %, 60 % and 80 % of them."""
    seeds: int = 5
    """Networks an arm, after the tuning."""
    every: int = 20
    """Constrain on one step in so many."""


def main(miniature: Miniature, console: Console | None = None) -> list[dict[str, Any]]:
    """All networks that are not there yet, a row each."""
    console = console or Console()
    name = "digits" if miniature.data_dir is None else "cifar10"
    data = halved(datasets.load(name, miniature.data_dir))
    held_out = len(data.train_images) // 10
    train = (data.train_images[:-held_out][: miniature.images], data.train_labels[:-held_out][: miniature.images])
    judges = {
        "tuning": (data.train_images[-held_out:], data.train_labels[-held_out:]),
        "test": (data.test_images, data.test_labels),
    }
    seen = datasets.Dataset(*train, *(part[:MONITORED] for part in judges["tuning"]))
    arms = [(arm, kind, bound) for kind, bounds in headline.STACKS.items() for arm, bound in bounds.items()]
    path = miniature.out_dir / "miniature.jsonl"
    rows = report.read_lines(path) if path.exists() else []

    def network(stage: str, arm: str, kind: str, bound: float, learning_rate: float, seed: int) -> dict[str, Any]:
        own = {"stage": stage, "arm": arm, "learning_rate": learning_rate, "seed": seed}
        shared = {"dataset": name, "train_images": len(train[0]), "epochs": miniature.epochs, "every": miniature.every}
        for row in rows:
            if (own | shared).items() <= row.items():
                return row
        config = configure(miniature, name, kind, own)
        error, norm, seconds = train_one(config, learning_rate, bound, seen, judges[stage], console)
        figures = {"error": error, "largest_norm": norm, "seconds": seconds, "images": len(judges[stage][0])}
        row = {**own, **figures, **shared, **report.environment()}
        rows.append(row)
        report.write_lines(path, rows)
        shutil.rmtree(config.out_dir)
        console.print(f"{stage}, {arm}, rate {learning_rate:g}, seed {seed}: error {100 * error:.2f} %")
        return row

    chosen = {}
    for arm in arms:
        tried = [network("tuning", *arm, rate, 0) for rate in LEARNING_RATES]
        chosen[arm] = min(tried, key=lambda row: row["error"])["learning_rate"]
    for seed in range(1, miniature.seeds + 1):
        for arm, rate in chosen.items():
            network("test", *arm, rate, seed)
    return rows


def halved(data: datasets.Dataset) -> datasets.Dataset:
    """Images of 32x32 pixels as the means of their 2x2 squares; others as they are."""

    def half(images: np.ndarray) -> np.ndarray:
        n, h, w, c = images.shape
        squares = images.reshape(n, h // 2, 2, w // 2, 2, c)
        return images if h < 32 else np.round(squares.mean((2, 4), dtype=np.float32)).astype(np.uint8)

    return data._replace(train_images=half(data.train_images), test_images=half(data.test_images))


def configure(miniature: Miniature, dataset: str, kind: str, own: dict[str, Any]) -> options.Config:
    """The options of one network, whose learning rate and bound come beside them: all of a kind are one program."""
    folder = "-".join(map(str, own.values()))
    return options.resolve(
        options.Config(
            dataset=dataset,
            out_dir=miniature.out_dir / "under_way" / folder,
            depth=8,
            epochs=miniature.epochs,
            batch_norm_momentum=0.9,
            constraint=kind,
            every=miniature.every,
            seed=own["seed"],
            save_every=10**9,
            save_minutes=1,
            keep=1,
        )
    )


def train_one(
    config: options.Config, rate: float, bound: float, data: datasets.Dataset, judge: tuple[Any, Any], console: Console
) -> tuple[float, float, float]:
    """The error on the judging images, the largest norm of a layer (certified), and the seconds of the steps."""
    hyper = {"learning_rate": np.array([rate]), "max_norm": np.array([bound])}
    run, state, record = cifar.train_members(config, hyper, (config.seed,), console, data)
    error = run.evaluate(state.params, state.batch_stats, *run.layout.place(judge))
    norms = report.norms(run.seeds.split(state.params), run.convs)
    return error, max(upper for _, upper in norms.values()), record.timed[1]


if __name__ == "__main__":
    plan = tyro.cli(Miniature, description=__doc__)
    if jax.config.jax_compilation_cache_dir is None:  # three programs for all networks
        jax.config.update("jax_compilation_cache_dir", str(plan.out_dir.absolute() / "compiled"))
    try:
        main(plan)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
