"""The hash behind vllm-router's consistent hashing: mcrouter's furc hash, spread over 64 bits.

Formulas: MurmurHash64A by Austin Appleby; `furc_hash` from facebook/mcrouter `lib/fbi/hash.c`; how the two are joined
and the seed from vllm-project/router 0.1.17 `src/policies/consistent_hash.rs`. Hashes are plain 64-bit unsigned ints,
equal to the Rust ones for every text (UTF-8).
"""

from collections.abc import Callable
from functools import lru_cache
from struct import unpack_from

_MASK = 2**64 - 1
_MULTIPLIER = 0xC6A4A7935BD1E995
_SEED = 4193360111
_REHASH_START = _SEED ^ (8 * _MULTIPLIER & _MASK)
_STRIDE = 23
_MODULUS = 2**23 - 1
_DEPTH = 23  # ceil(log2(_MODULUS))
_TRIES = 32
_FIRST_BITS = 2 ** (_DEPTH + 1) - 1


def murmur64a(data: bytes, seed: int = _SEED) -> int:
    """Give MurmurHash64A of the bytes."""
    size = len(data)
    whole = size & ~7
    state = seed ^ (size * _MULTIPLIER & _MASK)
    for word in unpack_from(f"<{whole >> 3}Q", data):
        mixed = word * _MULTIPLIER & _MASK
        mixed = (mixed ^ mixed >> 47) * _MULTIPLIER & _MASK
        state = (state ^ mixed) * _MULTIPLIER & _MASK
    if whole != size:
        state = (state ^ int.from_bytes(data[whole:], "little")) * _MULTIPLIER & _MASK
    state = (state ^ state >> 47) * _MULTIPLIER & _MASK
    return state ^ state >> 47


def _rehash(word: int) -> int:
    mixed = word * _MULTIPLIER & _MASK
    mixed = (mixed ^ mixed >> 47) * _MULTIPLIER & _MASK
    state = (_REHASH_START ^ mixed) * _MULTIPLIER & _MASK
    state = (state ^ state >> 47) * _MULTIPLIER & _MASK
    return state ^ state >> 47


def _bit_source(data: bytes) -> Callable[[int], int]:
    words = [murmur64a(data)]

    def bit(place: int) -> int:
        while len(words) <= place >> 6:
            words.append(_rehash(words[-1]))
        return words[place >> 6] >> (place & 63) & 1

    return bit


def _furc(data: bytes) -> int:
    """Give furc_hash of the bytes; the first of its up to 32 tries is nearly always the last, so it is done fast."""
    word = murmur64a(data)
    depth = (word & _FIRST_BITS).bit_length() - 1
    if depth < 2:
        return 0 if depth < 0 else 1
    bits = f"{word:064b}"
    for _ in range((_STRIDE * depth + depth) >> 6):
        word = _rehash(word)
        bits = f"{word:064b}{bits}"
    first = len(bits) - 1 - depth - _STRIDE
    number = int("1" + bits[first::-_STRIDE][: depth - 1], 2)
    return number if number < _MODULUS else _furc_by_tries(data)


def _furc_by_tries(data: bytes) -> int:
    bit = _bit_source(data)
    depth = place = _DEPTH
    for _ in range(_TRIES):
        while not bit(place):
            if depth == 0:
                return 0
            depth -= 1
            place = depth
        place += _STRIDE
        number = 1
        for _ in range(depth - 1):
            number = number << 1 | bit(place)
            place += _STRIDE
        if number < _MODULUS:
            return number
    return 0


@lru_cache(8192)
def fbi_hash(text: str) -> int:
    """Give the 64-bit place of a text on the ring."""
    return murmur64a(_furc(text.encode()).to_bytes(4, "little"))
