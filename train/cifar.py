"""Trains a Flax ResNet v2 whose convolutions are held inside an operator-norm ball.

    python train/cifar.py                                             bundled handwritten digits, no download
    python train/cifar.py --dataset cifar10 --data-dir DIR            the paper's ResNet-32, 250 epochs
    python train/cifar.py --dataset cifar10 --data-dir DIR --method clip --max-norm 0.5 --every 100

The first takes about half a minute on two CPU cores. The paper (Sedghi, Gupta and Long, ICLR 2019) reports that
clipping every 100 steps takes ResNet-32's test error on CIFAR-10 from 6.2 % to 5.3 %; this trainer follows its recipe,
and that claim has not been reproduced here yet.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

# Read when NumPy and jaxlib load, hence set before. The matrices here are small: more threads only wait for each other,
# and with another process on the cores single steps took up to 80 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets  # noqa: E402
import loop  # noqa: E402
import report  # noqa: E402
import resnet  # noqa: E402

import opnorm_jax as oj  # noqa: E402

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"depth": 8, "epochs": 15, "method": "rescale", "every": 1, "batch_norm_momentum": 0.9},
    "cifar10": {"depth": 32, "epochs": 250, "method": "none", "every": 100, "batch_norm_momentum": 0.997},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options; where the default is None it depends on the data set, and what was used is saved in config.json."""

    dataset: Literal["digits", "cifar10"] = "digits"
    """Bundled handwritten digits (1,797 images, 8 x 8), or CIFAR-10."""
    data_dir: Path | None = None
    """CIFAR-10's official binary or python folder, or either archive, or a folder that holds one of them."""
    download: bool = False
    """Fetch CIFAR-10 (170 MB, checksum verified) if it is not in data_dir."""
    out_dir: Path = Path("runs/latest")
    """Where config.json, metrics.jsonl, summary.json, spectra.png and params.safetensors go."""
    depth: int | None = None
    """6n + 2 layers: 8, 14, 20, 32, ... Default: 32, for digits 8."""
    width: int = 16
    """Channels of the first stage."""
    batch_norm: bool = True
    """Batch normalisation before each ReLU."""
    batch_norm_momentum: float | None = None
    """Decay of the running statistics. Default: 0.997, for digits, with their few steps, 0.9."""
    epochs: int | None = None
    """Default: 250, for digits 15. The learning rate falls tenfold at 40 %, 60 % and 80 % of them."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float | None = None
    """Initial learning rate. Default: 0.1 * batch_size / 128."""
    weight_decay: float = 2e-4
    """L2 penalty on all trainables."""
    method: Literal["none", "clip", "rescale", "project"] | None = None
    """How the norms are constrained. Default: none, for digits rescale."""
    max_norm: float = 1.0
    """The bound on each convolution's operator norm."""
    every: int | None = None
    """Constrain on one step in so many, and once more after the last. Default: 100, for digits 1."""
    certify: Literal["padding", "circular"] = "padding"
    """The bound is on the layer as it is (zero padding, strides), or on the paper's circular stand-in."""
    seed: int = 0
    """Of the initialisation, the shuffling and the augmentation."""
    eval_batch_size: int = 1000
    """Images a step when testing."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains, tests, reports; returns what summary.json holds."""
    console = console or Console()
    began = time.perf_counter()
    config = resolve(config)
    data = datasets.load(config.dataset, config.data_dir, config.download)
    batch_size = config.batch_size
    per_epoch = len(data.train_images) // batch_size
    if per_epoch < 1:
        raise ValueError(f"expected batch_size of at most {len(data.train_images)} images, got {batch_size}.")
    steps = per_epoch * config.epochs
    model = resnet.ResNet(config.depth, config.width, 10, config.batch_norm, config.batch_norm_momentum)
    image = data.train_images.shape[1:]
    key = jax.random.key(config.seed)
    variables = jax.jit(lambda k: model.init(k, jnp.zeros((1, *image)), train=False))(jax.random.fold_in(key, 2))
    params = variables["params"]
    convs = resnet.convolutions(params, config.depth, config.width, image[:2], config.certify)
    constraint = loop.make_constraint(config.method, config.max_norm, convs, config.every)
    rate = loop.schedule(config.learning_rate, steps)
    tx = loop.optimizer(rate, config.weight_decay, constraint)

    config.out_dir.mkdir(parents=True, exist_ok=True)
    report.save_json(config.out_dir / "config.json", plain(config))
    console.print(
        f"ResNet-{config.depth} v2, {resnet.count_parameters(params):,} parameters, {config.dataset}, {steps:,} steps; "
        f"constraint: {config.method}" + (f", max_norm {config.max_norm:g}" if constraint else "")
    )
    first = jax.tree.map(np.asarray, params)
    norms_before = report.norms(params, convs)
    digits = config.dataset == "digits"
    run = loop.make_run_steps(model, tx, batch_size, pad=1 if digits else 4, flip=not digits, per_epoch=per_epoch)
    evaluate = loop.make_evaluate(model, min(config.eval_batch_size, len(data.test_images)))
    train = jax.device_put((data.train_images, data.train_labels))
    test = jax.device_put((data.test_images, data.test_labels))
    state = loop.TrainState(params, variables.get("batch_stats", {}), tx.init(params), jnp.zeros((), jnp.int32), key)
    lengths = loop.steps_per_call(per_epoch, jax.default_backend())
    compile_began = time.perf_counter()
    compiled = {n: run.lower(state, *train, steps=n).compile() for n in set(lengths)}
    compile_seconds = time.perf_counter() - compile_began

    busy = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, open(config.out_dir / "metrics.jsonl", "w") as metrics:
        bar = progress.add_task("training", total=steps)
        for epoch in range(1, config.epochs + 1):
            epoch_began = time.perf_counter()
            losses, accuracies = [], []
            for n in lengths:
                state, loss, accuracy = compiled[n](state, *train)
                losses.append(n * float(loss))
                accuracies.append(n * float(accuracy))
                progress.update(bar, advance=n)
            seconds = time.perf_counter() - epoch_began
            busy += seconds
            row = {
                "epoch": epoch,
                "step": epoch * per_epoch,
                "train_loss": sum(losses) / per_epoch,
                "train_error": 1 - sum(accuracies) / per_epoch,
                "test_error": evaluate(state.params, state.batch_stats, *test),
                "learning_rate": float(rate(epoch * per_epoch - 1)),
                "seconds": seconds,
                "images_per_second": per_epoch * batch_size / seconds,
            }
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            error = 100 * row["test_error"]
            progress.update(bar, description=f"loss {row['train_loss']:.3f}, test error {error:.2f} %")

    params = state.params
    share = 0.0
    if constraint is not None:
        # The last steps may have left the ball: the network that is delivered, and tested, is inside.
        finish = jax.jit(lambda p: oj.constrain(p, config.max_norm, convs, method=config.method))
        params = jax.block_until_ready(finish(params))
        share = median_seconds(finish, state.params) / config.every / (busy / steps)
    summary = {
        "config": plain(config),
        "environment": report.environment(),
        "parameters": resnet.count_parameters(params),
        "test_error": evaluate(params, state.batch_stats, *test),
        "norms_before": norms_before,
        "norms_after": report.norms(params, convs),
        "images_per_second": steps * batch_size / busy,
        "compile_seconds": compile_seconds,
        # Measured: one call of the constraint on the final parameters, over `every`, against the mean step.
        "constraint_share": share,
    }
    report.plot_spectra(first, params, convs, config.out_dir / "spectra.png")
    save_params(config.out_dir / "params.safetensors", params, state.batch_stats)
    summary["total_seconds"] = time.perf_counter() - began
    report.save_json(config.out_dir / "summary.json", summary)
    report.print_table(console, summary)
    console.print(f"written to {config.out_dir}: config, metrics, summary, spectra.png, params.safetensors")
    return summary


def resolve(config: Config) -> Config:
    """The configuration with nothing left open, checked."""
    if config.dataset not in DEFAULTS:
        raise ValueError(f"expected dataset to be one of {tuple(DEFAULTS)}, got {config.dataset!r}.")
    chosen = {k: v for k, v in DEFAULTS[config.dataset].items() if getattr(config, k) is None}
    if config.learning_rate is None:
        chosen["learning_rate"] = 0.1 * config.batch_size / 128
    config = dataclasses.replace(config, **chosen)
    resnet.blocks(config.depth, config.width)  # type: ignore[arg-type]
    for name in ("width", "epochs", "batch_size", "eval_batch_size", "every"):
        if getattr(config, name) < 1:
            raise ValueError(f"expected {name} to be at least 1, got {getattr(config, name)}.")
    for name in ("learning_rate", "max_norm"):
        if not getattr(config, name) > 0:
            raise ValueError(f"expected {name} to be positive, got {getattr(config, name)}.")
    if not 0 <= config.batch_norm_momentum < 1:
        raise ValueError(f"expected batch_norm_momentum to be in [0, 1), got {config.batch_norm_momentum}.")
    if config.weight_decay < 0:
        raise ValueError(f"expected weight_decay to be 0 or more, got {config.weight_decay}.")
    return config


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def median_seconds(function: Any, argument: Any, repeats: int = 5) -> float:
    """Median wall-clock time of a compiled function."""
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(argument))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def save_params(path: Path, params: Any, batch_stats: Any) -> None:
    """Weights and batch statistics, flat names, without pickle."""
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_flatten_with_path({"params": params, "batch_stats": batch_stats})[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in named.items()}, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
