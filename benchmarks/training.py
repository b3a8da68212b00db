"""What the constraint costs a training step, as a share of the step.

    python -m benchmarks training [--quick]

For each network, three medians of interleaved runs: the step without a constraint, the constraint alone on a step it
acts on (kernels just moved out of the ball by that step), and alone, in place, on a step in between. The shares are
sums of these: differences of whole steps drown in their noise. ``act / step`` is what ``every=1`` adds; ``every=100``
adds the same once and the other 99 times.
"""

import functools

import jax

from benchmarks.measure import compile_seconds, interleaved, show
from benchmarks.networks import Training, chained

CASES = [  # network, batch, constraints
    ("ResNet-20", 128, ("clip", "rescale", "project")),
    ("ResNet-32", 128, ("clip", "rescale")),
    ("ResNet-18", 32, ("clip", "rescale")),
    ("ResNet-14, 8 times as wide", 32, ("clip", "rescale")),
]
QUICK = [("ResNet-8", 8, ("rescale", "project"))]


def measure(name, batch, constraints, repeats):
    training = Training(name, batch)
    step, state = training.step(None)
    functions = {"step": lambda: step(training.params, state)}
    compiling = {"step": compile_seconds(step, training.params, state)}
    for constraint in constraints:
        for every, when in ((1, "acting"), (1000, "in between")):
            act, (updates, start, params) = training.alone(training.constraint(constraint, every))
            compiling[f"{constraint}, {when}"] = compile_seconds(act, updates, start, params)
            # Its count is then 1: not due if every > 1.
            _, state_1 = jax.block_until_ready(act(updates, start, params))
            call = functools.partial(act, updates, state_1, params)
            functions[f"{constraint}, {when}"] = call if every == 1 else chained(act, updates, state_1, params)
    seconds = interleaved(functions, repeats)
    shares = {
        constraint: {
            "every=1": seconds[f"{constraint}, acting"] / seconds["step"],
            "every=100": (seconds[f"{constraint}, acting"] + 99 * seconds[f"{constraint}, in between"])
            / (100 * seconds["step"]),
        }
        for constraint in constraints
    }
    row = {"claim": "training", "network": name, "batch": batch, "share": shares, "seconds": seconds}
    row["compile_seconds"] = compiling
    show(row)
    return row


def run(options):
    """All rows."""
    cases = QUICK if options.quick else CASES
    return [measure(*case, repeats=min(options.repeats, 5)) for case in cases]
