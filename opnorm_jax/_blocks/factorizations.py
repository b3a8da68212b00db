"""Factorisations of stacks of small matrices, by a route that cannot hang, with derivatives that stay finite.

On a CPU, jaxlib spreads one *batched* LAPACK call over the thread pool that also runs the program; several such calls
in one jitted program can occupy every thread, each waiting for pieces that no thread is left to run: a deadlock. Here
every CPU call factorises *one* matrix (``lax.map`` without ``batch_size``), inline in the thread that reached it, so no
call ever waits for another, however freely a user composes the functions. ``vmap`` would turn that back into a batched
call; ``custom_vmap`` merges its axis into the stack instead. One matrix a call was measured as fast as a batched one.

On GPU and TPU the batched ``eigh`` is used: cuSOLVER's ``svd`` is batched only up to 32 by 32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

_HIGHEST = lax.Precision.HIGHEST


def _stackwise(function):
    """A function of stacks of matrices whose ``vmap`` rule is longer stacks.

    Compiled once a shape when called eagerly; and ``jit`` keeps its constants out of ``custom_vmap``'s sight, which
    refuses those that a condition further out has made batched.
    """
    function = jax.custom_batching.custom_vmap(jax.jit(function))

    @function.def_vmap
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

    return function


def gram(blocks: Complex[Array, "*c m n"]) -> Complex[Array, "*c r r"]:
    """The Gram matrix on the smaller side: FᴴF if n <= m, else FFᴴ.

    In real arithmetic, with three products in place of the four that a complex one takes: a fifth to a third faster.
    """
    m, n = blocks.shape[-2:]
    if n > m:
        return jnp.conj(gram(blocks.swapaxes(-1, -2)))
    transpose = lambda x: x.swapaxes(-1, -2)
    if not jnp.iscomplexobj(blocks):
        return jnp.matmul(transpose(blocks), blocks, precision=_HIGHEST)
    stacked = jnp.concatenate([blocks.real, blocks.imag], axis=-2)
    mixed = jnp.matmul(transpose(blocks.real), blocks.imag, precision=_HIGHEST)
    return lax.complex(jnp.matmul(transpose(stacked), stacked, precision=_HIGHEST), mixed - transpose(mixed))


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


@_stackwise
def _eigh(stack):
    if stack.shape[-1] == 1:
        return stack[..., 0].real, jnp.ones_like(stack)
    return lax.platform_dependent(stack, cpu=lambda a: lax.map(_one_eigh, a), default=_one_eigh)


@_stackwise
def _eigh_above(stack, limits):
    def lapack(stack, limits):
        # Rayleigh quotients, of vectors at hand, that are above the limit save the Cholesky factorisation.
        diagonal = jnp.diagonal(stack, axis1=-2, axis2=-1).real
        quotients = jnp.sum(stack.real**2 + stack.imag**2, axis=-2) / jnp.where(diagonal > 0, diagonal, 1)
        undecided = jnp.max(quotients, axis=-1) <= limits

        def one(item):
            matrix, limit, undecided = item
            below = lax.cond(undecided, _is_below, lambda *_: jnp.zeros((), bool), matrix, limit)
            nothing = lambda a: (jnp.zeros(len(a), limits.dtype), jnp.eye(len(a), dtype=a.dtype))
            return lax.cond(below, nothing, _one_eigh, matrix)

        return lax.map(one, (stack, limits, undecided))

    if stack.shape[-1] == 1:
        return _eigh(stack)
    return lax.platform_dependent(stack, limits, cpu=lapack, default=lambda stack, _: _one_eigh(stack))


def all_below(stack: Complex[Array, "c r r"], limit: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether every eigenvalue of every one of these Hermitian matrices is below ``limit``: a Cholesky factorisation
    of each ``limit - matrix``, a quarter of the cost of the eigenvalues. NaN is not below. Not differentiable."""
    if stack.shape[-1] == 1:
        return jnp.all(stack.real < limit)
    return jnp.all(_below(stack, jnp.broadcast_to(limit, stack.shape[:1])))


@_stackwise
def _below(stack, limits):
    one_by_one = lambda stack, limits: lax.map(lambda item: _is_below(*item), (stack, limits))
    return lax.platform_dependent(stack, limits, cpu=one_by_one, default=_is_below)


def _is_below(matrix, limit):
    diagonal = jnp.broadcast_to(limit[..., None, None].astype(matrix.dtype), matrix.shape)
    identity = jnp.broadcast_to(np.eye(matrix.shape[-1], dtype=bool), matrix.shape)
    shifted = jnp.where(identity, diagonal, 0) - matrix
    factor = lax.linalg.cholesky(shifted, symmetrize_input=False)
    return jnp.isfinite(factor).all((-1, -2))


def _one_eigh(matrix):
    vectors, values = lax.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@jax.custom_jvp
def singular_values(blocks: Complex[Array, "c m n"]) -> Float[Array, "c r"]:
    """Singular values, descending; on a CPU to working precision of the largest.

    Except at near ties: LAPACK's values-only SVD leaves values that are 1e-6 to 1e-3 apart up to 50 eps off. That is
    enough for all values, not for a certificate: see :func:`largest_singular_values`.

    Differentiable once. At ties the vectors are any basis of the tied space, which gives one element of the
    generalised gradient; where a value is zero its tangent is zero.
    """
    return _values(blocks)


@singular_values.defjvp
def _singular_values_jvp(primals, tangents):
    left, values, right = singular_vectors(primals[0])
    moved = jnp.matmul(tangents[0], right, precision=_HIGHEST)
    slopes = jnp.sum((left.conj() * moved).real, axis=-2)
    return values, jnp.where(values > 0, slopes, 0)


def largest_singular_values(blocks: Complex[Array, "c m n"]) -> Float[Array, " c"]:
    """The largest singular value of each block, or 0 for one whose own is not the largest of all.

    By elimination, a third of the cost of all values: blocks are taken in the order of a rough estimate, and one that a
    Cholesky factorisation finds below the largest value so far (to 4 eps) is not factorised. Not differentiable.

    To a few eps, near ties included, since projections make those: from a Gram matrix.
    """
    if min(blocks.shape[-2:]) <= _JACOBI_SIDE:
        return singular_values(blocks)[:, 0]
    return _largest(blocks[None])[0]


def largest_above(
    blocks: Complex[Array, "c m n"],
    valid: Bool[Array, " c"],
    best: Float[Array, ""],
    share: Float[Array, ""],
) -> tuple[Float[Array, " c"], Bool[Array, " c"]]:
    """The largest singular value of each block, or 0 for one whose own is not above ``best`` and all others'; and
    whether it may be as large as that ``share`` of the largest of those. Only ``valid`` blocks count.

    For a CPU, and not under ``vmap``: the same elimination as in :func:`largest_singular_values`.
    """
    if min(blocks.shape[-2:]) <= _JACOBI_SIDE:
        norms = jnp.where(valid, singular_values(blocks)[:, 0], 0)
        return norms, valid & ~(norms < share * jnp.maximum(best, jnp.max(norms)))
    grams = gram(blocks)

    def one(best, at):
        def look(_):
            low = _is_below(grams[at], (share * best) ** 2 + float(jnp.finfo(best.dtype).tiny))
            value = lax.cond(low, lambda *_: jnp.zeros((), best.dtype), _root_unless_below, grams[at], best)
            return value, ~low

        value, possible = lax.cond(valid[at], look, lambda _: (jnp.zeros((), best.dtype), False), None)
        return jnp.maximum(best, value), (at, value, possible)

    order = jnp.argsort(jnp.where(valid, -_estimates(grams), 0))
    _, (at, values, possible) = lax.scan(one, best, order)
    return jnp.zeros_like(values).at[at].set(values), jnp.zeros_like(valid).at[at].set(possible)


def singular_vectors(
    blocks: Complex[Array, "c m n"],
) -> tuple[Complex[Array, "c m r"], Float[Array, "c r"], Complex[Array, "c n r"]]:
    """Left vectors, values, right vectors, in descending order. Not differentiable."""
    return _svd(blocks)


@_stackwise
def _values(stack):
    m, n = stack.shape[-2:]
    if min(m, n) == 1:  # a vector
        return _norm(stack.reshape(stack.shape[0], -1))
    if min(m, n) <= _JACOBI_SIDE:
        return _jacobi(stack if n <= m else stack.swapaxes(-1, -2))
    return lax.platform_dependent(stack, cpu=_values_by_svd, default=_values_by_eigh)


def _values_by_svd(stack):
    return lax.map(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False), stack)


def _values_by_eigh(stack):
    values, _ = _eigh(gram(stack))
    return jnp.sqrt(jnp.maximum(values, 0))[..., ::-1]


_JACOBI_SIDE = 4
"""Up to this side a call to LAPACK takes longer than rotations of the whole stack at once."""


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


@_stackwise
def _largest(stacks: Complex[Array, "b c m n"]) -> Float[Array, "b c"]:
    """Each stack by itself."""
    one_by_one = lambda stacks: lax.map(_largest_by_elimination, stacks)
    return lax.platform_dependent(stacks, cpu=one_by_one, default=_largest_together)


def _estimates(grams):
    """Rough estimates from below, up to a factor common to all, of the Gram matrices' largest eigenvalues."""
    v = jnp.asarray(np.random.default_rng(0).standard_normal((grams.shape[-1], 1)), grams.dtype)
    v = jnp.broadcast_to(v, (*grams.shape[:-1], 1))
    size = jnp.ones((*grams.shape[:-2], 1, 1), grams.real.dtype)
    for _ in range(3):
        v = jnp.matmul(grams, v / size.astype(grams.dtype), precision=_HIGHEST)
        length = jnp.sqrt(jnp.sum(v.real**2 + v.imag**2, axis=(-1, -2), keepdims=True))
        size = jnp.where(length > 0, length, 1)
    return length[..., 0, 0]


def _limit(value):
    """What an eigenvalue is compared with, to be found no larger than this singular value's square."""
    info = jnp.finfo(value.dtype)
    return value**2 * (1 + 8 * float(info.eps)) + float(info.tiny)


def _root_unless_below(gram, value):
    """The root of the largest eigenvalue, or 0 if a Cholesky factorisation finds it no larger than ``value``."""
    nothing = lambda _: jnp.zeros((), value.dtype)
    root = lambda gram: jnp.sqrt(jnp.maximum(_one_eigh(gram)[0][-1], 0))
    return lax.cond(_is_below(gram, _limit(value)), nothing, root, gram)


def _largest_by_elimination(blocks: Complex[Array, "c m n"]) -> Float[Array, " c"]:
    grams = gram(blocks)

    def one(largest, at):
        value = _root_unless_below(grams[at], largest)
        return jnp.maximum(largest, value), (at, value)

    order = jnp.argsort(-_estimates(grams))
    _, (at, values) = lax.scan(one, jnp.zeros((), grams.real.dtype), order)
    return jnp.zeros_like(values).at[at].set(values)


def _largest_together(stacks: Complex[Array, "b c m n"]) -> Float[Array, "b c"]:
    """All at once, for accelerators: an eighth of the blocks is factorised, then all if that has not settled it."""
    grams = gram(stacks)
    root = lambda grams: jnp.sqrt(jnp.maximum(_one_eigh(grams)[0][..., -1], 0))
    _, picked = lax.top_k(_estimates(grams), -(-grams.shape[1] // 8))
    some = root(jnp.take_along_axis(grams, picked[..., None, None], axis=1))
    settled = _is_below(grams, jnp.broadcast_to(_limit(jnp.max(some, axis=1, keepdims=True)), grams.shape[:2]))
    # The picked ones themselves may fail the test by a rounding error.
    settled = jnp.put_along_axis(settled, picked, True, axis=1, inplace=False)
    values = jnp.put_along_axis(jnp.zeros(grams.shape[:2], some.dtype), picked, some, axis=1, inplace=False)
    return lax.cond(settled.all(), lambda _: values, root, grams)


@_stackwise
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
