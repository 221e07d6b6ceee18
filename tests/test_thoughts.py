"""Thoughts: their marks are no text, may be sampled, and are no part of the answer."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigram_kit import ASKED, HI, TURNS, bigram_dir, byte_tokenizer, sample
from equipoise.config import Recipe, Sampling, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.encoding.encode import Encoder
from equipoise.encoding.thoughts import refuse_thoughts
from equipoise.engine.decode import LiveRows
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation, Sampled, Token
from equipoise.engine.text import AnswerText
from equipoise.errors import ConfigError
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_all, run_stage
from equipoise.policy.rules import DialPolicy
from equipoise.pool.score import shortened
from equipoise.serve.main import check_policy
from equipoise.serve.prepare import ServedModel
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune
from equipoise.types import Branch, GenerationRequest, Message, Rendering
from serve_kit import (
    Server,
    dialled,
    example_policy,
    make_server,
    policy_text,
    running,
    served_model,
)
from test_serve_forging import checked
from tokenizer_kit import hostile
from tuning_kit import ATTRIBUTES, examples

_MARKERS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<box>", "</box>")
_CUT = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]")

TEMPLATES = {
    "opened by the prompt": _CUT + ASKED.replace("{% endif %}", "<think>\n{% endif %}"),
    "opened by the prompt, kept in history": TURNS
    + ASKED.replace("{% endif %}", "<think>\n{% endif %}"),
    "opened by the model": _CUT + ASKED,
    "a switch that writes an empty thought": TURNS
    + ASKED.replace(
        "{% endif %}",
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}",
    ),
    "a switch that opens or closes": TURNS
    + ASKED.replace(
        "{% endif %}", "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    ),
    "an empty thought before every answer": (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    + ASKED,
    "its own field": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    + ASKED,
    "explained to the model": "<|system|>Put <think> first, then </think>.<|end|>" + _CUT + ASKED,
}
NONE = {
    "no mention": TURNS + ASKED,
    "tools": TURNS + "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}" + ASKED,
    "around the user": (
        "{% for m in messages %}{% if m.role == 'user' %}<box>{{ m.content }}</box>"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    ),
    "explained only": "<|system|>Put <think> first, then </think>.<|end|>" + TURNS + ASKED,
}


def encoder_of(template: str) -> Encoder:
    return Encoder(byte_tokenizer(template, _MARKERS, plain=_PLAIN))


def names(encoder: Encoder, ids: object) -> set[str]:
    return set(encoder.tokenizer.convert_ids_to_tokens(sorted(ids)))  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_marks_of_thoughts_may_be_sampled_and_no_text_writes_them(kind: str) -> None:
    encoder = encoder_of(TEMPLATES[kind])
    assert encoder.thought is not None
    marks = encoder.thought.ids
    assert names(encoder, marks) == {"<think>", "</think>"}
    assert marks <= encoder.forbidden
    assert not marks & set(encoder.masked_ids)
    assert {"<|system|>", "<|user|>", "<|assistant|>"} <= names(encoder, encoder.masked_ids)
    plain = encoder.prompt_ids([Message("user", "a"), Message("assistant", "b"), *HI])
    own = [i for i in plain if i in encoder.forbidden]
    rng = random.Random(kind)
    for _ in range(100):
        texts = [hostile(rng, ["<think>", "</think>", "<|end|>"]) + "." for _ in range(3)]
        turns = [Message("user", texts[0]), Message("user", texts[2])]
        turns.insert(1, Message("assistant", texts[1]))
        assert [i for i in encoder.prompt_ids(turns) if i in encoder.forbidden] == own
        assert not encoder.forbidden & set(encoder.completion_ids(texts[0], finished=False))


@pytest.mark.parametrize("kind", NONE)
def test_other_pairs_are_no_thoughts(kind: str) -> None:
    encoder = encoder_of(NONE[kind])
    assert encoder.thought is None
    # What the template mentions stays a marker: no text writes it, and it is never sampled.
    mentioned = {p for p in _PLAIN if p in NONE[kind]}
    assert mentioned <= names(encoder, encoder.masked_ids)


def test_thoughts_are_no_part_of_the_decoded_answer() -> None:
    encoder = encoder_of(TEMPLATES["opened by the prompt"])

    def decoded(text: str) -> str:
        return encoder.decode(encoder.tokenizer.encode(text, add_special_tokens=False))

    assert decoded("<think>\nhm\n</think>\n\nok") == "ok"
    assert decoded("hm</think>ok") == "ok"
    assert decoded("ok\n<think>hm</think>\nyes") == "ok\n\nyes"
    assert decoded("<think>hm") == ""
    assert decoded("\nok") == "\nok"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("opened by the prompt", ("\n", "h", "m", "</think>", "o", "k", "<|end|>")),
        ("opened by the model", ("<|assistant|>", "<think>", "h", "</think>", "o", "k", "<|end|>")),
    ],
)
def test_a_model_can_close_its_thought(tmp_path: Path, kind: str, said: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[kind], _MARKERS, plain=_PLAIN)
    pieces = [tokenizer.tokenize(s)[0] if s == "\n" else s for s in said]
    answer = sample(load_causal(bigram_dir(tmp_path, tokenizer, pieces)))
    assert (answer.text, answer.finish) == ("ok", "stop")


def test_rows_have_numbers_for_a_thought_that_another_rendering_opens(tmp_path: Path) -> None:
    """The server's rows hold the plain encoder, a policy may switch thinking on."""
    kind = "a switch that writes an empty thought"
    tokenizer = byte_tokenizer(TEMPLATES[kind], _MARKERS, plain=_PLAIN)
    policy = load_causal(
        bigram_dir(
            tmp_path, tokenizer, ("<|assistant|>", "<think>", "h", "</think>", "o", "<|end|>")
        )
    )
    assert not policy.encoder.thinks
    on = policy.encoder.with_rendering(Rendering({"enable_thinking": True}))
    asked = Generation(tuple(on.prompt_ids(HI)), (), budget(8, answer=1), 1, "")
    rows = LiveRows(policy.model, policy.encoder)
    rows.join([asked])
    drawn = []
    while rows.rows:
        drawn += [token for _, token in rows.draw()]
        rows.advance()
    assert [token.finish for token in drawn if isinstance(token, Token)][-1] == "length"
    assert sum(isinstance(token, Token) and token.thought for token in drawn) == 3


# --- budgets ------------------------------------------------------------------------------------


def thinking(folder: Path, *said: str, kind: str = "opened by the model") -> LoadedPolicy:
    """A model that says these tokens behind the head of its turn."""
    tokenizer = byte_tokenizer(TEMPLATES[kind], _MARKERS, plain=_PLAIN)
    return load_causal(bigram_dir(folder, tokenizer, ("<|assistant|>", *said)))


def budget(thought: int, answer: int = 8) -> Sampling:
    return Sampling(top_k=1, max_tokens=answer, max_thought_tokens=thought)


def engine_says(policy: LoadedPolicy, sampling: Sampling) -> Sampled:
    engine = TransformersEngine(policy.model, policy.encoder, model_hash="")
    request = GenerationRequest(tuple(policy.encoder.prompt_ids(HI)), (Branch((), 1),) * 2)
    first, second = engine.generate([request], sampling)[0]
    assert first == second
    return first


def rows_say(policy: LoadedPolicy, sampling: Sampling) -> tuple[str, str | None, int]:
    """Return the text, the finish and the thought tokens that the server's rows give."""
    rows, text = LiveRows(policy.model, policy.encoder), AnswerText(policy.encoder)
    rows.join([Generation(tuple(policy.encoder.prompt_ids(HI)), (), sampling, 1, "")])
    shown, n_thought, finish = "", 0, None
    while rows.rows:
        for _, token in rows.draw():
            assert isinstance(token, Token)
            shown, n_thought = shown + text.push(token), n_thought + token.thought
            finish = token.finish
        rows.advance()
    return shown + text.flush(), finish, n_thought


_SAID = ("<think>", "h", "m", ".", "</think>", "Ċ", "o", "k", "<|end|>")


@pytest.mark.parametrize(
    ("sampling", "text", "finish", "n_thought", "n_tokens"),
    [
        (budget(5, 4), "ok", "stop", 5, 9),
        (budget(5, 3), "ok", "length", 5, 8),
        (budget(5, 2), "o", "length", 5, 7),
        (budget(4, 99), "", "thought", 4, 4),
        (budget(1, 99), "", "thought", 1, 1),
    ],
)
def test_thought_and_answer_have_budgets_of_their_own(
    tmp_path: Path, sampling: Sampling, text: str, finish: str, n_thought: int, n_tokens: int
) -> None:
    policy = thinking(tmp_path, *_SAID)
    found = engine_says(policy, sampling)
    assert (found.text, found.finish, found.n_tokens) == (text, finish, n_tokens)
    assert rows_say(policy, sampling) == (text, finish, n_thought)


def test_an_end_within_a_thought_is_no_answer(tmp_path: Path) -> None:
    policy = thinking(tmp_path, "<think>", "h", "<|end|>")
    found = engine_says(policy, budget(9))
    assert (found.text, found.finish) == ("", "thought")
    assert rows_say(policy, budget(9))[:2] == ("", "thought")
    completion = found.as_completion("p", 0, model_hash="")
    assert shortened([completion]) == []
    assert completion.judged == ""


def test_a_thought_that_the_prompt_has_begun_counts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["opened by the prompt"], _MARKERS, plain=_PLAIN)
    said = ("Ċ", "h", "</think>", "o", "k", "<|end|>")
    policy = load_causal(bigram_dir(tmp_path, tokenizer, said))
    assert engine_says(policy, budget(2, 3)).text == "ok"
    assert rows_say(policy, budget(2, 3)) == ("ok", "stop", 2)
    assert engine_says(policy, budget(1)).finish == "thought"


def test_marks_without_end_end(tmp_path: Path) -> None:
    policy = thinking(tmp_path, "<think>", "</think>", "<think>")
    assert engine_says(policy, budget(6, 3)).n_tokens <= 9
    assert rows_say(policy, budget(6, 3))[0] == ""


def test_models_without_thoughts_draw_as_before(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    policy = load_causal(bigram_dir(tmp_path, tokenizer, ("<|assistant|>", "o", "o")))
    assert policy.encoder.most_tokens(budget(99, 3)) == 3
    assert engine_says(policy, budget(99, 3)).n_tokens == 3


# --- who may think ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_model_that_thinks_is_not_tuned(kind: str) -> None:
    encoder = encoder_of(TEMPLATES[kind])
    empty = kind in ("a switch that writes an empty thought", "a switch that opens or closes")
    assert encoder.thinks is not empty
    if empty:
        refuse_thoughts(encoder)
        return
    with pytest.raises(ConfigError, match="enable_thinking: false"):
        refuse_thoughts(encoder)


def test_thinking_can_be_switched_on_and_is_then_refused_before_a_weight_moves(
    tmp_path: Path,
) -> None:
    kind = "a switch that writes an empty thought"
    tokenizer = byte_tokenizer(TEMPLATES[kind], _MARKERS, plain=_PLAIN)
    place = bigram_dir(tmp_path / "base", tokenizer, ("a", "b"))
    config = TuneConfig(objective="clm", steps=1, batch_size=2, dtype="float32", checkpoint_every=1)

    def tuned(rendering: Rendering) -> LoadedPolicy:
        policy = load_causal(place, rendering=rendering)
        tune(
            policy,
            examples(2),
            config,
            dials=Dials(ATTRIBUTES, 5),
            training=Training(tmp_path / "checkpoints", seed=0),
        )
        return policy

    tuned(Rendering())
    with pytest.raises(ConfigError, match="while it thinks"):
        tuned(Rendering({"enable_thinking": True}))


def test_a_run_that_would_tune_a_thinking_model_is_refused_before_it_generates(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["opened by the prompt"], _MARKERS, plain=_PLAIN)
    place = bigram_dir(tmp_path / "base", tokenizer, ("a", "b"))
    recipe = Recipe(
        name="r",
        description="",
        model=place,
        prompts={"train": [{"source": "none"}], "test": [{"source": "none"}]},  # type: ignore[arg-type]
        reward_models={},
        judges={},
    )
    with (
        RunDir.open(tmp_path / "run", recipe) as run,
        pytest.raises(ConfigError, match="while it thinks"),
    ):
        run_all(run)
    for stage in ("steer", "regenerate", "tune"):
        with (
            RunDir.open(tmp_path / "run", recipe) as run,
            pytest.raises(ConfigError, match="while it thinks"),
        ):
            run_stage(stage, run)


def test_the_server_gives_the_answer_and_counts_the_thought(tmp_path: Path) -> None:
    kind = "a switch that writes an empty thought"
    tokenizer = byte_tokenizer(TEMPLATES[kind], _MARKERS, plain=_PLAIN)
    model = served_model(dialled(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(["<think>", "h", "</think>", "Ċ", "o", "k"])
    server = make_server(tmp_path, model=model)
    policy = example_policy() | {"chat_template_kwargs": {"enable_thinking": True}}
    server.policy_file.write_text(policy_text(policy), "utf-8")
    tokens = [Token(i, thought=place < 3) for place, i in enumerate(ids)]
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}]}
    says(server, [*tokens, Token(-1, "stop")])
    with running(server) as port:
        whole = send(port, server.secrets["lab"], body)
        says(server, [tokens[0], Token(ids[1], "thought", thought=True)])
        cut = send(port, server.secrets["lab"], body)
    assert whole["choices"][0]["message"]["content"] == "ok"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == 7
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert cut["choices"][0]["message"]["content"] == ""
    assert cut["choices"][0]["finish_reason"] == "thought"
    generation = checked(server, body | {"max_tokens": 7}).generations[0]
    assert generation.sampling.max_tokens == 7
    assert generation.sampling.max_thought_tokens == 512
    taken = len(generation.prompt_ids) + len(generation.control_ids)
    small = prepare_with(replace(model, context=taken + 20), server, body)
    assert (small.max_tokens, small.max_thought_tokens) == (10, 10)


def says(server: Server, tokens: list[Token]) -> None:
    """Let the engine give these tokens."""

    async def stream(generation: Generation) -> AsyncIterator[Token]:
        for token in tokens:
            yield token

    server.engine.stream = stream  # type: ignore[method-assign]


def send(port: int, key: str, body: object) -> Any:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        return json.loads(connection.getresponse().read())


def prepare_with(model: ServedModel, server: Server, body: object) -> Sampling:
    server.model = model
    return checked(server, body).generations[0].sampling


def test_a_policy_must_leave_room_for_the_largest_thoughts() -> None:
    encoder = dialled(byte_tokenizer(TEMPLATES["opened by the prompt"], _MARKERS, plain=_PLAIN))
    limits = {"waiting_tokens": 4 * (4096 + 1024)}
    policy = DialPolicy.model_validate(example_policy(**limits))
    with pytest.raises(ConfigError, match="waiting_tokens is too small"):
        check_policy(served_model(encoder), policy)
    check_policy(served_model(), policy)
