"""Seeds by derivation: every random draw names what it is for."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from the parts, e.g. ``derive_seed(seed, prompt.id, sample_index)``.

    The same parts give the same seed on every machine and Python version.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
