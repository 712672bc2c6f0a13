"""The tables of cache types and plan steps, and our GGUF names. Standard library only.

The only file that spells our metadata keys. A cache type or a step is one row here; readers, writers, checks, messages
and bindings go over the rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ksort_gguf.errors import CacheTypeError

FORMAT_VERSION = 2  # major version: a reader refuses a larger one
TILE_TOKENS = 64  # tokens of one head that are stored together, see FORMAT.md
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
MAX_LAYERS = 1024  # several times what exists; more is a damaged file, refused before anything is counted up to it

# A token's mantissas are stored in 4-byte words: 8 channels of 4 bits, 4 of 8 bits, 16 of 6 bits in three words.
_GROUP_CHANNELS = {3: 32, 4: 8, 6: 16, 8: 4}


@dataclass(frozen=True)
class CacheType:
    """How one value of the K or V cache is stored."""

    name: str
    native_id: int  # ksort_type in ksort.h
    value_bits: int  # bits of a float, or of a BFP mantissa
    is_bfp: bool = False  # in blocks: BFP, or SBFP, whose scale bytes are signed floats
    queries: bool = False  # whether queries may be rounded to it

    @property
    def is_small(self) -> bool:
        """Whether its values are packed in 4 bits or less: exact rows lie beside it unless told otherwise."""
        return self.is_bfp and self.value_bits <= 4

    def tile_bytes(self, head_dim: int, block_size: int) -> int:
        """Bytes of one tile: TILE_TOKENS tokens of one head, mantissas then exponents (FORMAT.md, 'Tiles')."""
        if not self.is_bfp:
            return TILE_TOKENS * head_dim * self.value_bits // 8
        group = _GROUP_CHANNELS[self.value_bits]
        n_groups = -(-head_dim // group)
        n_blocks = -(-head_dim // block_size)
        return TILE_TOKENS * (n_groups * group * self.value_bits // 8 + n_blocks)

    def bits_per_value(self, head_dim: int, block_size: int) -> float:
        """Mean stored bits per value for heads of `head_dim` channels, exponents and padding included."""
        return self.tile_bytes(head_dim, block_size) * 8 / (TILE_TOKENS * head_dim)


CACHE_TYPES = {
    t.name: t
    for t in (
        CacheType("f32", 0, 32, queries=True),
        CacheType("f16", 1, 16),
        CacheType("bf16", 2, 16),
        CacheType("bfp16", 3, 8, is_bfp=True, queries=True),
        CacheType("bfp14", 4, 6, is_bfp=True),
        CacheType("bfp12", 5, 4, is_bfp=True),
        CacheType("sbfp12", 6, 4, is_bfp=True),
        CacheType("sbfp11", 7, 3, is_bfp=True),
    )
}
K_TYPES = V_TYPES = tuple(CACHE_TYPES)
QUERY_TYPES = tuple(t.name for t in CACHE_TYPES.values() if t.queries)

DEFAULT_BLOCK_TYPE = "sbfp12"  # of the types in blocks
EXACT_TAIL, EXACT_SINKS = 128, 4  # newest and first tokens that are kept in f16 beside small types
MAX_EXACT_TAIL = 1 << 20

DEFAULT_V_TYPE = "f16"
DEFAULT_QUERY_TYPE = "bfp16"


@dataclass(frozen=True)
class Table:
    """An array that a step has for a layer, with an entry for each channel of each KV head."""

    name: str  # of the array in kvplan.Transform (of an order in kvplan.KVPlan), and of its field in ksort.h
    stored: str  # in the names of GGUF tensors
    dtype: str  # of the array and of the GGUF tensor: "float32" or "int32"
    native_dtype: str  # in ksort.h
    check: str  # "finite", "positive" or "permutation": what each head's entries are
    square: bool = False  # [n_kv_heads, head_dim, head_dim] rather than [n_kv_heads, head_dim]

    def shape(self, n_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """The array's shape for one layer."""
        return (n_kv_heads, head_dim, head_dim) if self.square else (n_kv_heads, head_dim)


@dataclass(frozen=True)
class Step:
    """A step of a KV plan. `reference`: the function of reference.py that does it."""

    name: str
    tables: tuple[Table, ...]
    reference: str
    of_values: bool = False  # whether values take it too
    folded: bool = False  # into the rows of Wq and Wk; other steps act when keys and values are stored


STEPS = {  # in the order applied
    step.name: step
    for step in (
        Step("order", (Table("order", "order", "int32", "int32", "permutation"),), "reorder", folded=True),
        Step("shift", (Table("shift", "shift", "float32", "float32", "finite"),), "transform_keys"),
        Step("scale", (Table("scale", "scale", "float32", "float32", "positive"),), "transform_keys", of_values=True),
        Step("rotate", (), "rotate", of_values=True),
        Step(
            "feedback",
            (
                Table("permutation", "sequence", "int32", "uint16", "permutation"),
                Table("feedback", "feedback", "float32", "float32", "finite", square=True),
            ),
            "encode_transformed",
            of_values=True,
        ),
    )
}
RUN_TIME_STEPS = tuple(step.name for step in STEPS.values() if not step.folded)
VALUE_STEPS = tuple(step.name for step in STEPS.values() if step.of_values)
TRANSFORM_TABLES = tuple(table for name in RUN_TIME_STEPS for table in STEPS[name].tables)

PLANS: dict[str, tuple[str, ...]] = {"none": (), "ksort": ("order",), "balanced": RUN_TIME_STEPS}
RANKS = ("weight-norm", "effective-norm", "key-rms")  # what K-sort may sort channels by: plan/rank.py
DEFAULT_RANK = RANKS[0]
CALIBRATE_TOKENS = 16384  # of a text that a plan is made from


def check_block_size(block_size: int, head_dim: int) -> None:
    """Raise CacheTypeError unless `block_size` is one of BLOCK_SIZES and at most `head_dim`."""
    if block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise CacheTypeError(
            f"block size {block_size} is not one of {known}: pick one with `block_size`", field="block_size"
        )
    if block_size > head_dim:
        raise CacheTypeError(
            f"block size {block_size} is larger than the model's head dimension {head_dim}: "
            "pick a smaller `block_size`",
            field="block_size",
        )


def check_name(field: str, name: str, known: tuple[str, ...]) -> None:
    """Raise CacheTypeError naming the argument `field` unless `name` is one of `known`."""
    if name not in known:
        raise CacheTypeError(f"`{field}` {name} is not one of {', '.join(known)}", field=field)


def default_k_type(head_dim: int) -> str:
    """SBFP12; f16 for (toy) heads that are smaller than the smallest block."""
    return DEFAULT_BLOCK_TYPE if head_dim >= BLOCK_SIZES[0] else "f16"


def default_block_size(head_dim: int) -> int:
    """32, or 16 for heads smaller than that."""
    return 32 if head_dim >= 32 else 16


def format_version(steps: Iterable[str]) -> int:
    """The lowest version whose readers store what a plan of `steps` asks for (FORMAT.md section 4.6)."""
    return 2 if "feedback" in steps else 1


class Keys:
    """GGUF metadata keys and tensor names of ours (FORMAT.md, 'GGUF')."""

    PREFIX = "ksort."
    FORMAT_VERSION = "ksort.format_version"  # uint32
    BASE_ARCHITECTURE = "ksort.base_architecture"  # string: the stock architecture a folded file came from
    CACHE_TYPE_K = "ksort.cache_type_k"  # string: declared K-cache type
    BLOCK_SIZE = "ksort.block_size"  # uint32
    QUERY_TYPE = "ksort.query_type"  # string
    PLAN_NAME = "ksort.plan.name"  # string: such as "balanced"
    PLAN_STEPS = "ksort.plan.steps"  # array of strings, in the order applied
    PLAN_RANK = "ksort.plan.rank"  # string, with the step order: what channels were sorted by
    PLAN_STATISTICS = "ksort.plan.statistics"  # string, optional: what run-time steps were made from
    PLAN_ROW_ORDER = "ksort.plan.row_order"  # string: the stock row order that channel numbers refer to
    PLAN_WEIGHTS_HASH = "ksort.plan.weights_hash"  # string: "sha256:<hex>" of the stock projections

    # a table of STEPS by its stored name; those of values have VALUE_PREFIX before it
    TABLE_TENSOR = "ksort.blk.{layer}.{table}"
    VALUE_PREFIX = "v_"

    PLAN_FILE_TYPE = "kplan"  # general.type of a plan file
    FOLDED_PREFIX = "ksort-"  # general.architecture of a folded file is this + the base architecture


def base_architecture(architecture: str) -> str:
    """The stock architecture behind `architecture`, folded or not."""
    return architecture.removeprefix(Keys.FOLDED_PREFIX)
