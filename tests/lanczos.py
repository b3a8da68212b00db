"""A second float64 oracle, for layers too large for a dense matrix: matrix-free, SciPy's ``svds`` (ARPACK's Lanczos).

Nothing here is imported from opnorm_jax and no Fourier transform is used: the layer is a sum of shifted matrix products
in NumPy, its transpose written out as well. ``test_lanczos.py`` checks both against the dense oracle and SciPy.
"""

import numpy as np
from oracle import resolve_padding
from scipy.sparse.linalg import LinearOperator, svds


def operator(
    kernel,
    input_shape,
    *,
    strides=1,
    padding="CIRCULAR",
    input_dilation=1,
    kernel_dilation=1,
    feature_group_count=1,
):
    """The convolution as a float64 ``LinearOperator``; ``kernel`` is HWIO."""
    kernel = np.asarray(kernel, np.float64)
    rank, groups = len(input_shape), feature_group_count
    s, e, d = (np.broadcast_to(v, rank).tolist() for v in (strides, input_dilation, kernel_dilation))
    taps, (ig, o) = kernel.shape[:rank], kernel.shape[rank:]
    circular = padding == "CIRCULAR"
    pads = None if circular else resolve_padding(padding, input_shape, taps, s, d)
    reads = []  # per axis: for each tap, the input pixel that each output reads, or -1
    for a, n in enumerate(input_shape):
        length = n * e[a] if circular else (n - 1) * e[a] + 1
        low, high = ((d[a] * (taps[a] - 1)) // 2, 0) if circular else pads[a]
        outs = -(-length // s[a]) if circular else (length + low + high - d[a] * (taps[a] - 1) - 1) // s[a] + 1
        at = s[a] * np.arange(outs) + d[a] * np.arange(taps[a])[:, None] - low
        at = at % length if circular else at
        reads.append(np.where((at >= 0) & (at < length) & (at % e[a] == 0), at // e[a], -1))
    out_shape = tuple(read.shape[1] for read in reads)

    def shifts():
        for tap in np.ndindex(*taps):
            pixels = [read[j] for read, j in zip(reads, tap, strict=True)]
            seen = [np.flatnonzero(p >= 0) for p in pixels]
            yield kernel[tap], np.ix_(*seen), np.ix_(*(p[k] for p, k in zip(pixels, seen, strict=True)))

    def grouped(x):
        return x.reshape(*x.shape[:-1], groups, -1)

    def forward(x):
        x, y = x.reshape(*input_shape, groups * ig), np.zeros((*out_shape, groups, o // groups))
        for weights, out, pixel in shifts():
            y[out] += np.einsum("...gi,igo->...go", grouped(x[pixel]), weights.reshape(ig, groups, -1), optimize=True)
        return y.ravel()

    def backward(y):
        y, x = y.reshape(*out_shape, groups, o // groups), np.zeros((*input_shape, groups * ig))
        for weights, out, pixel in shifts():
            part = np.einsum("...go,igo->...gi", y[out], weights.reshape(ig, groups, -1), optimize=True)
            x[pixel] += part.reshape(*part.shape[:-2], -1)
        return x.ravel()

    shape = int(np.prod(out_shape)) * o, int(np.prod(input_shape)) * groups * ig
    return LinearOperator(shape, matvec=forward, rmatvec=backward, dtype=np.float64)


def norm(kernel, input_shape, **geometry):
    """The operator norm, to about 1e-10."""
    return float(svds(operator(kernel, input_shape, **geometry), k=1, tol=1e-11, return_singular_vectors=False)[0])
