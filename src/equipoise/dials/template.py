"""What a chat template writes around the turns, learnt without showing it any untrusted text.

The template is rendered with random placeholders as contents, once per sequence of roles. What
comes back is cut at the placeholders: the pieces between them are trusted, the gaps are slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import jinja2.lexer

from equipoise.dials.sealing import random_letters
from equipoise.errors import DataError, ModelError
from equipoise.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, bool]
"""A role, and whether the content is empty (templates may leave such a turn out)."""

_ROLES = ("system", "user", "assistant")
_REWRITE_PROBE = "\"'<&>\\\n{{ a }} {% b %} É  é\t# *"
_DIGITS = str.maketrans("0123456789", "qrstuvwxyz")
_COMMON: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant"),
)


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


def skeleton(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, generation_prompt: bool
) -> Skeleton:
    """Render a sequence of turns without their contents.

    Raises:
        DataError: If the template refuses this sequence of roles.
        ModelError: If the template drops or rewrites contents.
    """
    nonce = random_letters()
    names = [nonce + format(i, "06d").translate(_DIGITS) for i in range(len(turns))]

    def cut(before: str, after: str) -> tuple[list[str], list[int]]:
        contents = [
            "" if empty else before + name + after
            for name, (_, empty) in zip(names, turns, strict=True)
        ]
        return _cut(_render(tokenizer, turns, contents, generation_prompt), nonce, names)

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
        _render(tokenizer, turns, _wrapped(names, turns), generation_prompt), names, order
    )
    slots = tuple(
        Slot(message, _characters(probes, i, left=True), _characters(probes, i, left=False))
        for i, message in enumerate(order)
    )
    return Skeleton(tuple(pieces), slots)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    contents: Sequence[str],
    generation_prompt: bool,
) -> str:
    conversation = [
        {"role": role, "content": content}
        for (role, _), content in zip(turns, contents, strict=True)
    ]
    try:
        rendered = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            "the chat template refuses this sequence of turns: "
            + ", ".join(role for role, _ in turns),
            why=str(error),
            fix="leave such prompts out, or bring their turns into the order the model knows",
        ) from error
    return str(rendered)


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


def common_renders(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return renders of common role sequences with placeholder contents, refused ones left out."""
    renders = []
    for roles in _COMMON:
        turns = [(role, False) for role in roles]
        contents = [random_letters() for _ in roles]
        for generation_prompt in (False, True):
            try:
                renders.append(_render(tokenizer, turns, contents, generation_prompt))
            except DataError:
                continue
    return renders


def template_literals(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text and the string literals of the template's source, joined by NUL."""
    source = tokenizer.get_chat_template()
    try:
        lexed = list(jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).lex(source))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            "the chat template is not valid Jinja",
            why=str(error),
            fix="repair the tokenizer's chat_template",
        ) from error
    # Escapes such as \n stay as written in string literals; markers hold none.
    return "\0".join(text for _, kind, text in lexed if kind in ("data", "string"))


def check_prompt(messages: Sequence[Message]) -> None:
    """Raise DataError unless the messages are a prompt."""
    problem = None
    if unknown := [message.role for message in messages if message.role not in _ROLES]:
        problem = f"its role {unknown[0]!r} is none of {', '.join(_ROLES)}"
    elif not any(message.role == "user" for message in messages):
        problem = "it has no user turn"
    elif messages[-1].role != "user":
        problem = f"its last turn is the {messages[-1].role}'s, not the user's"
    elif not messages[-1].content.strip():
        problem = "its last user turn is blank"
    if problem:
        raise DataError(
            "this is not a prompt",
            why=problem,
            fix="give chat messages up to and including a user turn with text",
        )
