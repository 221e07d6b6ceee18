"""A model's chat template, with everything that it is rendered with besides the turns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from equipoise.dials.sealing import random_letters
from equipoise.errors import ConfigError, DataError, ModelError
from equipoise.types import Message, Rendering, TemplateValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, bool]
"""A role, and whether the content is empty (templates may leave such a turn out)."""

_ROLES = ("system", "user", "assistant")
_COMMON: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant"),
)
_OURS = frozenset({"messages", "raise_exception", "strftime_now", "namespace"})
"""Asked for by templates and given by transformers; its arguments and special tokens are, too."""
_DEFAULTS: Mapping[str, TemplateValue] = {"enable_thinking": False}
"""Given to templates that know them: a thought costs tokens, and dials are learnt without."""

_PLAIN = Rendering()


class _Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}`` of transformers, which changes nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The chat template of a tokenizer, ready to be rendered.

    Args:
        tokenizer: With a template, or without one.
        rendering: What the template is given at every rendering.

    Raises:
        ConfigError: A variable that the template does not know, or that is not to be set.
        ModelError: The template is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rendering: Rendering = _PLAIN,
    ) -> None:
        self._tokenizer = tokenizer
        self.exists: bool = tokenizer.chat_template is not None
        self._source: str = tokenizer.get_chat_template() if self.exists else ""
        self.known = self._undeclared()
        """Variables that the template asks for."""
        given = dict(rendering.variables)
        self._check(given)
        self.variables = {k: v for k, v in _DEFAULTS.items() if k in self.known} | given

    def render(
        self,
        turns: Sequence[Turn],
        contents: Sequence[str],
        *,
        generation_prompt: bool,
        reasoning: str | None = None,
        **changed: TemplateValue,
    ) -> str:
        """Render a conversation.

        Args:
            turns: Roles.
            contents: One per turn; never untrusted text.
            generation_prompt: Whether the head of the assistant's next turn is written.
            reasoning: The thought of every assistant's turn, as its ``reasoning_content``.
            changed: Variables with other values than the usual ones.

        Raises:
            DataError: If the template refuses this sequence of roles.
        """
        conversation = [
            {"role": role, "content": content}
            | ({"reasoning_content": reasoning} if reasoning and role == "assistant" else {})
            for (role, _), content in zip(turns, contents, strict=True)
        ]
        variables: dict[str, Any] = {**self.variables, **changed}
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(
                "the chat template refuses this sequence of turns: "
                + ", ".join(role for role, _ in turns),
                why=str(error),
                fix="leave such prompts out, or bring their turns into the order the model knows",
            ) from error
        return str(rendered)

    def common_renders(self) -> list[str]:
        """Return renders of common role sequences with placeholders, refused ones left out."""
        renders = []
        for roles in _COMMON:
            turns = [(role, False) for role in roles]
            contents = [random_letters() for _ in roles]
            for generation_prompt in (False, True):
                try:
                    renders.append(
                        self.render(turns, contents, generation_prompt=generation_prompt)
                    )
                except DataError:
                    continue
        return renders

    def literals(self) -> str:
        """Return the text and the string literals of the template's source, joined by NUL."""
        # Escapes such as \n stay as written in string literals; markers hold none.
        lexed = self._environment().lex(self._source)
        return "\0".join(text for _, kind, text in lexed if kind in ("data", "string"))

    def _undeclared(self) -> frozenset[str]:
        try:
            parsed = self._environment().parse(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                "the chat template is not valid Jinja",
                why=str(error),
                fix="repair the tokenizer's chat_template",
            ) from error
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))

    def _environment(self) -> jinja2.Environment:
        return jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])

    def _check(self, given: Mapping[str, TemplateValue]) -> None:
        taken = inspect.signature(self._tokenizer.apply_chat_template).parameters
        reserved = _OURS | set(self._tokenizer.special_tokens_map) | set(taken)
        free = self.known - reserved
        unknown = sorted(given.keys() - free)
        if unknown:
            raise ConfigError(
                f"chat_template_kwargs: the chat template knows no {unknown[0]!r} to be set",
                why=f"it asks for: {', '.join(sorted(free)) or 'nothing'}",
                fix="take the line out, or correct the name",
            )


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
