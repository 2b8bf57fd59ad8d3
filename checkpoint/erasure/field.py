"""The field GF(2^8) and the matrix that parities are made with: small sums, on matrices only.

Bytes are polynomials over GF(2), taken modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d), as ISA-L takes
them: addition is XOR. Torch-free.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""Bytes, or a matrix of field elements."""

POLYNOMIAL = 0x11D
REDUCED = POLYNOMIAL & 0xFF
"""What x^8 is."""


@cache
def _logarithms() -> tuple[npt.NDArray[np.int64], Bytes]:
    """Powers of x: the exponent of each element (0 has none), and the element of each exponent.

    The second goes round twice, so that a sum of two exponents needs no remainder.
    """
    exponents = np.zeros(256, np.int64)
    elements = np.zeros(510, np.uint8)
    element = 1
    for exponent in range(255):
        exponents[element] = exponent
        elements[exponent] = elements[exponent + 255] = element
        element <<= 1
        if element & 0x100:
            element ^= POLYNOMIAL
    return exponents, elements


def times(a: npt.ArrayLike, b: npt.ArrayLike) -> Bytes:
    """Products of elements, broadcast as NumPy does."""
    exponents, elements = _logarithms()
    a, b = np.asarray(a, np.uint8), np.asarray(b, np.uint8)
    products = elements[exponents[a] + exponents[b]]
    return np.where((a == 0) | (b == 0), np.uint8(0), products)


def inverse(a: npt.ArrayLike) -> Bytes:
    """1 / a of elements that are not 0."""
    exponents, elements = _logarithms()
    a = np.asarray(a, np.uint8)
    assert np.all(a != 0), "0 has no inverse"
    return np.asarray(elements[255 - exponents[a]])


def matrix_product(a: Bytes, b: Bytes) -> Bytes:
    """Of two matrices."""
    products = times(a[:, :, None], b[None, :, :])
    return np.asarray(np.bitwise_xor.reduce(products, axis=1))


def matrix_inverse(matrix: Bytes) -> Bytes:
    """By Gauss and Jordan; of a matrix that has one."""
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        pivot = column + int(np.argmax(work[column:, column] != 0))
        assert work[pivot, column], "the matrix has no inverse"
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = times(work[column], inverse(work[column, column]))
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= times(factors[:, None], work[column][None, :])
    return work[:, size:].copy()


@cache
def parity_matrix(k: int, m: int) -> Bytes:
    """Coefficients of m parities over k units of data; the first parity's are all 1: plain XOR.

    A Cauchy matrix, 1 / (x_i + y_j) of k + m elements that differ, with each column divided by its
    first coefficient. Every square part of it has an inverse, and so has every k rows of the
    identity above it: any m units of k + m can be rebuilt from the others.

    Raises:
        ValueError: there are not enough elements.
    """
    if k < 1 or m < 0 or k + m > 255:
        raise ValueError(
            f"{k} units of data with {m} of parity: at least 1 of data, and at most 255 together"
        )
    x = np.arange(k, k + m, dtype=np.uint8)
    y = np.arange(k, dtype=np.uint8)
    cauchy = inverse(x[:, None] ^ y[None, :])
    matrix = times(cauchy, inverse(cauchy[:1])) if m else cauchy
    matrix.flags.writeable = False
    return matrix
