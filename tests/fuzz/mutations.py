"""Damage: bytes anywhere, and parts of JSON. All randomness comes from the caller's `random`."""

import json
from collections.abc import Iterator
from random import Random

INTEGERS = (0, 1, 2, 3, 7, 127, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES = (None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e308, "", "x", "F32", "f16")


def mutate_bytes(data: bytes, header_bytes: int, random: Random) -> bytes:
    """`data` with one to four changes, nine of ten in its first `header_bytes`."""
    mutated = bytearray(data)
    for _ in range(random.randint(1, 4)):
        end = min(header_bytes, len(mutated)) if random.random() < 0.9 else len(mutated)
        if end == 0:
            break
        _change_bytes(mutated, random.randrange(end), random)
    return bytes(mutated)


def _change_bytes(data: bytearray, at: int, random: Random) -> None:
    change = random.randrange(7)
    if change == 0:
        data[at] ^= 1 << random.randrange(8)
    elif change == 1:
        data[at] = random.randrange(256)
    elif change in (2, 3):
        n_bytes = 4 if change == 2 else 8
        value = random.choice(INTEGERS) % 256**n_bytes
        data[at : at + n_bytes] = value.to_bytes(n_bytes, "little")
    elif change == 4:
        del data[at : at + random.randint(1, 16)]
    elif change == 5:
        data[at:at] = data[max(0, at - random.randint(1, 32)) : at]
    else:
        del data[at:]


def mutate_json(value: object, random: Random) -> object:
    """A copy of a JSON value with one to three of its parts replaced, removed, moved or doubled."""
    copy = json.loads(json.dumps(value))
    for _ in range(random.randint(1, 3)):
        copy = _change_json(copy, random)
    return copy


def _change_json(value: object, random: Random) -> object:
    holders = [held for held in _parts(value) if isinstance(held, (dict, list)) and held]
    if not holders or random.random() < 0.02:
        return random.choice(JSON_VALUES)
    holder = random.choice(holders)
    key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    other = random.choice(list(_parts(value)))
    change = random.randrange(5)
    if change == 0:
        del holder[key]
    elif change == 1:
        holder[key] = json.loads(json.dumps(other))
    elif change == 2:
        holder[key] = [json.loads(json.dumps(holder[key]))] * random.randint(0, 3)
    elif change == 3 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif isinstance(holder[key], int) and random.random() < 0.5:
        holder[key] += random.choice((-(2**40), -64, -1, 1, 64, 2**40))
    else:
        holder[key] = random.choice(JSON_VALUES)
    return value


def _parts(value: object) -> Iterator[object]:
    """The value and all that it holds, at any depth."""
    yield value
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)
