"""Cases drawn from large products: every value of every axis, in seeded combinations, instead of all combinations."""

import random
from collections.abc import Sequence


def draw(n: int, *axes: Sequence, seed: int = 0) -> list[tuple]:
    """`n` tuples with one value of each axis. Each value comes up as often as the others, give or take one."""
    rng = random.Random(seed)
    columns = []
    for axis in axes:
        shuffled = [value for _ in range(-(-n // len(axis))) for value in rng.sample(list(axis), len(axis))]
        columns.append(shuffled[:n])
    return list(zip(*columns, strict=True))
