"""What a chat template makes of turns, learnt without showing it any untrusted text.

The template is rendered with random placeholders as contents, once per sequence of roles. What
comes back is cut at the placeholders: the pieces between them are trusted, the gaps are slots.

Some templates decide by what a turn says. They are found by showing them what some are known to
look for. As untrusted contents never reach Jinja, such a decision has to be taken here, or the text
refused. One is taken: templates of reasoning models drop the thought of an earlier answer, all up
to its closing mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from equipoise.encoding.sealing import random_letters
from equipoise.errors import DataError, ModelError

if TYPE_CHECKING:
    from equipoise.encoding.template import ChatTemplate, Turn

_REWRITE_PROBE = "\"'<&>\\\n{{ a }} {% b %} É  é\t# *"
_DIGITS = str.maketrans("0123456789", "qrstuvwxyz")
_SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
_COMMANDS = ("/no_think", "/think", "<tool_call>", "<tool_response>", '{"name":')
_STRIPS = ("", "\n", "*")


@dataclass(frozen=True)
class Slot:
    """Where the content of one message goes."""

    message: int
    strip_left: str
    """Characters that the template strips: ``""`` none, ``"*"`` all white space, else these."""
    strip_right: str

    def fit(self, content: str) -> str:
        """Return the content as the template would write it."""
        return _strip(_strip(content, self.strip_left, str.lstrip), self.strip_right, str.rstrip)


def _strip(content: str, characters: str, side: Callable[..., str]) -> str:
    """Strip characters, or (``*``) all white space, on one side."""
    return side(content, None if characters == "*" else characters)


@dataclass(frozen=True)
class Skeleton:
    """A rendered sequence of roles: ``pieces[0] slots[0] pieces[1] ... pieces[-1]``."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]

    def fill(self, contents: Sequence[str]) -> str:
        """Return the render with these contents, one per message."""
        parts = [self.pieces[0]]
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            parts += [slot.fit(contents[slot.message]), piece]
        return "".join(parts)

    def around_last(self, contents: Sequence[str]) -> tuple[str, str, str]:
        """Return the render as (before the last slot, its content, behind it)."""
        slot = self.slots[-1]
        head = Skeleton(self.pieces[:-1], self.slots[:-1]).fill(contents)
        return head, slot.fit(contents[slot.message]), self.pieces[-1]


def skeleton(template: ChatTemplate, turns: Sequence[Turn], *, generation_prompt: bool) -> Skeleton:
    """Render a sequence of turns without their contents.

    Raises:
        DataError: If the template refuses this sequence of roles.
        ModelError: If the template drops or rewrites contents.
    """
    nonce = random_letters()
    names = [nonce + format(i, "06d").translate(_DIGITS) for i in range(len(turns))]

    def render(contents: Sequence[str]) -> str:
        return template.render(turns, contents, generation_prompt=generation_prompt)

    def wrapped(before: str, after: str) -> list[str]:
        named = zip(names, turns, strict=True)
        return ["" if empty else before + name + after for name, (_, empty) in named]

    def cut(before: str, after: str) -> tuple[list[str], list[int]]:
        first, *rest = render(wrapped(before, after)).split(nonce)
        index = {name[len(nonce) :]: i for i, name in enumerate(names)}
        if not all(part[:6] in index for part in rest):
            raise _rewrites()
        return [first, *(part[6:] for part in rest)], [index[part[:6]] for part in rest]

    pieces, order = cut("", "")
    missing = {i for i, (_, empty) in enumerate(turns) if not empty} - set(order)
    if missing:
        turn = min(missing)
        raise ModelError(
            f"the chat template leaves out turn {turn + 1} ({turns[turn][0]})",
            why="a turn that the model never sees cannot be answered",
            fix="leave such turns out of the prompts, or use another chat template",
        )

    def stripped(blank: str, *, left: bool) -> list[bool]:
        padded, again = cut(blank if left else "", "" if left else blank)
        if again != order:
            raise _rewrites()
        # Only one side is padded, so each blank has one place: the piece next to its slot.
        ours = slice(None, -1) if left else slice(1, None)
        result = []
        for plain, seen in zip(pieces[ours], padded[ours], strict=True):
            if seen not in (plain, plain + blank if left else blank + plain):
                raise _rewrites()
            result.append(seen == plain)
        return result

    probes = {
        (blank, left): stripped(blank, left=left) for blank in " \n" for left in (True, False)
    }
    probed = [text and text + _REWRITE_PROBE + text for text in wrapped("", "")]
    rendered = render(probed)
    if any(rendered.count(probed[number]) != order.count(number) for number in order):
        raise _rewrites()
    slots = tuple(
        Slot(message, _characters(probes, i, left=True), _characters(probes, i, left=False))
        for i, message in enumerate(order)
    )
    return Skeleton(tuple(pieces), slots)


def _characters(probes: dict[tuple[str, bool], list[bool]], slot: int, *, left: bool) -> str:
    found = "".join(blank for blank in " \n" if probes[blank, left][slot])
    return "*" if len(found) == 2 else found


def _rewrites() -> ModelError:
    return ModelError(
        "the chat template rewrites the contents of turns",
        why="contents must reach the model as they are, stripped of outer blanks at most",
        fix="use a chat template that inserts message['content'] unchanged",
    )


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
                    # The ways to strip under which dropping the thought gives what was rendered.
                    before, after = contents[:place], contents[place + 1 :]
                    found = {
                        strip
                        for strip in _STRIPS
                        if rendered == usual.fill([*before, _cut(said, mark, strip), *after])
                    }
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


def _cut(content: str, end: str, strip: str) -> str:
    return _strip(content.rpartition(end)[2], strip, str.lstrip)


def _rendered(template: ChatTemplate, roles: Sequence[str], contents: Sequence[str]) -> str | None:
    try:
        turns = [(role, False) for role in roles]
        return template.render(turns, contents, generation_prompt=True)
    except DataError:
        return None
