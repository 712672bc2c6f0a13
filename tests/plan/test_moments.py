"""Moments of queries, keys and values: of text by hand, and of weights against sampling."""

from dataclasses import replace

import numpy as np
import pytest
from checkpoint_support import (
    HEAD_DIM,
    LLAMA,
    N_EMBD,
    N_HEADS,
    N_KV_HEADS,
    N_VOCAB,
    QWEN2,
    random_weights,
    write_checkpoint,
)
from moments_support import second

from ksort_gguf.errors import KsortError
from ksort_gguf.models.hf_source import open_hf
from ksort_gguf.models.rope import frequencies, stock_tables
from ksort_gguf.models.run_variance import _Hidden
from ksort_gguf.plan.calibrate import observe_layers
from ksort_gguf.plan.moments import N_SAMPLES, LayerMoments
from ksort_gguf.plan.text_moments import moments_of_text, position_weights
from ksort_gguf.plan.weight_moments import _Rotation, moments_of_weights, sampled_positions

WINDOWS = [np.random.default_rng(n).integers(0, N_VOCAB, n).tolist() for n in (75, 33)]
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2}


def open_weights(folder, config, weights):
    return open_hf(write_checkpoint(folder, config, weights), "f32")


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path, rng):
    weights = random_weights(rng, biases=request.param == "qwen2")
    with open_weights(tmp_path / "m", FAMILIES[request.param], {k: w / 4 for k, w in weights.items()}) as source:
        yield source


def of_text(source, windows=WINDOWS) -> list[LayerMoments]:
    found = []
    moments_of_text(source, windows, lambda layer, moments: found.append((layer, moments)), lambda: None)
    assert [layer for layer, _ in found] == list(range(source.spec.n_layers))
    return [moments for _, moments in found]


def of_weights(source) -> list[LayerMoments]:
    found = []
    moments_of_weights(source, lambda layer, moments: found.append((layer, moments)), lambda: None)
    assert [layer for layer, _ in found] == list(range(source.spec.n_layers))
    return [moments for _, moments in found]


def assert_bit_equal(first: list[LayerMoments], second: list[LayerMoments]):
    for a, b in zip(first, second, strict=True):
        for name, values in vars(a).items():
            assert np.array_equal(values, getattr(b, name)), name


def test_moments_of_text_are_weighted_means(source):
    """Catches a window or layer that leaks into another's sums, a mean by window, and weights left out of a moment."""
    seen = {}
    observe_layers(source, WINDOWS, lambda layer, window, *qkv: seen.update({(layer, window): qkv}), lambda: None)
    weights = np.concatenate([position_weights(np.arange(len(window))) for window in WINDOWS])
    weights /= weights.sum()
    for layer, moments in enumerate(of_text(source)):
        q, k, v = (np.concatenate([seen[layer, w][i].double().numpy() for w in range(2)]) for i in range(3))
        assert moments.k_mean == pytest.approx(np.einsum("n,nhc->hc", weights, k), rel=1e-4, abs=1e-5)
        assert moments.v_mean == pytest.approx(np.einsum("n,nhc->hc", weights, v), rel=1e-4, abs=1e-5)
        for found, x in ((moments.k_second, k), (moments.v_second, v)):
            assert found == pytest.approx(np.einsum("n,nhc,nhd->hcd", weights, x, x), rel=1e-4, abs=1e-4)
        expected = np.zeros((N_KV_HEADS, HEAD_DIM, HEAD_DIM))
        for head in range(N_HEADS):
            expected[head * N_KV_HEADS // N_HEADS] += np.einsum("n,nc,nd->cd", weights, q[:, head], q[:, head])
        assert moments.q_second == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert np.array_equal(moments.keys, k.astype(np.float32))


@pytest.mark.parametrize("lengths", [(700, 20, 1), (5,) * 60, (257,)])
def test_samples_are_spread_over_the_text(tmp_path, rng, lengths):
    """Catches more samples than are promised where windows are short, and every window's first key among them."""
    windows = [rng.integers(0, N_VOCAB, n).tolist() for n in lengths]
    keys = []
    with open_weights(tmp_path / "m", LLAMA, random_weights(rng)) as source:
        observe_layers(source, windows, lambda layer, _, q, k, v: keys.append(k) if layer == 0 else None, lambda: None)
        samples = of_text(source, windows)[0].keys
    all_keys = np.concatenate(keys)
    assert N_SAMPLES / 2 <= len(samples) <= N_SAMPLES
    stride = -(-len(all_keys) // N_SAMPLES)
    assert np.array_equal(samples, all_keys[stride // 2 :: stride])


def test_moments_are_the_same_in_every_run(source):
    """Catches statistics, and so plans and files, that differ from run to run."""
    assert_bit_equal(of_weights(source), of_weights(source))
    assert_bit_equal(of_text(source), of_text(source))


def rotations(source, n_rot: int) -> np.ndarray:
    """RoPE as matrices [positions, d, d], at the sampled positions."""
    rope = replace(source.spec.blocks[0].attention.rope, n_rot=n_rot)
    tables = stock_tables(HEAD_DIM, n_rot, source.spec.row_order)
    theta = frequencies(rope, None)
    positions = sampled_positions(source.spec.context_length)
    matrices = np.zeros((len(positions), HEAD_DIM, HEAD_DIM))
    for c in range(HEAD_DIM):
        angle = positions * theta[tables.frequency[c]]
        matrices[:, c, c] = np.cos(angle) if tables.sign[c] else 1
        if tables.sign[c]:
            matrices[:, c, tables.partner[c]] = tables.sign[c] * np.sin(angle)
    return matrices


@pytest.mark.parametrize("length", [1, 512, 4096])
def test_sampled_positions_cover_the_context(length: int):
    """Catches plans from weights that are made for the first positions alone, or for some that do not exist."""
    positions = sampled_positions(length)
    assert positions.min() == 0 and 0.9 * length - 1 <= positions.max() < length
    for share in (0.25, 0.5, 0.75):  # density position^-3/4: a share s of them lies below s^4 of the context
        assert (positions < np.ceil(share**4 * length)).mean() == pytest.approx(share, abs=0.01 + 1 / length)


@pytest.mark.parametrize("n_rot", [HEAD_DIM, 20])
def test_rotation_is_averaged_over_positions(source, rng, n_rot: int):
    """Catches a wrong partner, sign or row order, cross terms left out, and channels turned that are not to be."""
    attention = source.spec.blocks[0].attention
    attention = replace(attention, rope=replace(attention.rope, n_rot=n_rot))
    rotation, matrices = _Rotation(source, attention), rotations(source, n_rot)
    x = rng.standard_normal((256, 3, HEAD_DIM))
    factors = rng.standard_normal((3, HEAD_DIM, 7))
    m = factors @ factors.swapaxes(1, 2)
    assert rotation.mean(x[0]) == pytest.approx(np.einsum("pcd,hd->hc", matrices, x[0]) / 256, abs=1e-6)
    expected = (matrices[:, None] @ m @ matrices.swapaxes(1, 2)[:, None]).mean(axis=0)
    assert rotation.second(m) == pytest.approx(expected, abs=1e-5)
    assert rotation.turn(x) == pytest.approx(np.einsum("pcd,phd->phc", matrices, x), abs=1e-6)


def hidden_states(rng, weights, n: int) -> np.ndarray:
    """Hidden states [n, N_EMBD] with the variances of the embedding's channels."""
    return rng.standard_normal((n, N_EMBD)) * np.sqrt((weights["model.embed_tokens.weight"] ** 2).mean(axis=0))


def normalized(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """RMSNorm."""
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True)) * gain


def test_first_layer_agrees_with_sampling(tmp_path, rng):
    """Catches a forgotten gain, bias, embedding variance or rotation, and rows taken for columns."""
    weights = random_weights(rng, biases=True)
    weights["model.embed_tokens.weight"] *= 2.0 ** rng.uniform(-2, 2, N_EMBD).astype(np.float32)
    with open_weights(tmp_path / "m", QWEN2, weights) as source:
        moments, matrices = of_weights(source)[0], rotations(source, HEAD_DIM)
    n = 256 * 200
    x = normalized(hidden_states(rng, weights, n), weights["model.layers.0.input_layernorm.weight"])

    def project(part: str) -> np.ndarray:
        name = f"model.layers.0.self_attn.{part}_proj."
        return (x @ weights[name + "weight"].T + weights[name + "bias"]).reshape(n, -1, HEAD_DIM)

    def turn(y: np.ndarray) -> np.ndarray:
        by_position = y.reshape(-1, 256, *y.shape[1:]).swapaxes(0, 1)
        return (by_position @ matrices.swapaxes(1, 2)[:, None]).reshape(y.shape)

    def distance(found: np.ndarray, expected: np.ndarray) -> float:
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    k, q, v = turn(project("k")), turn(project("q")), project("v")
    assert distance(moments.k_second, second(k)) < 0.04
    assert distance(moments.v_second, second(v)) < 0.04
    by_head = second(q)
    assert distance(moments.q_second, by_head.reshape(N_KV_HEADS, -1, HEAD_DIM, HEAD_DIM).sum(axis=1)) < 0.04
    noise = np.sqrt(np.einsum("hcc->hc", moments.k_second) / n)
    assert (np.abs(moments.k_mean - k.mean(axis=0)) < 6 * noise).all()
    assert (np.abs(moments.v_mean - v.mean(axis=0)) < 6 * noise.max()).all()
    sampled = second(moments.keys)
    assert distance(sampled, moments.k_second) < 0.5  # of 256 keys; keys that are not turned, or lack the bias: above 1


def test_hidden_states_grow_by_the_ffn(tmp_path, rng):
    """Catches a wrong gain, gate and up mixed up, a SiLU without its square, and a sum that forgets what was there."""
    weights = random_weights(rng)
    for name in list(weights):
        if "o_proj" in name:
            weights[name] *= 0  # no attention: what it averages depends on the text
        elif "gate_proj" in name:
            weights[name] *= rng.uniform(0.3, 1, (len(weights[name]), 1)).astype(np.float32)
        elif "up_proj" in name:
            weights[name] /= 64  # where gate and up change places, SiLU halves another one
        elif "down_proj" in name:
            weights[name] /= 4
    prefix = "model.layers.0."
    x = hidden_states(rng, weights, 40_000)
    entering = normalized(x, weights[prefix + "post_attention_layernorm.weight"])
    gate, up = (entering @ weights[f"{prefix}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    x += (gate / (1 + np.exp(-gate)) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    expected = (x**2).mean(axis=0)
    expected *= weights["model.layers.1.input_layernorm.weight"] ** 2 / expected.mean()
    with open_weights(tmp_path / "m", LLAMA, weights) as source:
        hidden, (first, second) = _Hidden(source), source.spec.blocks
        before = hidden.normalized(second.attention_norm)
        hidden.add(first, hidden.normalized(first.attention_norm))
        found = hidden.normalized(second.attention_norm)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 0.3 * np.linalg.norm(before - expected)


def test_keys_that_depend_on_each_other_have_moments(tmp_path, rng):
    """Catches a covariance that rounding makes indefinite where rows of Wk repeat or combine others, or are zero."""
    weights = random_weights(rng)
    rows = weights["model.layers.0.self_attn.k_proj.weight"]
    rows[2:HEAD_DIM] = rng.standard_normal((HEAD_DIM - 2, 2)).astype(np.float32) @ rows[:2]
    rows[HEAD_DIM:] = 0
    with open_weights(tmp_path / "m", LLAMA, weights) as source:
        assert of_weights(source)[0].is_finite()


def test_overflow_is_not_finite():
    """Catches one moment that is forgotten in the check for overflow."""
    fields = list(LayerMoments.__dataclass_fields__)
    good = {name: np.zeros(4) for name in fields}
    assert LayerMoments(**good).is_finite()
    for name in fields:
        for bad in (np.nan, np.inf):
            assert not LayerMoments(**{**good, name: np.array([0, bad])}).is_finite()


def test_hidden_states_that_overflow_are_named(tmp_path, rng):
    """Catches numpy's warnings and a plan of NaN from damaged weights."""
    weights = random_weights(rng)
    weights["model.layers.0.mlp.down_proj.weight"] *= np.float32(1e25)
    with (
        open_weights(tmp_path / "m", LLAMA, weights) as source,
        pytest.raises(KsortError, match=r"blk\.1\.attn_norm\.weight overflows"),
    ):
        of_weights(source)
