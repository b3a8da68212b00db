"""The trainer on several devices, hosts and seeds; in bfloat16; with every arm; and without training."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_run
from conftest import THOROUGH

for package in ("flax", "orbax.checkpoint", "rich", "tyro", "sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="the trainer needs the extra [train]")
sys.path.insert(0, str(train_run.TRAIN))

import arms  # noqa: E402
import cifar  # noqa: E402
import datasets  # noqa: E402
import loop  # noqa: E402
import options  # noqa: E402
import parallel  # noqa: E402
import report  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from opnorm_jax import Conv  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return train_run.cache_folder(tmp_path_factory)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path, name="train_loss") -> np.ndarray:
    return np.array([row[name] for row in rows(folder)])


# --- devices and hosts --------------------------------------------------------------------------------------------

# So small a rate, and so large a bound, that rounding stays rounding: batch norm after kernels held at 0.5 amplifies it.
SHORT = ("--epochs", 2, "--learning-rate", 0.01, "--max-norm", 1.5)


@pytest.fixture(scope="module")
def one_device(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train_run.run(cache, "--out-dir", folder, *SHORT)
    return folder


def same_to_rounding(folder, other):
    np.testing.assert_allclose(figures(folder), figures(other), rtol=1e-5)
    weights, others = (load_file(path / "params.safetensors") for path in (folder, other))
    assert weights.keys() == others.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], others[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_eight_devices_train_like_one(cache, one_device, tmp_path):
    output = train_run.run(cache, "--out-dir", tmp_path, *SHORT, devices=8)
    assert "on 8 device(s)" in output
    same_to_rounding(tmp_path, one_device)
    # A run of one device goes on with eight, and the other way round.
    output = train_run.run(cache, "--out-dir", tmp_path, *SHORT, "--devices", 2, devices=8)
    assert "on 2 device(s)" in output and "continuing from the checkpoint of step 44" in output


@pytest.mark.slow
def test_the_batch_is_split(tmp_path):
    """Each device works on its share of the images: seen in the compiled program."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import cifar, datasets, options\n"
        "config = options.resolve(cifar.Config(width=2, batch_size=64, constraint='none'))\n"
        "run, state = cifar.prepare(config, datasets.digits())\n"
        "print(run.call.lower(state, *run.train_set, steps=1).compile().as_text())\n"
    )
    command = [sys.executable, "-c", code, str(train_run.TRAIN)]
    env = train_run.environment(tmp_path, devices=8)
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert re.search(r"f32\[8,8,8,2\]\S* convolution", text) and not re.search(r"f32\[64,8,8,2\]", text)
    assert "all-reduce" in text


@pytest.mark.slow
def test_two_processes_train_like_one(cache, one_device, tmp_path):
    """Over loopback; in the thorough profile stopped in between."""

    def both(*more):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        hosts = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
        return [
            subprocess.Popen(
                train_run.command("--out-dir", tmp_path, *SHORT, *hosts, "--process-id", n, *more),
                env=train_run.environment(cache),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for n in range(2)
        ]

    for more in (("--max-steps", 7), ()) if THOROUGH else ((),):
        processes = both(*more)
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "on 2 device(s)" in outputs[0]
    assert ("continuing from the checkpoint of step 7" in outputs[0]) == THOROUGH
    assert "ResNet" not in outputs[1]  # only the first one speaks
    same_to_rounding(tmp_path, one_device)


def test_layout_errors():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"devices to be at most the {count} at hand"):
        parallel.layout(64, count + 1)
    if count > 1:
        with pytest.raises(ValueError, match="batch_size to be a multiple of"):
            parallel.layout(count + 1)


# --- seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seeds_together_are_seeds_alone(cache, one_device, tmp_path):
    together, second = tmp_path / "together", tmp_path / "second"
    output = train_run.run(cache, "--out-dir", together, *SHORT, "--seeds", 2)
    assert "test error of each seed" in output and "±" in output
    train_run.run(cache, "--out-dir", second, *SHORT, "--seed", 1)
    for n, alone in enumerate((one_device, second)):
        np.testing.assert_allclose(figures(together)[:, n], figures(alone), rtol=1e-5)
        weights, mine = load_file(alone / "params.safetensors"), load_file(together / f"params_seed{n}.safetensors")
        for name in weights:
            np.testing.assert_allclose(mine[name], weights[name], rtol=1e-3, atol=1e-4, err_msg=name)
    summary = json.loads((together / "summary.json").read_text())
    errors = summary["test_errors"]
    assert summary["test_error"] == pytest.approx(np.mean(errors))
    assert summary["test_error_standard_error"] == pytest.approx(abs(errors[0] - errors[1]) / 2)


def test_gradients_of_a_stack_are_the_same_on_every_platform():
    """Both ways to take them, and one network at a time."""
    rng = np.random.default_rng(0)
    kernels, images = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 3, 3, 2, 4), (3, 5, 8, 8, 2))
    )

    def loss_of(kernel, images):
        out = jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (out**2).mean(), out.sum()

    alone = [loop.gradient_of_each(loss_of, False, "gpu")(k, x) for k, x in zip(kernels, images)]
    for platform in ("cpu", "gpu"):
        grads, sums = loop.gradient_of_each(loss_of, True, platform)(kernels, images)
        for n, (grad, total) in enumerate(alone):
            np.testing.assert_allclose(grads[n], grad, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(sums[n], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constraint", [pytest.param("rescale", marks=pytest.mark.slow), "reshape"])
def test_seeds_keep_the_steps_in_between_free(constraint, tmp_path):
    """Under ``vmap`` the constraint stays behind a branch on one shared counter."""
    config = options.resolve(cifar.Config(width=2, constraint=constraint, every=7, seeds=3, out_dir=tmp_path))
    run, state = cifar.prepare(config, datasets.digits())
    assert state.step.shape == () and state.params["stem"]["kernel"].shape[0] == 3
    jaxpr = run.call.trace(state, *run.train_set, steps=1).jaxpr

    def branches(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "cond":
                yield equation.invars[0].aval.shape
            for value in equation.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    yield from branches(getattr(value, "jaxpr", value))

    assert () in list(branches(jaxpr.jaxpr))


def test_mean_and_standard_error():
    assert report.mean_and_error(0.25) == {"test_error": 0.25}
    got = report.mean_and_error([0.1, 0.2, 0.6])
    assert got["test_error"] == pytest.approx(0.3) and got["test_errors"] == [0.1, 0.2, 0.6]
    assert got["test_error_standard_error"] == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5)


# --- bfloat16, fewer steps, no training, TensorBoard --------------------------------------------------------------


@pytest.mark.slow
def test_bf16_and_evaluate_only(cache, tmp_path):
    folder = tmp_path / "run"
    train_run.run(cache, "--out-dir", folder, "--epochs", 3, "--bf16", "--constraint", "none")
    weights = load_file(folder / "params.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    losses = figures(folder)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    error = json.loads((folder / "summary.json").read_text())["test_error"]
    for path in (folder, folder / "checkpoints" / "66", folder / "checkpoints" / "66" / "state"):
        assert cifar.main(cifar.Config(evaluate_only=path))["test_error"] == pytest.approx(error, abs=1e-9)
    assert cifar.main(cifar.Config(evaluate_only=folder / "params.safetensors"))["test_error"] == pytest.approx(error)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint .*, a run's folder or params.safetensors"):
        cifar.main(cifar.Config(evaluate_only=tmp_path))


def test_bf16_computes_in_bf16_and_losses_in_float32(tmp_path):
    config = options.resolve(cifar.Config(width=2, constraint="none", bf16=True, out_dir=tmp_path))
    run, state = cifar.prepare(config, datasets.digits())
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {jnp.dtype("float32")}
    text = str(run.call.trace(state, *run.train_set, steps=1).jaxpr)
    convolutions = re.findall(r":(\w+)\[[\d,]+\] = conv_general_dilated", text)
    assert len(convolutions) > 20 and set(convolutions) == {"bf16"}
    assert re.search(r":f32\[128,10\] = ", text) and not re.search(r":bf16\[128,10\]", text)  # the logits


@pytest.mark.slow
def test_max_steps_reports_quickly(cache, tmp_path):
    output = train_run.run(cache, "--out-dir", tmp_path, "--epochs", 50, "--max-steps", 30, "--constraint", "none")
    assert "stopped after 30 of 1,100 steps" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 30 and summary["images_per_second"] > 0 and len(rows(tmp_path)) == 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra [tensorboard]")
    from record import Record

    record = Record(tmp_path, None, tensorboard=True)
    for epoch in (1, 2):
        record.add(3, [0.5, 0.75], [0.5, 0.25], 0.5, True)
        record.end_epoch({"epoch": epoch, "step": 3 * epoch}, [0.25, 0.5], 10)
    record.close()
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train_loss/1" in content and content.count(b"test_error/0") == 2


def test_without_tensorboard(tmp_path, monkeypatch):
    from record import Record

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'opnorm-jax\[tensorboard\]'"):
        Record(tmp_path, None, tensorboard=True)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seeds": 0}, "seeds to be at least 1"),
        ({"keep": 0}, "keep to be at least 1"),
        ({"max_steps": 0}, "max_steps to be at least 1"),
        ({"save_minutes": 0.0}, "save_minutes to be positive"),
        ({"coordinator": "localhost:1"}, "coordinator, num_processes and process_id together"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        options.resolve(cifar.Config(**given))


# --- calls and arms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_epoch, want", [(390, 39), (11, 11), (781, 50), (50, 50), (1, 1)])
def test_calls_are_of_one_length_where_that_divides(per_epoch, want):
    ends = loop.call_ends(per_epoch, "gpu")
    assert ends[0] == want and ends[-1] == per_epoch
    assert loop.call_ends(per_epoch, "cpu") == list(range(1, per_epoch + 1))


@pytest.mark.parametrize("shape", [(3, 3, 3, 16), (3, 3, 8, 4), (1, 1, 4, 9), (1, 1, 5, 1)], ids=str)
def test_reshaped_clip_is_the_svds(shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bound = float(np.linalg.svd(kernel.reshape(-1, shape[-1]), compute_uv=False).mean())
    got = arms.clip_reshaped({"k": jnp.asarray(kernel), "b": 3.0}, bound, {"k": Conv((8, 8)), "b": None})
    matrix = np.moveaxis(kernel, -1, 0).reshape(shape[-1], -1).astype(np.float64)  # (o) x (kh kw i)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    want = np.moveaxis(((left * np.minimum(values, bound)) @ right).reshape(shape[-1], *shape[:-1]), 0, -1)
    np.testing.assert_allclose(got["k"], want, atol=1e-5)
    assert got["b"] == 3.0
    inside = arms.clip_reshaped({"k": jnp.asarray(kernel)}, 2 * float(values[0]), {"k": Conv((8, 8))})
    np.testing.assert_array_equal(inside["k"], kernel)


def test_reshape_acts_on_one_update_in_so_many():
    params = {"k": jnp.ones((3, 3, 2, 2)), "b": jnp.zeros(2)}  # one singular value, 6
    tx = arms.make_constraint("reshape", 1.5, {"k": Conv((8, 8)), "b": None}, 3)
    state = tx.init(params)
    updates = jax.tree.map(jnp.zeros_like, params)
    for step in range(7):
        got, state = jax.jit(tx.update)(updates, state, params)
        want = -0.75 if step % 3 == 0 else 0.0
        np.testing.assert_allclose(got["k"], want, atol=1e-6)
        np.testing.assert_array_equal(got["b"], 0)
    finish = arms.make_finish("reshape", 1.5, {"k": Conv((8, 8)), "b": None})
    np.testing.assert_allclose(finish(params)["k"], 0.25, rtol=1e-6)
    assert arms.make_finish("none", 1.5, None)(params) is params
