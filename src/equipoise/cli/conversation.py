"""A conversation at a terminal: dials, history, one streamed answer at a time, a grid of nine.

The same policy function as the server's decides what a dial request gets, and the same rows decode
it; only HTTP is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.engine.cache import PrefixCache
from equipoise.engine.decode import LiveRows
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation
from equipoise.engine.text import AnswerText
from equipoise.errors import ConfigError, DataError, ModelError
from equipoise.models.limits import positions
from equipoise.policy.decide import Refusal, Server, allowed_levels, effective_setting
from equipoise.policy.rules import DialPolicy, Range, Scenario
from equipoise.seeds import derive_seed
from equipoise.types import Branch, DialSetting, GenerationRequest, Message

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy


class DialPanel:
    """Scenario and dials between two inputs.

    Without a policy every dial is free, and at its top until it is turned.
    """

    def __init__(self, dials: Dials, policy: DialPolicy | None = None) -> None:
        rules = policy or _open(dials.attributes)
        self.attributes, self.levels = dials.attributes, dials.levels
        self.dials: dict[str, object] = {}
        """What was asked for, by attribute; the rest is the scenario's default."""
        self.scenarios: Mapping[str, Scenario] = rules.scenarios
        self.scenario = rules.default_scenario
        self._server = Server(dials, rules.server, rules.round_up)

    def setting(self, asked: Mapping[str, object] | None = None) -> DialSetting:
        """Return the setting in force, or the one that other dials would get.

        Raises:
            ConfigError: The policy refuses it; the message names the allowed range.
        """
        dials = self.dials if asked is None else asked
        found = effective_setting(dials, {}, self.scenarios[self.scenario], self._server)
        if isinstance(found, Refusal):
            raise ConfigError(
                f"the {found.attribute} dial cannot be set so",
                why=found.message,
                fix=f"see /dials for what scenario {self.scenario} allows",
            )
        return found

    def turn(self, attribute: str, asked: object) -> DialSetting:
        """Turn a dial and return the setting in force; a refused turn changes nothing."""
        dials = {**self.dials, attribute: asked}
        found, self.dials = self.setting(dials), dials
        return found

    def enter(self, scenario: str) -> DialSetting:
        """Change the scenario, dials back to its defaults; return the setting in force."""
        if scenario not in self.scenarios:
            raise ConfigError(
                f"no scenario called {scenario}",
                why=f"the policy has {', '.join(self.scenarios)}",
                fix="name one of these",
            )
        self.scenario, self.dials = scenario, {}
        return self.setting()

    def allowed(self, attribute: str) -> range:
        """Return the levels that the scenario allows."""
        return allowed_levels(attribute, {}, self.scenarios[self.scenario], self._server)

    def described(self, setting: DialSetting) -> str:
        """Return a setting in words: the value of every dial, or auto."""
        return ", ".join(
            f"{attribute} auto" if level is None else f"{attribute} {self.value(level)}"
            for attribute, level in zip(self.attributes, setting.levels, strict=True)
        )

    def value(self, level: int) -> str:
        """Return the dial value of a level, as people write it."""
        return f"{level / (self.levels - 1):.4g}"


def _open(attributes: Sequence[str]) -> DialPolicy:
    free = Scenario(
        why="No policy was given, and the model's files are at hand.",
        ranges={attribute: Range() for attribute in attributes},
        default=dict.fromkeys(attributes, 1.0),
    )
    return DialPolicy(version=1, default_scenario="open", scenarios={"open": free})


@dataclass(frozen=True)
class Grid:
    """One prompt answered at several values of two dials, lowest first; texts by row and column."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]


class Conversation:
    """The state between two inputs.

    Args:
        loaded: A model with dials.
        policy: The operator's rules; without them every dial is free.
        sampling: How to sample.
        seed: Every answer derives its own seed from it.

    Raises:
        ModelError: The model has no dials, or cannot be decoded row by row.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        *,
        policy: DialPolicy | None = None,
        sampling: Sampling,
        seed: int = 0,
    ) -> None:
        if loaded.manifest is None:
            raise ModelError(
                "this model has no dials",
                why="its directory holds no dials.json",
                fix="give the directory that `equipoise stage tune` wrote: RUN/tune/model",
            )
        self.panel = DialPanel(loaded.manifest.dials, policy)
        """The dials."""
        self.messages: list[Message] = []
        """The conversation so far, ending with an answer."""
        self._encoder, self._seed = loaded.encoder, seed
        if policy is not None:
            self._encoder = loaded.encoder.with_rendering(policy.rendering)
        self._sampling = self._encoder.budgets(sampling)
        self._model, self._context = loaded.model, positions(loaded.model.config)
        self._rows = LiveRows(loaded.model, loaded.encoder, PrefixCache(4096))
        self._n_answers = 0

    def answer(self, text: str) -> Iterator[str]:
        """Stream the answer to a user turn; both turns join the history, also a partial answer.

        Raises:
            DataError: The turn cannot be encoded, or the conversation has grown too long.
            ConfigError: The policy refuses the dials.
        """
        return self._reply([*self.messages, Message("user", text)])

    def again(self) -> Iterator[str]:
        """Stream another answer to the last user turn, at the dials of now; it replaces the old."""
        return self._reply(self._last_asked())

    def forget(self) -> None:
        """Empty the history; the dials stay."""
        self.messages = []

    def grid(self, text: str | None = None) -> Grid:
        """Answer one prompt at up to 3 × 3 settings of the first two dials, none of it kept.

        Args:
            text: A user turn behind the history; by default the last one is asked again.
        """
        asked = [*self.messages, Message("user", text)] if text else self._last_asked()
        panel, seed = self.panel, derive_seed(self._seed, derive_seed("grid", self._n_answers))
        dials = panel.attributes[:2]
        allowed = [panel.allowed(attribute) for attribute in dials]
        axes = [sorted({of[0], of[len(of) // 2], of[-1]}) for of in allowed]
        settings = [
            panel.setting(
                {**panel.dials, **{a: {"level": k} for a, k in zip(dials, cell, strict=True)}}
            )
            for cell in product(*axes)
        ]
        branches = tuple(Branch(self._encoder.control_ids(one), seed) for one in settings)
        request = GenerationRequest(self._prompt_ids(asked), branches)
        engine = TransformersEngine(self._model, self._encoder, model_hash="")
        texts = [one.text for one in engine.generate([request], self._sampling)[0]]
        names = [
            tuple(f"{a} {panel.value(k)}" for k in axis)
            for a, axis in zip(dials, axes, strict=True)
        ]
        columns = names[1] if len(names) > 1 else ("answer",)
        n = len(columns)
        return Grid(
            names[0], columns, tuple(tuple(texts[i : i + n]) for i in range(0, len(texts), n))
        )

    def _last_asked(self) -> list[Message]:
        if not self.messages:
            raise DataError(
                "there is nothing to answer again",
                why="the history is empty",
                fix="ask something first",
            )
        return self.messages[:-1]

    def _reply(self, asked: Sequence[Message]) -> Iterator[str]:
        control_ids = self._encoder.control_ids(self.panel.setting())
        seed = derive_seed(self._seed, derive_seed("chat", self._n_answers))
        generation = Generation(self._prompt_ids(asked), control_ids, self._sampling, seed, "")
        self._n_answers += 1
        parts: list[str] = []
        try:
            for delta in filter(None, self._deltas(generation)):
                parts.append(delta)
                yield delta
        finally:
            self.messages = [*asked, Message("assistant", "".join(parts))]

    def _prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        prompt_ids = tuple(self._encoder.prompt_ids(messages))
        sampled = self._sampling.max_tokens + self._sampling.max_thought_tokens
        needed = len(prompt_ids) + len(self.panel.attributes) + sampled
        if self._context is not None and needed > self._context:
            raise DataError(
                "the conversation has grown too long for this model",
                why=f"it needs {needed} positions, the model has {self._context}, and nothing is "
                "cut off silently",
                fix="/forget the history, or start with a smaller --max-tokens",
            )
        return prompt_ids

    def _deltas(self, generation: Generation) -> Iterator[str]:
        self._rows.clear()  # what an answer that was stopped has left
        (joined,) = self._rows.join([generation])
        if isinstance(joined, Exception):
            raise joined
        text = AnswerText(self._encoder)
        for _, token in self._rows.run():
            if isinstance(token, Exception):
                raise token
            yield text.push(token)
        yield text.flush()
