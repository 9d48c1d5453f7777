"""Damaged files, for tests that read them."""

import random


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a file with some bytes changed, removed, added or repeated."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at, kind = rng.randrange(len(data)), rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice([1, 4, 100])]
        elif kind == 2:
            data[at:at] = rng.choice([bytes([rng.choice(b"(.0R\x81bhq\x94csuae]})tNK")]), rng.randbytes(4)])
        else:
            other = rng.randrange(len(data))
            data[at:at] = data[other : other + rng.choice([8, 64, 400])]
        data = data or bytearray(b".")
    return bytes(data)
