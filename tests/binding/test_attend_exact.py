"""Exact rows beside packed caches against the oracle in float64, at every kernel level."""

import numpy as np
import pytest
from native_support import (
    BFP_TYPES,
    FLOAT_TYPES,
    SHARE,
    attend_bound,
    drawn,
    integer_bound,
    new_cache,
    random_transform,
    rope_for,
    rotated,
)

from ksort_gguf import reference
from ksort_gguf.binding import cpu, ffi
from ksort_gguf.kvplan import Transform
from ksort_gguf.reference_exact import ExactRows, attend

TILE = reference.TILE_TOKENS
NAN_BYTE = 0xFF  # of rows that are not written: NaN, were it read
BLOCK = 16


class Side:
    """Keys or values in a packed cache with exact rows beside it (or none), and what they are in the oracle."""

    def __init__(self, rng, type_name: str, shape: tuple[int, int], n_slots: int, exact, transform: Transform | None):
        """exact: n_tail, n_sinks and tiles of the ring, or None."""
        self.type_name, self.transform = type_name, transform
        n_kv_heads, head_dim = shape
        self.rows = None
        if exact is not None:
            self.memory = ffi.aligned_buffer((1 + exact[2]) * n_kv_heads * TILE * head_dim * 2)
            self.memory[:] = NAN_BYTE
            self.rows = cpu.ExactRows(head_dim, n_kv_heads, *exact, self.memory)
        self.cache, _ = new_cache(type_name, head_dim, BLOCK, n_kv_heads, n_slots, NAN_BYTE, self.rows)
        self.x = (rng.standard_normal((n_slots, *shape)) * np.exp(rng.standard_normal(head_dim))).astype(np.float32)

    def pack(self, first: int, end: int, rope=None) -> None:
        """Slots first .. end-1, after what ksort.h asks for."""
        if self.rows is not None:
            begin = min(self.rows.begin, first)
            self.rows.begin = max(begin, end - self.rows.n_slots)
        rope = rope and {"rope": rope["rope"], **{name: rope[name][first:end] for name in ("cos", "sin")}}
        for ith in range(3):
            self.cache.pack(self.x[first:end], first, ith=ith, nth=3, transform=self.transform, **(rope or {}))

    def exact(self, rope=None) -> np.ndarray | None:
        """Exact rows of all slots, as the oracle has them."""
        if self.rows is None:
            return None
        y = rotated(self.x, **rope) if rope else self.x
        y = reference.transform_keys(y, self.transform) if self.transform else y
        return reference.round_blocks(y, "f16", BLOCK)


class Problem:
    """Both sides, queries in the last slots, and RoPE."""

    def __init__(
        self, rng, *, heads=(6, 2, 32), k_type="bfp12", v_type="bfp12", tail=(40, 4, 4), sides="kv", n_slots=300,
        n_queries=1, window=0, query_type="bfp16", steps=(), n_rot=16,
    ):  # fmt: skip
        n_heads, n_kv_heads, head_dim = heads
        self.shape, self.window, self.query_type = (n_kv_heads, head_dim), window, query_type
        self.scale, self.first_slot, self.n_slots = head_dim**-0.5, n_slots - n_queries, n_slots

        def side(name: str, type_name: str) -> Side:
            is_bfp = type_name in BFP_TYPES
            transform = random_transform(rng, n_kv_heads, head_dim, steps) if steps and is_bfp else None
            return Side(rng, type_name, self.shape, n_slots, tail if name in sides and is_bfp else None, transform)

        self.k, self.v = side("k", k_type), side("v", v_type)
        self.q = rng.standard_normal((n_queries, n_heads, head_dim)).astype(np.float32)
        _, self.rope = rope_for(rng, n_kv_heads, head_dim, n_rot, "half", n_slots)

    def pack(self, *ends: int) -> None:
        """All slots, in calls that end at `ends` and at the last slot."""
        for first, end in zip((0, *ends), (*ends, self.n_slots), strict=True):
            self.k.pack(first, end, self.rope)
            self.v.pack(first, end)

    def attend(self, nth: int = 1, n_queries: int | None = None) -> np.ndarray:
        """The library's; of the last `n_queries`, in one call."""
        n = len(self.q) if n_queries is None else n_queries
        first = self.n_slots - n
        positions = {name: self.rope[name][first:] for name in ("cos", "sin")}
        return cpu.attend(
            self.k.cache, self.v.cache, self.q[len(self.q) - n :], first, scale=self.scale, window=self.window,
            query_type=self.query_type, nth=nth, rope=self.rope["rope"], k_transform=self.k.transform,
            v_transform=self.v.transform, **positions,
        )  # fmt: skip

    def check(self, out: np.ndarray) -> None:
        """`out` lies within the share of the bound that attention without exact rows is held to."""
        positions = {name: self.rope[name][self.first_slot :] for name in ("cos", "sin")}
        exact_q = rotated(self.q, self.rope["rope"], **positions)
        if self.k.transform is not None:
            exact_q = reference.transform_queries(exact_q, self.k.transform)
        q = exact_q
        if self.query_type == "bfp16":
            q = reference.round_blocks(q, "bfp16", BLOCK)
        k, v = (side.cache.unpack(0, self.n_slots) for side in (self.k, self.v))
        rows = self.k.rows or self.v.rows
        struct = rows.struct
        exact = ExactRows(
            self.k.exact(self.rope), self.v.exact(), exact_q, struct.n_tail, struct.n_sinks, rows.begin
        )  # fmt: skip
        expected = attend(k, v, q, self.first_slot, self.scale, self.window, exact)
        largest = [
            np.maximum(np.abs(packed), np.abs(packed if other is None else other))
            for packed, other in ((k, exact.keys), (v, exact.values), (q, exact_q))
        ]
        bound = attend_bound(*largest, self.first_slot, self.scale, self.window)
        bound += integer_bound(largest[1], self.v.type_name) / 8 / SHARE
        if self.v.transform is not None:
            got_back = reference.restore_values(expected.astype(np.float32), self.v.transform)
            grown = np.abs(reference.restore_values(np.ones_like(self.q), self.v.transform)).max() + 1
            tolerance = SHARE * bound.max() * np.sqrt(self.shape[1]) * 8 + 1e-5 * grown
            np.testing.assert_allclose(out, got_back, rtol=2e-5, atol=tolerance)
            return
        share = np.max(np.abs(out - expected) / bound)
        assert np.isfinite(out).all() and share <= SHARE, f"{share:.3g} times the bound"


HEADS = [(1, 1, 16), (6, 2, 32), (4, 1, 64), (14, 2, 80), (3, 3, 34), (16, 1, 128), (2, 1, 256), (9, 3, 64)]
TAILS = [
    (128, 4, 4),
    (64, 0, 2),
    (1, 64, 3),
    (40, 4, 4),
    (0, 10, 0),
    (0, 10, 4),
    (200, 33, 5),
    (70, 1, 7),
    (500, 60, 9),
]


@drawn(
    45,
    heads=HEADS,
    tail=TAILS,
    k_type=BFP_TYPES,
    v_type=BFP_TYPES + FLOAT_TYPES,
    sides=["kv", "k", "kv"],
    query_type=["bfp16", "f32"],
    n_slots=[1, 3, 5, 64, 65, 130, 191, 300, 450],
    n_queries=[1, 1, 2, 17, 60],
    window=[0, 0, 1, 3, 50, 150],
    nth=[1, 2, 3, 4, 5],
)
def test_attention_is_the_oracles(
    level, rng, heads, tail, k_type, v_type, sides, query_type, n_slots, n_queries, window, nth
):
    """Catches a slot that is read from the wrong rows, twice or not at all, a ring row of another slot, keys' units in
    exact scores, rounded queries; rows that were not written hold NaN, which must not leak."""
    n_queries = min(n_queries, n_slots, max(1, tail[2] * TILE - tail[0] + 1) if tail[0] else n_queries)
    problem = Problem(
        rng, heads=heads, tail=tail, k_type=k_type, v_type=v_type, sides=sides, query_type=query_type, n_slots=n_slots,
        n_queries=n_queries, window=window,
    )  # fmt: skip
    problem.pack(*range(61, n_slots, 61))
    problem.check(problem.attend(nth))


@drawn(10, sides=["kv", "v"], k_type=["f16", "bfp12", "bfp16"], n_queries=[1, 20], nth=[1, 3])
def test_values_alone(level, rng, sides, k_type, n_queries, nth):
    """Catches values that are read as their keys are."""
    problem = Problem(rng, k_type=k_type, sides=sides, n_queries=n_queries, tail=(40, 4, 2))
    problem.pack(100, 200)
    problem.check(problem.attend(nth))


STEPS = [("scale",), ("rotate", "scale"), ("shift", "scale", "rotate", "permutation", "feedback")]


@drawn(9, steps=STEPS, heads=HEADS[:4], v_type=["bfp12", "f16"], n_queries=[1, 20], query_type=["bfp16", "f32"])
def test_transforms(level, rng, steps, heads, v_type, n_queries, query_type):
    """Catches exact rows from before the transform, or with feedback in them, and values restored twice."""
    problem = Problem(
        rng, heads=heads, v_type=v_type, steps=steps, n_queries=n_queries, query_type=query_type, tail=(40, 4, 2)
    )
    problem.pack(130)
    problem.check(problem.attend(2))


@pytest.mark.parametrize("transform", [False, True])
def test_rows_are_the_oracles_bits(level, rng, transform):
    """Catches rows rounded twice, in other rows, and rows of slots that the ring has no room for."""
    steps = ("shift", "scale", "rotate", "permutation", "feedback") if transform else ()
    problem = Problem(rng, tail=(40, 5, 2), n_slots=400, steps=steps)
    problem.pack(3, 10, 200)  # the last call brings more than the ring holds
    for side, rope in ((problem.k, problem.rope), (problem.v, None)):
        rows = side.memory.view(np.float16).reshape(3, problem.shape[0], TILE, problem.shape[1])
        expected = side.exact(rope).astype(np.float16)
        assert side.rows.begin == 400 - 128
        for slot in range(5):
            assert (rows[0, :, slot] == expected[slot]).all(), slot
        for slot in range(400 - 128, 400):
            assert (rows[1 + slot // TILE % 2, :, slot % TILE] == expected[slot]).all(), slot
        assert np.isnan(rows[0, :, 5:]).all()


@pytest.mark.parametrize("n_queries", [1, 25])
def test_how_a_text_is_cut_changes_nothing(level, rng, n_queries):
    """Catches tails that depend on the calls: in one call or many, all queries at once or one by one."""
    problem = Problem(rng, tail=(40, 4, 3), n_slots=180, n_queries=n_queries)
    problem.pack()
    whole = problem.attend()
    problem.check(whole)
    problem.pack(1, 2, 70, 171)
    np.testing.assert_allclose(problem.attend(5), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(problem.attend(n_queries=1), whole[-1:], rtol=0, atol=1e-5)


def test_slots_forgotten_and_written_anew(level, rng):
    """Catches rows of forgotten slots: behind a truncation within the ring, or before all that the ring has."""
    for kept in (250, 100, 3, 0):
        problem = Problem(rng, tail=(40, 4, 2), n_slots=300)
        problem.pack()
        for side in (problem.k, problem.v):
            side.x[kept:] = rng.standard_normal(side.x[kept:].shape)
        for first, end in ((kept, kept + 20), (kept + 20, 300)):
            problem.k.pack(first, end, problem.rope)
            problem.v.pack(first, end)
        problem.check(problem.attend(3))


def test_after_a_truncation_the_tail_grows_anew(level, rng):
    """Catches rows before `begin` that are read: those that the ring no longer has come from the packed tiles."""
    problem = Problem(rng, tail=(40, 4, 2), n_slots=300)
    problem.pack()
    problem.n_slots, problem.first_slot = 110, 109
    problem.k.pack(100, 110, problem.rope)
    problem.v.pack(100, 110)
    assert problem.k.rows.begin == problem.v.rows.begin == 100
    positions = {name: problem.rope[name][:110] for name in ("cos", "sin")}
    problem.rope = {"rope": problem.rope["rope"], **positions}
    for side in (problem.k, problem.v):
        side.x = side.x[:110]
    problem.check(problem.attend(2))
