"""Every error that a user can cause, each with what happened, why, and what to do.

    EquipoiseError
    ├── ConfigError        a recipe, flag or manifest is wrong
    ├── DataError          prompts, pairs or labels cannot be used
    ├── ModelError         a model or tokenizer cannot be used
    ├── EncodingError      untrusted text met the encoder's assertion
    ├── RewardError        a reward model broke its contract
    ├── RunError           a run directory cannot be used
    ├── TrainingError      tuning diverged or the dials stayed dead
    └── ServingError       the server's engine or scorer cannot answer

How to add one: subclass, raise it with all three parts, and list it above.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EquipoiseError(Exception):
    """Base of all user errors.

    Args:
        what: What happened, one line.
        why: The cause, as far as it is known.
        fix: The next step for the user.
    """

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why: {why}\n  fix: {fix}")
        self.what, self.why, self.fix = what, why, fix

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.why, self.fix))


def _rebuild(kind: type[EquipoiseError], what: str, why: str, fix: str) -> EquipoiseError:
    return kind(what, why=why, fix=fix)


class ConfigError(EquipoiseError):
    """A recipe, flag or manifest is wrong."""


class DataError(EquipoiseError):
    """Prompts, pairs or labels cannot be used."""


class ModelError(EquipoiseError):
    """A model or tokenizer cannot be used."""


class EncodingError(EquipoiseError):
    """Untrusted text met the encoder's assertion; nothing was sampled or trained on."""


class RewardError(EquipoiseError):
    """A reward model returned the wrong number of scores, or one that is not finite."""


class RunError(EquipoiseError):
    """A run directory is locked, changed, full or damaged."""


class TrainingError(EquipoiseError):
    """Tuning diverged; the last good checkpoint is kept."""


class ServingError(EquipoiseError):
    """The server's engine or scorer cannot answer; nothing wrong was sent."""


@contextmanager
def named(place: str) -> Iterator[None]:
    """Say of which row a text or an order of turns was refused.

    Raises:
        DataError: In place of a DataError or EncodingError that came from inside.
    """
    try:
        yield
    except (DataError, EncodingError) as error:
        raise DataError(f"{place}: {error.what}", why=error.why, fix=error.fix) from error
