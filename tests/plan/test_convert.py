"""Converting: what the file holds, and that it is there whole or not at all."""

import resource
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_support import HEAD_DIM, LLAMA, N_HEADS, N_KV_HEADS, QWEN2, random_weights, write_checkpoint

from ksort_gguf.cli.main import main
from ksort_gguf.container.gguf_writer import GgufOutput
from ksort_gguf.container.values import encode, string, uint32
from ksort_gguf.errors import KsortError
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.names import Keys
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.file import folded_plan


@pytest.fixture(params=["llama", "qwen2"])
def checkpoint(request, tmp_path: Path, rng) -> Path:
    if request.param == "llama":
        return write_checkpoint(tmp_path / "model", LLAMA, random_weights(rng))
    return write_checkpoint(tmp_path / "model", QWEN2, random_weights(rng, biases=True), n_shards=2)


@pytest.fixture
def stock(checkpoint: Path, tmp_path: Path) -> Path:
    convert(checkpoint, tmp_path / "stock.gguf", plan="none", outtype="q8_0")
    return tmp_path / "stock.gguf"


def test_folded_file_differs_only_where_it_must(stock: Path, tmp_path: Path):
    """Catches re-quantized rows, tensors or keys lost, and projections (biases too) folded wrongly or not at all."""
    convert(stock, tmp_path / "folded.gguf", plan="ksort,balanced", rank="effective-norm")
    with open_gguf(stock) as before, open_gguf(tmp_path / "folded.gguf") as after:
        order = folded_plan(after).order
        assert not np.array_equal(np.sort(order), order)
        n_heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}
        for name, tensor in before.tensors.items():
            raw = tensor.read()
            part = name.split(".")[2] if name.startswith("blk.") else ""
            if part in n_heads:
                rows = raw.reshape(n_heads[part], HEAD_DIM, -1)
                layer, group = int(name.split(".")[1]), n_heads[part] // N_KV_HEADS
                raw = np.concatenate([rows[i][order[layer, i // group]] for i in range(len(rows))]).reshape(-1)
            assert after.tensors[name].type == tensor.type
            assert np.array_equal(after.tensors[name].read(), raw), name
        base = before.family.name
        for key, value in before.values.items():
            renamed = f"ksort-{base}.{key.removeprefix(base + '.')}" if key.startswith(f"{base}.") else key
            if key not in ("general.architecture", "ksort.format_version"):
                assert after.values[renamed] == value
        versions = [file.metadata["ksort.format_version"] for file in (before, after)]
        assert versions == [1, 2]  # plans with feedback are of version 2
        assert after.metadata["general.architecture"] == f"ksort-{base}"
        assert not any(key.startswith(f"{base}.") for key in after.values)


def test_checkpoint_and_gguf_give_the_same_file(checkpoint: Path, tmp_path: Path):
    """Catches the two routes ranking rows in different orders, or different weights."""
    convert(checkpoint, tmp_path / "direct.gguf", plan="ksort,balanced")
    convert(checkpoint, tmp_path / "stock.gguf", plan="none")
    convert(tmp_path / "stock.gguf", tmp_path / "twice.gguf", plan="ksort,balanced")
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "twice.gguf").read_bytes()


def test_dense_gguf_can_be_retyped(checkpoint: Path, tmp_path: Path):
    """Catches types, or general.file_type, that differ from those of converting to that type at once."""
    convert(checkpoint, tmp_path / "f32.gguf", plan="none", outtype="f32")
    for outtype in ("f16", "bf16", "q8_0"):
        convert(tmp_path / "f32.gguf", tmp_path / "retyped.gguf", outtype=outtype, force=True)
        convert(checkpoint, tmp_path / "direct.gguf", outtype=outtype, force=True)
        assert (tmp_path / "retyped.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()


def test_odd_metadata_and_alignment_survive(stock: Path, tmp_path: Path):
    """Catches writers that drop empty strings and arrays, widen integers, or forget general.alignment."""
    odd = {
        "general.alignment": uint32(4096),
        "x.empty": string(""),
        "x.none": encode([], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
        "x.byte": encode(7, gguf.GGUFValueType.UINT8),
    }
    with open_gguf(stock) as source:
        infos = [(t.name, t.shape, t.type) for t in source.tensors.values()]
        with GgufOutput(tmp_path / "odd.gguf", {**source.values, **odd}, infos, alignment=4096) as output:
            for name, tensor in source.tensors.items():
                output.write_tensor(name, tensor.chunks())
    convert(tmp_path / "odd.gguf", tmp_path / "out.gguf")
    with open_gguf(tmp_path / "out.gguf") as after, open_gguf(stock) as before:
        assert {key: after.values[key] for key in odd} == odd
        assert np.array_equal(after.tensors["output_norm.weight"].read(), before.tensors["output_norm.weight"].read())
    assert all(tensor.data_offset % 4096 == 0 for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors)


def test_cache_keys_are_declared(checkpoint: Path, tmp_path: Path):
    """Catches flags that do not reach the file."""
    convert(checkpoint, tmp_path / "o.gguf", cache_type_k="bfp14", block_size=16, query_type="f32", model_name="N")
    with open_gguf(tmp_path / "o.gguf") as source:
        keys = (Keys.CACHE_TYPE_K, Keys.BLOCK_SIZE, Keys.QUERY_TYPE, "general.name")
        assert [source.metadata[key] for key in keys] == ["bfp14", 16, "f32", "N"]


@pytest.mark.parametrize("block_size", [7, 0, 256, 64])
def test_block_size_that_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path, block_size: int):
    """Catches block sizes that no cache can use (64 is larger than the head here) ending up in a file."""
    with pytest.raises(KsortError, match="block size"):
        convert(checkpoint, tmp_path / "o.gguf", block_size=block_size)
    assert not (tmp_path / "o.gguf").exists()


def test_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path):
    """Catches a dry run that creates or truncates its output."""
    result = convert(checkpoint, tmp_path / "o-{ftype}.gguf", outtype="bf16", dry_run=True)
    assert result.path.name == "o-bf16.gguf"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folded_source_is_refused(stock: Path, tmp_path: Path):
    """Catches folding twice, which no reader could undo."""
    convert(stock, tmp_path / "folded.gguf")
    with pytest.raises(KsortError, match="folded already"):
        convert(tmp_path / "folded.gguf", tmp_path / "o.gguf")


def test_existing_output_needs_force_and_is_never_the_source(stock: Path, tmp_path: Path):
    """Catches overwriting a file unasked, and reading from a file while replacing it."""
    (tmp_path / "o.gguf").write_bytes(b"mine")
    with pytest.raises(KsortError, match="`force`"):
        convert(stock, tmp_path / "o.gguf")
    with pytest.raises(KsortError, match="input itself"):
        convert(stock, stock, force=True)
    (tmp_path / "link.gguf").hardlink_to(stock)
    with pytest.raises(KsortError, match="input itself"):
        convert(stock, tmp_path / "link.gguf", force=True)
    assert (tmp_path / "o.gguf").read_bytes() == b"mine"


def test_shards_of_the_source_are_not_overwritten(checkpoint: Path):
    """Catches --force replacing a weight file of the very checkpoint that is being converted."""
    for shard in checkpoint.glob("*.safetensors"):
        before = shard.read_bytes()
        with pytest.raises(KsortError, match="input itself"):
            convert(checkpoint, shard, force=True)
        assert shard.read_bytes() == before


def test_folded_file_of_another_row_order_is_refused(stock: Path, tmp_path: Path):
    """Catches running a fold in a row order that RoPE's tables are not made for."""
    convert(stock, tmp_path / "folded.gguf")
    with open_gguf(tmp_path / "folded.gguf") as source:
        wrong = "half" if source.spec.row_order == "interleaved" else "interleaved"
        values = {**source.values, Keys.PLAN_ROW_ORDER: string(wrong)}
        infos = [(t.name, t.shape, t.type) for t in source.tensors.values()]
        with GgufOutput(tmp_path / "wrong.gguf", values, infos) as output:
            for name, tensor in source.tensors.items():
                output.write_tensor(name, tensor.chunks())
    with (
        open_gguf(tmp_path / "wrong.gguf") as source,
        pytest.raises(KsortError, match=rf"wrong\.gguf: key ksort\.plan\.row_order is '{wrong}'"),
    ):
        folded_plan(source)


def test_full_disk_leaves_the_old_file(stock: Path, tmp_path: Path):
    """Catches partial files under the final name, leftovers beside it, and tracebacks, when space runs out."""
    target = tmp_path / "out" / "o.gguf"
    target.parent.mkdir()
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(KsortError, match=r"^[^\n]*o\.gguf: cannot be written[^\n]*$"):
            convert(stock, target, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [(p.name, p.read_bytes()) for p in target.parent.iterdir()] == [("o.gguf", b"old")]


def test_interrupt_leaves_nothing(stock: Path, tmp_path: Path, monkeypatch):
    """Catches a temporary file left behind by Ctrl-C."""

    def interrupted(tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr("ksort_gguf.plan.convert._finite_chunks", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(stock, tmp_path / "out" / "o.gguf")
    assert not list((tmp_path / "out").iterdir())


def test_nan_outside_the_projections_is_named(tmp_path: Path, rng):
    """Catches damaged weights that ranking never looks at being copied into a new file."""
    weights = random_weights(rng)
    weights["model.layers.0.mlp.up_proj.weight"][1, 1] = np.inf
    directory = write_checkpoint(tmp_path / "m", LLAMA, weights)
    for outtype in ("f32", "f16", "bf16", "q8_0"):
        with pytest.raises(KsortError, match=r"up_proj\.weight holds NaN or infinity"):
            convert(directory, tmp_path / "o.gguf", outtype=outtype)
    assert not (tmp_path / "o.gguf").exists()


def test_f16_overflow_is_named(tmp_path: Path, rng):
    """Catches finite weights beyond 65504 becoming infinity."""
    weights = random_weights(rng)
    weights["model.layers.0.mlp.up_proj.weight"][1, 1] = 1e5
    directory = write_checkpoint(tmp_path / "m", LLAMA, weights)
    with pytest.raises(KsortError, match="too large for f16"):
        convert(directory, tmp_path / "o.gguf", outtype="f16")


def test_output_writer_refuses_wrong_order(tmp_path: Path):
    """Catches a header that announces other tensors than the data holds."""
    infos = [(name, (4,), gguf.GGMLQuantizationType.F32) for name in ("a", "b")]
    data = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="b written where a"), GgufOutput(tmp_path / "o", {}, infos) as output:
        output.write_tensor("b", [data])
    with pytest.raises(ValueError, match="16 announced"), GgufOutput(tmp_path / "o", {}, infos) as output:
        output.write_tensor("a", [data[:2]])
    with pytest.raises(ValueError, match="b was not written"), GgufOutput(tmp_path / "o", {}, infos) as output:
        output.write_tensor("a", [data])
    assert not list(tmp_path.iterdir())


def test_command_line(checkpoint: Path, tmp_path: Path, capsys):
    """Catches commands whose flags do not arrive, and errors that are not one line with status 1."""
    out, plan = str(tmp_path / "o.gguf"), str(tmp_path / "p.gguf")
    flags = ["--plan", "ksort,shift", "--rank", "effective-norm", "--block-size", "16"]
    assert main(["convert", str(checkpoint), "--outfile", out, *flags]) == 0
    assert main(["plan", str(checkpoint), "--outfile", plan]) == 0
    capsys.readouterr()
    assert main(["convert", str(checkpoint), "--outfile", out]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "exists already" in error
    with open_gguf(Path(out)) as source:
        assert folded_plan(source).rank == "effective-norm" and folded_plan(source).steps == ("order", "shift")
        assert folded_plan(source).order.shape == (2, N_KV_HEADS, HEAD_DIM)
