"""The trainer's certificate: true of every attack, and from first principles where those are at hand."""

import dataclasses
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

for package in ("flax", "tyro", "sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="the trainer needs the extra [train]")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))

import certify  # noqa: E402
import cifar  # noqa: E402
import loop  # noqa: E402
import options  # noqa: E402
import report  # noqa: E402


def test_pixel_radius_is_safe_and_can_be_reached():
    """Images move as far as they may, towards where standardisation stretches most; some come near the limit."""
    rng = np.random.default_rng(0)
    shape = (64, 4, 3, 2)
    deviation = np.geomspace(1e-3, 0.3, shape[0]).reshape(-1, 1, 1, 1)
    pixels = 0.5 + deviation * rng.standard_normal(shape)
    allowed = rng.uniform(0.01, 3.0, shape[0])
    radius = np.asarray(certify.pixel_radius(allowed, pixels)).reshape(-1, 1, 1, 1)
    centred = pixels - pixels.mean((1, 2, 3), keepdims=True)
    standardised = lambda x: np.asarray(loop.standardise(jnp.asarray(255 * x)), np.float64)
    before, seen = standardised(pixels), np.zeros(shape[0])
    for _ in range(50):
        sideways = rng.standard_normal(shape)
        for direction in (-centred, -centred + 0.1 * sideways, sideways, sideways - 0.5 * centred):
            step = direction * radius / np.sqrt((direction**2).sum((1, 2, 3), keepdims=True))
            seen = np.maximum(seen, np.sqrt(((standardised(pixels + step) - before) ** 2).sum((1, 2, 3))))
    assert (seen <= allowed * (1 + 1e-3)).all()  # float32 images
    assert (seen > 0.95 * allowed).sum() > 10


@pytest.mark.slow
def test_certificate_of_a_linear_network():
    """Two classes, opposite logits: the radius is exact, the attack succeeds just beyond it and never inside."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 5, 4, 1)).astype(np.uint8)
    weights = rng.standard_normal(20).astype(np.float32)
    forward = lambda params, stats, x, train: (x.reshape(len(x), -1) @ params)[:, None] * jnp.array([0.5, -0.5])
    x = np.asarray(loop.standardise(jnp.asarray(images, jnp.float32)), np.float64).reshape(40, -1)
    margin = x @ weights.astype(np.float64)
    labels = np.where(margin > 0, 0, 1)
    labels[:4] = 1 - labels[:4]  # wrong answers have no certificate
    found = certify.certify(forward, jnp.asarray(weights), {}, images, labels)
    norm = np.linalg.norm(weights) / 2**0.5
    assert found["lipschitz"]["sdp"] == pytest.approx(norm, rel=1e-4)
    deviation = (images / 255).std((1, 2, 3))
    allowed = np.abs(margin) / np.linalg.norm(weights)
    radius = np.maximum(allowed * deviation / (1 + allowed / 20**0.5), allowed / 20**0.5) * (np.arange(40) >= 4)
    assert found["right"] == 0.9 and found["attacks_inside"] == {"tried": 36, "succeeded": 0}
    assert found["median_radius"] == pytest.approx(np.median(radius), rel=1e-3)
    for row, limit in zip(found["radii"], certify.RADII, strict=True):
        assert row["radius"] == limit and row["certified"] == (radius > limit).mean()
        assert row["certified"] <= row["under_attack"] <= 0.9
    logits_of = jax.jit(lambda params, pixels: forward(params, {}, loop.standardise(pixels), train=False))
    far = np.where(radius > 0, 3 * radius, 1e-3).astype(np.float32)
    resists = certify.make_attack(logits_of, weights, images.astype(np.float32), jnp.asarray(labels))
    assert not resists(far)[4:].any()


@pytest.mark.slow
def test_certify_a_trained_network(tmp_path, monkeypatch):
    """No certificate is beaten; more is certified than by the product; what is returned is on the screen."""
    monkeypatch.setattr(report, "norms", lambda *args: {})
    monkeypatch.setattr(report, "plot_spectra", lambda *args: None)
    config = options.Config(out_dir=tmp_path, epochs=3, max_norm=0.5)
    cifar.main(config, Console(quiet=True))
    screen = io.StringIO()
    alone = dataclasses.replace(config, evaluate_only=tmp_path, certify=True, certify_images=100)
    found = cifar.main(alone, Console(file=screen, width=200))["certificate"]
    assert found["images"] == 100 and found["attacks_inside"]["succeeded"] == 0 < found["attacks_inside"]["tried"]
    assert found["lipschitz"]["sdp"] <= found["lipschitz"]["product"]
    for row in found["radii"]:
        assert row["certified_by_product"] <= row["certified"] <= row["under_attack"] <= found["right"]
    assert "of which succeeded: 0" in screen.getvalue() and "108/255" in screen.getvalue()
