"""The date that chat templates write in a run: its first day, kept in the run directory.

Templates of Llama 3.1, Granite and others write today's date into every prompt. A run that goes on
after midnight, or is resumed next week, must ask with the prompts that it began with.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from equipoise.errors import RunError
from equipoise.store.publish import json_bytes, publish_bytes, read_json_or_none

FILE = "date.json"


def settle_date(run_dir: Path) -> datetime.date:
    """Return the date of a run; today's, recorded, where there is none yet.

    Raises:
        RunError: What is recorded is no date.
    """
    file = run_dir / FILE
    kept = read_json_or_none(file)
    if kept is None:
        today = datetime.date.today()
        publish_bytes(file, json_bytes({"date": today.isoformat()}))
        return today
    try:
        return datetime.date.fromisoformat(kept["date"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file} holds no date",
            why="the chat template writes this date into every prompt of the run",
            fix='restore the line {"date": "YYYY-MM-DD"} with the day on which the run began',
        ) from error
