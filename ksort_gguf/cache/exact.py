"""Exact rows beside packed caches: which types have them, how many tokens they hold, and where they begin."""

from ksort_gguf.errors import CacheTypeError
from ksort_gguf.names import CACHE_TYPES, EXACT_SINKS, EXACT_TAIL, MAX_EXACT_TAIL, TILE_TOKENS

STEP_TOKENS = 64  # that are stored and attended together, so that the ring stays small


def exact_rows(
    k_type: str, v_type: str, tail: int | None, sinks: int | None,
    fields: tuple[str, str] = ("cache_exact_tail", "cache_exact_sinks"),
) -> tuple[int, int, bool]:  # fmt: skip
    """What CacheOptions' exact_tail, exact_sinks and exact_everywhere are for numbers of tokens asked for.

    None: EXACT_TAIL and EXACT_SINKS where a type is of 4 bits or less, else 0. Types of more bits have exact rows only
    where a number is asked for. Raises CacheTypeError naming the one of `fields` that is out of range, or more than 0
    where no type is packed.
    """
    types = CACHE_TYPES[k_type], CACHE_TYPES[v_type]
    for field, n, most in zip(fields, (tail, sinks), (MAX_EXACT_TAIL, TILE_TOKENS), strict=True):
        if n is not None and not 0 <= n <= most:
            raise CacheTypeError(f"`{field}` {n} is not a number of tokens from 0 to {most}", field=field)
        if n and not any(t.is_bfp for t in types):
            raise CacheTypeError(
                f"`{field}` {n}: exact rows lie beside packed caches, and neither `cache_type_k` {k_type} nor "
                f"`cache_type_v` {v_type} is packed: leave it out, or choose a BFP type",
                field=field,
            )
    is_small = any(t.is_small for t in types)
    of_tail, of_sinks = (EXACT_TAIL, EXACT_SINKS) if is_small else (0, 0)
    return of_tail if tail is None else tail, of_sinks if sinks is None else sinks, bool(tail or sinks)


def ring_tiles(n_tail: int, n_ctx: int) -> int:
    """Tiles of a ring that holds the tail of every token of a step, or all of a context."""
    return min(-(-(n_tail + STEP_TOKENS - 1) // TILE_TOKENS), -(-n_ctx // TILE_TOKENS)) if n_tail else 0


def begin_after(begin: int, first_slot: int, n_tokens: int, n_tiles: int) -> int:
    """The first slot of a ring of `n_tiles` once n_tokens are stored from `first_slot` on: ksort.h's rule.

    It holds where they are refused as well: the ring may have lost the rows that they take then, or none.
    """
    return max(min(begin, first_slot), first_slot + n_tokens - n_tiles * TILE_TOKENS)


def steps(first_slot: int, n_tokens: int, begin: int, n_tiles: int) -> list[tuple[int, int, int]]:
    """n_tokens tokens, the first in slot `first_slot`, in steps whose tails a ring of `n_tiles` holds.

    Of each step the first token's place among them, the place after the last, and the ring's first slot once the step
    is stored, where it was `begin` before all of them.
    """
    found = []
    for start in range(0, n_tokens, STEP_TOKENS):
        stop = min(start + STEP_TOKENS, n_tokens)
        begin = begin_after(begin, first_slot + start, stop - start, n_tiles)
        found.append((start, stop, begin))
    return found
