"""Factorisations of stacks of small matrices, by a route that cannot hang, with derivatives that stay finite.

On a CPU, jaxlib spreads one *batched* LAPACK call over the thread pool that also runs the program; several such calls
in one jitted program can occupy every thread, each waiting for pieces that no thread is left to run: a deadlock. Here
every CPU call factorises *one* matrix (``lax.map`` without ``batch_size``), inline in the thread that reached it, so no
call ever waits for another, however freely a user composes the functions. ``vmap`` would turn that back into a batched
call; ``custom_vmap`` merges its axis into the stack instead. One matrix a call was measured as fast as a batched one.

On GPU and TPU the batched ``eigh`` is used: cuSOLVER's ``svd`` is batched only up to 32 by 32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

_HIGHEST = lax.Precision.HIGHEST


def gram(blocks: Complex[Array, "*c m n"]) -> Complex[Array, "*c r r"]:
    """The Gram matrix on the smaller side: FᴴF if n <= m, else FFᴴ."""
    m, n = blocks.shape[-2:]
    adjoint = blocks.conj().swapaxes(-1, -2)
    pair = (adjoint, blocks) if n <= m else (blocks, adjoint)
    return jnp.matmul(*pair, precision=_HIGHEST)


def eigh(stack: Complex[Array, "c r r"]) -> tuple[Float[Array, "c r"], Complex[Array, "c r r"]]:
    """Eigenvalues, ascending, and eigenvectors of Hermitian matrices. Not differentiable."""
    return _eigh(stack)


def eigh_above(
    stack: Complex[Array, "c r r"], limit: Float[Array, ""]
) -> tuple[Float[Array, "c r"], Complex[Array, "c r r"]]:
    """:func:`eigh` of positive semidefinite matrices, of whose eigenvalues only those above ``limit`` matter.

    On a CPU a matrix that has none is found out by a Cholesky factorisation of ``limit - matrix``, several times
    cheaper, and gets zeros for eigenvalues. Not differentiable.
    """
    return _eigh_above(stack, jnp.broadcast_to(limit, stack.shape[:1]))


@jax.custom_batching.custom_vmap
def _eigh(stack):
    if stack.shape[-1] == 1:
        return stack[..., 0].real, jnp.ones_like(stack)
    return lax.platform_dependent(stack, cpu=lambda a: lax.map(_one_eigh, a), default=_one_eigh)


@jax.custom_batching.custom_vmap
def _eigh_above(stack, limits):
    def lapack(stack, limits):
        def one(item):
            matrix, limit = item
            shifted = jnp.diag(jnp.full(len(matrix), limit.astype(matrix.dtype))) - matrix
            below = jnp.isfinite(lax.linalg.cholesky(shifted, symmetrize_input=False)).all()
            nothing = lambda a: (jnp.zeros(len(a), limit.dtype), jnp.eye(len(a), dtype=a.dtype))
            return lax.cond(below, nothing, _one_eigh, matrix)

        return lax.map(one, (stack, limits))

    if stack.shape[-1] == 1:
        return _eigh(stack)
    return lax.platform_dependent(stack, limits, cpu=lapack, default=lambda stack, _: _one_eigh(stack))


def _one_eigh(matrix):
    vectors, values = lax.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def singular_values(blocks: Complex[Array, "c m n"], method: str = "auto") -> Float[Array, "c r"]:
    """Singular values, descending; on a CPU, unless told otherwise, to working precision of the largest.

    Differentiable once. At ties the vectors are any basis of the tied space, which gives one element of the
    generalised gradient; where a value is zero its tangent is zero.
    """
    return _VALUES[method](blocks)


@singular_values.defjvp
def _singular_values_jvp(method, primals, tangents):
    left, values, right = singular_vectors(primals[0])
    moved = jnp.matmul(tangents[0], right, precision=_HIGHEST)
    slopes = jnp.sum((left.conj() * moved).real, axis=-2)
    return values, jnp.where(values > 0, slopes, 0)


def singular_vectors(
    blocks: Complex[Array, "c m n"],
) -> tuple[Complex[Array, "c m r"], Float[Array, "c r"], Complex[Array, "c n r"]]:
    """Left vectors, values, right vectors, in descending order. Not differentiable."""
    return _svd(blocks)


def _values_by(method):
    """The function of a stack, a ``custom_vmap``, that takes one of the routes."""

    @jax.custom_batching.custom_vmap
    def values(stack):
        m, n = stack.shape[-2:]
        if min(m, n) == 1:  # a vector
            return _norm(stack.reshape(stack.shape[0], -1))
        if min(m, n) <= _JACOBI_SIDE:
            return _jacobi(stack if n <= m else stack.swapaxes(-1, -2))
        if method == "auto":
            return lax.platform_dependent(stack, cpu=_values_by_svd, default=_values_by_eigh)
        return _values_by_svd(stack) if method == "svd" else _values_by_eigh(stack)

    return values


@jax.jit
def _values_by_svd(stack):
    return lax.map(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False), stack)


@jax.jit
def _values_by_eigh(stack):
    values, _ = _eigh(gram(stack))
    return jnp.sqrt(jnp.maximum(values, 0))[..., ::-1]


_JACOBI_SIDE = 4
"""Up to this side a call to LAPACK takes longer than rotations of the whole stack at once."""


@jax.jit  # called eagerly, compiled once a shape
def _jacobi(stack: Complex[Array, "c m n"]) -> Float[Array, "c n"]:
    """One-sided Jacobi: columns are rotated in pairs until they are orthogonal; the values are their lengths.

    Hestenes' method, as accurate as any. Convergence is quadratic: with at most 4 columns 5 sweeps reach single
    precision and 6 double; each sweep meets every pair once, and all matrices take the same steps.
    """
    n = stack.shape[-1]
    columns = [stack[:, :, j].T for j in range(n)]  # (m, c): the stack runs along the contiguous axis
    square = lambda x: jnp.sum(x.real**2 + x.imag**2, axis=0, keepdims=True)
    sweeps = 1 if n == 2 else 6 if stack.dtype == jnp.complex64 else 7

    def sweep(columns, _):
        columns = list(columns)
        for p in range(n - 1):
            for q in range(p + 1, n):
                x, y = columns[p], columns[q]
                inner = jnp.sum(x.conj() * y, axis=0, keepdims=True)
                size = jnp.abs(inner)
                meet = size > 0
                safe = jnp.where(meet, size, 1)
                ratio = (square(y) - square(x)) / (2 * safe)
                tangent = jnp.where(ratio < 0, -1.0, 1.0).astype(size.dtype) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio**2))
                tangent = jnp.where(meet, tangent, 0)
                cosine = 1 / jnp.sqrt(1 + tangent**2)
                turned = (cosine * tangent / safe).astype(inner.dtype) * inner
                cosine = cosine.astype(inner.dtype)
                columns[p] = cosine * x - turned.conj() * y
                columns[q] = turned * x + cosine * y
        return tuple(columns), None

    columns, _ = lax.scan(sweep, tuple(columns), None, length=sweeps)
    values = jnp.concatenate([jnp.sqrt(square(column)) for column in columns]).T
    # As LAPACK has it, one NaN or infinity makes NaN of all: sorting would hide it at the end.
    return -jnp.sort(-values, axis=-1) + 0 * jnp.sum(values, axis=-1, keepdims=True)


@jax.custom_batching.custom_vmap
def _svd(stack):
    def lapack(a):
        def one(matrix):
            left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
            return left, values, right.conj().T

        return lax.map(one, a)

    def through_gram(a):
        m, n = a.shape[-2:]
        vectors = lax.linalg.eigh(gram(a), symmetrize_input=False)[0][..., ::-1]
        mapped = jnp.matmul(a if n <= m else a.conj().swapaxes(-1, -2), vectors, precision=_HIGHEST)
        values = _norm(mapped.swapaxes(-1, -2))
        inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0).swapaxes(-1, -2)
        mapped = mapped * inverse.astype(mapped.dtype)
        return (mapped, values[..., 0], vectors) if n <= m else (vectors, values[..., 0], mapped)

    return lax.platform_dependent(stack, cpu=lapack, default=through_gram)


def _norm(vectors):
    return jnp.sqrt(jnp.sum(vectors.real**2 + vectors.imag**2, -1, keepdims=True))


def _merge_batch(function):
    """The ``vmap`` rule of a function of stacks: longer stacks."""

    def rule(axis_size, in_batched, *stacks):
        if not any(in_batched):
            return function(*stacks), jax.tree.map(lambda _: False, jax.eval_shape(function, *stacks))
        whole = [
            stack if batched else jnp.broadcast_to(stack, (axis_size, *stack.shape))
            for stack, batched in zip(stacks, in_batched)
        ]
        outs = function(*(stack.reshape(-1, *stack.shape[2:]) for stack in whole))
        split = jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), outs)
        return split, jax.tree.map(lambda _: True, split)

    function.def_vmap(rule)


_VALUES = {method: _values_by(method) for method in ("auto", "svd", "eigh")}

for _function in (_eigh, _eigh_above, _svd, *_VALUES.values()):
    _merge_batch(_function)
