"""``equipoise chat``: talk to a tuned model and turn its dials on the way."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.errors import ConfigError, EquipoiseError

if TYPE_CHECKING:
    from equipoise.cli.conversation import Conversation, DialPanel, Grid

HELP = """\
/DIAL VALUE      turn a dial: /safety 0.8, /helpfulness auto, /safety level 3
/dials           show the dials and what the scenario allows
/scenario NAME   change the scenario (with --policy); no name lists them
/grid [PROMPT]   one prompt at 3 x 3 settings; no prompt takes the last one
/again           answer the last prompt anew, at the dials of now
/forget          empty the history
/help            this text
/quit            leave (also Ctrl-D)"""


def add_commands(app: typer.Typer) -> None:
    """Add ``chat`` to the table."""
    app.command("chat", help="Talk to a tuned model and turn its dials.")(chat)


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_DIR", help="Written by `equipoise stage tune`.")
    ],
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="FILE", help="Dial policy with scenarios.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option("--scenario", help="Scenario to begin in.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=10.0)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Talk to a tuned model."""
    from equipoise.cli.conversation import Conversation
    from equipoise.config import Sampling
    from equipoise.models.load import load_causal
    from equipoise.pipeline.runner import quieten
    from equipoise.policy.file import load_policy

    quieten()
    loaded = load_causal(model)
    manifest = loaded.manifest
    rules = load_policy(policy, manifest.dials) if policy and manifest else None
    conversation = Conversation(
        loaded,
        policy=rules,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens),
        seed=seed,
    )
    if scenario is not None:
        conversation.panel.enter(scenario)
    _loop(conversation, _lines(), sys.stdout.write)


def _lines() -> Iterable[str]:
    """Yield input lines; at a terminal with a prompt and line editing."""
    shown = "> " if sys.stdin.isatty() else ""
    if shown:
        with suppress(ImportError):  # input() edits lines and keeps their history with it
            import readline  # noqa: F401
    while True:
        try:
            yield input(shown)
        except EOFError:
            return


def _loop(conversation: Conversation, lines: Iterable[str], write: Callable[[str], object]) -> None:
    write(
        f"{conversation.panel.described(conversation.panel.setting())}; /help lists the commands\n"
    )
    for line in lines:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if not text:
            continue
        try:
            with closing(_answered(conversation, text)) as parts:
                for part in parts:
                    write(part)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            write("\n(stopped)\n")
        except EquipoiseError as error:
            write(f"{printable(str(error))}\n")


def _answered(conversation: Conversation, text: str) -> Generator[str, None, None]:
    """Yield what is to be shown for one line of input."""
    panel = conversation.panel
    if not text.startswith("/"):
        yield from _spoken(conversation.answer(text))
        return
    command, _, rest = text[1:].partition(" ")
    rest = rest.strip()
    if command in panel.attributes:
        yield f"{panel.described(panel.turn(command, _asked(rest)))}\n"
    elif command == "dials":
        yield _dials(panel)
    elif command == "scenario":
        if rest:
            yield f"{rest}: {panel.described(panel.enter(rest))}\n"
        else:
            yield _scenarios(panel)
    elif command == "grid":
        yield _table(conversation.grid(rest or None))
    elif command == "again":
        yield from _spoken(conversation.again())
    elif command == "forget":
        conversation.forget()
        yield "history is empty\n"
    elif command == "help":
        yield f"{HELP}\n"
    else:
        dials = ", ".join(f"/{attribute}" for attribute in panel.attributes)
        raise ConfigError(
            f"no command /{command}",
            why=f"the dials of this model are {dials}",
            fix="/help lists the commands",
        )


def _spoken(deltas: Iterable[str]) -> Iterable[str]:
    for delta in deltas:
        yield printable(delta)
    yield "\n"


def _asked(text: str) -> object:
    """Return the JSON value that a typed dial value stands for; ``level 3`` is a level."""
    if text.startswith("level "):
        number = text.removeprefix("level ").strip()
        return {"level": int(number)} if number.isdecimal() and len(number) < 9 else text
    try:
        return float(text)
    except ValueError:
        return text  # auto, or something that the policy function refuses


def _dials(panel: DialPanel) -> str:
    lines = [f"scenario {panel.scenario}\n"]
    for attribute, level in zip(panel.attributes, panel.setting().levels, strict=True):
        low, high = (panel.value(panel.allowed(attribute)[end]) for end in (0, -1))
        now = "auto" if level is None else f"{panel.value(level)} (level {level})"
        lines.append(f"  {attribute} {now}, allowed {low} to {high}\n")
    return "".join(lines)


def _scenarios(panel: DialPanel) -> str:
    return "".join(
        f"{'*' if name == panel.scenario else ' '} {name}: {printable(scenario.why)}\n"
        for name, scenario in panel.scenarios.items()
    )


def _table(grid: Grid) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for heading in ("", *grid.columns):
        table.add_column(heading, ratio=1 if heading else None, overflow="fold")
    for name, texts in zip(grid.rows, grid.texts, strict=True):
        table.add_row(Text(name), *(Text(printable(text).strip()) for text in texts))
    console = Console(file=sys.stdout)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and bidi characters become visible."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else _shown(char)
        for char in text
        if char not in _BIDI
    )


_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""They reorder what stands around them, so that a line reads as another one."""


def _shown(char: str) -> str:
    code = ord(char)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
