"""The figures of the documentation, measured on this machine.

    python -m benchmarks [NAME ...] [--quick] [--repeats 7] [--out benchmarks/results] [--data-dir CIFAR10]

NAME: spectrum (the paper's section 4.1), claims (one kernel), projection (in units of a clip), lipschitz (bounds on
whole networks), training (shares of a step), spectral_norm (what Flax's SpectralNorm leaves of a norm), optimizers
(Muon for convolutions and others, on digits and CIFAR-10), rivals (published norms and clips), scaling (map, channels,
layers, devices, memory); real_networks (bounds on ResNet-18, or on the networks in the folder --weights),
trained_networks (the paper's section 4.4, on the networks in that folder); throughput (of the trainer), gpu (all that
is claimed of accelerators, throughput included, in one run of under 9 minutes), tpu-aot (programs compiled for a TPU,
which needs none). Without one: spectrum to scaling. Each writes NAME.jsonl, with versions and hardware on every line.
``--table`` prints the tables of docs/speed.md from the files that are there, writes those of other pages into them,
draws the pictures, and measures nothing.
"""

import argparse
import importlib
from pathlib import Path

from benchmarks.measure import CORES, RESULTS, write

import jax  # isort: skip  (after benchmarks.measure, which sets what is read when the libraries load)

CPU = ("spectrum", "claims", "projection", "lipschitz", "training", "spectral_norm", "optimizers", "rivals", "scaling")
NAMES = (*CPU, "real_networks", "trained_networks", "throughput", "gpu", "tpu-aot")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; writes nothing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 is, for optimizers")
    parser.add_argument(
        "--weights", type=Path, help="a folder of trained networks, for real_networks, trained_networks and rivals"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32], help="sides of images, for real_networks")
    parser.add_argument("--inputs", type=Path, help="an .npy of images, for real_networks; otherwise random ones")
    parser.add_argument("--seconds", type=float, help="stop gpu before so long")
    parser.add_argument(
        "--parts",
        nargs="+",
        help="of gpu only throughput, factorizations, kernels or training; gpu.jsonl then holds them alone",
    )
    parser.add_argument("--table", action="store_true", help="tables and pictures from the results there are")
    options = parser.parse_args()
    if options.table:
        from benchmarks.figures import draw
        from benchmarks.tables import tables, write_pages

        written = [f"written: {path}" for path in write_pages(options.out)]
        print(tables(options.out), *written, *(f"drawn: {path}" for path in draw(options.out)), sep="\n\n")
        return
    if options.names == ["tpu-aot"]:
        jax.config.update("jax_platforms", "cpu")  # libtpu is there, but no TPU
    jax.config.update("jax_num_cpu_devices", CORES)
    accelerated = jax.default_backend() != "cpu"
    for name in options.names or (["gpu"] if accelerated else CPU):
        print(f"== {name}", flush=True)
        rows = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").run(options)
        if not options.quick:
            write(rows, name, options.out)


if __name__ == "__main__":
    main()
