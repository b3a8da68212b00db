"""Settings shared by all tests: strict promotion for the library's own, and a float64 switch."""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# Before jaxlib loads: two workers on few cores, and OpenBLAS's threads wait for each other even with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Compiled programs are kept for the other worker and for the next run. OPNORM_TEST_CACHE=off switches this off.
CACHE = pathlib.Path(tempfile.gettempdir(), f"opnorm_jax_tests_{os.getuid()}")
if os.environ.get("OPNORM_TEST_CACHE") != "off":
    CACHE.mkdir(mode=0o700, exist_ok=True)
    if CACHE.stat().st_uid == os.getuid():  # jax runs what it finds there
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)

THOROUGH = os.environ.get("OPNORM_TEST_PROFILE") == "thorough"

_cases = collections.Counter()
_trials = collections.Counter()


def pytest_configure(config):
    """``-m attack`` is the thorough profile of the tests with that mark, in one run."""
    global THOROUGH
    THOROUGH = THOROUGH or config.option.markexpr == "attack"
    hypothesis.settings.load_profile("thorough" if THOROUGH else "ci")


def count_case(promise, kind):
    """One case of a promise has been checked; OPNORM_CASES names a file that gets the numbers."""
    _cases[promise, kind] += 1


def count_trials(surface, tried=0, held=0):
    """So many tries at breaking a surface; so many of them failed to. Counted in the same file."""
    _trials[surface, "tried"] += tried
    _trials[surface, "held"] += held


@contextlib.contextmanager
def trial(surface):
    """One try, as a block or around a function: the surface held if nothing is raised."""
    count_trials(surface, tried=1)
    yield
    count_trials(surface, held=1)


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of that size mounted on a folder; gives a function that changes it."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a tmpfs")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def pytest_sessionstart(session):
    """Forgets the oldest compiled programs once they take more than 2 GB."""
    if hasattr(session.config, "workerinput") or not CACHE.is_dir():
        return
    files = sorted(((file.stat().st_mtime, file.stat().st_size, file) for file in CACHE.iterdir()), reverse=True)
    for (_, _, file), total in zip(files, itertools.accumulate(size for _, size, _ in files)):
        if total > 2e9:
            file.unlink(missing_ok=True)


def pytest_collection_modifyitems(items):
    """Leaves the first case of every parametrised test to the fast tier, and all cases of tests marked ``quick``."""
    seen = set()
    for item in items:
        if hasattr(item, "callspec") and not any(item.iter_markers("quick")) and not any(item.iter_markers("slow")):
            family = item.nodeid.split("[")[0]
            if family in seen:
                item.add_marker("slow")
            seen.add(family)


def pytest_sessionfinish(session):
    """Saves what was counted; a worker hands it to the process that started it."""
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["counts"] = list(_cases.items()), list(_trials.items())
    elif (_cases or _trials) and "OPNORM_CASES" in os.environ:
        report = {
            "profile": "thorough" if THOROUGH else "ci",
            "jax": jax.__version__,
            "hypothesis": hypothesis.__version__,
        }
        for (surface, what), count in sorted(_trials.items()):
            report.setdefault("trials", {}).setdefault(surface, {})[what] = count
        report["cases"] = sum(_cases.values())
        for (promise, kind), count in sorted(_cases.items()):
            report.setdefault(promise, {})[kind] = count
        pathlib.Path(os.environ["OPNORM_CASES"]).write_text(json.dumps(report, indent=2) + "\n")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds up what a worker of xdist counted."""
    for total, counts in zip((_cases, _trials), getattr(node, "workeroutput", {}).get("counts", ((), ()))):
        for key, count in counts:
            total[tuple(key)] += count


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """The library must never promote dtypes or ranks silently; the frameworks in the trainer's tests may."""
    if any(name in request.module.__name__ for name in ("test_train", "sweep", "readme", "docs")):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Hundreds of compiled programs take gigabytes; few are of use to another module."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 for one test."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        yield
