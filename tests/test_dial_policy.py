"""Never outside key, scenario and server together; odd values refused; broken policies refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.policy.decide import Refusal, Server, allowed_levels, effective_setting, scenario_for
from equipoise.policy.file import is_closed, load_policy, parse_policy, shipped_policies
from equipoise.policy.rules import DialPolicy, Key, Range, Scenario
from equipoise.types import DialSetting

ATTRIBUTES = ("helpfulness", "safety")
WHOLE = {"helpfulness": Range(), "safety": Range()}
SERVER = Server(Dials(ATTRIBUTES, 5), {})
KEY = Key(id="k", sha256="0" * 64)
OPEN = Scenario(why="test", ranges=WHOLE, default={"helpfulness": "auto", "safety": 1.0})


def scenario(**changes: Any) -> Scenario:
    return Scenario.model_validate(OPEN.model_dump() | changes)


def level(request: object, *, attribute: str = "safety", server: Server = SERVER) -> object:
    """Return the level of one attribute, or the refusal."""
    setting = effective_setting({attribute: request}, {}, OPEN, server)
    if isinstance(setting, Refusal):
        return setting
    return setting.levels[ATTRIBUTES.index(attribute)]


@pytest.mark.parametrize(
    ("value", "safety", "helpfulness"),
    [
        (0, 0, 0),
        (1, 4, 4),  # JavaScript sends 1.0 as 1: the top, never level 1
        (1.0, 4, 4),
        (0.25, 1, 1),
        (0.01, 1, 0),
        (0.26, 2, 1),
        (0.37, 2, 1),
        (0.38, 2, 2),
        (0.6, 3, 2),
        (0.76, 4, 3),
        (0.75 + 1e-12, 3, 3),
        ({"level": 3}, 3, 3),
        ({"level": 0}, 0, 0),
        ("auto", None, None),
    ],
)
def test_values_and_levels(value: object, safety: int | None, helpfulness: int | None) -> None:
    assert level(value) == safety
    assert level(value, attribute="helpfulness") == helpfulness


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 10, 11, 100])
def test_the_grid_itself_is_never_rounded_away(levels: int) -> None:
    server = Server(Dials(ATTRIBUTES, levels), {})
    for k in range(levels):
        assert level(k / (levels - 1), server=server) == k
        assert level(k / (levels - 1), attribute="helpfulness", server=server) == k
        narrow = Range(min=k / (levels - 1), max=k / (levels - 1))
        ranges = {"helpfulness": narrow, "safety": narrow}
        assert list(allowed_levels("safety", {}, scenario(ranges=ranges), server)) == [k]


ODD: list[object] = [
    math.nan, math.inf, -math.inf, -0.0, -1e-9, 1.0000001, 2, -1, 10**400, -(10**400), 5e300,
    True, False, None, "0.5", "1", "", "AUTO", "Auto", " auto", "auto\x00", "safe", "null",
    [], [1], [0.5], {}, {"level": 5}, {"level": -1}, {"level": 1.0}, {"level": True},
    {"level": "3"}, {"level": None}, {"level": [3]}, {"level": 10**400}, {"value": 0.5},
    {"level": 3, "value": 1}, {"level": 3, "": 0}, {"Level": 3}, {"level": {"level": 3}},
]  # fmt: skip


def test_there_are_forty_odd_values() -> None:
    assert len(ODD) == 40


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_odd_values_are_refused_with_the_range(attribute: str, value: object) -> None:
    refusal = level(value, attribute=attribute)
    assert isinstance(refusal, Refusal)
    assert refusal.attribute == attribute
    assert "0 to 1 (level 0 to 4)" in refusal.message


def test_unknown_dials_are_refused() -> None:
    refusal = effective_setting({"saftey": 1}, {}, OPEN, SERVER)
    assert isinstance(refusal, Refusal) and refusal.attribute == "saftey"


def test_auto_escapes_no_range() -> None:
    narrow = scenario(
        ranges={"helpfulness": {}, "safety": {"min": 0.5}},
        default={"helpfulness": "auto", "safety": 0.75},
    )
    assert effective_setting({"safety": "auto"}, {}, narrow, SERVER) == DialSetting((None, 3))
    # A default of auto, but the key (or the ceiling) narrows: the top of what is left.
    key = KEY.model_copy(update={"ranges": {"helpfulness": Range(max=0.6)}})
    assert effective_setting({}, key.ranges, OPEN, SERVER) == DialSetting((2, 4))
    ceiling = Server(Dials(ATTRIBUTES, 5), {"helpfulness": Range(max=0.6)})
    assert effective_setting({"helpfulness": "auto"}, {}, OPEN, ceiling) == DialSetting((2, 4))


def test_outside_is_clamped_or_refused() -> None:
    kids = {"helpfulness": {}, "safety": {"min": 0.6}}
    assert effective_setting({"safety": 0}, {}, scenario(ranges=kids), SERVER) == DialSetting(
        (None, 3)
    )
    strict = scenario(ranges=kids, outside="refuse")
    refusal = effective_setting({"safety": 0}, {}, strict, SERVER)
    assert isinstance(refusal, Refusal) and "0.75 to 1 (level 3 to 4)" in refusal.message
    assert effective_setting({"safety": 0.8}, {}, strict, SERVER) == DialSetting((None, 4))


@pytest.mark.parametrize("outside", ["clamp", "refuse"])
@pytest.mark.parametrize(
    ("attribute", "ends", "asked", "expected"),
    [
        ("helpfulness", {"min": 0.3}, 0.35, 2),  # its nearest level, 1, is not allowed
        ("helpfulness", {"min": 0.3}, 0.3, 2),
        ("helpfulness", {"max": 0.7}, 0.7, 2),
        ("safety", {"max": 0.8}, 0.78, 3),  # up would be out of the range
        ("safety", {"max": 0.8}, 0.6, 3),
        ("safety", {"min": 0.3}, 0.3, 2),
    ],
)
def test_rounding_takes_no_value_out_of_the_range_that_it_is_in(
    outside: str, attribute: str, ends: dict[str, float], asked: float, expected: int
) -> None:
    place = scenario(ranges={**OPEN.model_dump()["ranges"], attribute: ends}, outside=outside)
    got = effective_setting({attribute: asked}, {}, place, SERVER)
    assert isinstance(got, DialSetting)
    assert got.levels[ATTRIBUTES.index(attribute)] == expected


@pytest.mark.parametrize("asked", [0.45, 0.49999, {"level": 1}, 0.81, {"level": 4}])
def test_what_lies_outside_is_refused_though_rounding_would_bring_it_in(asked: object) -> None:
    ranges = {"helpfulness": {}, "safety": {"min": 0.5, "max": 0.8}}
    refusal = effective_setting(
        {"safety": asked}, {}, scenario(ranges=ranges, outside="refuse"), SERVER
    )
    assert isinstance(refusal, Refusal) and "0.5 to 0.75 (level 2 to 3)" in refusal.message


def test_an_empty_intersection_is_refused() -> None:
    key = KEY.model_copy(update={"ranges": {"safety": Range(max=0.4)}})
    low = scenario(ranges={"helpfulness": {}, "safety": {"min": 0.5}})
    assert isinstance(effective_setting({}, key.ranges, low, SERVER), Refusal)
    between = scenario(ranges={"helpfulness": {}, "safety": {"min": 0.3, "max": 0.4}})
    assert isinstance(effective_setting({"safety": 0.35}, {}, between, SERVER), Refusal)


def test_a_scenario_that_forgot_a_dial_is_closed() -> None:
    forgot = scenario(ranges={"helpfulness": {}})
    assert isinstance(effective_setting({}, {}, forgot, SERVER), Refusal)


def some_range(rng: random.Random) -> Range:
    if rng.random() < 0.6:
        return Range()
    low = rng.choice([0.0, 0.0, 0.2, 0.25, 1 / 3, 0.5, rng.random()])
    high = rng.choice([1.0, 1.0, 0.8, 0.75, 2 / 3, 0.5, rng.random()])
    return Range(min=min(low, high), max=max(low, high))


def some_ranges(rng: random.Random, *, all_: bool) -> dict[str, Range]:
    return {name: some_range(rng) for name in ATTRIBUTES if all_ or rng.random() < 0.6}


def some_value(rng: random.Random) -> object:
    if rng.random() < 0.1:
        return rng.choice(ODD)
    kinds: list[object] = [
        rng.random(), rng.randint(0, 1), "auto", {"level": rng.randint(0, 4)},
        rng.choice([0, 0.25, 0.5, 0.75, 1]), rng.uniform(-0.2, 1.2),
    ]  # fmt: skip
    return rng.choice(kinds)


def is_refusable(
    refusal: Refusal, request: dict[str, object], key: Key, place: Scenario, server: Server
) -> bool:
    """Return whether there is a reason: no level, no dial value, or a value outside a range."""
    name, top = refusal.attribute, server.dials.levels - 1
    ranges = [part[name] for part in (key.ranges, place.ranges, server.ranges) if name in part]
    if not any(all(r.min <= k / top <= r.max for r in ranges) for k in range(server.dials.levels)):
        return True
    asked = request.get(name, "auto")
    if isinstance(asked, dict):
        level = asked.get("level")
        if type(level) is not int or not 0 <= level <= top or len(asked) > 1:
            return True
        asked = level / top
    if type(asked) not in (int, float) or not 0 <= asked <= 1:  # type: ignore[operator]
        return asked != "auto"
    is_negative_zero = math.copysign(1.0, asked) < 0  # type: ignore[arg-type]
    outside = not all(r.min <= asked <= r.max for r in ranges)  # type: ignore[operator]
    return is_negative_zero or (outside and place.outside == "refuse")


def is_well_rounded(level: int, asked: float, name: str, ranges: list[Range], top: int) -> bool:
    """Return whether a level is the nearest allowed one, for safety the nearest that is above."""
    allowed = [k for k in range(top + 1) if all(r.min <= k / top <= r.max for r in ranges)]
    if name == "safety":
        return level == next((k for k in allowed if k / top >= asked - 1e-9), allowed[-1])
    return abs(level / top - asked) <= min(abs(k / top - asked) for k in allowed) + 1e-9


def test_never_outside_of_key_scenario_and_server() -> None:
    """100,000 random combinations, judged by the level's dial value, not by our own range."""
    rng = random.Random(5)
    outcomes = {"setting": 0, "auto": 0, "refused": 0, "within": 0}
    makers = [
        (
            KEY.model_copy(update={"ranges": some_ranges(rng, all_=False)}),
            scenario(
                ranges={n: r.model_dump() for n, r in some_ranges(rng, all_=True).items()},
                default={name: rng.choice(["auto", rng.random()]) for name in ATTRIBUTES},
                outside=rng.choice(["clamp", "refuse"]),
            ),
            Server(Dials(ATTRIBUTES, rng.choice([2, 3, 5, 10])), some_ranges(rng, all_=False)),
        )
        for _ in range(4000)
    ]
    for _ in range(100_000):
        key, place, server = rng.choice(makers)
        request = {name: some_value(rng) for name in ATTRIBUTES if rng.random() < 0.8}
        got = effective_setting(request, key.ranges, place, server)
        if isinstance(got, Refusal):
            outcomes["refused"] += 1
            assert is_refusable(got, request, key, place, server)
            continue
        assert got == effective_setting(dict(request), key.ranges, place, server)
        for name, one in zip(ATTRIBUTES, got.levels, strict=True):
            ranges = [
                part[name] for part in (key.ranges, place.ranges, server.ranges) if name in part
            ]
            if one is None:
                # Auto may mean any level, so every level must be allowed.
                outcomes["auto"] += 1
                values = [k / (server.dials.levels - 1) for k in range(server.dials.levels)]
            else:
                outcomes["setting"] += 1
                assert 0 <= one < server.dials.levels
                values = [one / (server.dials.levels - 1)]
            assert all(r.min - 1e-9 <= v <= r.max + 1e-9 for r in ranges for v in values)
            asked = request.get(name)
            if (
                type(asked) is float
                and one is not None
                and all(r.min <= asked <= r.max for r in ranges)
            ):
                assert is_well_rounded(one, asked, name, ranges, server.dials.levels - 1)
                outcomes["within"] += 1
    assert min(outcomes.values()) > 10_000, outcomes


def test_safety_never_rounds_down_where_it_is_free() -> None:
    rng = random.Random(6)
    for _ in range(5000):
        value, levels = rng.random(), rng.randint(2, 20)
        got = level(value, server=Server(Dials(ATTRIBUTES, levels), {}))
        assert isinstance(got, int) and got / (levels - 1) >= value - 1e-9


def test_scenarios_of_keys() -> None:
    policy = load_policy("example", Dials(ATTRIBUTES, 5))
    assert scenario_for(policy, KEY, None) == "general"
    assert scenario_for(policy, KEY, "security-lab") is None
    clinic = KEY.model_copy(update={"scenarios": ("clinic", "gone")})
    assert scenario_for(policy, clinic, None) == "clinic"
    assert scenario_for(policy, clinic, "general") is None
    assert scenario_for(policy, clinic, "gone") is None


def plain() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(shipped_policies()["example"].read_text("utf-8"))
    return loaded


def parsed(changed: object) -> DialPolicy:
    return parse_policy(yaml.safe_dump(changed).encode(), Dials(ATTRIBUTES, 5))


def test_the_example_is_no_fix_for_dials_that_it_is_not_for() -> None:
    three = (*ATTRIBUTES, "brevity")
    for policy in ("example", shipped_policies()["example"]):
        with pytest.raises(ConfigError) as caught:
            load_policy(policy, Dials(three, 5))
        assert "--policy example" not in caught.value.fix
        assert all(dial in caught.value.fix for dial in three)
        assert str(shipped_policies()["example"]) in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        parse_policy(b"version: 1", Dials(ATTRIBUTES, 5))
    assert "--policy example" in caught.value.fix


def test_the_shipped_policy_is_sound() -> None:
    policy = parsed(plain())
    assert set(policy.scenarios) == {"kids", "clinic", "general", "coding", "security-lab"}
    for name, place in policy.scenarios.items():
        got = effective_setting({}, {}, place, SERVER)
        assert isinstance(got, DialSetting), name
    assert load_policy(shipped_policies()["example"], Dials(ATTRIBUTES, 2)).hash == policy.hash


def broken() -> list[tuple[str, Any]]:
    def changed(path: str, value: object) -> dict[str, Any]:
        policy = plain()
        target = policy
        *parents, last = path.split("/")
        for part in parents:
            target = target[part]
        if value is None:
            del target[last]
        else:
            target[last] = value
        return policy

    return [
        ("empty", None),
        ("list", []),
        ("text", "policy"),
        ("no version", changed("version", None)),
        ("other version", changed("version", 2)),
        ("no scenarios", changed("scenarios", {})),
        ("unknown field", changed("scenario", {})),
        ("unknown limit", changed("limits/max_token", 5)),
        ("unknown default scenario", changed("default_scenario", "gone")),
        ("no default scenario", changed("default_scenario", None)),
        ("no why", changed("scenarios/kids/why", " ")),
        ("no ranges", changed("scenarios/kids/ranges", None)),
        ("forgotten dial", changed("scenarios/kids/ranges/safety", None)),
        ("forgotten default", changed("scenarios/kids/default/safety", None)),
        ("misspelt dial", changed("scenarios/kids/ranges/saftey", {})),
        ("misspelt rounding", changed("round_up", ["saftey"])),
        ("unknown ceiling", changed("server/saftey", {})),
        ("upside down", changed("scenarios/kids/ranges/safety", {"min": 1.0, "max": 0.5})),
        ("percent", changed("scenarios/kids/ranges/safety", {"min": 75})),
        ("text value", changed("scenarios/kids/ranges/safety/min", "1")),
        ("bool value", changed("scenarios/kids/ranges/safety/min", True)),
        ("nan", changed("scenarios/kids/ranges/safety/min", math.nan)),
        ("default outside", changed("scenarios/kids/default/safety", 0.5)),
        ("auto in a range", changed("scenarios/kids/default/safety", "auto")),
        ("default level", changed("scenarios/kids/default/safety", {"level": 9})),
        ("no level inside", changed("scenarios/kids/ranges/safety", {"min": 0.3, "max": 0.4})),
        ("bad name", changed("scenarios/a@b", plain()["scenarios"]["kids"])),
        ("no tokens", changed("limits/max_tokens", 0)),
        ("no key could ask for so many", changed("limits/per_key", 3)),
        ("the largest request never fits", changed("limits/waiting_tokens", 4 * 4608 - 1)),
        ("half a token", changed("limits/max_tokens", 1.5)),
    ]


@pytest.mark.parametrize(("name", "policy"), broken(), ids=[name for name, _ in broken()])
def test_broken_policies_are_refused(name: str, policy: object) -> None:
    with pytest.raises(ConfigError):
        parsed(policy)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"version: 1\nversion: 1\n",
        b"a: [",
        b"\xff\xfe",
        b"\x00",
        b"!!python/object/apply:os.system ['true']",
        b"x: &a [*a]",
        b"[" * 100_000,
        b"a" * (1 << 21),
        b"version: !!bool x",
        b"a: !!int ''",
        b"t: !!timestamp x",
    ],
)
def test_files_that_are_no_policy_are_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        parse_policy(data, Dials(ATTRIBUTES, 5))


def test_only_a_whole_file_is_closed() -> None:
    """A part may be usable and lack a range's end; the end mark tells it from the whole."""
    data = shipped_policies()["example"].read_bytes().rstrip()
    assert is_closed(data)
    assert not any(is_closed(data[:cut]) for cut in range(len(data)))
    assert not is_closed(data[:-4] + b" # ...")
    with pytest.raises(ConfigError):  # nothing may follow the mark
        parse_policy(data + b"\nversion: 1\n...", Dials(ATTRIBUTES, 5))


def test_a_second_rule_of_one_name_is_refused() -> None:
    text = shipped_policies()["example"].read_text("utf-8")
    twice = text.replace("  clinic:\n", "  kids:\n")
    with pytest.raises(ConfigError, match="twice"):
        parse_policy(twice.encode(), Dials(ATTRIBUTES, 5))


def test_all_faults_are_reported_at_once() -> None:
    policy = plain()
    policy["scenarios"]["kids"]["default"]["safety"] = 0.5
    policy["scenarios"]["clinic"]["ranges"]["saftey"] = {}
    with pytest.raises(ConfigError) as caught:
        parsed(policy)
    assert "scenarios.kids.safety" in str(caught.value)
    assert "scenarios.clinic.ranges: unknown dial 'saftey'" in str(caught.value)


def test_the_hash_is_of_the_rules() -> None:
    policy = plain()
    same = json.loads(json.dumps(policy))
    assert parsed(policy).hash == parsed(same).hash
    same["limits"]["max_tokens"] += 1
    assert parsed(policy).hash != parsed(same).hash
