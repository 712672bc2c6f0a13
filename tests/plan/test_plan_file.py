"""Plans in files: what is written is read, and what makes no sense is refused by name."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_support import HEAD_DIM, LLAMA, N_KV_HEADS, N_LAYERS, QWEN2, random_weights, write_checkpoint

from ksort_gguf.container.gguf_reader import open_container
from ksort_gguf.container.gguf_writer import GgufOutput
from ksort_gguf.container.values import strings
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import KVPlan, Transforms
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.names import STEPS, Keys
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.file import _plan, check_plan, folded_plan, plan_tensors, plan_values, read_plan, write_plan
from ksort_gguf.plan.make import make_plan

PLANS = ["ksort", "rotate", "shift", "balanced", "order,scale,feedback", ",".join(STEPS)]
TABLES = {"shift": np.float32, "scale": np.float32, "permutation": np.int32, "feedback": np.float32}


@pytest.fixture(params=["llama", "qwen2"])
def stock(request, tmp_path: Path, rng) -> Path:
    """A stock GGUF."""
    config = {"llama": LLAMA, "qwen2": QWEN2}[request.param]
    weights = {name: w / 4 for name, w in random_weights(rng, biases=request.param == "qwen2").items()}
    convert(write_checkpoint(tmp_path / "hf", config, weights), tmp_path / "stock.gguf", plan="none")
    return tmp_path / "stock.gguf"


@pytest.fixture
def source(stock: Path):
    with open_gguf(stock) as source:
        yield source


def assert_same(found: KVPlan, expected: KVPlan):
    for name in ("name", "steps", "row_order", "base_architecture", "weights_hash", "rank", "statistics"):
        assert getattr(found, name) == getattr(expected, name), name
    assert (found.order is None) == (expected.order is None)
    assert found.order is None or np.array_equal(found.order, expected.order)
    for a, b in ((found.keys, expected.keys), (found.values, expected.values)):
        assert a.rotate == b.rotate
        for table, dtype in TABLES.items():
            read = a.tables.get(table, {})
            assert read.keys() == b.tables.get(table, {}).keys()
            for layer, values in read.items():
                assert np.array_equal(values, b.tables[table][layer])
                assert values.dtype == dtype


@pytest.mark.parametrize("plan", PLANS)
def test_plan_file_and_folded_file_hold_the_plan(stock: Path, source, tmp_path: Path, plan: str):
    """Catches a field or table that is written but not read, values' tables taken for keys', and rounded tables."""
    rank = "key-rms" if "order" in plan or plan == "ksort" else None
    made, _ = make_plan(source, plan, rank=rank)
    write_plan(tmp_path / "p.gguf", made)
    assert_same(read_plan(tmp_path / "p.gguf"), made)
    check_plan(read_plan(tmp_path / "p.gguf"), source)
    convert(stock, tmp_path / "folded.gguf", plan=plan, rank=rank)
    with open_gguf(tmp_path / "folded.gguf") as folded:
        assert_same(folded_plan(folded), made)
    if plan == "balanced":
        assert all(set(made.keys.tables[table]) == set(range(N_LAYERS)) for table in TABLES)
        assert set(made.values.tables["feedback"]) == set(range(N_LAYERS)) and not made.values.tables.get("shift")


def tables_of(source, rng) -> KVPlan:
    """A plan with all steps and any tables, one layer lacking some, values shifted too."""

    def made(*shape: int) -> np.ndarray:
        return rng.uniform(0.5, 2, (N_KV_HEADS, *shape)).astype(np.float32)

    def transforms() -> Transforms:
        tables = {
            "shift": {1: made(HEAD_DIM)},
            "scale": {0: made(HEAD_DIM), 1: made(HEAD_DIM)},
            "permutation": {1: np.stack([rng.permutation(HEAD_DIM) for _ in range(N_KV_HEADS)]).astype(np.int32)},
            "feedback": {layer: np.triu(made(HEAD_DIM, HEAD_DIM), 1) for layer in range(N_LAYERS)},
        }
        return Transforms(True, tables)

    plan, _ = make_plan(source, ",".join(STEPS))
    return replace(plan, keys=transforms(), values=transforms())


def test_layers_may_lack_tables(source, tmp_path: Path, rng):
    """Catches tables shifted to the layers before those that lack one."""
    plan = tables_of(source, rng)
    write_plan(tmp_path / "p.gguf", plan)
    assert_same(read_plan(tmp_path / "p.gguf"), plan)


def write_damaged(path: Path, plan: KVPlan, replaced: dict, steps=None) -> Path:
    """A plan file of `plan` with some tensors (name: array) replaced or added; arrays of integers become I32."""
    write_plan(path, plan)
    container = open_container(path)
    container.file.close()
    values = dict(container.values)
    if steps is not None:
        values[Keys.PLAN_STEPS] = strings(steps)
    tensors = {**plan_tensors(plan), **replaced}
    kinds = {"f": gguf.GGMLQuantizationType.F32, "i": gguf.GGMLQuantizationType.I32}
    infos = [(name, array.shape, kinds[array.dtype.kind]) for name, array in tensors.items()]
    with GgufOutput(path, values, infos, force=True) as output:
        for name, array in tensors.items():
            output.write_tensor(name, [np.ascontiguousarray(array)])
    return path


HEADS = (N_KV_HEADS, HEAD_DIM)
NAN, NEGATIVE, ZERO = (np.full(HEADS, value, np.float32) for value in (np.nan, -1, 0))
ONES = np.ones(HEADS, np.float32)
SQUARE = np.ones((*HEADS, HEAD_DIM), np.float32)


@pytest.mark.parametrize(
    "name, array, words",
    [
        ("ksort.blk.1.shift", NAN, "holds NaN or infinity"),
        ("ksort.blk.0.feedback", SQUARE * np.float32(np.inf), "holds NaN or infinity"),
        ("ksort.blk.1.v_scale", NEGATIVE, "holds a scale that is not positive"),
        ("ksort.blk.1.scale", ZERO, "holds a scale that is not positive"),
        ("ksort.blk.1.scale", ONES.astype(np.int32), "is not a table of F32"),
        ("ksort.blk.1.shift", SQUARE, "is not a table of F32"),
        ("ksort.blk.1.v_feedback", ONES, "is not a table of F32"),
        ("ksort.blk.1.shift", ONES[:1], "does not fit"),
        ("ksort.blk.0.scale", ONES[:, 1:], "does not fit"),
        ("ksort.blk.0.v_feedback", SQUARE[:, :, 1:], "does not fit"),
        (f"ksort.blk.{N_LAYERS}.v_scale", ONES, "does not fit"),
        ("ksort.blk.0.sequence", ONES.astype(np.int32), "is not a permutation"),
        ("ksort.blk.0.v_sequence", ONES, "is not a table of I32"),
        ("ksort.blk.1.order", ONES.astype(np.int32), "is not a permutation"),
        ("ksort.blk.1.order", ONES, "is not a table of I32"),
    ],
)
def test_damaged_tables_are_refused_by_name(source, tmp_path: Path, rng, name: str, array, words: str):
    """Catches tables that run as they are: NaN in every key, a scale that mirrors channels, another model's layers."""
    path = write_damaged(tmp_path / "p.gguf", tables_of(source, rng), {name: array})
    with pytest.raises(KsortError) as error:
        check_plan(read_plan(path), source, str(path))
    message = str(error.value)
    assert str(path) in message and name in message and words in message and "\n" not in message


def test_damaged_tables_of_folded_files_are_refused(stock: Path, tmp_path: Path):
    """Catches checks that plan files have and folded files lack."""
    convert(stock, tmp_path / "folded.gguf")
    for name, array in (("ksort.blk.0.scale", NEGATIVE), (f"ksort.blk.{N_LAYERS}.shift", ONES)):
        with open_gguf(tmp_path / "folded.gguf") as model:
            contents = {tensor.name: (tensor.shape, tensor.type, tensor.read()) for tensor in model.tensors.values()}
            contents[name] = (array.shape, gguf.GGMLQuantizationType.F32, array)
            infos = [(name, shape, kind) for name, (shape, kind, _) in contents.items()]
            with GgufOutput(tmp_path / "bad.gguf", model.values, infos, force=True) as output:
                for tensor, (_, _, raw) in contents.items():
                    output.write_tensor(tensor, [raw])
        with open_gguf(tmp_path / "bad.gguf") as bad, pytest.raises(KsortError, match=rf"bad\.gguf: tensor {name}"):
            folded_plan(bad)


def test_order_of_a_layer_that_is_missing_is_refused(source, tmp_path: Path):
    """Catches a file that was cut between layers."""
    plan, _ = make_plan(source, "ksort")
    write_plan(tmp_path / "p.gguf", replace(plan, order=plan.order[:1]))
    with pytest.raises(KsortError, match="do not fit"):
        check_plan(read_plan(tmp_path / "p.gguf"), source)


@pytest.mark.parametrize("steps", [["order", "spin"], "order", [["order"]], None])
def test_unknown_steps_are_refused(source, steps):
    """Catches a newer plan run without the step that this program does not know, and tracebacks from odd values."""
    plan, _ = make_plan(source, "ksort")
    metadata = {key: value.decode() for key, value in plan_values(plan).items()}
    metadata[Keys.PLAN_STEPS] = steps
    with pytest.raises(KsortError, match=r"p\.gguf: plan steps .* are not known"):
        _plan(metadata, {}, "p.gguf")


def test_tables_of_steps_that_the_plan_lacks_are_refused(source, tmp_path: Path, rng):
    """Catches a plan that says rotate and scale but shifts as well."""
    path = write_damaged(tmp_path / "p.gguf", tables_of(source, rng), {}, steps=("scale", "rotate"))
    with pytest.raises(KsortError, match=r"p\.gguf: tensor ksort\.blk\..* belongs to no step of the plan"):
        read_plan(path)


def test_plan_without_a_version_is_refused(source):
    """Catches a file of an unknown format taken for one of this version."""
    plan, _ = make_plan(source, "ksort")
    metadata = {key: value.decode() for key, value in plan_values(plan).items()}
    del metadata["ksort.format_version"]
    with pytest.raises(KsortError, match=r"ksort\.format_version is missing"):
        _plan(metadata, {}, "p.gguf")
