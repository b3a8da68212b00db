"""Runs ``train/cifar.py`` in a process of its own, as the tests of the trainer want it: ``python train_run.py OPTIONS``.

The norms' bounds and the picture, which take most of such a short run and touch nothing of it, are left out.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "train"
SMALL = "--width 2 --batch-size 64 --max-norm 0.5 --every 3 --save-every 1 --resume auto".split()


def cache_folder(tmp_path_factory) -> Path:
    """Where compiled programs are kept: for good if JAX_COMPILATION_CACHE_DIR says so, else for this session."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("compiled")


def command(*options) -> list[str]:
    """The command line of one run."""
    return [sys.executable, __file__, *SMALL, *map(str, options)]


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Compiled programs are shared between processes, so that the second start takes seconds."""
    return {
        **os.environ,
        "PYTHONPATH": str(TRAIN.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "COLUMNS": "200",
    }


def run(cache: Path, *options, code: int = 0, devices: int = 1, **more: str) -> str:
    """One run to its end; what it printed."""
    env = {**environment(cache, devices), **more}
    done = subprocess.run(command(*options), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.path.insert(0, str(TRAIN))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import checkpoint
    import report

    checkpoint.MARGIN = int(os.environ.get("CHECKPOINT_MARGIN", checkpoint.MARGIN))

    if "REPORT_NORMS" not in os.environ:
        report.norms = lambda *args: {}
    report.plot_spectra = lambda *args: None
    runpy.run_path(str(TRAIN / "cifar.py"), run_name="__main__")
