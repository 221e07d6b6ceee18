"""Coverage-guided fuzzing of the encoder: inputs that reach new code are kept and changed further.

    python tests/fuzz_encode.py -max_total_time=1800     # options are libFuzzer's; needs atheris

Ends with a traceback and the input at the first text that writes a marker, or error that is not one
of ours. ``scripts/fuzz`` installs what it needs.
"""

from __future__ import annotations

import sys

import atheris

from equipoise.dials.dials import Dials

with atheris.instrument_imports(include=["equipoise.dials", "equipoise.types"]):
    from equipoise.dials.manifest import control_tokens
    from equipoise.encoding.encode import Encoder
    from equipoise.errors import DataError

from test_encode import ATTRIBUTES, benign_marks, dialled, marks, messages
from tokenizer_kit import FAMILIES, MARKERS

NAMES = sorted(FAMILIES)
ROLES = {1: ["user"], 2: ["system", "user"], 3: ["user", "assistant", "user"]}


def text(data: atheris.FuzzedDataProvider, pieces: list[str]) -> str:
    """Return text made of markers, cut markers and whatever the fuzzer likes."""
    parts = []
    for _ in range(data.ConsumeIntInRange(1, 5)):
        piece = data.PickValueInList(pieces)
        begin = data.ConsumeIntInRange(0, len(piece))
        kinds = [piece, piece[:begin], piece[begin:], data.ConsumeUnicode(8)]
        parts.append(data.PickValueInList(kinds))
    return "".join(parts)


def one(raw: bytes) -> None:
    """Encode one conversation and its last turn as a completion and as a pair."""
    data = atheris.FuzzedDataProvider(raw)
    family = data.PickValueInList(NAMES)
    encoder: Encoder = dialled(family)
    pieces = [*MARKERS[family], *control_tokens(Dials(ATTRIBUTES, 5))]
    roles = ROLES[data.ConsumeIntInRange(1, 3)]
    turns = [{"role": role, "content": text(data, pieces)} for role in roles]
    try:
        found = encoder.prompt_ids(messages(turns))
        completion = encoder.completion_ids(turns[-1]["content"], finished=False)
        pair = encoder.pair(turns[0]["content"], turns[-1]["content"]).ids
    except DataError:
        return  # blank, or a lone surrogate: refused by name
    assert marks(found, family) == benign_marks(family, turns), turns
    assert not marks(completion, family), turns
    assert marks(pair, family) == marks(encoder.pair("the", "the").ids, family), turns


if __name__ == "__main__":
    for family in NAMES:
        dialled(family)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
