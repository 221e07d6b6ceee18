"""A model's chat template, with everything that it is rendered with besides the turns."""

from __future__ import annotations

import copy
import datetime
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from equipoise.encoding.sealing import random_letters
from equipoise.errors import ConfigError, DataError, ModelError
from equipoise.types import PLAIN, Message, Rendering, TemplateValue

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

_CLOCK = "equipoise_clock"
_STOPPED = (
    "{%- macro strftime_now(format) -%}"
    f"{{{{ {_CLOCK}[format] if format in {_CLOCK} else raise_exception('unknown format') }}}}"
    "{%- endmacro %}\n"
)
"""Put in front, it hides the function of that name; the line break goes with the block."""


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
        rendering: Rendering = PLAIN,
    ) -> None:
        self._tokenizer = tokenizer
        self.exists: bool = tokenizer.chat_template is not None
        self._source: str = tokenizer.get_chat_template() if self.exists else ""
        parsed = self._parse()
        self.known = frozenset(jinja2.meta.find_undeclared_variables(parsed))
        """Variables that the template asks for."""
        self._formats = _date_formats(parsed)
        given = dict(rendering.variables)
        self._check(given)
        self.variables = {k: v for k, v in _DEFAULTS.items() if k in self.known} | given
        self._date = rendering.date
        self.clock: Mapping[str, str] | None = {}
        """What ``strftime_now`` gives, by format; ``None`` where the formats are not known."""
        if rendering.date is not None:
            self.clock = self._read_clock()

    def now(self) -> ChatTemplate:
        """Return the template with its clock stopped: no day ends between two renderings.

        Where the template computes its formats the clock runs on, and ``clock`` is ``None``.
        """
        if self._date is not None or "strftime_now" not in self.known:
            return self
        stopped = copy.copy(self)
        stopped.clock = self._read_clock()
        return stopped

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
        if self.clock:
            variables[_CLOCK] = self.clock
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=(_STOPPED if self.clock else "") + self._source,
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

    def _read_clock(self) -> Mapping[str, str] | None:
        if self._formats is None:
            if self._date is None:
                return None
            raise ModelError(
                "the chat template computes how it writes the date",
                why="a run asks all of its prompts with one date, which is put in by format",
                fix="write the formats of strftime_now as plain texts in the chat template",
            )
        if self._date is not None:
            midnight = datetime.datetime.combine(self._date, datetime.time())
            return {text: midnight.strftime(text) for text in self._formats}
        source = "\0".join(f"{{{{ strftime_now({json.dumps(text)}) }}}}" for text in self._formats)
        turn = [{"role": "user", "content": ""}]
        said = self._tokenizer.apply_chat_template(turn, chat_template=source, tokenize=False)
        return dict(zip(self._formats, str(said).split("\0"), strict=True))

    def _parse(self) -> jinja2.nodes.Template:
        try:
            return self._environment().parse(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                "the chat template is not valid Jinja",
                why=str(error),
                fix="repair the tokenizer's chat_template",
            ) from error

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


def _date_formats(parsed: jinja2.nodes.Template) -> list[str] | None:
    """Return the formats in which a template writes the date; None if one of them is computed."""
    calls = parsed.find_all(jinja2.nodes.Call)
    asked = [call for call in calls if getattr(call.node, "name", None) == "strftime_now"]
    formats = [call.args[0] if len(call.args) == 1 else None for call in asked]
    texts = {str(f.value) for f in formats if isinstance(f, jinja2.nodes.Const)}
    known = all(isinstance(f, jinja2.nodes.Const) for f in formats)
    return sorted(texts) if known else None


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
