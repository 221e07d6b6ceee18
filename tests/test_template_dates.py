"""Templates that write today's date: one per run, the day's own in the server."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as clock

from bigram_kit import ASKED, HI, TURNS, bigram_dir, byte_tokenizer
from equipoise.config import Recipe
from equipoise.encoding.encode import Encoder
from equipoise.encoding.template import ChatTemplate
from equipoise.errors import ModelError, RunError
from equipoise.models.load import load_causal
from equipoise.pipeline import stored as rundate
from equipoise.pipeline.job import Job
from equipoise.pipeline.rundir import RunDir
from equipoise.progress import Progress
from equipoise.types import Rendering

_DATED = "<|system|>Today is {{ strftime_now('%d %b %Y') }}.<|end|>" + TURNS + ASKED
_SOMEDAY = datetime.date(2024, 7, 26)


class Later(datetime.datetime):
    """A clock that stands somewhere in 2031."""

    day = 2

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Later:
        return cls(2031, 1, cls.day, tzinfo=tz)


def rendered(encoder: Encoder) -> str:
    return str(encoder.tokenizer.decode(encoder.prompt_ids(HI)))


def test_an_encoder_without_a_date_writes_the_day_of_each_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = Encoder(byte_tokenizer(_DATED))
    assert "2031" not in rendered(encoder)
    monkeypatch.setattr(clock, "datetime", Later)
    assert "Today is 02 Jan 2031." in rendered(encoder)
    monkeypatch.setattr(Later, "day", 3)
    assert "Today is 03 Jan 2031." in rendered(encoder)
    assert len(list(encoder._skeletons)) == 1


def test_a_given_date_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = bigram_dir(tmp_path, byte_tokenizer(_DATED), ("a", "b"))
    encoder = load_causal(place, rendering=Rendering(date=_SOMEDAY)).encoder
    before = encoder.prompt_ids(HI)
    assert "Today is 26 Jul 2024." in rendered(encoder)
    monkeypatch.setattr(clock, "datetime", Later)
    assert encoder.prompt_ids(HI) == before
    assert Encoder(encoder.tokenizer, rendering=encoder.rendering).prompt_ids(HI) == before


@pytest.mark.parametrize(
    "template",
    [
        _DATED,
        "\n  {% if strftime_now is defined %}{% set d = strftime_now('%Y') %}{% endif %}\n{{ d }}"
        + TURNS,
        '{% macro m() %}{{ strftime_now("it\'s %A") }}{% endmacro %}{{ m() }}' + TURNS,
        "{# no date #}\n\n" + TURNS,
    ],
)
def test_a_stopped_clock_changes_the_date_only(template: str) -> None:
    today = Rendering(date=datetime.date.today())
    tokenizer = byte_tokenizer(template)
    turns = [{"role": "user", "content": "hi"}]
    own = tokenizer.apply_chat_template(turns, tokenize=False)
    for found in (ChatTemplate(tokenizer, today), ChatTemplate(tokenizer).now()):
        assert found.render([("user", False)], ["hi"], generation_prompt=False) == own


def test_a_date_whose_format_is_computed_runs_on_or_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer("{% set how = '%d %Y' %}" + _DATED.replace("'%d %b %Y'", "how"))
    encoder = Encoder(tokenizer)
    assert "2031" not in rendered(encoder)
    monkeypatch.setattr(clock, "datetime", Later)
    assert "Today is 02 2031." in rendered(encoder)
    with pytest.raises(ModelError, match="computes how it writes the date"):
        Encoder(tokenizer, rendering=Rendering(date=_SOMEDAY))


def test_a_run_keeps_the_date_of_its_first_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        name="r",
        description="",
        model="m",
        prompts={"train": [{"source": "none"}], "test": [{"source": "none"}]},  # type: ignore[arg-type]
        reward_models={},
        judges={},
    )

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2031, 1, 2)

    with RunDir.open(tmp_path / "run", recipe) as run:
        first = Job.of(run, Progress()).rendering
    monkeypatch.setattr(rundate.datetime, "date", Tomorrow)
    with RunDir.open(tmp_path / "run", recipe) as run:
        assert Job.of(run, Progress()).rendering.key == first.key
    (tmp_path / "run" / "date.json").write_text('{"date": "yesterday"}')
    with RunDir.open(tmp_path / "run", recipe) as run, pytest.raises(RunError, match="no date"):
        _ = Job.of(run, Progress()).rendering
