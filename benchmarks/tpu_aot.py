"""Programs compiled for TPU v5e chips and not run: what XLA counts of each, on one chip and on four.

    pip install -e ".[tpu-aot]" && python -m benchmarks tpu-aot [--quick]

Every public function of one kernel (3x3, 64 channels, 32x32 pixels), a gradient, a training step of one layer with the
optax transformation, a training step of a ResNet-32 if Flax is installed, and the plain two-liners in jax.numpy. On
four chips the frequencies are divided over a mesh, and the collective operations are counted. libtpu compiles without
a TPU. Each program has a process of its own, as libtpu can end it. Those whose rows are there already are left out.

FLOPs and bytes are XLA's own counts, which take the body of a loop once, however often it runs.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import opnorm_jax as oj
from benchmarks import renderings
from benchmarks.measure import read, write

ROOT = Path(__file__).parent.parent
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
COLLECTIVES = re.compile(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
MINUTES = 5  # at most, for one program


def programs(taps, channels, n, mesh):
    """Functions of one kernel by name, and its shape."""
    size, same = (n, n), oj.Conv((n, n))
    execution, products = (oj.Execution(mesh=mesh, factorization=name) for name in ("auto", "products"))
    upper = lambda kernel: oj.operator_norm_bounds(kernel, same, execution=execution).upper
    functions = {
        "plain FFT and SVD": lambda kernel: renderings.plain_spectrum(kernel, size),
        "plain clip": lambda kernel: renderings.plain_clip(kernel, size, 1.0),
        "plain step": layer_step(n, optax.sgd(0.1)),
        "singular_values": functools.partial(oj.singular_values, conv=size, execution=execution),
        "operator_norm": functools.partial(oj.operator_norm, conv=size, execution=execution),
        "operator_norm_bounds": functools.partial(oj.operator_norm_bounds, conv=same, execution=execution),
        "operator_norm_upper_bound": functools.partial(oj.operator_norm_upper_bound, execution=execution),
        "gradient of operator_norm_bounds": jax.grad(upper),
    }
    for label, how in (("", execution), (", products", products)):
        for function in (oj.clip_operator_norm, oj.rescale_operator_norm, oj.project_operator_norm):
            functions[function.__name__ + label] = functools.partial(function, conv=same, max_norm=1.0, execution=how)
        constraint = oj.constrain_operator_norm(1.0, same, execution=how)
        functions["step with constrain_operator_norm" + label] = layer_step(n, optax.chain(optax.sgd(0.1), constraint))
    functions |= {
        "clip_singular_values": functools.partial(
            oj.clip_singular_values, conv=size, lower=0.5, upper=1.0, execution=execution
        ),
        "log_abs_det": functools.partial(oj.log_abs_det, conv=size, execution=execution),
        "solve": lambda kernel: oj.solve(kernel, size, jnp.ones((1, n, n, channels)), execution=execution),
        "steepest_direction": functools.partial(oj.steepest_direction, conv=same, execution=execution),
    }
    return functions, jax.ShapeDtypeStruct((taps, taps, channels, channels), jnp.float32)


def layer_step(n, tx):
    """A step of one layer on 128 images."""

    def step(kernel):
        x = jnp.ones((128, n, n, kernel.shape[2]))
        gradient = jax.grad(lambda kernel: jnp.square(jax.nn.relu(renderings.zero_padded(x, kernel))).mean())(kernel)
        updates, _ = tx.update(gradient, tx.init(kernel), kernel)
        return optax.apply_updates(kernel, updates)

    return step


def network_step(constraint):
    """A ResNet-32's step, and the shapes of its arguments."""
    from benchmarks.networks import Training

    training = Training("ResNet-32", 128)
    step, state = training.step(training.constraint(constraint, 1) if constraint else None)
    return step, (training.params, state)


NETWORK_STEPS = {"ResNet-32, plain step": None, "ResNet-32, step with rescale": "rescale"}


def compiled(name, size, chips):
    """What XLA counts of a program."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:chips]
    mesh = Mesh(np.array(devices), ("frequency",), axis_types=(AxisType.Auto,))
    if name in NETWORK_STEPS:
        function, arguments = network_step(NETWORK_STEPS[name])
    else:
        functions, kernel = programs(*size, mesh if chips > 1 else None)
        function, arguments = functions[name], (kernel,)
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments)
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    counts, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "compile_seconds": time.perf_counter() - began,
        "GFLOP": counts["flops"] / 1e9,
        "MB accessed": counts["bytes accessed"] / 1e6,
        "MiB temporary": memory.temp_size_in_bytes / 2**20,
        "MiB of program": memory.generated_code_size_in_bytes / 2**20,
        "collectives": dict(Counter(COLLECTIVES.findall(program.as_text()))),
    }


def in_a_process(name, size, chips):
    """The same, or the error that ended the process."""
    command = [sys.executable, "-m", "benchmarks.tpu_aot", name, *map(str, size), str(chips)]
    environment = {**LIBTPU, **os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled in {MINUTES} minutes"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    fatal = re.search(r"^F\d.*\] (.*)$", done.stderr, re.MULTILINE)
    return {"error": fatal[1].strip() if fatal else done.stderr.strip().splitlines()[-1]}


def run(options):
    """All rows."""
    size = (3, 4, 8) if options.quick else (3, 64, 32)
    names = [*programs(*size, None)[0]]
    if importlib.util.find_spec("flax") and not options.quick:
        names += NETWORK_STEPS
    rows = [] if options.quick else read(options.out, "tpu-aot")
    there = {(row["program"], row["chips"]) for row in rows}
    for name in names:
        for chips in (1,) if "plain" in name or name in NETWORK_STEPS else (1, 4):
            if (name, chips) in there:
                continue
            row = {"program": name, "compiled for": "TPU v5e", "chips": chips}
            row |= dict(zip(("taps", "channels", "map"), size)) | in_a_process(name, size, chips)
            rows.append(row)
            if not options.quick:
                write(rows, "tpu-aot", options.out)  # as they come
            print(row, flush=True)
    return rows


if __name__ == "__main__":
    print(json.dumps(compiled(sys.argv[1], tuple(map(int, sys.argv[2:5])), int(sys.argv[5]))))
