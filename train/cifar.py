"""Trains a Flax ResNet v2 whose convolutions are held inside an operator-norm ball.

    python train/cifar.py                                             bundled handwritten digits, no download
    python train/cifar.py --dataset cifar10 --data-dir DIR            the paper's ResNet-32, 250 epochs
    python train/cifar.py --dataset cifar10 --data-dir DIR --constraint clip --max-norm 0.5 --every 100

The first takes about a minute on two CPU cores. The paper (Sedghi, Gupta and Long, ICLR 2019) reports that
clipping every 100 steps takes ResNet-32's test error on CIFAR-10 from 6.2 % to 5.3 %; this trainer follows its recipe,
and that claim has not been reproduced here yet.

A run that was stopped or killed continues when the same command is given again, to the same bits. SIGTERM and Ctrl-C
let the step under way finish, save, and exit with code 128 + signal (143, 130). It uses all local devices; for several
hosts give each process --coordinator HOST:PORT --num-processes N --process-id I.
"""

import contextlib
import functools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# Read when NumPy and jaxlib load, hence set before. The matrices here are small: more threads only wait for each other,
# and with another process on the cores single steps took up to 80 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms
import certify
import checkpoint
import datasets
import jax
import jax.numpy as jnp
import loop
import numpy as np
import optax
import options
import parallel
import report
import resnet
import tyro
from options import Config
from record import Record
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Run(NamedTuple):
    """A training run, ready to start: what its parts need to know of it."""

    config: Config
    seeds: parallel.Seeds
    layout: parallel.Layout
    convs: Any
    rate: Any  # the learning rate's schedule
    per_epoch: int
    steps: int
    train_set: Any  # on the devices
    test_set: Any
    forward: Any  # arms.make_forward's
    call: Any  # loop.make_run_steps's
    evaluate: Any  # loop.make_evaluate's


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains, tests and reports; returns what summary.json holds, with NaN where the file has null."""
    began = time.perf_counter()
    console = console or Console(quiet=config.process_id not in (None, 0))
    if config.evaluate_only is not None:
        return evaluate_only(config, console)
    config = options.resolve(config)
    parallel.start(config)
    check_folder(config)
    data = datasets.load(config.dataset, config.data_dir, config.download)
    run, state = prepare(config, data)
    first = run.seeds.split(state.params)
    console.print(
        f"ResNet-{config.depth} v2, {resnet.count_parameters(first[0]):,} parameters, {config.dataset}, "
        f"{run.steps:,} steps on {run.layout.devices} device(s); constraint: {config.constraint}"
        + ("" if config.constraint == "none" else f", max_norm {config.max_norm:g}")
    )
    with locked(config.out_dir), contextlib.closing(open_folder(config)) as checkpoints:
        state, record, compile_seconds = train_on(run, state, data, checkpoints, console)
        summary = finish(run, state, first, record, console, {"compile_seconds": compile_seconds, "began": began})
        parallel.wait("finished")
    return summary


def prepare(
    config: Config,
    data: datasets.Dataset,
    hyper: dict[str, np.ndarray] | None = None,
    numbers: tuple[int, ...] | None = None,
) -> tuple[Run, loop.TrainState]:
    """The run, and its state before the first step.

    ``hyper`` and ``numbers``, from a sweep, hold each network's own learning_rate and max_norm, and its seed, in place
    of the configuration's.
    """
    per_epoch = len(data.train_images) // config.batch_size
    if per_epoch < 1:
        raise ValueError(f"expected batch_size of at most {len(data.train_images)} images, got {config.batch_size}.")
    steps = per_epoch * config.epochs
    if steps >= 2**31:  # they are counted in int32
        raise ValueError(f"expected fewer steps than 2^31, got {steps:,}: too many epochs.")
    dtype = jnp.bfloat16 if config.bf16 else jnp.float32
    model = resnet.ResNet(config.depth, config.width, 10, config.batch_norm, config.batch_norm_momentum, dtype)
    image = data.train_images.shape[1:]
    init = lambda key: model.init(key, jnp.zeros((1, *image)), train=False)
    shapes = jax.eval_shape(init, jax.random.key(0))
    convs = resnet.convolutions(model, shapes, image, config.norm_of)
    decay_steps = None if config.epochs_per_decay is None else config.epochs_per_decay * per_epoch

    def make_tx(learning_rate, max_norm):
        constraint = arms.make_constraint(config.constraint, max_norm, convs, config.every)
        rate = loop.schedule(learning_rate, steps, decay_steps)
        return loop.optimizer(config.optimizer, rate, config.weight_decay, convs, constraint)

    make = make_tx if hyper is None else optax.inject_hyperparams(make_tx)
    tx = make(config.learning_rate, config.max_norm)
    rate = loop.schedule(config.learning_rate if hyper is None else hyper["learning_rate"], steps, decay_steps)

    def create(key, hyper):
        variables = init(jax.random.fold_in(key, 2))
        params = variables["params"]
        opt_state = (tx if hyper is None else make(**hyper)).init(params)
        return loop.TrainState(params, variables.get("batch_stats", {}), opt_state, jnp.zeros((), jnp.int32), key)

    layout = parallel.layout(config.batch_size, config.devices)
    seeds = parallel.Seeds(numbers or tuple(config.seed + n for n in range(config.seeds)), hyper)
    state, axes = seeds.create(create)
    pad, flip = image[0] // 8, config.dataset != "digits"
    forward = arms.make_forward(model, config.constraint, config.max_norm)
    call = loop.make_run_steps(forward, tx, loop.Batches(config.batch_size, per_epoch, pad, flip), layout, axes)
    eval_batch_size = min(config.eval_batch_size, len(data.test_images))
    evaluate = loop.make_evaluate(forward, eval_batch_size, layout, config.seeds > 1)
    train_set = layout.place((data.train_images, data.train_labels))
    test_set = layout.place((data.test_images, data.test_labels))
    run = Run(config, seeds, layout, convs, rate, per_epoch, steps, train_set, test_set, forward, call, evaluate)
    return run, layout.place(state)


def train_members(
    config: Config,
    hyper: dict[str, np.ndarray],
    numbers: tuple[int, ...],
    console: Console,
    data: datasets.Dataset | None = None,
) -> tuple[Run, loop.TrainState, Record]:
    """Trains networks that differ in seed, learning rate and bound alone, from the folder's checkpoint if there is one.

    ``hyper`` and ``numbers`` are as in :func:`prepare`; ``data`` stands in for the configuration's data set.
    Returns the run, its last state and its record.
    """
    data = data or datasets.load(config.dataset, config.data_dir, config.download)
    run, state = prepare(config, data, hyper, numbers)
    folder = config.out_dir
    with locked(folder), contextlib.closing(checkpoint.Checkpoints(folder / "checkpoints", config.keep)) as checkpoints:
        state, record, _ = train_on(run, state, data, checkpoints, console)
    return run, state, record


def train_on(
    run: Run, state: loop.TrainState, data: datasets.Dataset, checkpoints: checkpoint.Checkpoints, console: Console
) -> tuple[loop.TrainState, Record, float]:
    """Trains from the newest checkpoint of this run, or else from ``state``.

    Returns the last state, the record, and the seconds of compilation.
    """
    config = run.config
    owner = {"config": options.identity(config), "data": checkpoint.digest(data)}
    found = checkpoints.restore(state, console.print, functools.partial(check_owner, config, owner))
    state, position = found or (state, None)
    if position is not None:
        console.print(f"continuing from the checkpoint of step {position['step']:,} in {config.out_dir}")
    with contextlib.closing(Record(config.out_dir, position, config.tensorboard)) as record:
        save = lambda step, state: checkpoints.save(step, state, {**record.position(step), "owner": owner})
        state, compile_seconds = train(run, state, record, save, console)
    return state, record, compile_seconds


def check_owner(config: Config, owner: dict[str, Any], position: dict[str, Any]) -> None:
    """Raises an error if a checkpoint was saved by a run of another configuration, or on other data."""
    if (saved := position.get("owner")) is None:
        raise ValueError(f"{config.out_dir}: its checkpoint does not say of which run it is. Choose another --out-dir.")
    options.check_same(config, saved["config"])
    if saved["data"] != owner["data"]:
        raise ValueError(
            f"{config.out_dir}: expected the data set that its checkpoint was trained on, got another (SHA-256 "
            f"{owner['data'][:12]}, there {saved['data'][:12]}). Choose another --out-dir, or --resume never."
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one run at a time. The system gives the lock back when the process ends, however it does."""
    if fcntl is None or not parallel.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: expected a folder that no other run is using, got one that another process has locked. "
                "Wait for it, or choose another --out-dir."
            ) from None
        yield


def check_folder(config: Config) -> None:
    """An error, before anything is done, if the run cannot go on in its folder."""
    saved, checkpoints = config.out_dir / "config.json", config.out_dir / "checkpoints"
    if config.resume != "never" and saved.is_file():
        options.check_same(config, report.load_json(saved))
    if config.resume == "must" and not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        raise FileNotFoundError(f"{checkpoints}: expected a checkpoint for --resume must, got none.")
    parallel.wait("folder checked")


def open_folder(config: Config) -> checkpoint.Checkpoints:
    """The run's folder, with its configuration saved; and its checkpoints."""
    folder = config.out_dir
    if parallel.is_first():
        if config.resume == "never" and folder.is_dir():
            for name in ("checkpoints", "tensorboard"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(folder / name)
        folder.mkdir(parents=True, exist_ok=True)
        report.save_json(folder / "config.json", options.plain(config))
    parallel.wait("folder ready")
    return checkpoint.Checkpoints(folder / "checkpoints", config.keep)


def train(
    run: Run, state: loop.TrainState, record: Record, save: Callable[[int, Any], None], console: Console
) -> tuple[loop.TrainState, float]:
    """Steps, tests and saves, to the end or until told to stop; returns the state and the seconds of compilation."""
    config, step = run.config, int(state.step)
    last = min(run.steps, config.max_steps or run.steps)
    ends = loop.call_ends(run.per_epoch, jax.default_backend())
    compiled: dict[int, Any] = {}
    compile_seconds, saved_at, fresh, previous = 0.0, time.monotonic(), True, None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, asked_to_stop() as asked:
        bar = progress.add_task("training", total=last, completed=step)
        while step < last:
            n = next(end for end in ends if end > step % run.per_epoch) - step % run.per_epoch
            if n not in compiled:
                began = time.perf_counter()
                compiled[n] = run.call.lower(state, *run.train_set, steps=n).compile()
                compile_seconds += time.perf_counter() - began
            began = time.perf_counter()
            state, loss, accuracy = compiled[n](state, *run.train_set)
            step += n
            done, ended = step >= last, step % run.per_epoch == 0
            # One call is left under way while the next is prepared, so that the device does not wait for Python.
            jax.block_until_ready(loss if fresh or done or ended else previous)
            record.add(n, loss, accuracy, time.perf_counter() - began, timed=not fresh)
            fresh, previous = False, loss
            progress.update(bar, completed=step)
            astray = False  # whether to keep nothing of the state
            if ended:
                words, astray = end_epoch(run, state, step, record)
                progress.update(bar, description=words)
            minutes = (time.monotonic() - saved_at) / 60
            stop, due = parallel.agree(bool(asked), minutes >= config.save_minutes)
            if stop or due or done or (ended and step // run.per_epoch % config.save_every == 0):
                astray = astray or is_astray(config, loss)
                if not astray:
                    save(step, state)
                saved_at = time.monotonic()
            if ended and astray:
                break
            if stop and not done:
                saved = "diverged, not saved" if astray else "saved"
                console.print(f"asked to stop: {saved} at step {step:,} of {run.steps:,}; the same command continues")
                raise SystemExit(128 + (asked[0] if asked else signal.SIGTERM))
    return state, compile_seconds


def end_epoch(run: Run, state: loop.TrainState, step: int, record: Record) -> tuple[str, bool]:
    """Tests, writes the epoch's row, and puts it in a few words. Also tells whether the run is astray."""
    error = run.evaluate(state.params, state.batch_stats, *run.test_set)
    row = {"epoch": step // run.per_epoch, "step": step, "learning_rate": np.asarray(run.rate(step - 1)).tolist()}
    row = record.end_epoch(row, error, run.config.batch_size)
    words = f"loss {np.mean(row['train_loss']):.3f}, test error {100 * np.mean(row['test_error']):.2f} %"
    return words, is_astray(run.config, row["train_loss"])


def is_astray(config: Config, loss: Any) -> bool:
    """Tells whether the loss is NaN or infinite, and the run is to halt for it."""
    return config.halt_on_nan and not bool(np.isfinite(loss).all())


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; a second one acts as usual, at once."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number, frame):
        del frame
        received.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(
    run: Run, state: loop.TrainState, first: list[Any], record: Record, console: Console, times: dict[str, float]
) -> dict[str, Any]:
    """Constrains once more, tests, and leaves the weights, the summary, the spectra and the table."""
    config, constrained = run.config, run.config.constraint != "none"
    steps, seconds = record.timed if record.timed[0] else (1, float("inf"))
    # The last steps may have left the ball: the network that is delivered, and tested, is inside.
    constrain = jax.jit(run.seeds.map(arms.make_finish(config.constraint, config.max_norm, run.convs)))
    params = jax.block_until_ready(constrain(state.params))
    every = 1 if config.constraint == "normalize" else config.every
    share = median_seconds(constrain, state.params) / every / (seconds / steps) if constrained else 0.0
    errors = run.evaluate(params, state.batch_stats, *run.test_set)
    networks, statistics = run.seeds.split(params), run.seeds.split(state.batch_stats)
    summary = {
        "config": options.plain(config),
        "environment": report.environment(),
        "parameters": resnet.count_parameters(networks[0]),
        "steps": int(state.step),
        **report.mean_and_error(errors),
        "norms_before": report.norms(first, run.convs),
        "norms_after": report.norms(networks, run.convs),
        "images_per_second": config.seeds * steps * config.batch_size / seconds,
        "compile_seconds": times["compile_seconds"],
        # Measured: one call of the constraint on the final parameters, over `every`, against the mean step. The
        # derivative that normalize takes besides is not in it.
        "constraint_share": share,
        "diverged": None if report.is_finite((params, state.batch_stats)) else diverged(config),
    }
    if config.certify and summary["diverged"] is None:
        images, labels = (np.asarray(part)[: config.certify_images] for part in run.test_set)
        summary["certificate"] = certify.certify(run.forward, networks[0], statistics[0], images, labels)
    if parallel.is_first():
        report.plot_spectra(first[0], networks[0], run.convs, config.out_dir / "spectra.png")
        for seed, network, stats in zip(run.seeds.numbers, networks, statistics):
            name = "params.safetensors" if config.seeds == 1 else f"params_seed{seed}.safetensors"
            report.save_params(config.out_dir / name, network, stats)
        summary["total_seconds"] = time.perf_counter() - times["began"]
        report.save_json(config.out_dir / "summary.json", summary)
        report.print_table(console, summary)
        if int(state.step) < run.steps:
            console.print(f"stopped after {int(state.step):,} of {run.steps:,} steps (--max-steps)")
        console.print(f"written to {config.out_dir}: config, metrics, summary, spectra.png, params.safetensors")
    return summary


def diverged(config: Config) -> str:
    """What is wrong with the weights, and where the last finite ones are."""
    steps = [int(path.name) for path in (config.out_dir / "checkpoints").glob("*") if path.name.isdigit()]
    kept = f"the checkpoint of step {max(steps):,} is finite" if steps else "no checkpoint was saved before"
    return "the weights hold NaN or infinity" + (f"; {kept}" if config.halt_on_nan else "")


def evaluate_only(config: Config, console: Console) -> dict[str, Any]:
    """Tests saved weights on the data set of their run; the network is the one that the run's config.json describes."""
    weights, folder = checkpoint.load_weights(config.evaluate_only)
    saved = options.load(report.load_json(folder / "config.json"))
    data_dir = config.data_dir or saved.data_dir
    data = datasets.load(saved.dataset, data_dir, config.download)
    dtype = jnp.bfloat16 if saved.bf16 else jnp.float32
    model = resnet.ResNet(saved.depth, saved.width, 10, saved.batch_norm, saved.batch_norm_momentum, dtype)
    image = jnp.zeros((1, *data.test_images.shape[1:]))
    wanted = jax.eval_shape(lambda: {"batch_stats": {}, **model.init(jax.random.key(0), image, train=False)})
    checkpoint.check_weights(weights, wanted, config.evaluate_only)
    stacked = weights["params"]["stem"]["kernel"].ndim > 4
    # Saved weights of a normalised network may be a checkpoint's, from before the last rescaling.
    forward = arms.make_forward(model, saved.constraint, saved.max_norm)
    evaluate = loop.make_evaluate(forward, min(config.eval_batch_size, len(data.test_images)), None, stacked)
    test = jax.device_put((data.test_images, data.test_labels))
    errors = np.atleast_1d(evaluate(weights["params"], weights["batch_stats"], *test))
    for seed, error in enumerate(errors, saved.seed):
        console.print(f"test error{f' of seed {seed}' if stacked else ''}: {100 * error:.2f} %")
    summary = report.mean_and_error(errors)
    if config.certify:
        first = (lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)) if stacked else (lambda tree: tree)
        images, labels = (part[: config.certify_images] for part in (data.test_images, data.test_labels))
        networks = first(weights["params"]), first(weights["batch_stats"])
        summary["certificate"] = certify.certify(forward, *networks, images, labels)
        report.print_certificate(console, summary["certificate"])
    return summary


def median_seconds(function: Any, *args: Any, repeats: int = 5) -> float:
    """Median wall-clock time of a compiled function."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


if __name__ == "__main__":
    try:
        summary = main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if summary.get("diverged"):
        raise SystemExit(f"error: the run diverged: {summary['diverged']}. Try a smaller --learning-rate.")
