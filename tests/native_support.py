"""What the tests of libksort share: nasty inputs, caches in aligned memory, RoPE tables, problems and their bounds."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from drawn_support import draw

from ksort_gguf import reference
from ksort_gguf.binding import cpu, ffi
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.models.rope import folded_tables, stock_tables
from ksort_gguf.names import BLOCK_SIZES

BFP_TYPES = tuple(reference.MANTISSA_BITS)
FLOAT_TYPES = tuple(reference.FLOAT_BYTES)
# head_dim, block_size: whole blocks, ragged last blocks, padded words, the smallest head, the largest
BFP_SHAPES = (
    *((16, 16), (18, 16), (34, 32), (64, 16), (64, 32), (64, 64), (80, 32), (80, 64), (90, 16), (90, 64), (96, 32)),
    *((96, 64), (128, 32), (128, 128), (250, 64), (256, 128), (256, 16)),
)
FLOAT_HEAD_DIMS = (2, 6, 80, 90, 128, 256)


def drawn(n_cases: int, /, **axes: Sequence) -> pytest.MarkDecorator:
    """Parametrize a test by cases of these axes (drawn_support), each named by its values.

    Every value of every axis comes up: an axis longer than `n_cases` is an error.
    """
    assert n_cases >= max(map(len, axes.values())), "some values would never be tried"
    cases = draw(n_cases, *axes.values(), seed=zlib.crc32("".join(axes).encode()))
    names = ["-".join(f"{axis}={_word(value)}" for axis, value in zip(axes, case, strict=True)) for case in cases]
    return pytest.mark.parametrize(tuple(axes), cases, ids=[f"{i}-{name}" for i, name in enumerate(names)])


def _word(value) -> str:
    """A value of an axis in a test's name."""
    if hasattr(value, "_asdict"):
        return ",".join(f"{field}:{x}" for field, x in value._asdict().items())
    if isinstance(value, tuple):
        return "+".join(map(_word, value)) or "none"
    return str(value)


def random_formats(n: int, seed: int = 1) -> list[tuple[str, int, int]]:
    """`n` cache formats (type, head_dim, block_size), all types alike: half of the shapes above, half any."""
    rng = np.random.default_rng(seed)
    known = {
        True: draw(n, BFP_SHAPES, seed=seed),
        False: draw(n, [(head_dim, 16) for head_dim in FLOAT_HEAD_DIMS], seed=seed),
    }
    formats = []
    for i, (type_name,) in enumerate(draw(n, BFP_TYPES + FLOAT_TYPES, seed=seed)):
        is_bfp = type_name in BFP_TYPES
        head_dim, block_size = known[is_bfp][i][0]
        if i % 2:
            head_dim = int(rng.integers(8 if is_bfp else 1, 129)) * 2
            block_size = int(rng.choice([size for size in BLOCK_SIZES if size <= max(head_dim, 16)]))
        formats.append((type_name, head_dim, block_size))
    return formats


def nasty_rows(rng: np.random.Generator, n_rows: int, head_dim: int, mantissa_bits: int = 4) -> np.ndarray:
    """float32 [n_rows, head_dim]: each row is one kind of block that encoders get wrong, in random order."""
    normal = rng.standard_normal((n_rows, head_dim))
    outlier = np.where(rng.random((n_rows, head_dim)) < 0.05, 100.0, 1.0)
    ticks = rng.integers(-(2 ** (mantissa_bits + 1)), 2 ** (mantissa_bits + 1), (n_rows, head_dim))
    largest = np.float64(np.finfo(np.float32).max)
    kinds = [
        normal,
        normal * outlier,
        ticks * 0.25,  # exact ties between mantissas, in every direction
        normal * 1e30,
        normal * 1e-30,
        normal * 2.0**-126,  # blocks around the smallest normal number
        normal * 2.0**-140,  # only subnormal numbers
        np.zeros_like(normal),
        np.where(normal > 0, 0.0, -0.0),
        np.sign(normal) * largest,  # all largest: the clamp, and the largest exponent
        np.full_like(normal, 2.0**-149),  # all smallest
        np.sign(normal) * np.exp2(rng.integers(-126, 127, (n_rows, head_dim))),
        np.where(rng.random((n_rows, head_dim)) < 0.1, normal, 0.0),
        np.broadcast_to(normal[:, :1], normal.shape),
    ]
    choice = rng.integers(0, len(kinds), n_rows)
    return np.stack([kinds[kind][row] for row, kind in enumerate(choice)]).astype(np.float32)


def new_cache(type_name, head_dim, block_size, n_kv_heads, n_slots, fill=0, exact=None):
    """PackedHeads over aligned memory whose bytes are all `fill`, and it as uint8 [tiles, heads, tile bytes]."""
    one_tile = cpu.tile_bytes(type_name, head_dim, block_size)
    n_tiles = -(-n_slots // reference.TILE_TOKENS)
    memory = ffi.aligned_buffer(n_tiles * n_kv_heads * one_tile)
    memory[:] = fill
    cache = cpu.PackedHeads(type_name, head_dim, block_size, n_kv_heads, n_slots, memory, exact=exact)
    return cache, memory.reshape(n_tiles, n_kv_heads, one_tile)


RUN_TIME_STEPS = ("shift", "scale", "rotate", "permutation", "feedback")  # in the order applied


def random_transform(rng, n_kv_heads: int, head_dim: int, steps=RUN_TIME_STEPS) -> Transform:
    """A Transform with the steps named: scales over some powers of two, feedback as strong as a plan's or stronger.

    Of feedback, the diagonal and what lies below may not be read: it is NaN.
    """
    heads = (n_kv_heads, head_dim)
    tables = {
        "shift": rng.standard_normal(heads),
        "scale": np.exp(rng.standard_normal(heads)),
        "feedback": np.where(np.tri(head_dim, dtype=bool), np.nan, rng.standard_normal((*heads, head_dim)) * 0.2),
    }
    chosen = {name: table.astype(np.float32) for name, table in tables.items() if name in steps}
    if "permutation" in steps:
        chosen["permutation"] = rng.permuted(np.tile(np.arange(head_dim, dtype=np.int32), (n_kv_heads, 1)), axis=1)
    return Transform(rotate="rotate" in steps, **chosen)


def rope_for(rng, n_kv_heads, head_dim, n_rot, row_order, n_tokens, folded=True) -> tuple[np.ndarray, dict]:
    """The order [n_kv_heads, head_dim] (random a head, if folded), and rope, cos, sin for it as the calls take them."""
    stock = stock_tables(head_dim, n_rot, row_order)
    heads = np.tile(np.arange(head_dim), (n_kv_heads, 1))
    order = rng.permuted(heads, axis=1) if folded else heads
    tables = folded_tables(stock, order)
    angles = rng.uniform(-np.pi, np.pi, (n_tokens, max(1, n_rot // 2)))
    positions = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return order, {"rope": tables, **positions}


def rotated(x: np.ndarray, rope: RopeTables, cos, sin) -> np.ndarray:
    """x [T, heads, d] after RoPE by the reference; query heads use their KV head's tables."""
    repeat = x.shape[1] // len(rope.partner)
    partner, sign, frequency = (np.repeat(t, repeat, axis=0) for t in (rope.partner, rope.sign, rope.frequency))
    return reference.rope(x, partner, sign, frequency, cos, sin)


def token_of_byte(type_name: str, head_dim: int, block_size: int) -> np.ndarray:
    """int [tile bytes]: the token (0..63) that each byte of a tile belongs to, from FORMAT.md's byte formulas."""
    n_bytes = cpu.tile_bytes(type_name, head_dim, block_size)
    place = np.arange(n_bytes)
    if type_name in FLOAT_TYPES:
        return place // (head_dim * reference.FLOAT_BYTES[type_name])
    n_blocks = -(-head_dim // block_size)
    strip_bytes = (n_bytes - 64 * n_blocks) // 4
    in_strip = place // strip_bytes * 16 + place % strip_bytes // 4 % 16
    return np.where(place < 4 * strip_bytes, in_strip, (place - 4 * strip_bytes) % 64)


UNIT = 2.0**-24  # relative rounding error of one float32 operation
EXP_ERROR = 2.0**-23  # relative error that a kernel's exp may have


def attend_bound(k, v, q, first_slot: int, scale: float, window: int = 0) -> np.ndarray:
    """How far ksort_attend may be from reference.attend of the same arrays: float64 [n_queries, n_heads, 1].

    To first order, for a query that sees T slots, with A = max_t |scale| sum_c |q_c k_tc| and V = max |v|:
    - a score is d products and sums, and at most 8 more factors (block exponents, scale): error (d + 8) u A;
    - exp(s - m): the difference errs by 2 u A, exp itself by EXP_ERROR;
    - the running maximum m may rise with every tile of 64 tokens and every split joined. Whatever m was, it cancels;
      each rescaling errs by EXP_ERROR + 2 u, and their arguments, which sum up to at most 2 A, by 2 u A.
    So a weight errs by eta = (d + 12) u A + (T / 32 + 8) (EXP_ERROR + 2 u), relatively, in numerator and denominator
    alike; sums of T terms add (T + 8) u to each: the quotient errs by 2 V (eta + (T + 8) u). 1.1 covers higher orders.
    """
    n_queries, n_heads, head_dim = q.shape
    group = n_heads // k.shape[1]
    bound = np.empty((n_queries, n_heads, 1))
    for i in range(n_queries):
        end = first_slot + i + 1
        seen = slice(max(0, end - window) if window else 0, end)
        n_seen = seen.stop - seen.start
        for g in range(n_heads):
            largest_score = abs(scale) * (np.abs(k[seen, g // group], dtype=float) @ np.abs(q[i, g], dtype=float)).max()
            weight_error = (head_dim + 12) * UNIT * largest_score + (n_seen / 32 + 8) * (EXP_ERROR + 2 * UNIT)
            bound[i, g] = 2.2 * np.abs(v[seen, g // group]).max() * (weight_error + (n_seen + 8) * UNIT)
    return bound


class Shape(NamedTuple):
    """One problem: head geometry, the queries' place, and how the rest is varied along."""

    head_dim: int
    block_size: int
    n_heads: int
    n_kv_heads: int
    first_slot: int
    n_queries: int
    window: int
    n_rot: int
    v_type: str
    nth: int
    v_block_size: int = 16


def random_shapes(n: int) -> list[Shape]:
    """`n` problems: every head dimension, span, number of queries, window and values' type about equally often."""
    group_sizes, kv_heads = (1, 2, 3, 4, 7, 16), (1, 2, 3)
    head_dims = (16, 18, 34, 64, 64, 80, 90, 96, 128, 250, 256)
    starts, queries = (0, 1, 15, 63, 100, 130, 199, 300, 700), (1, 1, 1, 2, 3, 17, 37, 70)
    windows, parts = (0, 0, 1, 33, 50, 128), (1, 2, 3, 5)
    axes = head_dims, group_sizes, kv_heads, starts, queries, windows, BFP_TYPES + FLOAT_TYPES, parts
    rng, shapes = np.random.default_rng(2), []
    for head_dim, group, n_kv_heads, first_slot, n_queries, window, v_type, nth in draw(n, *axes, seed=2):
        sizes = [size for size in BLOCK_SIZES if size <= head_dim]
        block_size, v_block_size = (int(size) for size in rng.choice(sizes, 2))
        if n_queries > 3 and first_slot > 300:
            first_slot = 60  # the oracle is slow
        group = min(group, 4) if n_queries > 3 else group
        n_rot = int(rng.choice([2, head_dim // 4 * 2, head_dim]))
        heads = group * n_kv_heads, n_kv_heads
        shapes.append(
            Shape(head_dim, block_size, *heads, first_slot, n_queries, window, n_rot, v_type, nth, v_block_size)
        )
    return shapes


def random_problem(rng, shape: Shape, k_type: str, query_type: str):
    """Packed caches, raw q and rope; and the float arrays that the library must have used: k, v, q."""
    n_tokens = shape.first_slot + shape.n_queries
    k_cache, _ = new_cache(k_type, shape.head_dim, shape.block_size, shape.n_kv_heads, n_tokens, fill=0xFF)
    v_cache, _ = new_cache(shape.v_type, shape.head_dim, shape.v_block_size, shape.n_kv_heads, n_tokens, fill=0xFF)
    channel_scale = np.exp(rng.standard_normal(shape.head_dim))  # outlier channels, as keys have
    k = (rng.standard_normal((n_tokens, shape.n_kv_heads, shape.head_dim)) * channel_scale).astype(np.float32)
    v = rng.standard_normal(k.shape).astype(np.float32)
    q = rng.standard_normal((shape.n_queries, shape.n_heads, shape.head_dim)).astype(np.float32)
    _, rope = rope_for(rng, shape.n_kv_heads, shape.head_dim, shape.n_rot, "half", n_tokens)
    k_cache.pack(k, 0, **rope)
    v_cache.pack(v, 0)
    query_rope = {"rope": rope["rope"], **{part: rope[part][shape.first_slot :] for part in ("cos", "sin")}}
    q_used = rotated(q, **query_rope)
    if query_type == "bfp16":
        q_used = reference.round_blocks(q_used, "bfp16", shape.block_size)
    return k_cache, v_cache, q, query_rope, (k_cache.unpack(0, n_tokens), v_cache.unpack(0, n_tokens), q_used)


# The bound adds up worst cases, but rounding errors mostly cancel: kernels measure below 0.01 of it on these problems.
# Held to this share of it, small mistakes show, not only gross ones.
SHARE = 0.05


def integer_bound(v: np.ndarray, v_type: str | None) -> float:
    """What multiplying BFP12 values by integers may add to attend_bound; 0 for other types.

    weight * step is rounded to units of 2^-16 of a tile's largest weight times its largest step, twice where the step
    is smaller than the largest: off by at most 1/2 + 1/4. A value is at most 2 steps, so 64 tokens err by no more than
    64 * 2 * 3/4 * 2^-16 = 1.5 * 2^-10 of it; they are held to 2^-10. A block's largest value is at least its step, so
    that is 2^-10 V times a weight of the tile, and the tiles' largest weights sum to no more than all weights.
    """
    return 2.0**-10 * float(np.abs(v).max()) if v_type == "bfp12" else 0.0


def assert_close(out, k, v, q, first_slot, scale, window, v_type=None) -> None:
    """`out` lies within SHARE of attend_bound from the float64 reference.

    The 64 roundings of integer_bound have random signs: they mostly add up to no more than the root of 64.
    """
    error = np.abs(out - reference.attend(k, v, q, first_slot, scale, window))
    bound = attend_bound(k, v, q, first_slot, scale, window) + integer_bound(v, v_type) / 8 / SHARE
    share = np.max(error / bound)
    assert np.isfinite(out).all()
    assert share <= SHARE, f"error {error.max():.3g} is {share:.3g} times the bound"
