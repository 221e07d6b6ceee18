"""What is left of a plan, and the word about a stage that is far over it; on a clock by hand."""

from __future__ import annotations

import io

import pytest

from equipoise.pipeline.pace import Pace
from equipoise.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.minutes = 0.0

    def __call__(self) -> float:
        return self.minutes * 60


def followed(planned: dict[str, float]) -> tuple[Pace, Clock, list[str]]:
    clock, said = Clock(), list[str]()
    return Pace(planned, said.append, clock=clock), clock, said


def test_what_is_left_follows_the_pace_of_what_is_done() -> None:
    pace, _, said = followed({"generate": 1.5, "tune": 2.0, "evaluate": 4.0})
    assert pace.left == 7.5
    pace.begin("generate")
    pace.end(7.5)  # (7.5 + .5) / (1.5 + .5) = 4
    pace.begin("tune")
    pace.end(2.0)  # (9.5 + .5) / (3.5 + .5) = 2.5
    pace.begin("evaluate")
    pace.end(10.0)
    assert said == [
        "left: about 24.0 min (planned 6.0)",
        "left: about 10.0 min (planned 4.0)",
    ]


def test_a_stage_without_a_plan_says_and_changes_nothing() -> None:
    pace, clock, said = followed({"tune": 2.0})
    pace.begin("distil")
    clock.minutes = 60
    pace.check()
    pace.end(60.0)
    assert said == [] and pace.left == 2.0


def test_a_short_stage_says_little_of_a_long_one() -> None:
    pace, _, _ = followed({"judge": 0.0, "evaluate": 10.0})
    pace.begin("judge")
    pace.end(0.1)  # only its loading
    assert pace.left == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("planned", "minutes", "told"),
    [(2.0, 4.0, False), (2.0, 4.1, True), (0.1, 0.55, False), (0.1, 0.7, True)],
)
def test_a_stage_is_far_over_its_plan_at_twice_and_half_a_minute(
    planned: float, minutes: float, told: bool
) -> None:
    pace, clock, said = followed({"tune": planned})
    pace.begin("tune")
    clock.minutes = minutes
    pace.check()
    assert bool(said) == told


@pytest.mark.parametrize(
    ("load", "cause"),
    [
        (3.2, "other work shares the cores (load average 3.2 on 2)"),
        (1.9, "the plan was too short, or other work shared the cores"),
    ],
)
def test_it_is_said_once_with_the_likely_cause(
    load: float, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.pipeline.pace.cores", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    watched, clock, said = followed({"tune": 1.0, "evaluate": 1.0})
    watched.begin("tune")
    for clock.minutes in (1.0, 3.0, 5.0):
        watched.check()
    watched.end(5.0)
    assert len(said) == 2  # and what is left
    assert said[0].startswith(f"tune: 3.0 min so far, planned 1.0; {cause}")


def test_a_stage_that_never_got_on_is_told_of_at_its_end() -> None:
    watched, clock, said = followed({"tune": 1.0})
    watched.begin("tune")
    clock.minutes = 9
    watched.end(9.0)
    assert [line.split(";")[0] for line in said] == ["tune: 9.0 min so far, planned 1.0"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_tasks_call_who_watches_and_lines_stand_by_themselves(
    stream: type[io.StringIO],
) -> None:
    out, calls = stream(), list[int]()
    progress = Progress(out)

    def watch() -> None:
        calls.append(1)
        progress.say("[said]")

    with progress.watched(watch), progress.task("tune", 2) as advance:
        advance(1)
        advance(1)
    with progress.task("evaluate", 1) as advance:
        advance(1)
    progress.say("end")
    assert len(calls) == 2
    lines = [line.strip() for line in out.getvalue().replace("\r", "\n").split("\n")]
    # A bar redraws its line by escape sequences; what was said has a line of its own.
    assert sum(line.endswith("[said]") for line in lines) == 2
    assert not any("[said]" in line and "tune" in line for line in lines)
    assert lines[-2].endswith("end")
