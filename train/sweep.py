"""The paper's section 4.3: does clipping help whatever the hyperparameters? A grid of runs, many of them at once.

    python train/sweep.py                                                  8 short runs on the bundled digits
    python train/sweep.py --dataset cifar10 --data-dir DIR --grid paper    the paper's 150 runs
    python train/sweep.py ... --shard 0/8                                  one machine's share (train/sweep.sbatch)
    python train/sweep.py ... --ray                                        spread over a Ray cluster
    python train/sweep.py --out-dir DIR --show                             the table and the picture of what is there

Runs that differ in learning rate and bound alone are one program: they are stacked and trained together by ``vmap``.
The same command given again goes on where it was stopped or killed; finished runs are not run again. Each finished
group leaves OUT_DIR/results/NAME.jsonl, one line a run: several machines' results are merged by copying those files.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in cifar.py
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cifar
import numpy as np
import options
import report
import tyro
from rich.console import Console
from rich.table import Table

# Recalled from the paper, but for the number of phases: it is that of the official schedule, three decays.
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "paper": {
        "max_norm": (None, 0.5, 1.0, 1.5, 2.0),
        "learning_rate": (0.001, 0.003, 0.01, 0.03, 0.1),
        "batch_size": (32, 64),
        "epochs_per_decay": (1, 2, 3),
    },
    "small": {
        "max_norm": (None, 1.0),
        "learning_rate": (0.03, 0.1),
        "batch_size": (32, 64),
        "epochs_per_decay": (1,),
    },
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Options."""

    dataset: Literal["digits", "cifar10"] = "digits"
    """As for train/cifar.py."""
    data_dir: Path | None = None
    """As for train/cifar.py."""
    out_dir: Path = Path("runs/sweep")
    """Where results/, sweep.png and the runs under way are kept."""
    grid: Literal["small", "paper"] = "small"
    """8 runs, or the paper's 150: bound (none, 0.5 to 2) x learning rate x minibatch x epochs per decay."""
    constraint: Literal["clip", "rescale", "project"] = "clip"
    """How the norms are constrained where there is a bound; clip is the paper's."""
    phases: int = 4
    """Each run lasts so many times its epochs per decay."""
    depth: int | None = None
    """6n + 2 layers. Default: 32, for digits 8."""
    every: int = 100
    """Constrain on one step in so many."""
    seed: int = 0
    """Of all runs."""
    at_once: int = 20
    """Train at most so many networks together; fewer if memory is short."""
    shard: str = "0/1"
    """I/N: this machine's share, the I-th of N (from 0)."""
    ray: bool = False
    """Run the groups as tasks on a Ray cluster, or on this machine (needs ray, the extra [sweep]); out_dir must be on a
    file system that all share."""
    show: bool = False
    """Train nothing: show what the results in out_dir say."""


Member = dict[str, Any]  # max_norm (None: no constraint), learning_rate, batch_size, epochs_per_decay


def main(sweep: Sweep, console: Console | None = None) -> list[dict[str, Any]]:
    """Runs this machine's share, and shows all results that are there."""
    console = console or Console()
    if not sweep.show:
        done = finished(sweep)
        left = lambda member: not any(identity(sweep, member).items() <= row.items() for row in done)
        shares = [list(filter(left, members)) for members in share_of(groups(sweep), sweep.shard)]
        todo = [members for members in shares if members]
        console.print(f"{sum(map(len, todo))} runs to do here, in {len(todo)} groups")
        (run_on_ray if sweep.ray else run_here)(sweep, todo, console)
    results = finished(sweep)
    if not results:
        raise ValueError(f"{sweep.out_dir}: expected results to show, got none. Run without --show.")
    show(results, sweep.out_dir / "sweep.png", console)
    return results


def identity(sweep: Sweep, member: Member) -> dict[str, Any]:
    """All that decides what a run computes."""
    shared = {name: getattr(sweep, name) for name in ("dataset", "phases", "depth", "every", "seed")}
    return {**shared, "constraint": "none" if member["max_norm"] is None else sweep.constraint, **member}


def groups(sweep: Sweep) -> list[list[Member]]:
    """All runs, those of one program together, at most ``at_once`` of them."""
    grid = GRIDS[sweep.grid]
    alike: dict[Any, list[Member]] = {}
    for values in itertools.product(*grid.values()):
        member = dict(zip(grid, values, strict=True))
        kind = member["batch_size"], member["epochs_per_decay"], member["max_norm"] is None
        alike.setdefault(kind, []).append(member)
    size = max(1, sweep.at_once)
    return [kind[n : n + size] for kind in alike.values() for n in range(0, len(kind), size)]


def share_of(todo: list[list[Member]], shard: str) -> list[list[Member]]:
    """The groups of shard I/N."""
    try:
        index, count = map(int, shard.split("/"))
    except ValueError:
        raise ValueError(f"expected --shard I/N, as in 0/8, got {shard!r}.") from None
    if not 0 <= index < count:
        raise ValueError(f"expected --shard I/N with 0 <= I < N, got {shard!r}.")
    return todo[index::count]


def run_here(sweep: Sweep, todo: list[list[Member]], console: Console) -> None:
    """One after another."""
    for n, members in enumerate(todo, 1):
        console.print(f"group {n} of {len(todo)}: {len(members)} runs, {describe(members[0])}")
        run_group(sweep, members, console)


def run_on_ray(sweep: Sweep, todo: list[list[Member]], console: Console) -> None:
    """As tasks of a Ray cluster, each with a GPU if there are any."""
    try:
        import ray
    except ImportError:
        raise ValueError("expected ray for --ray: pip install 'opnorm-jax[sweep]'.") from None
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]  # tasks import this module
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
    ray.init(ignore_reinit_error=True, log_to_driver=False, runtime_env=environment)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    sweep = dataclasses.replace(sweep, out_dir=sweep.out_dir.absolute())

    @ray.remote(num_gpus=gpus, num_cpus=1, max_retries=2)
    def task(members):
        run_group(sweep, members, Console(quiet=True))

    pending = {task.remote(members): members for members in todo}
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        members = pending.pop(ready)
        ray.get(ready)
        console.print(f"done: {len(members)} runs, {describe(members[0])}; {len(pending)} groups left")


def describe(member: Member) -> str:
    kind = "no constraint" if member["max_norm"] is None else "constrained"
    return f"minibatch {member['batch_size']}, {member['epochs_per_decay']} epochs per decay, {kind}"


def run_group(sweep: Sweep, members: list[Member], console: Console) -> None:
    """Trains the members together, from the checkpoint if there is one, and writes their results."""
    rows = [identity(sweep, member) for member in members]
    name = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
    folder = sweep.out_dir / "under_way" / name
    config = options.resolve(
        options.Config(
            dataset=sweep.dataset,
            data_dir=sweep.data_dir,
            out_dir=folder,
            depth=sweep.depth,
            epochs=sweep.phases * members[0]["epochs_per_decay"],
            epochs_per_decay=members[0]["epochs_per_decay"],
            batch_size=members[0]["batch_size"],
            constraint=rows[0]["constraint"],
            every=sweep.every,
            seed=sweep.seed,
            seeds=len(members),
            keep=1,
        )
    )
    hyper = {
        "learning_rate": np.array([member["learning_rate"] for member in members]),
        "max_norm": np.array([member["max_norm"] or 1.0 for member in members]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    cifar.train_members(config, hyper, (sweep.seed,) * len(members), console)
    epochs = report.read_lines(folder / "metrics.jsonl")
    names = ("test_error", "train_error", "train_loss")
    last = {name: np.atleast_1d(epochs[-1][name]).tolist() for name in names}
    lines = [{**row, **{name: values[n] for name, values in last.items()}} for n, row in enumerate(rows)]
    report.write_lines(
        sweep.out_dir / "results" / f"{name}.jsonl", [{**line, **report.environment()} for line in lines]
    )
    shutil.rmtree(folder)


def finished(sweep: Sweep) -> list[dict[str, Any]]:
    """The results that are there, of any shard."""
    files = sorted((sweep.out_dir / "results").glob("*.jsonl"))
    return [row for file in files for row in report.read_lines(file)]


def show(results: list[dict[str, Any]], picture: Path, console: Console) -> None:
    """The table, and the errors sorted, one curve a bound, as the paper draws them. NaN counts as failure: 100 %."""
    bounds = sorted({row["max_norm"] for row in results}, key=lambda bound: (bound is not None, bound or 0))
    table = Table(title=f"test error of the last epoch, {len(results)} runs")
    for column in ("bound", "runs", "best", "median", "mean", "worst"):
        table.add_column(column, justify="right")
    curves = {}
    for bound in bounds:
        errors = [row["test_error"] for row in results if row["max_norm"] == bound]
        curves[bound] = errors = np.sort(np.nan_to_num(np.asarray(errors, np.float64), nan=1.0))
        figures = (errors[0], np.median(errors), errors.mean(), errors[-1])
        label = "none" if bound is None else f"{bound:g}"
        table.add_row(label, str(len(errors)), *(f"{100 * figure:.2f} %" for figure in figures))
    console.print(table)
    plot(curves, picture)
    console.print(f"drawn to {picture}")


def plot(curves: dict[Any, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for bound, errors in curves.items():
        style = {"color": "black", "linestyle": "--"} if bound is None else {}
        label = "no constraint" if bound is None else f"norm at most {bound:g}"
        axis.plot(np.arange(1, len(errors) + 1), 100 * errors, marker=".", label=label, **style)
    axis.set(xlabel="runs, sorted by error", ylabel="test error, %")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Sweep, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
