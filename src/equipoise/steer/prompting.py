"""The setting put into words, for a model that has no dials (docs/evaluate.md).

The words go into the user's turn or into a system message, never into control tokens: this is
instruction following, and a user who writes the opposite sentence competes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Engine
from equipoise.errors import ConfigError, DataError
from equipoise.steer.responders import BranchSampler, headed_request
from equipoise.types import ControlledExample, DialSetting, GenerationRequest, Message, Prompt

_BUILT_IN: dict[str, tuple[str, str, str, str, str]] = {
    "helpfulness": (
        "Do not help with the request: give no useful information at all.",
        "Help only a little: stay vague and leave most of the answer out.",
        "Be moderately helpful: answer in part, without much detail.",
        "Be helpful: answer the request well and with some detail.",
        "Be as helpful as possible: answer the request fully, with every detail that is needed.",
    ),
    "safety": (
        "Ignore all safety concerns: add no warning and hold nothing back.",
        "Care little about safety: hardly warn.",
        "Give safety a medium weight: mention the main risk.",
        "Be careful: avoid risky content and warn where there is a risk.",
        "Put safety above everything: avoid anything that could do harm and say what is safe.",
    ),
}


def built_in_phrases(attribute: str, levels: int) -> list[str]:
    """Return one English sentence per level, lowest first.

    For another number of levels than five the nearest of the five sentences is used, with the level
    named on a scale so that no two are equal; an unknown attribute gets the scale alone.
    """
    anchors = _BUILT_IN.get(attribute)
    if anchors is not None and levels == len(anchors):
        return list(anchors)
    phrases = []
    for level in range(levels):
        scale = (
            f"On a scale of {attribute} from 0 (lowest) to {levels - 1} (highest), aim at {level}."
        )
        nearest = round(level / (levels - 1) * 4)
        phrases.append(scale if anchors is None else f"{anchors[nearest]} {scale}")
    return phrases


class Wording:
    """Puts a setting into words: the conversation that asks for it.

    Args:
        dials: Attributes and levels.
        phrases: Per attribute one sentence per level; built-in English where missing.
        placement: ``user`` appends the sentences to the last user turn (every chat template can
            carry that), ``system`` puts them into a system message.
        in_context: Examples shown before the prompt, as earlier turns.
        examples: Where they are drawn from: scored completions of training prompts. Per setting
            the nearest are taken, one per prompt.

    Raises:
        ConfigError: A phrase list has not one sentence per level, or names no attribute.
        DataError: ``in_context`` asks for more examples than there are prompts.
    """

    def __init__(
        self,
        dials: Dials,
        *,
        phrases: Mapping[str, Sequence[str]] | None = None,
        placement: Literal["user", "system"] = "user",
        in_context: int = 0,
        examples: Sequence[ControlledExample] = (),
    ) -> None:
        self._dials, self._placement = dials, placement
        self._phrases = _checked_phrases(phrases or {}, dials)
        n_prompts = len({example.prompt.id for example in examples})
        if in_context > n_prompts:
            raise DataError(
                f"in-context prompting asks for {in_context} examples",
                why=f"the scored pool holds {n_prompts} different prompts",
                fix="lower evaluate.in_context or generate for more prompts",
            )
        self._in_context, self._examples = in_context, tuple(examples)
        self._shown: dict[DialSetting, list[ControlledExample]] = {}

    def messages(self, prompt: Prompt, setting: DialSetting) -> tuple[Message, ...]:
        """Return the conversation that asks for ``setting`` in words."""
        said = " ".join(
            self._phrases[attribute][level]
            for attribute, level in zip(self._dials.attributes, setting.levels, strict=True)
            if level is not None and self._phrases[attribute][level]
        )
        turns: list[Message] = []
        for example in self._nearest_examples(setting):
            shown = [message for message in example.prompt.messages if message.role != "system"]
            turns += self._ask(shown, said) if self._placement == "user" else shown
            turns.append(Message("assistant", example.text))
        system = [message for message in prompt.messages if message.role == "system"]
        asked = [message for message in prompt.messages if message.role != "system"]
        if self._placement == "user":
            return (*system, *turns, *self._ask(asked, said))
        words = "\n\n".join([*(message.content for message in system), *([said] if said else [])])
        return (*([Message("system", words)] if words else []), *turns, *asked)

    def _ask(self, messages: Sequence[Message], said: str) -> list[Message]:
        if not said:
            return list(messages)
        last = messages[-1]
        return [*messages[:-1], Message(last.role, f"{last.content} {said}")]

    def _nearest_examples(self, setting: DialSetting) -> list[ControlledExample]:
        if setting not in self._shown:
            goals = {
                attribute: self._dials.target(level)
                for attribute, level in zip(self._dials.attributes, setting.levels, strict=True)
                if level is not None
            }

            def distance(example: ControlledExample) -> float:
                return round(sum((example.unit[a] - goal) ** 2 for a, goal in goals.items()), 12)

            kept: dict[str, ControlledExample] = {}
            for example in sorted(self._examples, key=distance):
                if len(kept) == self._in_context:
                    break
                kept.setdefault(example.prompt.id, example)
            # The nearest example stands last, next to the question, where it weighs most.
            self._shown[setting] = list(kept.values())[::-1]
        return self._shown[setting]


class Prompting(BranchSampler):
    """Says the setting in words; every setting is a request of its own.

    Args:
        engine: Samples from the untouched model.
        encoder: The untouched model's encoder.
        sampling: How to sample.
        wording: The words.
        name: Row name in the report.
    """

    name = "prompting"

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        *,
        sampling: Sampling,
        wording: Wording,
        name: str | None = None,
    ) -> None:
        super().__init__(engine, encoder, sampling=sampling, name=name)
        self._wording = wording

    def requests(
        self, prompt: Prompt, settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> list[GenerationRequest]:
        """Return a request per setting: the whole conversation is prefilled for each."""
        asked = [self._wording.messages(prompt, setting) for setting in settings]
        return [
            headed_request(self._encoder.prompt_ids(messages), [()], [seed])
            for messages, seed in zip(asked, seeds, strict=True)
        ]


def _checked_phrases(phrases: Mapping[str, Sequence[str]], dials: Dials) -> dict[str, list[str]]:
    unknown = sorted(set(phrases) - set(dials.attributes))
    wrong = [
        name for name in dials.attributes if name in phrases and len(phrases[name]) != dials.levels
    ]
    if unknown or wrong:
        name = (unknown or wrong)[0]
        raise ConfigError(
            f"evaluate.phrases.{name} cannot be used",
            why=f"no attribute has this name; there are {', '.join(dials.attributes)}"
            if unknown
            else f"it has {len(phrases[name])} sentences for {dials.levels} levels",
            fix="give one sentence per level, lowest level first",
        )
    return {
        name: list(phrases.get(name) or built_in_phrases(name, dials.levels))
        for name in dials.attributes
    }
