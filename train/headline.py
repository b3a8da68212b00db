"""The paper's section 4.2, with error bars: ResNet-32 with batch norm on CIFAR-10, clipped every 100 steps or not.

    python train/headline.py --data-dir DIR                    all arms, three seeds each, 250 epochs
    python train/headline.py --data-dir DIR --minutes 9        stop cleanly after so long; the same command goes on
    python train/headline.py --data-dir DIR --epochs 2 --depth 8 --max-steps 20     to see that it works

The arms share everything but the constraint: none, clip at 0.5 and at 1.0 (the paper's; it reports 5.3 % and 5.5 %
against 6.2 %), rescaling to 1.0, and the nearest projection to 1.0, which holds the norm of the zero-padded layers
themselves. Arms that differ in the bound alone are one program, and all their seeds are trained at once. What counts is
each arm's last epoch, not its best, and the network as it was trained; the error after one more constraint stands
beside it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in cifar.py
sys.path.insert(0, str(Path(__file__).resolve().parent))

import checkpoint
import cifar
import jax
import jax.numpy as jnp
import numpy as np
import options
import report
import resnet
import tyro
from rich.console import Console
from rich.table import Table

import opnorm_jax as oj

STACKS: dict[str, dict[str, float]] = {  # the bound of each arm; an infinite one changes no bit
    "clip": {"none": np.inf, "clip0.5": 0.5, "clip1.0": 1.0},
    "rescale": {"rescale1.0": 1.0},
    "project": {"project1.0": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Headline:
    """Options."""

    data_dir: Path | None = None
    """CIFAR-10, as for train/cifar.py; without it, digits."""
    out_dir: Path = Path("runs/headline")
    """Where headline.jsonl and each arm's folder are kept."""
    stacks: tuple[Literal["clip", "rescale", "project"], ...] = ("clip", "rescale", "project")
    """Which arms to train: clip includes the one without a constraint."""
    seeds: int = 3
    """Networks an arm."""
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
    norms: bool = True
    """Bound the norms of all trained layers at the end; they can be had later, by the same command."""


def main(headline: Headline, console: Console | None = None) -> list[dict[str, Any]]:
    """All arms, and the table."""
    console = console or Console()
    if headline.minutes is not None:
        timer = threading.Timer(60 * headline.minutes, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    configs: list[options.Config] = []
    for constraint in dict.fromkeys(headline.stacks):
        arms = [configure(headline, name, constraint, bound) for name, bound in STACKS[constraint].items()]
        if not all(map(is_done, arms)):
            train_stack(headline, constraint, arms, console)
        configs += arms
        rows = write(headline, configs)
        show(rows, console)
    if headline.norms:
        for config in configs:
            add_norms(config)
        rows = write(headline, configs)
        show(rows, console)
    return rows


def configure(headline: Headline, name: str, constraint: str, bound: float, **choice: Any) -> options.Config:
    """The options with which train/cifar.py would train one arm."""
    if np.isinf(bound):
        constraint, bound = "none", 1.0
    return options.resolve(
        options.Config(
            dataset="digits" if headline.data_dir is None else "cifar10",
            data_dir=headline.data_dir,
            out_dir=headline.out_dir / name,
            depth=headline.depth,
            epochs=headline.epochs,
            constraint=constraint,
            max_norm=bound,
            every=100,
            bf16=headline.bf16,
            max_steps=headline.max_steps,
            **{"seeds": headline.seeds, **choice},
        )
    )


def is_done(config: options.Config) -> bool:
    """Whether the arm's folder holds its results; an error if it holds another run's."""
    path = config.out_dir / "summary.json"
    if not path.exists():
        return False
    saved = report.load_json(path)["config"]
    options.check_same(config, saved)
    return saved["max_steps"] == config.max_steps


def train_stack(headline: Headline, constraint: str, arms: list[options.Config], console: Console) -> None:
    """Trains all seeds of these arms at once, from where they were left, and gives each arm its folder."""
    seeds, networks = headline.seeds, headline.seeds * len(arms)
    bounds = np.repeat(list(STACKS[constraint].values()), seeds)
    name = str(Path("under_way") / constraint)
    config = configure(headline, name, constraint, 1.0, seeds=networks, save_every=10**9, save_minutes=3)
    config.out_dir.mkdir(parents=True, exist_ok=True)
    hyper = {"learning_rate": np.full(networks, config.learning_rate), "max_norm": bounds}
    console.print(f"{', '.join(arm.out_dir.name for arm in arms)}: {networks} networks at once")
    run, state, record = cifar.train_members(config, hyper, tuple(range(seeds)) * len(arms), console)
    steps, seconds = record.timed
    constrain = lambda params, bound: oj.constrain(params, bound, run.convs, constraint=constraint)
    finish = jax.jit(jax.vmap(constrain) if networks > 1 else constrain)
    limits = jnp.float32(bounds if networks > 1 else bounds[0])
    params = finish(state.params, limits)
    share = cifar.median_seconds(finish, state.params, limits) / config.every / (seconds / steps)
    test = lambda params: np.atleast_1d(run.evaluate(params, state.batch_stats, *run.test_set))
    errors, errors_constrained = test(state.params), test(params)
    weights, statistics = run.seeds.split(params), run.seeds.split(state.batch_stats)
    epochs = report.read_lines(config.out_dir / "metrics.jsonl")
    for n, arm in enumerate(arms):
        members = slice(n * seeds, (n + 1) * seeds)
        arm.out_dir.mkdir(parents=True, exist_ok=True)
        report.save_json(arm.out_dir / "config.json", options.plain(arm))
        own = lambda value, members=members: value[members] if isinstance(value, list) else value
        lines = [json.dumps({key: own(value) for key, value in epoch.items()}) + "\n" for epoch in epochs]
        (arm.out_dir / "metrics.jsonl").write_text("".join(lines))
        for seed, network, stats in zip(range(seeds), weights[members], statistics[members]):
            report.save_params(arm.out_dir / f"params_seed{seed}.safetensors", network, stats)
        summary = {
            "test_errors": errors[members].tolist(),
            "test_errors_constrained": errors_constrained[members].tolist(),
            "steps": int(state.step),
            "networks_at_once": networks,
            "images_per_second": networks * steps * config.batch_size / seconds,
            "constraint_share": share,  # of the whole stack, as if every arm had a bound
            "environment": report.environment(),
            "config": options.plain(arm),
        }
        report.save_json(arm.out_dir / "summary.json", summary)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(config.out_dir)


def add_norms(config: options.Config) -> None:
    """Adds to an arm's summary the least and the largest norm of its trained layers, by certified bounds."""
    path = config.out_dir / "summary.json"
    summary = report.load_json(path)
    if "norms" in summary:
        return
    files = [config.out_dir / f"params_seed{seed}.safetensors" for seed in range(config.seeds)]
    networks = [checkpoint.load_weights(file)[0] for file in files]
    image = (8, 8, 1) if config.dataset == "digits" else (32, 32, 3)
    convs = resnet.convolutions(resnet.ResNet(config.depth, config.width), networks[0], image, config.norm_of)
    largest = report.norms([network["params"] for network in networks], convs)
    report.save_json(path, {**summary, "norms": largest})


def write(headline: Headline, configs: list[options.Config]) -> list[dict[str, Any]]:
    """One row an arm, which headline.jsonl then holds."""
    rows = [row_of(config.out_dir.name, report.load_json(config.out_dir / "summary.json")) for config in configs]
    (headline.out_dir / "headline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def row_of(arm: str, summary: dict[str, Any]) -> dict[str, Any]:
    """What is reported of an arm: mean, standard error, and the 95 % interval of Student's t."""
    from scipy import stats

    errors = np.array(summary["test_errors"], np.float64)
    row = {"arm": arm, "test_errors": errors.tolist(), "mean": float(errors.mean())}
    if len(errors) > 1:
        row["standard_error"] = float(errors.std(ddof=1) / len(errors) ** 0.5)
        half = float(stats.t.ppf(0.975, len(errors) - 1)) * row["standard_error"]
        row["interval_95"] = [row["mean"] - half, row["mean"] + half]
    if "norms" in summary:
        lower, upper = zip(*summary["norms"].values())
        row["largest_norm_of_a_layer"] = {"least": [min(lower), min(upper)], "greatest": [max(lower), max(upper)]}
    kept = (
        "test_errors_constrained",
        "steps",
        "networks_at_once",
        "images_per_second",
        "constraint_share",
        "environment",
        "config",
    )
    return {**row, **{name: summary[name] for name in kept}}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table so far."""
    table = Table(title="test error after the last epoch")
    for column in ("arm", "seeds", "mean", "standard error", "95 % interval", "norms, at most"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = ["", ""]
        if "interval_95" in row:
            low, high = (100 * end for end in row["interval_95"])
            spread = [f"{100 * row['standard_error']:.2f}", f"{low:.2f} to {high:.2f} %"]
        norms = row.get("largest_norm_of_a_layer")
        largest = f"{norms['greatest'][1]:.4f}" if norms else ""
        table.add_row(row["arm"], str(len(row["test_errors"])), f"{100 * row['mean']:.2f} %", *spread, largest)
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Headline, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
