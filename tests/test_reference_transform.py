"""The oracle's transforms: against a Hadamard matrix written out, numbers worked out by hand, and plain rounding."""

import numpy as np
import pytest
from native_support import BFP_SHAPES, RUN_TIME_STEPS, drawn, nasty_rows, random_transform

from ksort_gguf import reference
from ksort_gguf.kvplan import Transform
from ksort_gguf.reference_blocks import MANTISSA_BITS, SCALED_TYPES, decode_blocks, encode_blocks, encode_transformed


def hadamard(n: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix of n = 2^k channels, by Kronecker products."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(n)


@pytest.mark.parametrize(
    ("head_dim", "segments"),
    [(2, [2]), (6, [4, 2]), (64, [64]), (80, [64, 16]), (90, [64, 16, 8, 2]), (96, [64, 32]), (256, [256])],
)
def test_rotate_is_blocks_of_hadamard_matrices(rng, head_dim, segments):
    """Catches a missing or repeated stride, wrong signs, a wrong factor, and segments cut elsewhere."""
    matrix = np.zeros((head_dim, head_dim))
    starts = np.cumsum([0, *segments])
    for start, n in zip(starts[:-1], segments, strict=True):
        matrix[start : start + n, start : start + n] = hadamard(n)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-12)  # the test's own matrix
    x = rng.standard_normal((5, 3, head_dim)).astype(np.float32)
    np.testing.assert_allclose(reference.rotate(x), x @ matrix, rtol=0, atol=3e-6)
    np.testing.assert_allclose(reference.rotate(reference.rotate(x)), x, rtol=0, atol=3e-6)


@pytest.mark.parametrize("steps", [("shift",), ("scale",), ("rotate",), ("permutation",), RUN_TIME_STEPS], ids="+".join)
@pytest.mark.parametrize("head_dim", [64, 90])
def test_scores_keep_their_differences(rng, steps, head_dim):
    """Catches a query transform that is not the inverse transpose of the key's: softmax(q.k) must stay as it is."""
    transform = random_transform(rng, 2, head_dim, steps)
    k = rng.standard_normal((30, 2, head_dim)).astype(np.float32)
    q = rng.standard_normal((5, 6, head_dim)).astype(np.float32)
    y, p = reference.transform_keys(k, transform), reference.transform_queries(q, transform)

    def centered_scores(keys, queries):
        scores = np.einsum("thd,qhgd->qhgt", keys.astype(float), queries.astype(float).reshape(5, 2, 3, -1))
        return scores - scores.mean(axis=-1, keepdims=True)

    np.testing.assert_allclose(centered_scores(y, p), centered_scores(k, q), rtol=0, atol=2e-4)
    assert not np.allclose(y, k)


def test_restored_values_are_the_values(rng):
    """Catches restoring in the order of transforming, or with another head's tables: averages must come back."""
    transform = random_transform(rng, 2, 80)
    v = rng.standard_normal((30, 2, 80)).astype(np.float32)
    weights = rng.dirichlet(np.ones(30), 6).astype(np.float32)  # [n_heads, T]
    y = reference.transform_keys(v, transform)
    out = np.einsum("gt,tgd->gd", weights, np.repeat(y, 3, axis=1))[None]
    expected = np.einsum("gt,tgd->gd", weights, np.repeat(v, 3, axis=1))[None]
    np.testing.assert_allclose(reference.restore_values(out, transform), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("largest", "exponent", "mantissas"),
    [(5.0, 2, [5, 1, 1]), (4.4, 1, [7, 3, 3]), (-7.9, 2, [-8, 1, 1])],
)
def test_exponent_of_least_error_by_hand(largest, exponent, mantissas):
    """Catches the natural exponent kept, or one less, where the other is better, and a clamp at -7; m = 4.

    Beside 15 channels of 1.3. Step 1: errors 15 * 0.3^2 = 1.35 and the largest's own (0, 0.4^2, 0.1^2). Step 1/2, up to
    3.5: 15 * 0.2^2 = 0.6 and 1.5^2, 0.9^2, 3.9^2 of the largest. So 4.4 alone takes the smaller step: 1.41 < 1.51.
    """
    x = np.full((1, 1, 16), 1.3, np.float32)
    x[..., 0] = largest
    stored, exponents = encode_transformed(x, "bfp12", 16, None)
    assert exponents.tolist() == [[[127 + exponent]]]
    assert stored[0, 0, :3].tolist() == mantissas


@pytest.mark.parametrize(("power", "exponent"), [(-129, 0), (-128, 1), (-127, 1), (-126, 2)])
def test_smallest_exponents(power, exponent):
    """Catches exponent 0, which means zero, chosen for its smaller error, and subnormal blocks that are not zero.

    The block of 4.4 and 1.3 above, which takes one less than its natural exponent: here 0, 1, 2, 3.
    """
    x = np.full((1, 1, 16), 1.3, np.float32)
    x[..., 0] = 4.4
    _, exponents = encode_transformed(np.ldexp(x, power), "bfp12", 16, None)
    assert exponents.tolist() == [[[exponent]]]


def test_feedback_by_hand():
    """Catches errors of the wrong sign, taken from earlier channels, or not handed on; m = 4, step 1.

    4.4 -> 4, error 0.4; 2.6 - 0.5 * 0.4 = 2.4 -> 2 (not 3), error 0.4; 1.4 + 0.5 * 0.4 = 1.6 -> 2 (not 1).
    """
    x = np.zeros((1, 1, 16), np.float32)
    x[0, 0, :4] = 4.4, 2.6, 1.4, 7.0
    feedback = np.zeros((1, 16, 16), np.float32)
    feedback[0, 0, 1], feedback[0, 1, 2], feedback[0, 3, 2] = 0.5, -0.5, 100.0  # the last one lies below the diagonal
    for used, expected in ((None, [4, 3, 1, 7]), (feedback, [4, 2, 2, 7])):
        mantissas, exponents = encode_transformed(x, "bfp12", 16, used)
        assert mantissas[0, 0, :4].tolist() == expected
        assert exponents.tolist() == [[[127 + 2]]]


def squared_error(x, mantissas, codes, type_name, block_size) -> np.ndarray:
    """float64 [rows, blocks] of float32 x [rows, d]."""
    error = (decode_blocks(mantissas, codes, type_name, block_size).astype(float) - x) ** 2
    return np.stack([error[:, start : start + block_size].sum(axis=1) for start in range(0, x.shape[1], block_size)], 1)


@drawn(18, type_name=("bfp12", "bfp14", "bfp16"), shape=BFP_SHAPES)
def test_least_error_is_never_above_nearest(rng, type_name, shape):
    """Catches sums of errors compared in different units, or over another block's channels."""
    head_dim, block_size = shape
    x = np.clip(nasty_rows(rng, 300, head_dim, MANTISSA_BITS[type_name]), -1e30, 1e30)
    mantissas, codes = encode_transformed(x[:, None], type_name, block_size, None)
    ours = squared_error(x, mantissas[:, 0], codes[:, 0], type_name, block_size)
    nearest = squared_error(x, *encode_blocks(x, type_name, block_size), type_name, block_size)
    assert (ours <= nearest * (1 + 1e-5)).all()  # float32 sums decide between near equals
    assert (ours < 0.9 * nearest).any()


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("type_name", SCALED_TYPES)
def test_signed_scales_lower_the_error(rng, type_name, block_size):
    """Catches a search that loses to the nearest encoder of SBFP; on single blocks it may."""
    x = rng.standard_normal((300, 1, 128)).astype(np.float32)
    nearest = squared_error(x[:, 0], *encode_blocks(x[:, 0], type_name, block_size), type_name, block_size)
    mantissas, codes = encode_transformed(x, type_name, block_size, None)
    ours = squared_error(x[:, 0], mantissas[:, 0], codes[:, 0], type_name, block_size)
    assert ours.mean() < 0.92 * nearest.mean()
    assert (codes >> 7).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("largest", "code", "mantissas"),
    [(8.0, 0xBC, [-8, -1, 1]), (-8.0, 0x3C, [-8, 1, -1]), (10.0, 0xBD, [-8, -1, 1]), (9.0, 0xBC, [-8, -1, 1])],
)
def test_scale_of_least_error_by_hand(largest, code, mantissas):
    """Catches a scale of the largest value's own sign, mantissa 7 for it, and the scale above kept where the one below
    is better: 9 is nearest to -8 * -1 beside 15 channels of 1 and -1, which are no multiples of 1.25; m = 4."""
    x = np.ones((1, 1, 16), np.float32)
    x[..., 2:] = -1.0
    x[..., 0] = largest
    stored, codes = encode_transformed(x, "sbfp12", 16, None)
    assert codes.tolist() == [[[code]]]
    assert stored[0, 0, :3].tolist() == mantissas


@pytest.mark.parametrize("type_name", MANTISSA_BITS)
def test_feedback_lowers_the_weighted_error(rng, type_name):
    """Catches feedback that helps no query: e^T H e must fall well below plain rounding's for correlated queries."""
    head_dim, n_tokens = 64, 400
    queries = rng.standard_normal((1000, 12)) @ rng.standard_normal((12, head_dim))  # 12 directions that matter
    metric = queries.T @ queries / 1000
    metric = metric / np.trace(metric) * head_dim + 0.01 * np.eye(head_dim)
    upper = np.linalg.cholesky(np.linalg.inv(metric)).T
    feedback = np.triu(upper / np.diag(upper)[:, None], 1).astype(np.float32)
    x = rng.standard_normal((n_tokens, 1, head_dim)).astype(np.float32)
    weighted = []
    for used in (None, feedback[None]):
        encoded = encode_transformed(x, type_name, 32, used)
        error = (decode_blocks(*encoded, type_name, 32).astype(float) - x)[:, 0]
        weighted.append(np.einsum("tc,cd,td->", error, metric, error))
    assert weighted[1] < 0.5 * weighted[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_is_refused(bad):
    """Catches an exponent made from NaN or infinity."""
    with pytest.raises(ValueError, match="NaN"):
        encode_transformed(np.full((1, 1, 16), bad, np.float32), "bfp12", 16, None)


def test_no_steps_change_nothing(rng):
    """Catches a transform without steps that still touches keys, queries or values."""
    x = rng.standard_normal((3, 2, 16)).astype(np.float32)
    for function in (reference.transform_keys, reference.transform_queries, reference.restore_values):
        assert function(x, Transform()) is x
