"""The ``equipoise`` command: one table of commands, one border where errors become messages.

Nothing on the way to ``--help`` imports torch, transformers or pyarrow.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence

import typer

from equipoise.cli import chat, look, serving, stages
from equipoise.errors import EquipoiseError
from equipoise.pipeline.table import STAGES

INTERRUPTED = 130
"""Exit code after Ctrl-C; typer hands it back instead of raising."""

app = typer.Typer(
    name="equipoise",
    help="Two dials, safety and helpfulness, for an aligned language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stages.add_commands(app)
look.add_commands(app)
chat.add_commands(app)
serving.add_commands(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 error, 2 wrong usage, 130 interrupted.

    Args:
        arguments: Command line without the program's name; ``sys.argv`` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    _be_lenient_at_the_edge()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # It prints its warnings by itself: the root would print them once more.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        _refuse_old_command(arguments)
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except typer.exceptions.TyperException as error:
        _usage(error)
    except (KeyboardInterrupt, typer.exceptions.Abort):
        _fail(
            "interrupted; what was finished is kept, the same command goes on from there",
            code=INTERRUPTED,
        )
    except BrokenPipeError:
        sys.exit(1)
    except EquipoiseError as error:
        if debug:
            raise
        _fail(f"error: {error}", code=1)
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        _fail(
            f"error: this is a fault of the program ({kind}: {error})\n"
            "  fix: run again with --debug and report what it prints",
            code=1,
        )


def _be_lenient_at_the_edge() -> None:
    """Read and write what the terminal's encoding has no character for as a question mark.

    A file or pipe on Windows is cp1252, and any text of a model, our own marks too, may go there.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _refuse_old_command(arguments: Sequence[str]) -> None:
    """Say what a command is called now."""
    old = arguments[0] if arguments else ""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if old in STAGES and old not in known:
        _fail(f"error: `equipoise {old}` is now `equipoise stage {old}`", code=2)


def _usage(error: typer.exceptions.TyperException) -> None:
    context = getattr(error, "ctx", None)
    usage = f"{context.get_usage()}\n" if context is not None else ""
    _fail(f"{usage}error: {error.format_message()}", code=2)


def _fail(text: str, *, code: int) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
