"""Optimizers compared: SGD, Adam, optax's Muon on flattened kernels, and Muon for convolutions.

    python -m benchmarks optimizers [--quick] [--data-dir CIFAR10]

On the handwritten digits, and on 2,560 images of CIFAR-10 with 2,000 of its test images, if it is there: a ResNet-8 v2
with batch normalisation and no constraint (train/resnet.py, width 8), batches of 128, no augmentation. Each optimizer
gets the same tuning: learning rates a factor of 2 apart, one seed each, chosen by the error on a fifth of the training
images that is held out; five of them, and more at an end where the best one stands. With the chosen rate it trains on
all training images with three other seeds. The rate falls linearly to zero. A line gives, for each, the chosen rate,
the training loss of every epoch (mean), that of the last and the test error (mean and standard error of the mean), and
the time of a step against SGD's.

Before that, for kernels of several sizes and SAME padding: the descent <G, X> / |X| of directions X, in parts of the
best known, for a Gaussian gradient G and one of rank 4; and the cost of ours, in clips of G at half of its norm.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import opnorm_jax as oj
from benchmarks.measure import interleaved, show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train"))
import datasets  # noqa: E402
import loop  # noqa: E402
import resnet  # noqa: E402

BATCH = 128
RATES = {  # the middle ones of five
    "SGD, momentum 0.9": 0.1,
    "Adam": 4e-3,
    "Muon, flattened kernels": 0.02,
    "Muon for convolutions": 0.05,
    "Muon for convolutions, exact": 0.05,
}


def make(name, rate, convs):
    """An optimizer by name; ``rate`` is a schedule. Muon's other parameters have Adam, at a tenth of the rate."""
    if name.startswith("SGD"):
        return optax.sgd(rate, momentum=0.9, nesterov=True)
    if name == "Adam":
        return optax.adam(rate)
    tenth = lambda count: 0.1 * rate(count)
    if name.startswith("Muon for"):
        return oj.conv_muon(rate, convs, exact="exact" in name, adam_learning_rate=tenth)
    flat = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    dimensions = jax.tree.map(lambda conv: None if conv is None else flat, convs, is_leaf=lambda node: node is None)
    return optax.contrib.muon(rate, adam_learning_rate=tenth, muon_weight_dimension_numbers=dimensions)


def prepare(width, images):
    """The model and its convolutions."""
    model = resnet.ResNet(8, width, batch_norm_momentum=0.9)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])), train=False))
    return model, resnet.convolutions(model, variables, images.shape[1:], "layer")


def start(model, tx, seed, images):
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(seed), images[:1].astype(jnp.float32)
    )
    return variables["params"], variables["batch_stats"], tx.init(variables["params"])


def make_step(model, tx):
    """One training step, jitted."""

    def loss_fn(params, stats, images, labels):
        logits, changed = model.apply(
            {"params": params, "batch_stats": stats}, loop.standardise(images), train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed["batch_stats"]

    @jax.jit
    def step(state, images, labels):
        params, stats, opt_state = state
        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, images, labels)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return step


def train(model, convs, name, rate, seed, epochs, data):
    """One run. Returns the mean loss of each epoch, and the share of errors on the other images."""
    (images, labels), (test_images, test_labels) = data
    steps = len(images) // BATCH
    tx = make(name, optax.linear_schedule(rate, 0.0, epochs * steps), convs)
    step, state = make_step(model, tx), start(model, tx, seed, images)
    rng, losses = np.random.default_rng(seed), []
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for n in range(steps):
            rows = order[n * BATCH : (n + 1) * BATCH]
            state, loss = step(state, images[rows], labels[rows])
            losses.append(float(loss))
    params, stats, _ = state
    variables = {"params": params, "batch_stats": stats}
    logits = jax.jit(functools.partial(model.apply, train=False))(variables, loop.standardise(jnp.asarray(test_images)))
    return np.reshape(losses, (epochs, steps)).mean(1), float(np.mean(np.argmax(logits, -1) != test_labels))


def tune(train, middle, factors):
    """The rate with the least error (then loss), and what every rate gave; rates are added until it is not the last."""
    tuning = {middle * factor: train(middle * factor) for factor in factors}
    while True:
        rate = min(tuning, key=lambda rate: (tuning[rate][1], tuning[rate][0][-1]))
        if len(factors) < 3 or len(tuning) > 8 or min(tuning) < rate < max(tuning):
            return rate, tuning
        rate *= 2 if rate == max(tuning) else 0.5
        tuning[rate] = train(rate)


def directions(channels, n, kind, repeats):
    """What each direction reaches for one gradient."""
    rng, conv = np.random.default_rng(0), oj.Conv((n, n))
    gradient = rng.standard_normal((3, 3, channels, channels))
    if kind == "rank 4":
        factors = (rng.standard_normal(shape) for shape in ((3, 3, 4), (4, channels), (4, channels)))
        gradient = np.einsum("abr,ri,ro->abio", *factors)
    left, _, right = np.linalg.svd(gradient.reshape(-1, channels), full_matrices=False)
    gradient, flat = (jnp.asarray(x, jnp.float32) for x in (gradient, (left @ right).reshape(gradient.shape)))
    size = lambda kernel: float(oj.operator_norm_bounds(kernel, conv).upper)
    ours = {
        "cheap": jax.jit(functools.partial(oj.steepest_direction, conv=conv)),
        "exact": jax.jit(functools.partial(oj.steepest_direction, conv=conv, exact=True)),
    }
    clip = jax.jit(functools.partial(oj.clip_operator_norm, conv=conv, max_norm=size(gradient) / 2))
    seconds = interleaved(
        {name: functools.partial(f, gradient) for name, f in (*ours.items(), ("clip", clip))}, repeats
    )
    found = {"gradient": gradient, "flattened": flat, **{name: f(gradient).direction for name, f in ours.items()}}
    descent = {name: float(jnp.sum(gradient * x)) / size(x) for name, x in found.items()}
    row = {
        "channels": channels,
        "map": n,
        "gradient": kind,
        "descent": {name: value / max(descent.values()) for name, value in descent.items()},
        "gap": float(ours["exact"](gradient).gap) / max(descent.values()),
        "clips": {name: seconds[name] / seconds["clip"] for name in ours},
    }
    show(row)
    return row


def compare(title, data, width, epochs, seeds, factors, repeats):
    """A row for each optimizer on one data set."""
    model, convs = prepare(width, data.train_images)
    order = np.random.default_rng(0).permutation(len(data.train_images))
    held, kept = np.split(order, [len(order) // 5])
    part = lambda rows: (data.train_images[rows], data.train_labels[rows])
    whole = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    steps = {}
    for name, rate in RATES.items():
        tx = make(name, optax.constant_schedule(rate), convs)
        state = start(model, tx, 0, data.train_images)
        batch = data.train_images[:BATCH], data.train_labels[:BATCH]
        steps[name] = functools.partial(make_step(model, tx), state, *batch)
    seconds, rows = interleaved(steps, repeats), []
    for name, middle in RATES.items():
        rate, tuning = tune(
            lambda rate, name=name: train(model, convs, name, rate, 100, epochs, (part(kept), part(held))),
            middle,
            factors,
        )
        curves, errors = map(np.array, zip(*(train(model, convs, name, rate, n, epochs, whole) for n in range(seeds))))
        spread = lambda column: float(column.std(ddof=1) / len(column) ** 0.5) if len(column) > 1 else None
        row = {
            "optimizer": name,
            "data": title,
            "epochs": epochs,
            "seeds": seeds,
            "rate": rate,
            "held out": {f"{rate:g}": round(error, 4) for rate, (_, error) in tuning.items()},
            "curve": [round(float(loss), 5) for loss in curves.mean(0)],
            "training loss": [float(curves[:, -1].mean()), spread(curves[:, -1])],
            "test error": [float(errors.mean()), spread(errors)],
            "step / SGD": seconds[name] / seconds["SGD, momentum 0.9"],
        }
        rows.append(row)
        show(row)
    return rows


def run(options):
    """All rows."""
    sizes = [(4, 8)] if options.quick else [(16, 32), (32, 16), (64, 8)]
    rows = [directions(*size, kind, options.repeats) for size in sizes for kind in ("Gaussian", "rank 4")]
    width, epochs, seeds, factors = (4, 1, 1, (1.0,)) if options.quick else (8, 8, 3, (0.25, 0.5, 1.0, 2.0, 4.0))
    rows += compare("digits", datasets.load("digits"), width, epochs, seeds, factors, options.repeats)
    if options.data_dir is not None:
        cifar = datasets.load("cifar10", options.data_dir)
        some = datasets.Dataset(*(array[:count] for array, count in zip(cifar, (2560, 2560, 2000, 2000))))
        epochs = min(epochs, 5)
        rows += compare("CIFAR-10, 2,560 images", some, width, epochs, seeds, factors, options.repeats)
    return rows
