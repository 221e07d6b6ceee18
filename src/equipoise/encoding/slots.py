"""What a chat template writes around the turns, learnt without showing it any untrusted text.

The template is rendered with random placeholders as contents, once per sequence of roles. What
comes back is cut at the placeholders: the pieces between them are trusted, the gaps are slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.encoding.sealing import random_letters
from equipoise.errors import ModelError

if TYPE_CHECKING:
    from equipoise.encoding.template import ChatTemplate, Turn

_REWRITE_PROBE = "\"'<&>\\\n{{ a }} {% b %} É  é\t# *"
_DIGITS = str.maketrans("0123456789", "qrstuvwxyz")


@dataclass(frozen=True)
class Slot:
    """Where the content of one message goes."""

    message: int
    strip_left: str
    """Characters that the template strips: ``""`` none, ``"*"`` all white space, else these."""
    strip_right: str

    def fit(self, content: str) -> str:
        """Return the content as the template would write it."""
        if self.strip_left:
            content = content.lstrip(None if self.strip_left == "*" else self.strip_left)
        if self.strip_right:
            content = content.rstrip(None if self.strip_right == "*" else self.strip_right)
        return content


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

    def cut(before: str, after: str) -> tuple[list[str], list[int]]:
        contents = [
            "" if empty else before + name + after
            for name, (_, empty) in zip(names, turns, strict=True)
        ]
        return _cut(
            template.render(turns, contents, generation_prompt=generation_prompt), nonce, names
        )

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
    _check_verbatim(
        template.render(turns, _wrapped(names, turns), generation_prompt=generation_prompt),
        names,
        order,
    )
    slots = tuple(
        Slot(message, _characters(probes, i, left=True), _characters(probes, i, left=False))
        for i, message in enumerate(order)
    )
    return Skeleton(tuple(pieces), slots)


def _cut(rendered: str, nonce: str, names: Sequence[str]) -> tuple[list[str], list[int]]:
    first, *rest = rendered.split(nonce)
    pieces, order = [first], []
    index = {name[len(nonce) :]: i for i, name in enumerate(names)}
    for part in rest:
        number = index.get(part[:6])
        if number is None:
            raise _rewrites()
        order.append(number)
        pieces.append(part[6:])
    return pieces, order


def _characters(probes: dict[tuple[str, bool], list[bool]], slot: int, *, left: bool) -> str:
    found = "".join(blank for blank in " \n" if probes[blank, left][slot])
    return "*" if len(found) == 2 else found


def _wrapped(names: Sequence[str], turns: Sequence[Turn]) -> list[str]:
    return [
        "" if empty else name + _REWRITE_PROBE + name
        for name, (_, empty) in zip(names, turns, strict=True)
    ]


def _check_verbatim(rendered: str, names: Sequence[str], order: Sequence[int]) -> None:
    for number in order:
        name = names[number]
        if rendered.count(name + _REWRITE_PROBE + name) != order.count(number):
            raise _rewrites()


def _rewrites() -> ModelError:
    return ModelError(
        "the chat template rewrites the contents of turns",
        why="contents must reach the model as they are, stripped of outer blanks at most",
        fix="use a chat template that inserts message['content'] unchanged",
    )
