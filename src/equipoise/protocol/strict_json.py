"""JSON as two readers would read it alike: no key twice, bounded depth, UTF-8 only.

Two keys of one name are where a check and its use part ways: one sees the first, one the last.
Numbers beyond floats are kept as infinities, so that the field they stand in can name its range.
"""

from __future__ import annotations

import json
from typing import Any

from equipoise.protocol.failures import bad_request, quoted

MAX_DEPTH = 32
MAX_KEYS = 512
"""Of one object. Each key of too many would be a fault of its own, at a kilobyte and more."""
_MAX_DIGITS = 4000
"""Python refuses to parse longer integers."""


class _TwiceError(ValueError):
    pass


def parse(body: bytes) -> Any:
    """Return the JSON value in a request body.

    Raises:
        RefusedError: 400; it is not UTF-8 or not JSON, names a key twice, nests too deeply, or an
            object in it has too many keys.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
    except _TwiceError as error:
        raise bad_request(
            f"the key {error} stands twice in one object", code="duplicate_key"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise bad_request(
            f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json"
        ) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise _too_deep()


def _too_deep() -> Exception:
    return bad_request(f"the body nests deeper than {MAX_DEPTH}", code="too_deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise bad_request(f"an object holds more than {MAX_KEYS} keys", code="too_many_keys")
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _TwiceError(quoted(key))
            seen.add(key)
    return result


def _integer(digits: str) -> int | float:
    if len(digits) > _MAX_DIGITS:
        return float("-inf") if digits.startswith("-") else float("inf")
    # JSON's -0 has a sign, and a dial value has none: keep it, so that it can be refused.
    return -0.0 if digits == "-0" else int(digits)
