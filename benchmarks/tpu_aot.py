"""Programs compiled for TPU v5e chips and not run: what XLA counts of each, on one chip and on four.

    pip install -e ".[tpu-aot]" && python -m benchmarks tpu-aot [--quick]

Every public function of one kernel (3x3, 64 channels, 32x32 pixels), a gradient, a training step of one layer with the
optax transformation, a training step of a ResNet-32 if Flax is installed, and the plain two-liners in jax.numpy. On
four chips the frequencies are divided over a mesh, and the collective operations are counted. libtpu compiles without
a TPU.

FLOPs and bytes are XLA's own counts, which take the body of a loop once, however often it runs.
"""

import functools
import importlib.util
import os
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import opnorm_jax as oj
from benchmarks import renderings
from benchmarks.measure import write

LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
COLLECTIVES = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
PLAIN = ("plain FFT and SVD", "plain clip", "plain training step")


def programs(taps, channels, n, execution):
    """Functions of one kernel."""
    size, same = (n, n), oj.Conv((n, n))
    upper = lambda kernel: oj.operator_norm_bounds(kernel, same, execution=execution).upper
    functions = {
        "plain FFT and SVD": lambda kernel: renderings.plain_spectrum(kernel, size),
        "singular_values": functools.partial(oj.singular_values, conv=size, execution=execution),
        "operator_norm": functools.partial(oj.operator_norm, conv=size, execution=execution),
        "operator_norm_bounds": functools.partial(oj.operator_norm_bounds, conv=same, execution=execution),
        "operator_norm_upper_bound": functools.partial(oj.operator_norm_upper_bound, execution=execution),
        "gradient of operator_norm_bounds": jax.grad(upper),
        "plain clip": lambda kernel: renderings.plain_clip(kernel, size, 1.0),
    }
    for name in ("clip", "rescale", "project"):
        function = getattr(oj, f"{name}_operator_norm")
        functions[function.__name__] = functools.partial(function, conv=same, max_norm=1.0, execution=execution)
    functions["clip_singular_values"] = functools.partial(
        oj.clip_singular_values, conv=size, lower=0.5, upper=1.0, execution=execution
    )
    functions["steepest_direction"] = functools.partial(oj.steepest_direction, conv=same, execution=execution)
    functions["log_abs_det"] = functools.partial(oj.log_abs_det, conv=size, execution=execution)
    functions["solve"] = lambda kernel: oj.solve(kernel, size, jnp.ones((1, n, n, channels)), execution=execution)
    functions["plain training step"] = layer_step(n, channels, optax.sgd(0.1))
    constrained = optax.chain(optax.sgd(0.1), oj.constrain_operator_norm(1.0, same, execution=execution))
    functions["training step with constrain_operator_norm"] = layer_step(n, channels, constrained)
    return functions, jax.ShapeDtypeStruct((taps, taps, channels, channels), jnp.float32)


def layer_step(n, channels, tx):
    """A step of one layer on 128 images."""

    def step(kernel):
        x = jnp.ones((128, n, n, channels))
        gradient = jax.grad(lambda kernel: jnp.square(jax.nn.relu(renderings.zero_padded(x, kernel))).mean())(kernel)
        updates, _ = tx.update(gradient, tx.init(kernel), kernel)
        return optax.apply_updates(kernel, updates)

    return step


def network_steps():
    """A ResNet-32's step with and without the constraint: functions, each with the shapes of its arguments."""
    from benchmarks.networks import Training

    training = Training("ResNet-32", 128)
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for name, tx in (("plain ResNet-32 step", None), ("ResNet-32 step, rescale", training.constraint("rescale", 1))):
        step, state = training.step(tx)
        yield name, step, shapes((training.params, state))


def compiled(function, arguments, sharding):
    """What XLA counts of a function compiled for the chips of ``sharding``."""
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    began = time.perf_counter()
    program = jax.jit(function).lower(*placed).compile()
    counts, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "compile_seconds": time.perf_counter() - began,
        "GFLOP": counts["flops"] / 1e9,
        "MB accessed": counts["bytes accessed"] / 1e6,
        "MiB temporary": memory.temp_size_in_bytes / 2**20,
        "MiB of program": memory.generated_code_size_in_bytes / 2**20,
        "collectives": dict(Counter(COLLECTIVES.findall(program.as_text()))),
    }


def run(options):
    """All rows."""
    from jax.experimental import topologies

    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices), ("frequency",), axis_types=(AxisType.Auto,))
    where = {
        1: (SingleDeviceSharding(topology.devices[0]), oj.Execution()),
        4: (NamedSharding(mesh, PartitionSpec()), oj.Execution(mesh=mesh)),
    }
    size = (3, 4, 8) if options.quick else (3, 64, 32)
    rows = []

    def add(name, function, arguments, chips):
        row = {
            "program": name,
            "compiled for": "TPU v5e",
            "chips": chips,
            "taps": size[0],
            "channels": size[1],
            "map": size[2],
        }
        row |= dict(zip(("taps", "channels", "map"), size)) | compiled(function, arguments, where[chips][0])
        rows.append(row)
        if not options.quick:
            write(rows, "tpu-aot", options.out)  # as they come
        print(row, flush=True)

    for chips in where:
        functions, kernel = programs(*size, where[chips][1])
        for name, function in functions.items():
            if chips == 1 or name not in PLAIN:
                add(name, function, (kernel,), chips)
    if importlib.util.find_spec("flax") and not options.quick:
        for name, function, arguments in network_steps():
            add(name, function, arguments, 1)
    return rows
