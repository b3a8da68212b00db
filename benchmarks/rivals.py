"""What else people use for the norm or the spectrum of a convolution, written out as they would write it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def paper_spectrum(kernel, size):
    """The paper's code: FFT at the map's size, then one SVD per frequency."""
    return np.linalg.svd(np.fft.fft2(kernel, size, axes=[0, 1]), compute_uv=False)


def paper_clip(kernel, size, bound):
    """The paper's code for a clip."""
    blocks = np.fft.fft2(kernel, size, axes=[0, 1])
    u, s, v = np.linalg.svd(blocks, full_matrices=False)
    clipped = np.matmul(u * np.minimum(s, bound)[..., None, :], v)
    return np.fft.ifft2(clipped, axes=[0, 1]).real[: kernel.shape[0], : kernel.shape[1]]


@functools.partial(jax.jit, static_argnums=1)
def plain_spectrum(kernel, size):
    """The same two lines in jax.numpy."""
    return jnp.linalg.svd(jnp.fft.fft2(kernel, size, axes=[0, 1]), compute_uv=False)


@functools.partial(jax.jit, static_argnums=1)
def plain_clip(kernel, size, bound):
    """The paper's clip in jax.numpy."""
    u, s, v = jnp.linalg.svd(jnp.fft.fft2(kernel, size, axes=[0, 1]), full_matrices=False)
    clipped = jnp.matmul(u * jnp.minimum(s, bound)[..., None, :], v)
    return jnp.fft.ifft2(clipped, axes=[0, 1]).real[: kernel.shape[0], : kernel.shape[1]]


def full_matrix_spectrum(kernel, size):
    """SVD of the convolution's matrix, assembled by shifting each tap's identity round the torus."""
    (h, w), (i, o) = size, kernel.shape[2:]
    matrix = np.zeros((h, w, o, h, w, i), kernel.dtype)
    y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    for a in range(kernel.shape[0]):
        for b in range(kernel.shape[1]):
            matrix[y, x, :, (y + a) % h, (x + b) % w, :] += kernel[a, b].T
    return np.linalg.svd(matrix.reshape(h * w * o, h * w * i), compute_uv=False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def power_iteration(kernel, size, steps=100):
    """A norm from below, without a bound on its error: ``steps`` rounds through the zero-padded layer and back."""

    def layer(x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def step(x, _):
        y, back = jax.vjp(layer, x / jnp.linalg.norm(x))
        return back(y)[0], jnp.linalg.norm(y)

    x = jax.random.normal(jax.random.key(0), (1, *size, kernel.shape[2]))
    return jax.lax.scan(step, x, None, length=steps)[1][-1]


def flax_spectral_norm(kernel):
    """Flax's ``SpectralNorm``: one power step on the kernel as an (kh kw i) x o matrix, whose norm is not the layer's.

    Returns a jitted function of the variables, and the variables.
    """
    import flax.linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(kernel.shape[3], kernel.shape[:2], use_bias=False)
            return nn.SpectralNorm(conv)(x, update_stats=True)

    x = jnp.zeros((1, 1, 1, kernel.shape[2]))  # one pixel: what is timed is the normalisation
    layer = Layer()
    variables = layer.init(jax.random.key(0), x)
    return jax.jit(lambda variables: layer.apply(variables, x, mutable=["batch_stats"])), variables


def torch_rivals(kernel, size, bound):
    """The paper's code in PyTorch, if that is installed: functions of nothing."""
    try:
        import torch
    except ImportError:
        return {}
    weights = torch.from_numpy(np.array(kernel))

    def spectrum():
        return torch.linalg.svdvals(torch.fft.fft2(weights, s=size, dim=(0, 1))).numpy()

    def clip():
        u, s, v = torch.linalg.svd(torch.fft.fft2(weights, s=size, dim=(0, 1)), full_matrices=False)
        clipped = (u * s.clamp(max=bound)[..., None, :]) @ v
        return torch.fft.ifft2(clipped, dim=(0, 1)).real[: kernel.shape[0], : kernel.shape[1]].numpy()

    return {"spectrum": spectrum, "clip": clip}
