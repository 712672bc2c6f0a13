"""LayerStep and the thread pool: the runner's call gives what the plain calls give, for any number of threads."""

import gc
from pathlib import Path

import numpy as np
import pytest
from native_support import drawn, new_cache, rope_for

from ksort_gguf.binding import cpu
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import NO_PART, PARTS, LayerStep, Pool
from ksort_gguf.errors import CacheTypeError, KsortError

N_HEADS, N_KV_HEADS, HEAD_DIM, N_SLOTS = 6, 2, 64, 512
ROW = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM  # floats of q, k and v of one token


class Layer:
    """One layer's caches and step, and the same twice over for plain calls."""

    def __init__(self, rng, pool: Pool, k_type="bfp12", v_type="f16"):
        caches = [new_cache(t, HEAD_DIM, 32, N_KV_HEADS, N_SLOTS) for t in (k_type, v_type) * 2]
        (self.k, self.k_tiles), (self.v, self.v_tiles) = caches[:2]
        (self.plain_k, self.plain_k_tiles), (self.plain_v, self.plain_v_tiles) = caches[2:]
        self.pool = pool
        _, self.rope = rope_for(rng, N_KV_HEADS, HEAD_DIM, HEAD_DIM, "half", N_SLOTS)
        self.step = LayerStep(
            pool, self.k, self.v, n_heads=N_HEADS, scale=0.125, window=0, query_type="bfp16",
            rope=self.rope["rope"], layer=7,
        )  # fmt: skip

    def run(self, qkv: np.ndarray, first_slot: int) -> np.ndarray:
        """LayerStep.run on qkv [n_tokens, ROW], whose rows may lie further apart than ROW floats."""
        n_tokens = len(qkv)
        out = np.full((n_tokens, N_HEADS * HEAD_DIM + 5), -7, np.float32)  # 5 floats between rows
        rows = FloatRows(out).columns(0, N_HEADS * HEAD_DIM)
        self.step.run(FloatRows(qkv), first_slot, *self.positions(first_slot, n_tokens), rows)
        assert (out[:, N_HEADS * HEAD_DIM :] == -7).all()
        return out[:, : N_HEADS * HEAD_DIM].reshape(n_tokens, N_HEADS, HEAD_DIM)

    def positions(self, first_slot: int, n_tokens: int) -> list[FloatRows]:
        """The rope table's rows of a step, cos and sin."""
        return [FloatRows(self.rope[part][first_slot : first_slot + n_tokens]) for part in ("cos", "sin")]

    def run_plainly(self, qkv: np.ndarray, first_slot: int) -> np.ndarray:
        """The same by PackedHeads.pack and cpu.attend on the second pair of caches, without threads."""
        n_tokens = len(qkv)
        heads = qkv.reshape(n_tokens, -1, HEAD_DIM)
        q, k, v = np.split(heads, [N_HEADS, N_HEADS + N_KV_HEADS], axis=1)
        positions = {part: self.rope[part][first_slot : first_slot + n_tokens] for part in ("cos", "sin")}
        self.plain_k.pack(k, first_slot, self.rope["rope"], **positions)
        self.plain_v.pack(v, first_slot)
        return cpu.attend(
            self.plain_k, self.plain_v, q, first_slot, scale=0.125,
            rope=self.rope["rope"], nth=self.pool.n_threads, **positions,
        )  # fmt: skip


@drawn(4, n_threads=[1, 2, 3, 4], v_type=["f16", "bfp12", "bfp14"])
def test_pool_equals_plain_calls(level, rng, n_threads, v_type):
    """Catches lost or doubled parts, a missing barrier between pack, attend and merge, and a stale workspace size."""
    with Pool(n_threads) as pool:
        layer = Layer(rng, pool, v_type=v_type)
        first_slot = 0
        for n_tokens in (1, 3, 200, 1, 1, 70, 1):  # grows the workspace after small steps
            padded = rng.standard_normal((n_tokens, ROW + 11)).astype(np.float32)
            qkv = padded[:, :ROW]
            out = layer.run(qkv, first_slot)
            assert out.tobytes() == layer.run_plainly(np.ascontiguousarray(qkv), first_slot).tobytes()
            first_slot += n_tokens
        assert layer.k_tiles.tobytes() == layer.plain_k_tiles.tobytes()
        assert layer.v_tiles.tobytes() == layer.plain_v_tiles.tobytes()


@pytest.mark.parametrize("n_threads", [2, 4])
def test_many_short_steps(rng, n_threads):
    """Catches a lost wake-up or a thread still in the last step: layers take turns on one pool, as in the runner."""
    with Pool(n_threads) as pool:
        layers = [Layer(rng, pool) for _ in range(3)]
        for slot in range(200):
            qkv = rng.standard_normal((1, ROW)).astype(np.float32)
            for layer in layers:
                assert layer.run(qkv, slot).tobytes() == layer.run_plainly(qkv, slot).tobytes()


@pytest.mark.parametrize("place", ["k", "v", "q"])
def test_errors_name_the_layer_and_write_nothing(level, rng, place):
    """Catches keys stored although the values of the same step are NaN, and an error that does not say where."""
    with Pool(2) as pool:
        layer = Layer(rng, pool)
        qkv = rng.standard_normal((4, ROW)).astype(np.float32)
        qkv[2, {"q": 0, "k": N_HEADS * HEAD_DIM, "v": ROW - 1}[place]] = np.nan
        with pytest.raises(KsortError, match=r"NaN or infinity.*\(layer 7\)"):
            layer.run(qkv, 10)
        if place != "q":
            assert not layer.k_tiles.any()
            assert not layer.v_tiles.any()
        qkv[:] = rng.standard_normal(qkv.shape)
        layer.run(qkv, 10)  # the pool works on after an error


def test_values_beyond_f16_name_the_way_out(rng):
    """Catches a range error without the argument that helps."""
    with Pool(1) as pool:
        layer = Layer(rng, pool)
        qkv = np.full((1, ROW), 1e5, np.float32)
        with pytest.raises(CacheTypeError, match="`cache_type_v` f32"):
            layer.run(qkv, 0)
        assert not layer.k_tiles.any()


def test_window(rng):
    """Catches a LayerStep that drops its window."""
    with Pool(2) as pool:
        outs = []
        for window in (0, 8):
            layer = Layer(np.random.default_rng(3), pool)
            step = LayerStep(
                pool, layer.k, layer.v, n_heads=N_HEADS, scale=0.125, window=window, query_type="f32",
                rope=layer.rope["rope"],
            )  # fmt: skip
            layer.step = step
            outs.append(layer.run(np.random.default_rng(4).standard_normal((30, ROW)).astype(np.float32), 0))
        assert np.array_equal(outs[0][:8], outs[1][:8])
        assert not np.allclose(outs[0][9:], outs[1][9:])


def test_pool_closes_twice_and_reopens():
    """Catches a double free."""
    for _ in range(20):
        pool = Pool(3)
        pool.close()
        pool.close()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_pool_threads_end():
    """Catches threads that outlive their pool, closed or merely forgotten."""
    gc.collect()  # pools of other tests, which a failure may have kept
    before = len(list(Path("/proc/self/task").iterdir()))
    pool, forgotten = Pool(3), Pool(2)
    assert len(list(Path("/proc/self/task").iterdir())) == before + 3
    pool.close()
    del forgotten
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_a_closed_pool_is_refused(rng):
    """Catches a step on freed memory."""
    pool = Pool(2)
    layer = Layer(rng, pool)
    pool.close()
    with pytest.raises(ValueError, match="libksort"):
        layer.run(np.zeros((1, ROW), np.float32), 0)


def test_parts_of_a_step_make_the_step(level, rng):
    """Catches a part that measures another one, does nothing, or does all; and NO_PART doing anything."""
    with Pool(2) as pool:
        layer, n_tokens = Layer(rng, pool), 5
        qkv = rng.standard_normal((n_tokens, ROW)).astype(np.float32)
        out = np.full((n_tokens, N_HEADS * HEAD_DIM), -7, np.float32)
        layer.step.prepare(FloatRows(qkv), 0, *layer.positions(0, n_tokens), FloatRows(out))
        layer.step.run_part(NO_PART)
        changed = [(layer.k_tiles.any(), layer.v_tiles.any(), (out != -7).all())]
        for part in PARTS:
            layer.step.run_part(part)
            changed.append((layer.k_tiles.any(), layer.v_tiles.any(), (out != -7).all()))
        assert changed == [(False,) * 3, (True, False, False), (True, True, False), (True,) * 3]
        assert out.tobytes() == layer.run_plainly(qkv, 0).tobytes()


def test_a_step_in_the_same_rows_moves_on(rng):
    """Catches a decode step that keeps the slot, or cos and sin, of the step before: its rows are reused."""
    with Pool(2) as pool:
        layer = Layer(rng, pool)
        qkv, out = np.empty((1, ROW), np.float32), np.empty((1, N_HEADS * HEAD_DIM), np.float32)
        rows = FloatRows(qkv), FloatRows(out)
        for slot in range(5):
            qkv[:] = rng.standard_normal(qkv.shape)
            layer.step.run(rows[0], slot, *layer.positions(slot, 1), rows[1])
            assert out.tobytes() == layer.run_plainly(qkv, slot).tobytes(), slot
        many = rng.standard_normal((3, ROW)).astype(np.float32)
        assert layer.run(many, 5).tobytes() == layer.run_plainly(many, 5).tobytes()
