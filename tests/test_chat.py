"""``equipoise chat``: dials by the policy function, history, streaming, the grid, safe output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher_kit import dialled
from equipoise.cli import chat
from equipoise.cli.conversation import Conversation
from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError, DataError, ModelError
from equipoise.policy.file import load_policy
from equipoise.types import DialSetting, Message
from tuning_kit import ATTRIBUTES, tiny_policy

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=50, max_tokens=10)


def conversation(*, policy: str | None = None, seed: int = 0, max_tokens: int = 10) -> Conversation:
    rules = load_policy(policy, Dials(ATTRIBUTES, 5)) if policy else None
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=50, max_tokens=max_tokens)
    return Conversation(dialled(), policy=rules, sampling=sampling, seed=seed)


def typed(talk: Conversation, *lines: str) -> str:
    """Return all that the terminal shows for these lines."""
    shown: list[str] = []
    chat._loop(talk, lines, shown.append)
    return "".join(shown)


def test_an_answer_streams_and_joins_the_history() -> None:
    talk = conversation()
    deltas = list(talk.answer("how do i clean it?"))
    assert len(deltas) > 1
    text = "".join(deltas)
    assert talk.messages == [Message("user", "how do i clean it?"), Message("assistant", text)]
    second = "".join(talk.answer("and then?"))
    assert [m.role for m in talk.messages] == ["user", "assistant", "user", "assistant"]
    assert talk.messages[-1].content == second != text
    again = conversation()
    assert "".join(again.answer("how do i clean it?")) == text
    assert "".join(conversation(seed=1).answer("how do i clean it?")) != text


def test_dials_change_the_answer_and_again_replaces_it() -> None:
    talk = conversation()
    seen: list[tuple[int, ...]] = []
    real = talk._encoder.control_ids
    talk._encoder = _Spy(talk._encoder, seen)  # type: ignore[assignment]
    first = "".join(talk.answer("hello"))
    talk.panel.turn("safety", 0.0)
    talk.panel.turn("helpfulness", "auto")
    second = "".join(talk.again())
    assert seen == [real(DialSetting((4, 4))), real(DialSetting((None, 0)))]
    assert [m.content for m in talk.messages] == ["hello", second]
    assert first != second


class _Spy:
    """An encoder that notes which controls were asked for."""

    def __init__(self, encoder: object, seen: list[tuple[int, ...]]) -> None:
        self._encoder, self._seen = encoder, seen

    def __getattr__(self, name: str) -> object:
        return getattr(self._encoder, name)

    def control_ids(self, setting: DialSetting) -> tuple[int, ...]:
        ids: tuple[int, ...] = self._encoder.control_ids(setting)  # type: ignore[attr-defined]
        self._seen.append(ids)
        return ids


def test_a_stopped_answer_is_kept_as_far_as_it_came() -> None:
    talk = conversation(max_tokens=60)
    stream = talk.answer("hello")
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert talk.messages == [Message("user", "hello"), Message("assistant", first)]
    assert "".join(talk.answer("go on"))


def test_typed_dials_mean_what_the_api_means() -> None:
    talk = conversation()
    shown = typed(
        talk, "/safety 0.8", "/helpfulness auto", "/safety level 1", "/safety 1", "/helpfulness 0.1"
    )
    # 0.8 is between levels 3 and 4: safety rounds up, helpfulness goes to the nearest.
    assert shown.splitlines()[1:] == [
        "helpfulness 1, safety 1",
        "helpfulness auto, safety 1",
        "helpfulness auto, safety 0.25",
        "helpfulness auto, safety 1",
        "helpfulness 0, safety 1",
    ]


@pytest.mark.parametrize(
    "value", ["2", "-0.1", "nan", "inf", "1e999", "", "high", "level 5", "level -1", "level x", "3"]
)
def test_an_odd_value_is_refused_and_changes_nothing(value: str) -> None:
    talk = conversation()
    before = talk.panel.setting()
    shown = typed(talk, f"/safety {value}")
    assert "cannot be set so" in shown and "0 to 1" in shown
    assert talk.panel.setting() == before and talk.panel.dials == {}


def test_the_policy_holds_at_the_terminal_too() -> None:
    talk = conversation(policy="example")
    assert talk.panel.scenario == "general"
    typed(talk, "/scenario kids", "/safety 0", "/helpfulness auto")
    assert talk.panel.setting() == DialSetting((None, 4))
    typed(talk, "/scenario security-lab", "/safety 0")
    assert talk.panel.setting() == DialSetting((4, 0))
    shown = typed(talk, "/scenario nowhere", "/scenario", "/dials")
    assert "no scenario called nowhere" in shown
    assert "* security-lab: " in shown and "  kids: " in shown
    assert "safety 0 (level 0), allowed 0 to 1" in shown
    assert talk.panel.scenario == "security-lab"
    grid = talk.grid("hello")
    assert grid.rows == ("helpfulness 0", "helpfulness 0.5", "helpfulness 1")
    talk.panel.enter("kids")
    assert talk.grid("hello").columns == ("safety 1",)


def test_the_grid_answers_one_prompt_nine_times_and_keeps_nothing() -> None:
    talk = conversation()
    with pytest.raises(DataError, match="nothing to answer"):
        talk.grid()
    list(talk.answer("hello"))
    before = list(talk.messages)
    grid = talk.grid()
    assert talk.messages == before
    assert grid.columns == ("safety 0", "safety 0.5", "safety 1")
    assert [len(texts) for texts in grid.texts] == [3, 3, 3]
    assert talk.grid().texts == grid.texts  # the same prompt, dials and seed
    shown = typed(talk, "/grid")
    assert all(name in shown for name in (*grid.rows, *grid.columns))
    assert talk._rows.rows == []


def test_mistakes_are_said_and_the_talk_goes_on() -> None:
    talk = conversation()
    shown = typed(talk, "/again", "/sefety 1", "/help", "", "hello", "/forget", "/quit", "not read")
    assert "nothing to answer" in shown and "no command /sefety" in shown
    assert "/helpfulness, /safety" in shown and "turn a dial" in shown
    assert shown.endswith("history is empty\n")
    assert talk.messages == []


def test_a_conversation_that_outgrows_the_model_is_not_cut() -> None:
    talk = conversation(max_tokens=200)
    before = list(talk.messages)
    with pytest.raises(DataError, match="too long"):
        list(talk.answer("word " * 100))
    assert talk.messages == before


def test_a_model_without_dials_is_refused() -> None:
    with pytest.raises(ModelError, match="no dials"):
        Conversation(tiny_policy(), sampling=SAMPLING)


@given(st.text())
def test_no_output_steers_the_terminal(text: str) -> None:
    shown = chat.printable(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert not any(0x7F <= ord(c) <= 0x9F or 0x202A <= ord(c) <= 0x202E for c in shown)


def test_escape_sequences_become_visible() -> None:
    assert (
        chat.printable("\x1b[2J\x07ok\n\x9b1m\u202eabc")
        == "␛[2J␇ok\n\N{REPLACEMENT CHARACTER}1mabc"
    )
    assert chat.printable("naïve 漢字 🙂👩‍👧\ttab") == "naïve 漢字 🙂👩‍👧\ttab"


def run_cli(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    from equipoise.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_the_command_reads_lines_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from equipoise.dials.tokens import save_dial_model

    loaded = dialled()
    assert loaded.manifest is not None
    save_dial_model(loaded.model, loaded.tokenizer, loaded.manifest, tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("/safety 0\nhello\n/dials\n"))
    where = str(tmp_path / "model")
    options = ["--policy", "example", "--scenario", "security-lab", "--max-tokens", "6"]
    code, out, err = run_cli(["chat", where, *options], capsys)
    assert code == 0 and "Traceback" not in err
    assert out.splitlines()[0].startswith("helpfulness 1, safety 1; /help")
    assert "helpfulness 1, safety 0" in out and "scenario security-lab" in out
    code, out, err = run_cli(["chat", where, "--scenario", "kids"], capsys)
    assert code == 1 and "no scenario called kids" in err


def test_refused_turns_name_the_dial() -> None:
    with pytest.raises(ConfigError, match="safety"):
        conversation().panel.turn("safety", True)
