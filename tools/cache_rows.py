"""Rows of the comparison of caches: what a spelling means, and how its logits and its bits are found.

    K                 keys as K, values in f16
    K/V               keys as K, values as V
    K@PLAN, K/V@PLAN  the same under a KV plan (our own types only): the name of a plan file without its ending, or a
                      plan that is made here: a name or steps as `ksort-gguf plan --plan` takes them, but joined by +,
                      from the weights, or with :text from Python's documentation: bfp12@order+shift+scale:text

Any of them may end in ~tail=N, ~sink=S or both: each query finds the newest N tokens, its own included, and the first S
tokens in f16, the others as stored. What a row does not say is 0, or what --tail and --sink say.

Our types go through the real packed cache: f32 f16 bf16 bfp16 bfp14 bfp12, the BFP ones in blocks of 32 unless a block
size follows, as in bfp12-64. All others are simulations (simulated_caches).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from model_variants import ModelVariants, parse_made_plan
from simulated_caches import FLOATS, SCHEMES
from simulated_caches.attention import SimulatedAttention
from simulated_caches.scheme import EXACT_BITS, LayerTensors, Scheme, Side

from ksort_gguf.cache.cpu import ContextCache
from ksort_gguf.cache.exact import exact_rows
from ksort_gguf.cache.protocol import CacheOptions
from ksort_gguf.engine.calibration import calibration_windows, default_text
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer
from ksort_gguf.errors import KsortError, PlanError
from ksort_gguf.eval.perplexity import Forward, forward_of
from ksort_gguf.names import BLOCK_SIZES, CACHE_TYPES, DEFAULT_QUERY_TYPE, PLANS, STEPS, V_TYPES, default_block_size

Bits = Callable[[], tuple[float, float]]

_CALIBRATION_TOKENS = 4096  # or one window, where the context is longer


@dataclass(frozen=True)
class Row:
    """One kind of cache, before it is measured."""

    spelling: str
    k: str
    v: str
    plan: str | None
    tail: int | None = None  # newest tokens, in f16; None: the row does not say
    sink: int | None = None  # first tokens, likewise

    def with_defaults(self, tail: int, sink: int) -> "Row":
        """The row, saying what it did not say."""
        tail, sink = tail if self.tail is None else self.tail, sink if self.sink is None else self.sink
        return dataclasses.replace(self, tail=tail, sink=sink)

    @property
    def is_simulated(self) -> bool:
        return self.k in SCHEMES or self.v in SCHEMES


def known_names() -> str:
    """Every name that a row may be made of, for messages."""
    sizes = "|".join(map(str, BLOCK_SIZES))
    ours = [f"{name}[-{sizes}]" if t.is_bfp else name for name, t in CACHE_TYPES.items()]
    return " ".join([*ours, *SCHEMES])


def parse_row(spelling: str, plans: Mapping[str, object]) -> Row:
    """Raises KsortError for unknown names, listing those known, and for what does not go together."""
    stored, *ends = spelling.split("~")
    cache, at, plan = stored.partition("@")
    if at and plan not in plans:
        try:
            parse_made_plan(plan)
        except KsortError:
            raise KsortError(
                f"--types {spelling}: unknown plan {plan!r}: name a plan file with --plan-file, or a plan or steps "
                f"joined by + ({', '.join((*PLANS, *STEPS))})"
            ) from None
    k, slash, v = cache.partition("/")
    row = Row(spelling, k, v if slash else "f16", plan if at else None, *_parse_ends(spelling, ends))
    for name in (row.k, row.v):
        if name not in SCHEMES and _split_block_size(name)[0] not in CACHE_TYPES:
            raise KsortError(f"--types {spelling}: unknown cache type {name!r} (known: {known_names()})")
    if row.is_simulated:
        if row.plan or not all(name in SCHEMES or name in FLOATS for name in (row.k, row.v)):
            raise KsortError(f"--types {spelling}: only {', '.join(FLOATS)} go with a simulated cache, and no plan")
    elif _split_block_size(row.v)[0] not in V_TYPES:
        raise KsortError(f"--types {spelling}: values cannot be {row.v} (they can be {', '.join(V_TYPES)})")
    return row


def _parse_ends(spelling: str, ends: Sequence[str]) -> tuple[int | None, int | None]:
    """["tail=128", "sink=4"] -> (128, 4)."""
    counts: dict[str, int] = {}
    for end in ends:
        name, _, count = end.partition("=")
        if name not in ("tail", "sink") or name in counts or not (count.isascii() and count.isdecimal()):
            raise KsortError(f"--types {spelling}: ~{end} is not ~tail=N or ~sink=N, each once, N a number of tokens")
        counts[name] = int(count)
    return counts.get("tail"), counts.get("sink")


def _split_block_size(name: str) -> tuple[str, int | None]:
    """ "bfp12-64" -> ("bfp12", 64); a name without a block size as it is."""
    base, _, size = name.rpartition("-")
    if base in CACHE_TYPES and CACHE_TYPES[base].is_bfp and size in map(str, BLOCK_SIZES):
        return base, int(size)
    return name, None


class Runner:
    """Runs rows on texts of `n_ctx` tokens."""

    def __init__(self, variants: ModelVariants, n_ctx: int):
        self._variants, self._n_ctx = variants, n_ctx
        self._samples: list[LayerTensors] | None = None  # of each layer, f16, made when a scheme asks for them

    def check(self, row: Row) -> None:
        """Raise KsortError for a row that this model's heads cannot be stored in."""
        if not row.is_simulated:
            self._options(row)
            return
        for name in (row.k, row.v):
            for head_dim in {attention.head_dim for attention in self._variants.spec.attentions}:
                _scheme(name).check(head_dim)

    def prepare(self, row: Row) -> tuple[Forward, Bits]:
        """The row's logits, and a function for the mean bits of a key and of a value of the text that ran last."""
        return self._simulated(row) if row.is_simulated else self._packed(row)

    def _options(self, row: Row) -> CacheOptions:
        """The packed cache that a row of our own types asks for."""
        (k_type, k_block), (v_type, v_block) = _split_block_size(row.k), _split_block_size(row.v)
        block_size = k_block or v_block or default_block_size(self._variants.spec.min_head_dim)
        query_type = DEFAULT_QUERY_TYPE if CACHE_TYPES[k_type].is_bfp else "f32"
        try:
            exact = exact_rows(k_type, v_type, row.tail or 0, row.sink or 0)
        except KsortError as error:
            raise KsortError(f"--types {row.spelling}: {error}") from None
        return CacheOptions(k_type, v_type, block_size, query_type, *exact)

    def _packed(self, row: Row) -> tuple[Forward, Bits]:
        options = self._options(row)
        context = self._variants.model(row.plan).start(options, self._n_ctx)

        def mean_bits(name: str) -> float:
            attentions = self._variants.spec.attentions
            packed = _mean([CACHE_TYPES[name].bits_per_value(a.head_dim, options.block_size) for a in attentions])
            if not options.has_exact(name):
                return packed
            n_seen = np.arange(self._n_ctx // 2, self._n_ctx) + 1  # by the queries that are scored
            exact_share = np.minimum(options.exact_tail + options.exact_sinks, n_seen) / n_seen
            return packed + EXACT_BITS * float(exact_share.mean())  # which are stored twice

        return forward_of(context), lambda: (mean_bits(options.k_type), mean_bits(options.v_type))

    def _simulated(self, row: Row) -> tuple[Forward, Bits]:
        keys, values = self._fitted(_scheme(row.k), "k"), self._fitted(_scheme(row.v), "v")
        layers = self._variants.layers(self._n_ctx)
        attention = SimulatedAttention(layers, keys, values, tail=row.tail or 0, sink=row.sink or 0)

        def bits() -> tuple[float, float]:
            return _mean([k for k, _ in attention.bits]), _mean([v for _, v in attention.bits])

        return self._forward(attention), bits

    def _forward(self, attention: SimulatedAttention) -> Forward:
        heads = [plan.heads for plan in self._variants.layers(self._n_ctx)]
        cache = ContextCache(heads, CacheOptions("f32", "f32", 32, "f32"), self._n_ctx)
        return forward_of(self._variants.model().start_with(cache, attention, n_ubatch=self._n_ctx))

    def _fitted(self, scheme: Scheme, side: Side) -> list[Scheme]:
        """What the scheme does in each layer, with the layer's constants."""
        n_layers = self._variants.spec.n_layers
        schemes = [scheme] * n_layers
        if scheme.needs_calibration:
            schemes = [scheme.fit(_map(sample, torch.Tensor.float), side) for sample in self._calibration()]
        return [fitted.in_layer(layer, n_layers) for layer, fitted in enumerate(schemes)]

    def _calibration(self) -> list[LayerTensors]:
        """What each layer computes on a calibration text, cut into windows of the context; f16: half the memory."""
        if self._samples is None:
            n_layers = self._variants.spec.n_layers
            parts: list[list[LayerTensors]] = [[] for _ in range(n_layers)]
            exact = [FLOATS["f32"]] * n_layers

            def keep(layer: int, tensors: LayerTensors) -> None:
                parts[layer].append(_map(tensors, torch.Tensor.half))

            forward = self._forward(SimulatedAttention(self._variants.layers(self._n_ctx), exact, exact, keep))
            for window in _calibration_windows(self._variants.tokenizer, self._n_ctx):
                forward(window, len(window) - 1)
            self._samples = [_joined(part) for part in parts]
        return self._samples


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scheme(name: str) -> Scheme:
    return SCHEMES[name] if name in SCHEMES else FLOATS[name]


def _calibration_windows(tokenizer: Tokenizer, n_ctx: int) -> list[list[int]]:
    """Python's own documentation as token ids, in windows of `n_ctx`."""
    try:
        return calibration_windows(tokenizer, default_text(), max(_CALIBRATION_TOKENS, n_ctx), n_ctx)
    except PlanError:
        raise KsortError(f"-c {n_ctx}: the calibration text is shorter than that: use a smaller context") from None


def _map(layer: LayerTensors, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerTensors:
    """The layer with each tensor changed."""
    q, k, k_before_rope, v = (change(x) for x in layer.tensors())
    return dataclasses.replace(layer, q=q, k=k, k_before_rope=k_before_rope, v=v)


def _joined(parts: list[LayerTensors]) -> LayerTensors:
    """Several windows as one, for statistics."""
    q, k, k_before_rope, v = (torch.cat(xs, 1) for xs in zip(*(part.tensors() for part in parts), strict=True))
    return dataclasses.replace(parts[0], q=q, k=k, k_before_rope=k_before_rope, v=v)
