"""KV plans: ranking, folding, and the weights they belong to."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_support import HEAD_DIM, LLAMA, N_KV_HEADS, N_LAYERS, QWEN2, random_weights, write_checkpoint

from ksort_gguf.container.retype import ArrayTensor, RetypedTensor
from ksort_gguf.errors import KsortError
from ksort_gguf.models.hf_source import open_hf
from ksort_gguf.models.rope import folded_tables, stock_tables
from ksort_gguf.models.spec import Attention, Projection, Rope
from ksort_gguf.plan.file import check_plan
from ksort_gguf.plan.fold import FoldedTensor, folded_tensors, inverse_order
from ksort_gguf.plan.make import make_plan
from ksort_gguf.plan.moments import LayerMoments
from ksort_gguf.plan.rank import effective_energies, layer_order, weight_energies, weights_hash

_Q, _KV = Projection("q", 64, 48), Projection("kv", 32, 48)
_ATTENTION = Attention(4, 2, 16, 0.25, _Q, _KV, _KV, Projection("output", 48, 64), Rope(16, 10000.0))

NO_MOMENTS = LayerMoments(*[np.zeros(0)] * 7)  # for ranks that do not ask


@pytest.fixture
def qwen(tmp_path: Path, rng):
    with open_hf(write_checkpoint(tmp_path / "qwen", QWEN2, random_weights(rng, biases=True)), "f32") as source:
        yield source


def _orders(rng, n_kv_heads: int = N_KV_HEADS, head_dim: int = HEAD_DIM) -> np.ndarray:
    return np.stack([rng.permutation(head_dim) for _ in range(n_kv_heads)]).astype(np.int32)


def test_weight_norm_order_falls(qwen):
    """Catches rising order, ranks taken over columns, and heads mixed up."""
    for layer in range(2):
        order = layer_order(qwen, layer, "weight-norm", NO_MOMENTS)
        norms = np.linalg.norm(qwen.tensors[f"blk.{layer}.attn_k.weight"].read_f32().astype(np.float64), axis=1)
        by_head = norms.reshape(N_KV_HEADS, HEAD_DIM)
        assert (np.diff(np.take_along_axis(by_head, order, axis=1)) <= 0).all()


def test_equal_norms_keep_channel_order():
    """Catches an unstable sort, with which two runs or machines could disagree about a file."""
    energies = weight_energies(np.ones((32, 48), np.float32), _ATTENTION)
    assert np.array_equal(np.argsort(-energies, axis=1, kind="stable"), np.tile(np.arange(16), (2, 1)))


@pytest.mark.parametrize("row_order", ["half", "interleaved"])
def test_effective_norm_is_the_mean_square_of_rotated_keys(rng, row_order: str):
    """Catches a forgotten gain, bias or partner: the formula against keys that are computed, rotated and averaged."""
    weight = rng.standard_normal((32, 48)).astype(np.float32)
    bias, gain = rng.standard_normal(32).astype(np.float32), rng.uniform(0.5, 2, 48).astype(np.float32)
    inputs = rng.standard_normal((200_000, 48))
    keys = ((inputs * gain) @ weight.T.astype(np.float64) + bias).reshape(-1, 2, 16)
    tables = stock_tables(16, 16, row_order)
    angle = rng.uniform(0, 2 * np.pi, (len(keys), 1, 8))
    partners = keys[:, :, tables.partner] * tables.sign
    rotated = keys * np.cos(angle)[..., tables.frequency] + partners * np.sin(angle)[..., tables.frequency]
    expected = (rotated**2).mean(axis=0)
    assert effective_energies(weight, bias, gain, _ATTENTION, row_order) == pytest.approx(expected, rel=0.03)


def test_fold_shares_the_order_of_a_group(qwen, rng):
    """Catches query heads folded with their own index instead of their KV head's, biases that stay, and other tensors
    that move."""
    orders = np.stack([_orders(rng) for _ in range(N_LAYERS)])
    folded = folded_tensors(qwen, orders)
    for name, tensor in qwen.tensors.items():
        part = name.split(".")[2] if name.startswith("blk.") else ""
        values = tensor.read_f32()
        if part in ("attn_q", "attn_k"):
            heads = values.reshape(-1, HEAD_DIM, *values.shape[1:])
            order = orders[int(name.split(".")[1])]
            group = len(heads) // N_KV_HEADS
            values = np.concatenate([head[order[i // group]] for i, head in enumerate(heads)])
        assert np.array_equal(folded[name].read_f32(), values), name


def test_fold_moves_quantized_rows_as_bytes(tmp_path: Path, rng):
    """Catches rows split at value instead of byte boundaries, and parts of a tensor that are read as its beginning."""
    base = RetypedTensor(
        ArrayTensor("f", "t", rng.standard_normal((2 * HEAD_DIM, 64)).astype(np.float32)),
        gguf.GGMLQuantizationType.Q8_0,
    )
    raw, rows = base.read().reshape(2 * HEAD_DIM, -1), rng.permutation(2 * HEAD_DIM)
    folded = FoldedTensor(base, rows)
    assert np.array_equal(folded.read().reshape(raw.shape), raw[rows])
    assert np.array_equal(folded.read_rows(5, 41).reshape(36, -1), raw[rows[5:41]])
    unfolded = FoldedTensor(folded, inverse_order(rows))
    assert np.array_equal(unfolded.read(), raw.reshape(-1))


@pytest.mark.parametrize("row_order", ["half", "interleaved"])
def test_folding_keeps_scores(rng, row_order: str):
    """Catches a fold that RoPE in folded order doesn't undo: q.k after RoPE must be that of the stock model."""
    order = _orders(rng)
    stock = stock_tables(HEAD_DIM, HEAD_DIM, row_order)
    folded = folded_tables(stock, order)
    q, k = rng.standard_normal((2, N_KV_HEADS, HEAD_DIM))
    angles = rng.uniform(0, 6, (2, HEAD_DIM // 2))

    def rotate(x, partner, sign, frequency, angle):
        return x * np.cos(angle)[frequency] + sign * np.take_along_axis(x, partner, -1) * np.sin(angle)[frequency]

    def scores(q, k, tables):
        shape = (N_KV_HEADS, HEAD_DIM)
        parts = [np.broadcast_to(t, shape).astype(np.intp) for t in (tables.partner, tables.sign, tables.frequency)]
        return (rotate(q, *parts, angles[0]) * rotate(k, *parts, angles[1])).sum(axis=-1)

    sorted_q, sorted_k = (np.take_along_axis(x, order, axis=-1) for x in (q, k))
    assert scores(sorted_q, sorted_k, folded) == pytest.approx(scores(q, k, stock), rel=1e-12)


def test_plan_for_other_weights_names_both_hashes(qwen, tmp_path: Path, rng):
    """Catches a plan that silently scrambles a model it was not made for: one changed value is enough to tell."""
    weights = random_weights(np.random.default_rng(20240331), biases=True)
    weights["model.layers.1.self_attn.k_proj.bias"][3] += 1e-3
    other = open_hf(write_checkpoint(tmp_path / "other", QWEN2, weights), "f32")
    plan, _ = make_plan(other, "ksort")
    with pytest.raises(KsortError) as error:
        check_plan(plan, qwen, "p.gguf")
    assert plan.weights_hash in str(error.value) and weights_hash(qwen) in str(error.value)


def test_plan_for_other_architecture_or_shape_is_refused(qwen, tmp_path: Path, rng):
    """Catches numpy errors, or nonsense, from a plan of another model family or size."""
    llama = open_hf(write_checkpoint(tmp_path / "llama", LLAMA, random_weights(rng)), "f32")
    with pytest.raises(KsortError, match=r"'qwen2'.*'llama'"):
        check_plan(make_plan(qwen, "ksort")[0], llama)
    plan, _ = make_plan(qwen, "ksort")
    with pytest.raises(KsortError, match=r"do not fit"):
        check_plan(replace(plan, order=plan.order[:1]), qwen)


def test_nan_in_projection_is_named(tmp_path: Path, rng):
    """Catches NaN weights, whose norms would sort anywhere."""
    weights = random_weights(rng)
    weights["model.layers.1.self_attn.k_proj.weight"][2, 3] = np.nan
    source = open_hf(write_checkpoint(tmp_path / "m", LLAMA, weights), "f32")
    with pytest.raises(KsortError, match=r"layers\.1\.self_attn\.k_proj\.weight holds NaN"):
        make_plan(source)
