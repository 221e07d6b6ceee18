"""A dialled model for people: load it, ask it, turn its dials by name.

Everything here is a call or two of the typed parts below it: ``load_causal``,
``TransformersEngine`` and ``DialSetting``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError, ModelError
from equipoise.seeds import derive_seed
from equipoise.types import Branch, DialSetting, GenerationRequest, Message

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

TUNED = Path("tune/model")
"""Where a run directory holds its tuned model."""


class Model:
    """A chat model with dials; made by :func:`load`."""

    def __init__(self, policy: LoadedPolicy, dials: Dials) -> None:
        from equipoise.engine.sample import TransformersEngine

        self.dials = dials
        """The names of its dials, in order, and how many levels each has."""
        self._encoder, self._engine = policy.encoder, TransformersEngine.of(policy)

    def ask(
        self,
        prompt: str | Sequence[Message],
        *,
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        **dials: float,
    ) -> str:
        """Return an answer at a setting of the dials.

        Args:
            prompt: What the user says, or all turns of a chat, the user's last.
            seed: The same seed gives the same answer.
            temperature: 0: always the likeliest token.
            max_new_tokens: Of the answer.
            dials: Name of a dial to its value from 0 (least) to 1 (most), e.g. ``safety=1``. One
                that is not named is left free. Between two levels safety takes the upper one, any
                other dial the nearest.

        Raises:
            ConfigError: There is no such dial, or a value is out of its range.
            DataError: The prompt cannot be encoded, or leaves no room for an answer.
        """
        try:
            sampling = Sampling(temperature=temperature, max_tokens=max_new_tokens)
        except ValueError as error:
            raise ConfigError(
                f"temperature {temperature} with max_new_tokens {max_new_tokens} cannot be sampled",
                why="a temperature is a number, at least 0, and an answer has at least one token",
                fix="leave them out for the defaults",
            ) from error
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        control_ids = self._encoder.control_ids(self._setting(dials))
        request = GenerationRequest(
            tuple(self._encoder.prompt_ids(messages)),
            (Branch(control_ids, derive_seed(seed, "ask")),),
        )
        return self._engine.generate([request], sampling)[0][0].text

    def _setting(self, values: dict[str, float]) -> DialSetting:
        for name in values:
            if name not in self.dials.attributes:
                raise ConfigError(
                    f"this model has no dial called {name}",
                    why=f"its dials are {', '.join(self.dials.attributes)}",
                    fix="turn one of these",
                )
        return DialSetting(
            tuple(
                self.dials.level_for_value(
                    values[name], rounding="up" if name == "safety" else "nearest"
                )
                if name in values
                else None
                for name in self.dials.attributes
            )
        )


def load(name: str | Path) -> Model:
    """Load a model with dials: its directory, or the run directory that it was tuned in.

    Raises:
        ModelError: The model has no dials, or its files are missing or damaged.
    """
    from equipoise.models.load import load_causal

    run = Path(name)
    policy = load_causal(str(run / TUNED if (run / "recipe.json").is_file() else name))
    if policy.manifest is None:
        raise ModelError(
            "this model has no dials",
            why="its directory holds no dials.json",
            fix="give the directory that `equipoise stage tune` wrote: RUN/tune/model",
        )
    return Model(policy, policy.manifest.dials)
