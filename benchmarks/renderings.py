"""What else people use for the norm or the spectrum of a convolution, written out as they would write it."""

import functools
import math

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


def zero_padded(x, kernel, stride=1):
    """The layer itself, padded as PyTorch's networks are; at stride 1 that is SAME padding."""
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def power_iteration(kernel, size, steps=100, stride=1):
    """A norm from below, without a bound on its error: ``steps`` rounds through the zero-padded layer and back."""

    def step(x, _):
        y, back = jax.vjp(lambda x: zero_padded(x, kernel, stride), x / jnp.linalg.norm(x))
        return back(y)[0], jnp.linalg.norm(y)

    x = jax.random.normal(jax.random.key(0), (1, *size, kernel.shape[2]))
    return jax.lax.scan(step, x, None, length=steps)[1][-1]


def space_to_depth(kernel, stride):
    """The kernel of a strided layer as that of one without strides, whose input channels are the stride's phases.

    The norm is the same (Senderovich et al. 2022, Grishina et al. 2024): every formula then has a strided form.
    """
    h, w, i, o = kernel.shape
    rows, columns = -(-h // stride), -(-w // stride)
    kernel = jnp.pad(kernel, ((0, rows * stride - h), (0, columns * stride - w), (0, 0), (0, 0)))
    phases = kernel.reshape(rows, stride, columns, stride, i, o).transpose(0, 2, 1, 3, 4, 5)
    return phases.reshape(rows, columns, stride * stride * i, o)


def matrix_norm(matrix, steps):
    """The norm of a matrix by power iteration, from below."""
    normalised = lambda v: v / jnp.linalg.norm(v)
    step = lambda _, v: normalised(matrix.T @ (matrix @ v))
    v = normalised(jax.random.normal(jax.random.key(0), matrix.shape[1:], matrix.dtype))
    return jnp.linalg.norm(matrix @ jax.lax.fori_loop(0, steps, step, v))


@functools.partial(jax.jit, static_argnums=1)
def flattened_norm(kernel, steps=50):
    """The norm of the kernel as an o x (h w i) matrix: what SpectralNorm takes for the layer's (Miyato et al. 2018)."""
    return matrix_norm(kernel.reshape(-1, kernel.shape[3]), steps)


@functools.partial(jax.jit, static_argnums=1)
def four_unfoldings(kernel, steps=50):
    """The least norm of four matrices made of the kernel, times sqrt(h w) (Singla and Feizi 2021)."""
    h, w, i, o = kernel.shape
    unfoldings = (
        kernel.reshape(h * w * i, o),
        kernel.transpose(2, 0, 1, 3).reshape(i, h * w * o),
        kernel.transpose(0, 2, 1, 3).reshape(h * i, w * o),
        kernel.transpose(1, 2, 0, 3).reshape(w * i, h * o),
    )
    return math.sqrt(h * w) * jnp.min(jnp.stack([matrix_norm(matrix, steps) for matrix in unfoldings]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def tensor_norm(kernel, steps=100, starts=1):
    """The norm of the kernel as a complex tensor of four modes, times sqrt(h w) (Grishina et al. 2024).

    The tensor's norm is found by alternating maximisation from random starts, which can end below it.
    """
    normalised = lambda v: jnp.conj(v) / jnp.linalg.norm(v).astype(v.dtype)
    kernel = kernel.astype(jnp.complex64)

    def step(_, vectors):
        h, w, i, o = vectors
        seen = jnp.einsum("hwio,h,o->wi", kernel, h, o)
        w = normalised(seen @ i)
        i = normalised(w @ seen)
        seen = jnp.einsum("hwio,w,i->ho", kernel, w, i)
        h = normalised(seen @ o)
        return h, w, i, normalised(h @ seen)

    def value(key):
        vectors = (jax.random.normal(k, (n,), jnp.complex64) for k, n in zip(jax.random.split(key, 4), kernel.shape))
        vectors = jax.lax.fori_loop(0, steps, step, tuple(map(normalised, vectors)))
        return jnp.abs(jnp.einsum("hwio,h,w,i,o->", kernel, *vectors))

    best = jnp.max(jax.lax.map(value, jax.random.split(jax.random.key(0), starts)))
    return math.sqrt(kernel.shape[0] * kernel.shape[1]) * best


def smaller_side(kernel):
    """The kernel or, where that makes smaller Gram matrices, its transpose, which has the same norm."""
    return kernel if kernel.shape[3] <= kernel.shape[2] else jnp.swapaxes(kernel, 2, 3)


@functools.partial(jax.jit, static_argnums=(1, 2))
def gram_circular(kernel, size, steps=5):
    """Gram iteration at every frequency, a bound for circular padding (Delattre et al. 2023)."""
    gram, log = jnp.fft.rfft2(smaller_side(kernel), size, axes=(0, 1)), 0.0
    for _ in range(steps):
        norm = jnp.linalg.norm(gram, axis=(2, 3), keepdims=True)
        gram, log = gram / norm.astype(gram.dtype), 2 * (log + jnp.log(norm))
        gram = jnp.conj(gram).swapaxes(2, 3) @ gram
    norm = jnp.linalg.norm(gram, axis=(2, 3), keepdims=True)
    return jnp.exp(jnp.max(log + jnp.log(norm)) / 2**steps)


@functools.partial(jax.jit, static_argnums=1)
def gram_zero_padded(kernel, steps=4):
    """Gram iteration on the kernel itself, a bound for every size and padding (Delattre et al. 2024).

    The kernel's correlations with itself are taken at the frequencies of a grid that holds the last of them: the
    published code takes them by convolutions, which is far slower on a CPU. The largest sum of magnitudes over the taps
    and inputs of a channel ends the iteration.
    """
    grid = [(k - 1) * 2**steps + 1 for k in kernel.shape[:2]]
    gram, log = jnp.fft.rfft2(smaller_side(kernel), grid, axes=(0, 1)), 0.0
    for _ in range(steps):
        norm = jnp.linalg.norm(gram.ravel())
        gram, log = gram / norm.astype(gram.dtype), 2 * (log + jnp.log(norm))
        gram = jnp.conj(gram).swapaxes(2, 3) @ gram
    sums = jnp.abs(jnp.fft.irfft2(gram, grid, axes=(0, 1))).sum((0, 1, 2))
    return jnp.exp((log + jnp.log(jnp.max(sums))) / 2**steps)


@functools.partial(jax.jit, static_argnums=(1, 3))
def fast_clip(kernel, size, bound, rounds=200):
    """Clips the layer's largest singular value again and again (Ebrahimpour-Boroojeny et al. 2024).

    Each round takes ten power steps through the layer for its leading vector v and, if the value s found is above the
    bound, one gradient step of 0.35 on |layer(v) - (bound / s) layer_before(v)|^2 in the kernel. The authors' code sums
    that over channels and rows, and averages over columns.
    """
    normalised = lambda x: x / jnp.linalg.norm(x)

    def once(_, state):
        kernel, x = state
        layer = lambda x: zero_padded(x, kernel)
        x = jax.lax.fori_loop(0, 10, lambda _, x: normalised(jax.vjp(layer, x)[1](layer(x))[0]), x)
        y = layer(x)
        wanted = jnp.minimum(bound / jnp.linalg.norm(y), 1) * y
        slope = jax.grad(lambda kernel: jnp.sum((zero_padded(x, kernel) - wanted) ** 2) / size[1])(kernel)
        return kernel - 0.35 * slope, x

    x = normalised(jax.random.normal(jax.random.key(0), (1, *size, kernel.shape[2])))
    return jax.lax.fori_loop(0, rounds, once, (kernel, x))[0]


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
