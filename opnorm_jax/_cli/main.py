"""The command line: ``opnorm report`` and ``opnorm constrain``; also ``python -m opnorm_jax``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

# Read when the LAPACK that jax calls is loaded, at its first use. The matrices here are small: threads of OpenBLAS
# would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np

import opnorm_jax as oj
from opnorm_jax._cli.batch_norm import EPSILON, factors
from opnorm_jax._cli.checkpoint import UserError, open_checkpoint
from opnorm_jax._cli.hints import hints
from opnorm_jax._cli.layers import Kernels, add_arguments, find_kernels, positive
from opnorm_jax._conv import along_outputs
from opnorm_jax._tree.layers import list_layers
from opnorm_jax._tree.report import format_table, printable, show_progress
from opnorm_jax._tree.transform import CONSTRAINTS

_CHECKPOINT = "a .safetensors or .npz file; or the folder of a run, its checkpoints or one step, saved by orbax"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns 0. An error is one line on stderr, and the exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(argv)
    try:
        with _stopped_by_sigterm():
            options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader, head say, has had enough
        _silence_stdout()
    except OSError as error:
        _silence_stdout()
        _fail(f"the output cannot be written ({error.strerror or error}).")
    except (ValueError, TypeError, MemoryError, OverflowError, RecursionError) as error:
        _fail(f"{str(error) or type(error).__name__}")
    return 0


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exit, so that temporary files vanish."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(options: argparse.Namespace) -> None:
    if options.plot:
        _check_plot(options.plot)
    checkpoint = open_checkpoint(options.checkpoint)
    found = find_kernels(checkpoint, options)
    _print_notes(found)
    kernels = checkpoint.read(found.convs)
    scales = factors(checkpoint, found.convs, found.batch_norms, options.fold_batch_norm or EPSILON)
    with _wide_enough(kernels.values()):
        shapes = {name: checkpoint.entries[name].shape for name in found.unknown}
        params = kernels | {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
        convs = found.convs | found.unknown
        report = oj.spectral_report(
            params, convs, scales=dict.fromkeys(params) | scales, smallest=options.smallest, progress=_progress()
        )
        if options.plot:
            drawn = {name: kernels[name] * along_outputs(scales[name], found.convs[name]) for name in scales}
            drawn = {name: array.astype(np.result_type(kernels[name], np.float32)) for name, array in drawn.items()}
            try:
                oj.plot_spectra(params | drawn, convs, path=options.plot, title=Path(options.checkpoint).name)
            except OSError as error:
                raise UserError(f"{options.plot}: cannot be written ({error}).") from None
    guesses = hints(found.convs, checkpoint.entries)
    if options.json:
        facts = {"checkpoint": str(checkpoint.path), "notes": found.notes, "hints": guesses}
        facts |= {"batch_norms": found.batch_norms, **report.as_dict(), "skipped": found.skipped}
        print(json.dumps(facts, indent=2))
    else:
        _print_table(report, str(report))
        for name, norm in found.batch_norms.items():
            print(printable(f"{name} is folded with {norm}"))
        for guess in guesses:
            print(printable(f"? {guess}"))


def _constrain(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.checkpoint)
    out = Path(options.out)
    if out.suffix not in checkpoint.suffixes:
        raise UserError(f"{out}: expected a name that ends in {' or '.join(checkpoint.suffixes)} for this checkpoint.")
    if not out.parent.is_dir():
        raise UserError(f"{out}: its folder does not exist.")
    if out.exists() and (not out.is_file() or out.samefile(checkpoint.path)):
        raise UserError(f"{out}: expected another file than the checkpoint itself, and no folder, pipe or device.")
    if out.exists() and not options.force:
        raise UserError(f"{out}: exists already. Pass --force to replace it.")
    found = find_kernels(checkpoint, options)
    if found.unknown:
        (name, unknown), *others = found.unknown.items()
        more = f" (also {_some(name for name, _ in others)})" if others else ""
        raise UserError(f"{name}: {unknown.reason}{more}. To leave it as it is, --exclude it.")
    if found.batch_norms:
        raise UserError(
            f'opnorm constrain folds no "batch_norm" ({_some(found.batch_norms)}): it bounds kernels alone.'
        )
    _print_notes(found)
    for guess in hints(found.convs, checkpoint.entries):
        _tell(guess)
    kernels = checkpoint.read(found.convs)
    if broken := [name for name, kernel in kernels.items() if not np.isfinite(kernel.astype(np.float64)).all()]:
        raise UserError(f"NaN or infinity in {_some(broken)}: nothing to constrain.")
    with _wide_enough(kernels.values()):
        before = oj.spectral_report(kernels, found.convs, progress=_progress())
        items = list(kernels.items())
        after = {}
        for name, kernel in show_progress(items, options.constraint) if _progress() else items:
            alone = oj.constrain(
                {name: kernel}, options.max_norm, {name: found.convs[name]}, constraint=options.constraint
            )
            after[name] = np.asarray(alone[name])
        report = oj.spectral_report(after, found.convs, progress=_progress())
    moved = {name: kernel for name, kernel in after.items() if kernel.tobytes() != kernels[name].tobytes()}
    try:
        checkpoint.write(out, moved, options.force)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}).") from None
    rows = []
    members = [
        [np.asarray(kernel, np.float64) for _, kernel, _ in list_layers(tree, found.convs)] for tree in (kernels, after)
    ]
    for old, new, was, now in zip(before.layers, report.layers, *members):
        distance = np.linalg.norm(now - was) / (np.linalg.norm(was) or 1)
        bounds = (f"{value:#.5g}" for value in (old.upper, new.lower, new.upper))
        rows.append((printable(old.path), *bounds, f"{distance:.3g}"))
    print(format_table(("layer", "upper before", "lower after", "upper after", "moved by"), rows, left=1))
    print(f"{len(moved)} of {len(kernels)} kernels changed; wrote {printable(str(out))}")
    over = sum(not row.upper <= options.max_norm * (1 + 1e-5) for row in report.layers)
    if over:
        why = (
            "one clip, as the paper's, does not bring the norm under the bound" if options.constraint == "clip" else ""
        )
        why = why or "kernels of a narrow dtype are rounded after they are constrained"
        print(f"{over} still above {options.max_norm:g}: {why}")


def _parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _fail(f"{message} ({self.prog} --help)")

    parser = Parser(prog="opnorm", description="Norms and spectra of the convolutions in a checkpoint.")
    parser.add_argument("--version", action="version", version=f"opnorm {oj.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    report = commands.add_parser("report", help="a table of norm bounds, conditions and stable ranks")
    report.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the spectra")
    report.add_argument(
        "--smallest", action="store_true", help="find the smallest singular values of zero-padded layers themselves"
    )
    report.set_defaults(run=_report)
    constrain = commands.add_parser("constrain", help="a copy with every norm held under a bound")
    constrain.add_argument("checkpoint", metavar="IN", help=_CHECKPOINT)
    constrain.add_argument("out", metavar="OUT", help="same format as IN; for orbax, .safetensors or .npz")
    constrain.add_argument("--max-norm", type=positive, required=True, metavar="X", help="the bound")
    constrain.add_argument(
        "--constraint", choices=CONSTRAINTS, default="rescale", help="default: rescale; project moves the least"
    )
    constrain.add_argument("--force", action="store_true", help="replace OUT")
    constrain.set_defaults(run=_constrain)
    for command in (report, constrain):
        add_arguments(command)
    return parser


def _fail(message: str) -> NoReturn:
    _tell(f"error: {' '.join(message.split())}")
    raise SystemExit(2)


def _silence_stdout() -> None:
    """Lets what is left in stdout's buffer go nowhere, so that the interpreter's end does not raise once more."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _tell(message: str) -> None:
    """Prints a line on stderr, if that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"opnorm: {printable(message)}", file=sys.stderr)


def _print_notes(found: Kernels) -> None:
    """Prints what was assumed and what was passed over."""
    for note in found.notes:
        _tell(note)
    if found.skipped:
        _tell(f"{len(found.skipped)} other array{'s' * (len(found.skipped) > 1)} passed over: {_some(found.skipped)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_plot(path: Path) -> None:
    """Finds out before the work is done that a picture cannot be saved."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'opnorm-jax[cli]'.") from None
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise UserError(f"{path}: expected a picture's suffix, one of .{', .'.join(sorted(formats))}.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder does not exist.")


def _wide_enough(kernels: Iterable[np.ndarray]) -> contextlib.AbstractContextManager:
    """Computes in float64 if a kernel is of float64."""
    wide = any(kernel.dtype == np.float64 for kernel in kernels)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _progress() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and find_spec("rich") is not None


def _print_table(renderable: Any, text: str) -> None:
    """Prints by rich on a terminal, otherwise the plain table, whose lines are never broken."""
    if sys.stdout is None or not sys.stdout.isatty() or find_spec("rich") is None:
        print(text)
        return
    from rich.console import Console

    Console().print(renderable)
