"""Templates that decide by what a turn says, found by showing them what some are known to look for.

Untrusted contents never reach Jinja, so such a decision has to be taken here, or the text refused.
One is taken: templates of reasoning models drop the thought of an earlier answer, all up to its
closing mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from equipoise.encoding.slots import Skeleton, skeleton
from equipoise.errors import DataError, ModelError

if TYPE_CHECKING:
    from equipoise.encoding.template import ChatTemplate

_SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
_COMMANDS = ("/no_think", "/think", "<tool_call>", "<tool_response>", '{"name":')
_STRIPS = ("", "\n", "*")


@dataclass(frozen=True)
class ContentRules:
    """What a chat template makes of contents, beyond writing them down."""

    thought_end: str = ""
    """The closing mark of a thought."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Role whose contents lose all up to the last of these marks, to what is stripped behind it:
    nothing, these characters, or (``*``) all white space."""
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role to texts that the template acts upon in some other way."""

    def fit(self, role: str, content: str) -> str:
        """Return the content that the template would write.

        Raises:
            DataError: The template acts upon this content.
        """
        held = next((text for text in self.refused.get(role, ()) if text in content), None)
        if held is not None:
            raise DataError(
                f"the chat template acts upon {held!r} in what a turn says",
                why=f"contents are never shown to a template, and this one would change the prompt "
                f"by the {role}'s text",
                fix="leave this prompt out, or use a chat template that inserts contents unchanged",
            )
        if role in self.dropped and self.thought_end in content:
            return _cut(content, self.thought_end, self.dropped[role])
        return content


def content_rules(template: ChatTemplate, thought_end: str) -> ContentRules:
    """Probe a chat template.

    Args:
        template: With its clock stopped.
        thought_end: The closing mark of the model's thoughts.
    """
    refused: dict[str, set[str]] = {}
    strips: dict[str, set[str]] = {}
    kept: set[str] = set()
    for roles in _SEQUENCES:
        turns = [(role, False) for role in roles]
        try:
            usual = skeleton(template, turns, generation_prompt=True)
        except (DataError, ModelError):
            continue  # said when such a prompt comes
        for place, role in enumerate(roles):
            for mark, said in _probes(thought_end):
                contents = ["a b"] * len(roles)
                contents[place] = said
                rendered = _rendered(template, roles, contents)
                if rendered == usual.fill(contents):
                    kept |= {role} if mark == thought_end else set()
                elif mark == thought_end:
                    found = _explaining(rendered, usual, contents, place, mark)
                    strips[role] = strips.get(role, found) & found
                else:
                    refused.setdefault(role, set()).add(mark)
    for role, found in strips.items():
        if role in kept:  # here so, there otherwise
            found.clear()
        if not found:
            refused.setdefault(role, set()).add(thought_end)
    return ContentRules(
        thought_end,
        {role: min(found, key=_STRIPS.index) for role, found in strips.items() if found},
        {role: tuple(sorted(marks)) for role, marks in refused.items()},
    )


def _probes(end: str) -> list[tuple[str, str]]:
    """Return (what a template may look for, a content that holds it)."""
    start = end.replace("/", "", 1)
    thoughts = [f"x{end}y", f"{start}x{end}\n\n  y", f"x{end}\n\n  y", f"{start}x{end}y{end} z"]
    commands = [(text, form) for text in _COMMANDS for form in (f"a {text}", f"{text} a")]
    closed = [("<tool_response>", "<tool_response>a</tool_response>")]
    return [*((end, text) for text in thoughts), *commands, *closed]


def _explaining(
    rendered: str | None, usual: Skeleton, contents: Sequence[str], place: int, end: str
) -> set[str]:
    """Return the ways to strip under which dropping the thought gives what was rendered."""
    found = set()
    for strip in _STRIPS:
        fitted = [*contents]
        fitted[place] = _cut(contents[place], end, strip)
        if rendered == usual.fill(fitted):
            found.add(strip)
    return found


def _cut(content: str, end: str, strip: str) -> str:
    kept = content.rpartition(end)[2]
    return kept.lstrip(None if strip == "*" else strip) if strip else kept


def _rendered(template: ChatTemplate, roles: Sequence[str], contents: Sequence[str]) -> str | None:
    try:
        turns = [(role, False) for role in roles]
        return template.render(turns, contents, generation_prompt=True)
    except DataError:
        return None
