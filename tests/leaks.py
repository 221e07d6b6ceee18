"""Does a report without text hold text?"""

from __future__ import annotations

import re
from collections.abc import Iterable


def shared_runs(outputs: Iterable[str], texts: Iterable[str], *, words: int = 8) -> set[str]:
    """Return every run of ``words`` words of any text that occurs in any output.

    The check behind a report without text: it must be empty over the report's files.
    """

    def runs(text: str) -> set[str]:
        found = re.findall(r"\w+", text.casefold())
        return {" ".join(found[i : i + words]) for i in range(len(found) - words + 1)}

    secret: set[str] = set().union(*map(runs, texts))
    return secret & set().union(*map(runs, outputs))
