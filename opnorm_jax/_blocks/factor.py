"""Factorisations of stacks of small matrices, by a route that cannot hang, with derivatives that stay finite.

On a CPU, jaxlib spreads one *batched* LAPACK call over the thread pool that also runs the program; several such calls
in one jitted program can occupy every thread, each waiting for pieces that no thread is left to run: a deadlock. Here
every CPU call factorises *one* matrix (``lax.map`` without ``batch_size``), inline in the thread that reached it, so no
call ever waits for another, however freely a user composes the functions. Under ``vmap`` the stacks become longer (see
batching.py). One matrix a call was measured to be as fast as a batched call.

On GPU and TPU the batched ``eigh`` is used: cuSOLVER's ``svd`` is batched only up to 32 by 32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from opnorm_jax._blocks.batching import stackwise
from opnorm_jax._blocks.guard import forbid_derivative
from opnorm_jax._blocks.linalg import adjoint
from opnorm_jax._rounding import tie_tolerance

_HIGHEST = lax.Precision.HIGHEST

_once = forbid_derivative(
    "operator norms and singular values have no third derivative here. Take at most two: a gradient, a Hessian, or a "
    "Hessian-vector product."
)


def gram(blocks: Complex[Array, "*c m n"]) -> Complex[Array, "*c r r"]:
    """Computes the Gram matrix on the smaller side: FᴴF if n <= m, else FFᴴ.

    It takes three real products in place of the four that a complex one takes: a fifth to a third faster.
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
    """Computes eigenvalues, ascending, and eigenvectors of Hermitian matrices. Not differentiable."""
    return _eigh(stack)


def eigh_above(
    stack: Complex[Array, "c r r"], limit: Float[Array, ""]
) -> tuple[Float[Array, "c r"], Complex[Array, "c r r"]]:
    """Does what :func:`eigh` does for positive semidefinite matrices whose eigenvalues matter only above ``limit``.

    On a CPU a Cholesky factorisation of ``limit - matrix``, which is several times cheaper, shows which matrices have
    no such eigenvalue. Those get zeros for eigenvalues. Not differentiable.
    """
    return _eigh_above(stack, jnp.broadcast_to(limit, stack.shape[:1]))


@stackwise
def _eigh(stack):
    if stack.shape[-1] == 1:
        return stack[..., 0].real, jnp.ones_like(stack)
    return lax.platform_dependent(stack, cpu=lambda a: lax.map(batched_eigh, a), default=batched_eigh)


@stackwise
def _eigh_above(stack, limits):
    def lapack(stack, limits):
        # Rayleigh quotients, of vectors at hand, that are above the limit save the Cholesky factorisation.
        diagonal = jnp.diagonal(stack, axis1=-2, axis2=-1).real
        quotients = jnp.sum(stack.real**2 + stack.imag**2, axis=-2) / jnp.where(diagonal > 0, diagonal, 1)
        undecided = jnp.max(quotients, axis=-1) <= limits

        def one(item):
            matrix, limit, undecided = item
            below = lax.cond(undecided, is_below, lambda *_: jnp.zeros((), bool), matrix, limit)
            nothing = lambda a: (jnp.zeros(len(a), limits.dtype), jnp.eye(len(a), dtype=a.dtype))
            return lax.cond(below, nothing, batched_eigh, matrix)

        return lax.map(one, (stack, limits, undecided))

    if stack.shape[-1] == 1:
        return _eigh(stack)
    return lax.platform_dependent(stack, limits, cpu=lapack, default=lambda stack, _: batched_eigh(stack))


def all_below(stack: Complex[Array, "c r r"], limit: Float[Array, ""]) -> Bool[Array, ""]:
    """Decides whether every eigenvalue of all these Hermitian matrices is below ``limit``.

    It takes a Cholesky factorisation of each ``limit - matrix``, a quarter of the cost of the eigenvalues. NaN is not
    below. Not differentiable.
    """
    if stack.shape[-1] == 1:
        return jnp.all(stack.real < limit)
    return jnp.all(_below(stack, jnp.broadcast_to(limit, stack.shape[:1])))


@stackwise
def _below(stack, limits):
    one_by_one = lambda stack, limits: lax.map(lambda item: is_below(*item), (stack, limits))
    return lax.platform_dependent(stack, limits, cpu=one_by_one, default=is_below)


def is_below(matrix: Complex[Array, "*c r r"], limit: Float[Array, "*c"]) -> Bool[Array, "*c"]:
    """Decides for each matrix of a batch whether its eigenvalues are below its limit. On a CPU: of one matrix only."""
    diagonal = jnp.broadcast_to(limit[..., None, None].astype(matrix.dtype), matrix.shape)
    identity = jnp.broadcast_to(np.eye(matrix.shape[-1], dtype=bool), matrix.shape)
    shifted = jnp.where(identity, diagonal, 0) - matrix
    return lax.platform_dependent(shifted, tpu=_is_definite_as_real, default=_is_definite)


def _is_definite(matrix: Complex[Array, "*c r r"]) -> Bool[Array, "*c"]:
    """Decides for each Hermitian matrix of a batch whether it is positive definite."""
    return jnp.isfinite(lax.linalg.cholesky(matrix, symmetrize_input=False)).all((-1, -2))


def _is_definite_as_real(matrix: Complex[Array, "*c r r"]) -> Bool[Array, "*c"]:
    """Does the same by the real matrix [[Re, -Im], [Im, Re]], which has the same eigenvalues, each twice.

    libtpu (0.0.42 and 0.0.50) ends the process where it compiles a complex Cholesky factorisation for several chips.
    """
    if not jnp.iscomplexobj(matrix):
        return _is_definite(matrix)
    real, imaginary = matrix.real, matrix.imag
    rows = jnp.concatenate([real, -imaginary], axis=-1), jnp.concatenate([imaginary, real], axis=-1)
    return _is_definite(jnp.concatenate(rows, axis=-2))


def batched_eigh(matrix: Complex[Array, "*c r r"]) -> tuple[Float[Array, "*c r"], Complex[Array, "*c r r"]]:
    """Computes what :func:`eigh` does in one call to the library. On a CPU: of one matrix only."""
    vectors, values = lax.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@jax.custom_jvp
def singular_values(blocks: Complex[Array, "c m n"]) -> Float[Array, "c r"]:
    """Computes the singular values, descending; on a CPU to working precision of the largest.

    Except at near ties: LAPACK's values-only SVD leaves values that are 1e-6 to 1e-3 apart up to 50 eps off. This
    accuracy suffices for a spectrum but not for a certified bound: see ``largest.largest_singular_values``.

    Differentiable twice. At ties the vectors are any basis of the tied space, which gives one element of the
    generalised gradient, and the second derivative is NaN. Where a value is zero its tangent is zero.
    """
    return _values(blocks)


@singular_values.defjvp
def _singular_values_jvp(primals, tangents):
    left, _, right = singular_vectors(primals[0])
    values = singular_values(primals[0])
    moved = jnp.matmul(tangents[0], right, precision=_HIGHEST)
    slopes = jnp.sum((left.conj() * moved).real, axis=-2)
    return values, jnp.where(values > 0, slopes, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def singular_vectors(
    blocks: Complex[Array, "c m n"], count: int | None = None
) -> tuple[Complex[Array, "c m k"], Float[Array, "c k"], Complex[Array, "c n k"]]:
    """Computes left vectors, values and right vectors, in descending order: the first ``count`` (None: all) of each.

    Differentiable once, for functions in which the vectors' phases cancel. A vector whose value is tied has no
    derivative; it is NaN then.
    """
    return tuple(out[..., :count] for out in _svd(blocks))  # type: ignore[return-value]


@singular_vectors.defjvp
def _singular_vectors_jvp(count, primals, tangents):
    r"""Returns the derivative of singular vectors by perturbation theory, in terms of P = Uᴴ dF V.

    Of the columns wanted only: so ties among the other values do no harm. Phases are chosen such that vᴴ dv = 0.
    """
    blocks, dots = _once(primals[0]), tangents[0]
    left, values, right = _svd(blocks)
    mul = lambda a, b: jnp.matmul(a, b, precision=_HIGHEST)
    p = mul(adjoint(left), mul(dots, right))
    k = values[..., :count].shape[-1]
    rows, columns = values[..., :, None], values[..., None, :k]
    u, v, p_right, p_left = left[..., :k], right[..., :k], p[..., :k], adjoint(p)[..., :k]
    own = jnp.broadcast_to(np.eye(values.shape[-1], k, dtype=bool), p_right.shape)
    tied = (jnp.abs(columns - rows) <= tie_tolerance(values.dtype) * values[..., :1, None]) & ~own
    difference = jnp.where(own | tied, 1, (columns - rows) * (columns + rows))
    inverse = jnp.where(own, 0, jnp.where(tied, jnp.nan, 1 / difference))
    inverse, rows, columns = (x.astype(blocks.dtype) for x in (inverse, rows, columns))
    safe = jnp.where(columns == 0, 1, columns)
    outside = lambda basis, x: (x - mul(basis, mul(adjoint(basis), x))) / safe
    v_dot = mul(right, inverse * (rows * p_right + columns * p_left))
    u_dot = mul(left, inverse * (columns * p_right + rows * p_left))
    if right.shape[-2] > right.shape[-1]:
        v_dot = v_dot + outside(right, mul(adjoint(dots), u))
    if left.shape[-2] > left.shape[-1]:
        u_dot = u_dot + outside(left, mul(dots, v))
    diagonal = jnp.diagonal(p_right, axis1=-2, axis2=-1)[..., None, :]
    if jnp.iscomplexobj(blocks):
        u_dot = u_dot + u * lax.complex(jnp.zeros_like(diagonal.imag), diagonal.imag) / safe
    return (u, values[..., :count], v), (u_dot, diagonal.real[..., 0, :], v_dot)


@stackwise
def _values(stack):
    m, n = stack.shape[-2:]
    if min(m, n) == 1:  # a vector
        return _norm(stack.reshape(stack.shape[0], -1))
    if min(m, n) <= JACOBI_SIDE:
        return _jacobi(stack if n <= m else stack.swapaxes(-1, -2))
    return lax.platform_dependent(stack, cpu=_values_by_svd, default=_values_by_eigh)


def _values_by_svd(stack):
    return lax.map(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False), stack)


def _values_by_eigh(stack):
    # An eigenvalue's root is off by up to sqrt(eps) of the largest; the length to which its vector is mapped, by less.
    _, _, lengths = _mapped_by_vectors(stack)
    return -jnp.sort(-lengths, axis=-1)


def _mapped_by_vectors(stack):
    """Computes the Gram matrices' eigenvectors, in descending order, what they are mapped to, and its lengths."""
    m, n = stack.shape[-2:]
    vectors = batched_eigh(gram(stack))[1][..., ::-1]
    mapped = jnp.matmul(stack if n <= m else adjoint(stack), vectors, precision=_HIGHEST)
    return vectors, mapped, _norm(mapped.swapaxes(-1, -2))[..., 0]


JACOBI_SIDE = 4
"""Up to this side a call to LAPACK takes longer than rotations of the whole stack at once."""


def _jacobi(stack: Complex[Array, "c m n"]) -> Float[Array, "c n"]:
    """Rotates columns in pairs until they are orthogonal (one-sided Jacobi); the values are then their lengths.

    This is Hestenes' method, as accurate as any. Convergence is quadratic: with at most 4 columns 5 sweeps reach single
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


@stackwise
def _svd(stack):
    def lapack(a):
        def one(matrix):
            left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
            return left, values, right.conj().T

        return lax.map(one, a)

    def through_gram(a):
        m, n = a.shape[-2:]
        vectors, mapped, values = _mapped_by_vectors(a)
        inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)[..., None, :]
        mapped = mapped * inverse.astype(mapped.dtype)
        return (mapped, values, vectors) if n <= m else (vectors, values, mapped)

    return lax.platform_dependent(stack, cpu=lapack, default=through_gram)


def _norm(vectors):
    return jnp.sqrt(jnp.sum(vectors.real**2 + vectors.imag**2, -1, keepdims=True))
