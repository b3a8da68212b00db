"""Independent float64 oracles: nothing here is imported from opnorm_jax, and none of it uses a Fourier transform.

A convolution's matrix is built by explicit loops over output pixels and taps in NumPy, following the definition of
``lax.conv_general_dilated``; ``test_oracle.py`` checks that against ``lax`` itself, Flax and SciPy.
"""

import copy
import itertools
import math

import numpy as np


def resolve_padding(padding, shape, taps, strides, kernel_dilation):
    """Explicit pairs for SAME and VALID, by their published definition."""
    if padding == "CAUSAL":
        padding = (padding,)
    if padding == "VALID":
        return [(0, 0)] * len(shape)
    if padding == "SAME":
        pairs = []
        for n, k, s, d in zip(shape, taps, strides, kernel_dilation, strict=True):
            total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        return pairs
    pairs = []
    for entry, n, k, s, d in zip(padding, shape, taps, strides, kernel_dilation, strict=True):
        if entry == "CAUSAL":
            pairs.append(((k - 1) * d, 0))
        elif isinstance(entry, str):
            pairs += resolve_padding(entry, (n,), (k,), (s,), (d,))
        else:
            pairs.append(tuple(entry))
    return pairs


def _reflected(x, length):
    """The pixel at x of an image that is mirrored at its outermost pixels, which are not repeated."""
    x = abs(x) % max(1, 2 * (length - 1))
    return min(x, 2 * (length - 1) - x)


COPIES = {
    "CIRCULAR": lambda x, length: x % length,
    "EDGE": lambda x, length: min(max(x, 0), length - 1),
    "REFLECT": _reflected,
}


def dense_matrix(
    kernel,
    input_shape,
    *,
    strides=1,
    padding="CIRCULAR",
    input_dilation=1,
    kernel_dilation=1,
    feature_group_count=1,
):
    """The convolution's matrix in float64, (outputs x channels, inputs x channels); ``kernel`` is HWIO."""
    kernel = np.asarray(kernel, np.float64)
    rank = len(input_shape)
    s, e, d = (np.broadcast_to(v, rank).tolist() for v in (strides, input_dilation, kernel_dilation))
    taps, (ig, o), g = kernel.shape[:rank], kernel.shape[rank:], feature_group_count
    axes = []  # per axis: list of (output, tap, input) triples that meet
    out_shape = []
    names = (padding,) * rank if isinstance(padding, str) else padding
    for a in range(rank):
        n, k = input_shape[a], taps[a]
        reach = d[a] * (k - 1)
        if names[a] in COPIES:  # the name says which pixel is read outside of the image
            length = n * e[a] if names[a] == "CIRCULAR" else n
            low, outs, pixel = reach // 2, math.ceil(length / s[a]), COPIES[names[a]]
        else:
            ((low, high),) = resolve_padding((names[a],), (n,), (k,), (s[a],), (d[a],))
            length, pixel = (n - 1) * e[a] + 1, lambda x, length: x
            outs = (length + low + high - reach - 1) // s[a] + 1
        triples = []
        for t in range(outs):
            for j in range(k):
                x = pixel(s[a] * t + d[a] * j - low, length)
                if 0 <= x < length and x % e[a] == 0:
                    triples.append((t, j, x // e[a]))
        axes.append(triples)
        out_shape.append(outs)
    matrix = np.zeros((*out_shape, o, *input_shape, ig * g))
    og = o // g
    for combo in itertools.product(*axes):
        t, j, p = zip(*combo, strict=True)
        for group in range(g):
            rows = slice(group * og, (group + 1) * og)
            cols = slice(group * ig, (group + 1) * ig)
            matrix[(*t, rows, *p, cols)] += kernel[j][:, rows].T
    return matrix.reshape(math.prod(out_shape) * o, -1)


def dense_singular_values(kernel, input_shape, **geometry):
    """All singular values, descending, float64."""
    return np.linalg.svd(dense_matrix(kernel, input_shape, **geometry), compute_uv=False)


def paper_singular_values(kernel, input_shape):
    """The paper's NumPy code, rendered independently: FFT at the input's size, one SVD per frequency."""
    transforms = np.fft.fft2(np.asarray(kernel, np.float64), input_shape, axes=[0, 1])
    return np.linalg.svd(transforms, compute_uv=False)


def paper_clip(kernel, input_shape, bound):
    """The paper's Appendix A (Clip_OperatorNorm), rendered independently in float64."""
    kernel = np.asarray(kernel, np.float64)
    transforms = np.fft.fft2(kernel, input_shape, axes=[0, 1])
    left, values, right = np.linalg.svd(transforms, full_matrices=False)
    clipped = np.matmul(left * np.minimum(values, bound)[..., None, :], right)
    return np.fft.ifft2(clipped, axes=[0, 1]).real[: kernel.shape[0], : kernel.shape[1]]


def torch_jacobian(layer, channels, size):
    """A layer of PyTorch's as a matrix in float64, without its bias."""
    import torch

    wide = copy.deepcopy(layer).to(torch.float64)
    x = torch.zeros(1, channels, *size, dtype=torch.float64)
    return torch.autograd.functional.jacobian(wide, x).reshape(-1, x.numel()).detach().numpy()
