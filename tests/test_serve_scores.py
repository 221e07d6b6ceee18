"""``--score`` at the server: scores in every answer, the nearest of N, and none without scores."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli.main import main
from equipoise.engine.seam import Generation, Token
from equipoise.rewards.scorer import Scorer
from equipoise.serve import main as serve_main
from equipoise.serve import scorer as serve_scorer
from equipoise.serve.http import on_loopback
from equipoise.serve.scorer import LiveScorer, ScorerUnavailableError
from equipoise.types import Prompt
from eval_kit import Identity
from serve_kit import ATTRIBUTES, Reply, Server, ask, call, chat_body, make_server, wait_for
from test_serve_process import free_port, save_toy


class ByText:
    """Unit scores by the texts' own numbers; fails on demand."""

    name = hash = "by-text"

    def __init__(self, place: int, fault: Callable[[], list[float] | None]) -> None:
        self.place, self.fault = place, fault

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        broken = self.fault()
        return broken if broken is not None else [float(t.split()[self.place]) for _, t in pairs]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A server whose engine says other numbers for each choice: ``0.1 0.9``, ``0.3 0.7``, ..."""
    made = make_server(tmp_path)
    made.api.model = replace(made.api.model, scored=True)
    made.api.scorer = scorer(lambda: None)

    async def varied(generation: Generation) -> AsyncIterator[Token]:
        place = len(made.engine.seen) % 4
        made.engine.seen.append(generation)
        text = f"{0.1 + 0.2 * place:.1f} {0.9 - 0.2 * place:.1f}"
        for token_id in made.model.encoder.completion_ids(text, finished=False):
            yield Token(token_id)
        yield Token(-1, "stop")

    made.engine.stream = varied  # type: ignore[method-assign]
    return made


def scorer(fault: Callable[[], list[float] | None], **more: Any) -> LiveScorer:
    models = {a: ByText(place, fault) for place, a in enumerate(ATTRIBUTES)}
    return LiveScorer(Scorer(models, Identity()), levels=5, **more)


def asked(server: Server, **body: Any) -> Reply:
    async def main() -> Reply:
        await server.engine.start()
        return await ask(server.app, chat_body(**body), key=server.secrets["lab"])

    return asyncio.run(main())


def events(reply: Reply) -> list[Any]:
    lines = reply.body.decode().split("\n\n")
    return [json.loads(line[6:]) if line[6] == "{" else line[6:] for line in lines if line]


def test_every_choice_carries_what_it_measured(server: Server) -> None:
    reply = asked(server)
    assert reply.status == 200
    (choice,) = reply.json["choices"]
    assert choice["message"]["content"] == "0.1 0.9"
    assert choice["measured"] == {"helpfulness": 0.1, "safety": 0.9}
    assert "effective" in reply.json["dials"]


class Half:
    """A reward model that finds everything middling."""

    name = hash = "half"

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        return [0.5] * len(pairs)


@pytest.mark.parametrize("options", [[], ["--score"]])
def test_the_command_hands_its_scorer_to_the_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    apps: list[Any] = []
    live = LiveScorer(Scorer(dict.fromkeys(ATTRIBUTES, Half()), Identity()), levels=5)
    monkeypatch.setattr(serve_scorer, "load_scorer", lambda *_, **__: live)
    monkeypatch.setattr(serve_main, "run_app", lambda app, **_: apps.append(app))
    monkeypatch.setattr(serve_main, "log_to_stderr", lambda: None)
    monkeypatch.delenv("EQUIPOISE_KEYS", raising=False)
    with pytest.raises(SystemExit) as ended:
        command = ["serve", str(save_toy(tmp_path)), "--policy", "example"]
        main([*command, "--port", str(free_port()), *options])
    assert not ended.value.code
    said = capsys.readouterr()
    key = said.out.strip()
    assert key.startswith("eqp-") and key not in said.err
    with on_loopback(apps[0]) as port:
        body = chat_body(max_tokens=2)
        reply = call(port, "POST", "/v1/chat/completions", body, key=key).json
        best = call(port, "POST", "/v1/chat/completions", body | {"best_of": 2}, key=key)
    if options:
        assert reply["choices"][0]["measured"] == dict.fromkeys(ATTRIBUTES, 0.5)
        assert best.status == 200 and "measured" in best.json["choices"][0]
    else:
        assert "measured" not in reply["choices"][0]
        assert best.status == 400


def test_without_a_scorer_nothing_is_measured_and_best_of_is_refused(tmp_path: Path) -> None:
    plain = make_server(tmp_path)
    assert "measured" not in asked(plain).json["choices"][0]
    refused = asked(plain, best_of=2)
    assert refused.status == 400 and refused.json["error"]["param"] == "best_of"


def best(server: Server, dials: dict[str, object], n: int = 1) -> list[str]:
    reply = asked(server, best_of=4, n=n, dials=dials, model="toy@security-lab")
    assert reply.status == 200, reply.body
    return [choice["message"]["content"] for choice in reply.json["choices"]]


def test_best_of_keeps_the_nearest_to_the_effective_setting(server: Server) -> None:
    assert best(server, {"helpfulness": 1, "safety": 0}) == ["0.7 0.3"]
    assert best(server, {"helpfulness": 0, "safety": 1}) == ["0.1 0.9"]
    assert best(server, {"helpfulness": "auto", "safety": {"level": 2}}) == ["0.5 0.5"]
    assert best(server, {"helpfulness": 1, "safety": 0}, n=2) == ["0.7 0.3", "0.5 0.5"]


def test_all_samples_are_counted_and_numbered(server: Server) -> None:
    one = asked(server).json["usage"]["completion_tokens"]
    reply = asked(server, best_of=3, n=2).json
    assert reply["usage"]["completion_tokens"] == 3 * one
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]


@pytest.mark.parametrize(
    "body", [{"best_of": 5}, {"best_of": 1, "n": 2}, {"best_of": 0}, {"best_of": 2, "stream": True}]
)
def test_best_of_outside_its_limits_is_refused(server: Server, body: dict[str, Any]) -> None:
    reply = asked(server, **body)
    assert reply.status == 400 and "best_of" in reply.body.decode()
    assert server.engine.seen == []


def test_a_stream_ends_with_the_scores(server: Server) -> None:
    *chunks, last, done = events(asked(server, stream=True))
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["measured"] == {"helpfulness": 0.1, "safety": 0.9}
    assert "dials" in last
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "0.1 0.9"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def broken(how: Any) -> Callable[[], list[float] | None]:
    def fault() -> list[float] | None:
        if isinstance(how, Exception):
            raise how
        return how  # type: ignore[no-any-return]

    return fault


FAULTS = [OSError("CANARY"), TimeoutError(), [float("nan")], [], [0.1, 0.2, 0.3], [None]]


@pytest.mark.parametrize("how", FAULTS, ids=repr)
def test_no_answer_leaves_unscored(server: Server, how: Any) -> None:
    server.api.scorer = scorer(broken(how))
    for n in (1, 2):
        reply = asked(server, n=n)
        assert reply.status == 503
        assert reply.json["error"]["code"] == "scorer_unavailable"  # told apart from a block
        assert b"CANARY" not in reply.body and b"0.1" not in reply.body
    *_, last = events(asked(server, stream=True))
    assert last["error"]["code"] == "scorer_unavailable"
    assert server.api.admission.completions == 0


def test_a_broken_stream_has_no_finish_and_no_done(server: Server) -> None:
    server.api.scorer = scorer(broken(OSError()))
    *chunks, _ = events(asked(server, stream=True))
    assert "[DONE]" not in chunks
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def test_a_scorer_that_hangs_refuses_until_it_is_back(server: Server) -> None:
    free = threading.Event()
    server.api.scorer = hanging = scorer(lambda: None if free.wait(60) else [], timeout=0.05)

    def ready() -> int:
        key = server.secrets["lab"]
        return asyncio.run(ask(server.app, method="GET", path="/readyz", key=key)).status

    assert ready() == 200
    *chunks, last = events(asked(server, stream=True))
    assert last["error"]["code"] == "scorer_unavailable" and "[DONE]" not in chunks
    wait_for(lambda: hanging.stuck, "the batch counts as failed")
    n_sampled, n_queued = len(server.engine.seen), hanging._work.qsize()
    for stream in (False, True):
        reply = asked(server, stream=stream)
        assert reply.status == 503 and reply.json["error"]["code"] == "scorer_unavailable"
        with pytest.raises(ScorerUnavailableError):
            asyncio.run(hanging.score((), []))
    assert ready() == 503
    assert len(server.engine.seen) == n_sampled  # nothing is sampled for no one
    assert hanging._work.qsize() == n_queued  # and no text waits
    free.set()
    wait_for(lambda: not hanging.stuck, "the batch is back")
    assert ready() == 200 and asked(server).status == 200
    assert server.api.admission.completions == 0


_HANGS = """
import asyncio, threading
from eval_kit import Identity
from equipoise.rewards.scorer import Scorer
from equipoise.serve.scorer import LiveScorer, ScorerUnavailableError
from equipoise.engine.seam import Sampled

class Hanging:
    name = hash = "hanging"

    def score(self, pairs):
        threading.Event().wait()

scorer = LiveScorer(Scorer({"safety": Hanging()}, Identity()), levels=5, timeout=0.05)
try:
    asyncio.run(scorer.score((), [Sampled((), "text", "stop")]))
except ScorerUnavailableError:
    scorer.close()
    print("given up", flush=True)
"""


def test_a_scorer_that_hangs_does_not_keep_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANGS], cwd=Path(__file__).parent, timeout=240, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"given up\n"), done.stderr


def test_a_thousand_faults_and_no_unscored_answer(server: Server) -> None:
    """Every third call of a reward model fails, in turn by each of the faults."""
    calls = 0

    def sometimes() -> list[float] | None:
        nonlocal calls
        calls += 1
        return broken(FAULTS[calls % len(FAULTS)])() if calls % 3 == 0 else None

    server.api.scorer = scorer(sometimes)

    async def main() -> list[Reply]:
        await server.engine.start()
        key = server.secrets["lab"]
        return [await ask(server.app, chat_body(stream=bool(i % 2)), key=key) for i in range(1000)]

    replies = asyncio.run(main())
    good = bad = 0
    for index, reply in enumerate(replies):
        if index % 2:
            found = events(reply)
            scored = found[-1] == "[DONE]"
            assert scored == ("measured" in reply.body.decode())
        else:
            scored = reply.status == 200
            assert scored == ("measured" in reply.body.decode())
        good, bad = good + scored, bad + (not scored)
    assert good > 300 and bad > 300
    assert server.api.admission.completions == 0
