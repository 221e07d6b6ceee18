"""What one busy neighbour costs a run, the server and a chat: idle and beside it, in one script.

    python -m benchmarks.threads            # about seven minutes on two cores, nothing beside it
    python -m benchmarks.threads --quick    # a smoke test of two or three minutes; writes nothing

The neighbour is one ``while True: pass``. The commands are those that users call, with the
Workshop's start model (for serve and chat with dials that were not trained: as fast as tuned ones):

    run     ``equipoise stage generate``: the time of the next SHARDS shards, CAP seconds at most
    serve   STREAMS streamed answers at once, WINDOW seconds
    chat    one answer after the other, WINDOW seconds

in three settings: ``equipoise`` as it is; ``torch first``, as torch has it if nobody sets a policy
(what the package did before); and ``one thread`` (``OMP_NUM_THREADS=1``). All processes of a kind
live side by side, all but the one that is measured stopped (SIGSTOP), and take turns: settings,
idle and busy alternate within a round, and the first turn of each is not counted.

The rule, fixed before any result was written: RULE x idle or more is left beside the neighbour. It
is *held* if the ratio busy / idle is at least RULE in every round, *missed* if in none, else
*undecided*. Tokens are counted by the model's tokenizer in the text that has come by then.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from benchmarks.results import flat, here, shaped, write
from benchmarks.serve.server import dialled
from benchmarks.subjects import CAP, PROMPTS, STREAMS, WINDOW, Chat, Run, Serve, Subject

from equipoise.dials.tokens import save_dial_model
from equipoise.policy.file import shipped_policies

RESULT = Path(__file__).with_suffix(".json")
RULE = 0.4
CORES, ROUNDS = 2, 4
KINDS = ("run", "serve", "chat")
COMMAND = "from equipoise.cli.main import main; main()"
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "equipoise": (COMMAND, {}),
    "torch first": (f"import torch; {COMMAND}", {}),
    "one thread": (COMMAND, {"OMP_NUM_THREADS": "1"}),
}
DECIDES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
NEIGHBOUR = [sys.executable, "-c", "while True: pass"]


@contextmanager
def subjects(kind: str, folder: Path) -> Iterator[dict[str, Subject]]:
    """Start one process per setting; all are stopped (SIGSTOP) when they are yielded."""
    with ExitStack() as stack:
        found: dict[str, Subject] = {}
        for number, (name, (program, variables)) in enumerate(SETTINGS.items()):
            kept = {k: v for k, v in os.environ.items() if k not in DECIDES} | variables

            def start(*arguments: str, stdin: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    [sys.executable, "-c", program, *arguments],  # noqa: B023
                    stdin=stdin, stdout=subprocess.PIPE, env=kept,  # noqa: B023
                    stderr=(folder / "stderr.txt").open("ab"),
                )  # fmt: skip

            subject: Subject
            if kind == "run":
                subject = Run(start, folder / f"run{number}")
            elif kind == "serve":
                subject = Serve(start, folder / "model", folder / "policy.yaml")
            else:
                subject = Chat(start, folder / "model", folder / "lines.txt")
            stack.callback(_end, subject.process)
            subject.ready()
            _goes_on(subject, folder)
            subject.process.send_signal(signal.SIGSTOP)
            found[name] = subject
        yield found


def measured(kind: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Take turns, and return what came out by setting."""
    taken = {name: {side: list[Any]() for side in ("idle", "busy")} for name in SETTINGS}
    with subjects(kind, folder) as found:
        for round_ in range(-1, rounds):
            names = list(found)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                for side in ("idle", "busy") if round_ % 2 == 0 else ("busy", "idle"):
                    if round_ >= 0 or side == "idle":
                        taken[name][side].append(one_turn(found[name], busy=side == "busy"))
                        _goes_on(found[name], folder)
        settled = {n: {"threads": s.threads} for n, s in found.items() if isinstance(s, Run)}
    # The first idle turn of each warmed it up.
    return {
        name: settled.get(name, {}) | summary(sides["idle"][1:], sides["busy"])
        for name, sides in taken.items()
    }


def one_turn(subject: Subject, *, busy: bool) -> tuple[int, float, bool]:
    """Let one process go on for a moment, beside the neighbour or alone."""
    with ExitStack() as stack:
        if busy:
            stack.callback(_end, subprocess.Popen(NEIGHBOUR))
            time.sleep(0.3)
        subject.process.send_signal(signal.SIGCONT)
        stack.callback(subject.process.send_signal, signal.SIGSTOP)
        return subject.measure()


def summary(idle: Sequence[Any], busy: Sequence[Any]) -> dict[str, Any]:
    """Return tokens per second of both sides and their ratio, round by round."""
    found: dict[str, Any] = {}
    rates = {}
    for side, turns in (("idle", idle), ("busy", busy)):
        rates[side] = [tokens / seconds for tokens, seconds, _ in turns]
        found[side] = _spread(rates[side], 1) | {"n": len(turns)}
        found[side]["not_finished"] = sum(not finished for _, _, finished in turns)
    # Both turns of a round met the same machine. An idle turn without a token says nothing.
    pairs = [b / i for i, b in zip(rates["idle"], rates["busy"], strict=True) if i]
    if pairs:
        held, missed = min(pairs) >= RULE, max(pairs) < RULE
        verdict = "held" if held else "missed" if missed else "undecided"
        found["busy_by_idle"] = _spread(pairs, 3) | {"n": len(pairs), "rule": verdict}
    return found


def _spread(values: Sequence[float], digits: int) -> dict[str, Any]:
    middle = statistics.median(values)
    shown = {"median": middle, "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in shown.items()}


def _goes_on(subject: Subject, folder: Path) -> None:
    if subject.process.poll() is not None:
        said = (folder / "stderr.txt").read_text("utf-8", "ignore")
        raise SystemExit(f"it ended: {subject.process.args}\n{said[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # SIGTERM would wait for a process that is stopped
    process.wait()


def _prepare(folder: Path) -> None:
    """Write the model, its policy without narrow limits, and what is typed into the chat."""
    loaded = dialled()
    assert loaded.manifest is not None
    save_dial_model(loaded.model, loaded.tokenizer, loaded.manifest, folder / "model")
    policy = yaml.safe_load(shipped_policies()["example"].read_text("utf-8"))
    policy["limits"] |= {"requests_per_minute": 10**6, "per_key": 1000}
    (folder / "policy.yaml").write_text(yaml.safe_dump(policy), "utf-8")
    (folder / "lines.txt").write_text("".join(f"{p}\n/forget\n" for p in PROMPTS), "utf-8")


def main() -> None:
    """Measure all kinds and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one round, writes nothing")
    parser.add_argument("--only", choices=KINDS, help="writes nothing")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    load, begun = os.getloadavg()[0], time.perf_counter()
    if load > 0.5:
        print(f"load average {load:.1f}: other work is going on, so idle is not idle")
    made_at = here()
    result: dict[str, Any] = {
        "rule": f"busy >= {RULE} x idle; held: in all rounds, missed: in none",
        "load_average_before": round(load, 2),
        "settings": {
            name: f"python -c {c!r} {v or ''}".strip() for name, (c, v) in SETTINGS.items()
        },
        "streams": STREAMS,
        "seconds": {"window of serve and chat": WINDOW, "cap of run": CAP},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(folder)
        for kind in [given.only] if given.only else KINDS:
            result[kind] = measured(kind, folder, 1 if given.quick else ROUNDS)
            print(json.dumps({kind: result[kind]}, indent=1), flush=True)
    result["minutes"] = round((time.perf_counter() - begun) / 60, 1)
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    if not given.quick and not given.only:
        headline = flat({kind: result[kind] for kind in KINDS})
        write(RESULT, shaped("python -m benchmarks.threads", headline, made_at=made_at, **result))
    print(f"{result['minutes']} minutes")


if __name__ == "__main__":
    main()
