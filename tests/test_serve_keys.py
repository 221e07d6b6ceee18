"""Keys are shown once and kept hashed; policy and keys change under a running server, whole."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.cli.main import main
from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.policy import keys as keys_module
from equipoise.policy import reload
from equipoise.policy.decide import scenario_for
from equipoise.policy.file import parse_policy
from equipoise.policy.keys import (
    add_key,
    digest,
    environment_keys,
    find,
    new_secret,
    parse_keys,
    read_keys,
)
from equipoise.policy.reload import RulesSource
from equipoise.policy.rules import Key
from equipoise.serve.main import ServeOptions, allowed_hosts, check_start, rules_source
from serve_kit import (
    ATTRIBUTES,
    LEVELS,
    Reply,
    ask,
    call,
    chat_body,
    example_policy,
    make_server,
    policy_text,
    running,
    served_model,
)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_a_key_from_making_to_revoking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "keys.json"
    made = ["--scenario", "kids", "--range", "safety=0.75:1", "--requests-per-minute", "7"]
    assert command("keys", "new", "front desk", "--keys", str(file), *made) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("eqp-") and len(secret) == 4 + 43  # 256 bits in base 64
    text = file.read_text()
    assert secret not in text and secret[4:] not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert file.stat().st_mode & 0o777 == 0o600
    (key,) = read_keys(file)
    assert (key.scenarios, key.requests_per_minute) == (("kids",), 7)
    assert (key.ranges["safety"].min, key.ranges["safety"].max) == (0.75, 1.0)
    assert find([key], secret) == key
    assert find([key], secret + "x") is None and find([key], secret[:-1]) is None
    assert command("keys", "list", "--keys", str(file)) == 0
    listed = capsys.readouterr().out
    assert key.id in listed and "front desk" in listed and key.sha256 not in listed
    assert command("keys", "revoke", key.id, "--keys", str(file)) == 0
    assert find(read_keys(file), secret) is None
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "arguments",
    [
        ["--range", "safety"],
        ["--range", "safety=1:0"],
        ["--range", "safety=a:b"],
        ["--range", "safety=nan:1"],
        ["--range", "safety=0:2"],
        ["--scenario", "a b"],
        ["--scenario", "toy@kids"],
    ],
)
def test_keys_that_make_no_sense_are_not_made(tmp_path: Path, arguments: list[str]) -> None:
    file = tmp_path / "keys.json"
    assert command("keys", "new", "x", "--keys", str(file), *arguments) == 1
    assert not file.exists()


def test_every_stored_hash_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time of a refusal tells where in the file a key stands."""
    secrets = [new_secret() for _ in range(5)]
    keys = [Key(id=str(i), sha256=digest(secret)) for i, secret in enumerate(secrets)]
    compared = []
    real = keys_module.hmac.compare_digest
    monkeypatch.setattr(
        keys_module.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b)
    )
    for secret in (secrets[0], secrets[4], "eqp-nobody"):
        compared.clear()
        find(keys, secret)
        assert compared == [key.sha256 for key in keys]


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = [Key(id=f"k{i}", sha256=digest(str(i))) for i in range(24)]
        list(pool.map(lambda key: add_key(file, key), made))
    assert {key.id for key in read_keys(file)} == {key.id for key in made}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{}x", b"[]", b'{"version": 2}', b'{"keys": [{}]}', b'{"keys": [], "x": 1}',
     b'{"keys": [{"id": "a", "sha256": "00"}]}', b'{"keys": [{"id": "a b", "sha256": "' + b"0" * 64
     + b'"}]}', b"\xff"],
)  # fmt: skip
def test_broken_key_files_are_refused_unquoted(data: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(data)
    assert "0" * 20 not in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, Key(id="a", sha256=digest("a")))
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_keys(file)


# --- in force -----------------------------------------------------------------------------------


def test_revoking_and_adding_are_obeyed_at_once(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    with running(server) as port:
        kid = server.secrets["kid"]
        assert call(port, "GET", "/v1/models", key=kid).status == 200
        keys_module.revoke_key(server.keys_file, "kid")
        assert call(port, "GET", "/v1/models", key=kid).status == 401
        fresh = new_secret()
        add_key(server.keys_file, Key(id="new", sha256=digest(fresh), scenarios=("kids",)))
        assert call(port, "GET", "/v1/models", key=fresh).status == 200


def rewrite(path: Path, policy: object) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(policy_text(policy), "utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)


BROKEN = ["", "version: 1", "version: [", "scenarios: {}", "{}", "\x00", "key: [1, 2", "- 1",
          "version: !!bool x", "a: !!int ''", "t: !!timestamp x"]  # fmt: skip


@pytest.mark.parametrize("text", [*BROKEN, None])
def test_a_broken_policy_lets_nobody_in_until_it_is_whole(tmp_path: Path, text: str | None) -> None:
    server = make_server(tmp_path)
    whole = server.policy_file.read_text()

    async def status() -> Reply:
        await server.engine.start()
        return await ask(server.app, chat_body(), key=server.secrets["lab"])

    assert asyncio.run(status()).status == 200
    if text is None:
        server.policy_file.unlink()
    else:
        server.policy_file.write_text(text)
        os.utime(server.policy_file, (10**9, 10**9))  # settled, so the second request reads nothing
    for _ in range(2):
        refused = asyncio.run(status())
        assert refused.status == 503 and refused.json["error"]["code"] == "no_policy"
    assert len(server.engine.seen) == 1
    server.policy_file.write_text(whole)
    assert asyncio.run(status()).status == 200


def test_a_policy_that_others_may_write_is_not_in_force(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    for mode in (0o666, 0o664, 0o646):
        server.policy_file.chmod(mode)
        assert server.source.current() is None
        with pytest.raises(ConfigError, match="chmod go-w"):
            server.source.read()
    server.policy_file.chmod(0o644)
    server.rules()


@pytest.mark.parametrize(
    ("sort_keys", "closed"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.nightly),
        pytest.param(False, True, marks=pytest.mark.nightly),
    ],
)
def test_no_part_of_a_policy_is_in_force(tmp_path: Path, *, sort_keys: bool, closed: bool) -> None:
    """Written in place and cut anywhere, whichever field stands last."""
    server, late = make_server(tmp_path), 0
    clinic = example_policy()["scenarios"]["clinic"]
    ranges = {"helpfulness": {}, "safety": {"max": 1.0, "min": 0.75}}
    policy = {
        "version": 1,
        "default_scenario": "clinic",
        "scenarios": {"clinic": {**clinic, "ranges": ranges}},
    }
    policy["scenarios"]["clinic"]["ranges"] = policy["scenarios"]["clinic"].pop("ranges")
    source = RulesSource(
        server.policy_file, server.keys_file, dials=Dials(ATTRIBUTES, LEVELS), 
        now_ns=lambda: server.policy_file.stat().st_mtime_ns + late,
    )  # fmt: skip
    data = yaml.safe_dump(policy, sort_keys=sort_keys, explicit_end=closed).encode().rstrip()
    n_usable = 0
    for cut in range(len(data)):
        with contextlib.suppress(ConfigError):
            parse_policy(data[:cut], Dials(ATTRIBUTES, LEVELS))
            n_usable += 1
        server.policy_file.write_bytes(data[:cut])
        assert source.current() is None
    assert n_usable or (sort_keys and not closed)
    server.policy_file.write_bytes(data)
    if not closed:
        assert source.current() is None
        late = 3 * 10**9
    rules = source.current()
    assert rules is not None
    assert rules.policy.scenarios["clinic"].ranges["safety"].min == 0.75


def test_what_changes_while_a_body_comes_holds_for_it(tmp_path: Path) -> None:
    server = make_server(tmp_path)

    def status(halfway: Callable[[], None]) -> tuple[int, str | None]:
        """Return it with the hash of the policy that the response names."""

        async def one() -> Reply:
            await server.engine.start()
            key = server.secrets["lab"]
            return await ask(server.app, chat_body(), key=key, halfway=halfway)

        reply = asyncio.run(one())
        return reply.status, reply.headers.get("x-dial-policy")

    assert status(lambda: None) == (200, server.rules().policy_hash)
    changed = status(lambda: rewrite(server.policy_file, example_policy(max_tokens=111)))
    assert changed == (200, server.rules().policy_hash)
    assert [g.sampling.max_tokens for g in server.engine.seen] == [1024, 111]
    good = server.policy_file.read_text()
    assert status(lambda: rewrite(server.policy_file, {})) == (503, None)
    server.policy_file.write_text(good)
    revoked = status(lambda: keys_module.revoke_key(server.keys_file, "lab") and None)
    assert revoked == (401, None)
    assert len(server.engine.seen) == 2


def test_broken_keys_let_nobody_in(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    good = server.keys_file.read_bytes()

    async def status() -> int:
        await server.engine.start()
        return (await ask(server.app, chat_body(), key=server.secrets["lab"])).status

    damages = ((b"", 503), (good[:-5], 503), (b'{"version": 1, "keys": []}', 401))
    for data, refused in damages:
        server.keys_file.write_bytes(data)
        assert asyncio.run(status()) == refused, data
    wrong = json.loads(good)
    wrong["keys"][0]["ranges"] = {"saftey": {"min": 0.9, "max": 1.0}}
    server.keys_file.write_text(json.dumps(wrong))
    assert asyncio.run(status()) == 503
    server.keys_file.write_bytes(good)
    server.keys_file.chmod(0o644)
    assert asyncio.run(status()) == 503
    server.keys_file.chmod(0o600)
    assert asyncio.run(status()) == 200


def test_a_key_for_a_scenario_that_is_not_there_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(tmp_path)
    keys = ["--keys", str(server.keys_file)]
    assert command("keys", "new", "a", *keys, "--scenario", "nope", "--scenario", "kids") == 0
    assert command("keys", "new", "b", *keys, "--scenario", "gone") == 0
    a, b = (key.id for key in read_keys(server.keys_file)[-2:])
    keys_module.revoke_key(server.keys_file, b)

    def warnings() -> list[str]:
        caplog.clear()
        for _ in range(3):
            server.rules()
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    said = f"key {a}: the policy has no scenario nope; what it asks for there gets 404"
    assert warnings() == [said]
    server.source.reload()
    assert warnings() == []
    policy = example_policy()
    policy["scenarios"]["nope"] = policy["scenarios"]["kids"]
    rewrite(server.policy_file, policy)
    assert warnings() == []
    del policy["scenarios"]["nope"]  # and the policy may lose it later
    rewrite(server.policy_file, policy)
    assert warnings() == [said]


def test_a_change_within_one_tick_of_the_clock_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the file system says is as before: only reading again tells."""
    server = make_server(tmp_path)
    stamp = (10**18, 0, 0, 0, 0)
    monkeypatch.setattr(reload, "_stamp", lambda path: stamp)
    one, two = example_policy(max_tokens=111), example_policy(max_tokens=222)

    def seen(age_ns: int) -> int:
        source = RulesSource(
            server.policy_file, server.keys_file, dials=Dials(ATTRIBUTES, LEVELS), 
            now_ns=lambda: stamp[0] + age_ns,
        )  # fmt: skip
        for policy in (one, two):
            server.policy_file.write_text(policy_text(policy))
            rules = source.current()
        assert rules is not None
        return rules.policy.limits.max_tokens

    assert seen(age_ns=10**6) == 222
    assert seen(age_ns=10**9) == 111  # long settled: not read at every request


def test_reload_reads_again_on_request(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    later = RulesSource(
        server.policy_file, server.keys_file, dials=Dials(ATTRIBUTES, LEVELS), 
        now_ns=lambda: 2**62,
    )  # fmt: skip
    first = later.current()
    assert later.current() is first
    later.reload()
    again = later.current()
    assert again == first and again is not first


@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_no_answer_under_half_of_one_policy_and_half_of_another(tmp_path: Path, n: int) -> None:
    """Hash, default and limit of every answer belong together, while the file changes n times."""
    server = make_server(tmp_path, limits={"waiting": 9999, "per_key": 9999})
    policies = []
    for i, safety in enumerate((0.5, 0.75, 1.0)):
        policy = example_policy(max_tokens=100 + i)
        policy["scenarios"]["general"]["default"]["safety"] = safety
        policies.append(policy)
    expected: dict[str, tuple[float, int]] = {}
    for i, (policy, safety) in enumerate(zip(policies, (0.5, 0.75, 1.0), strict=True)):
        rewrite(server.policy_file, policy)
        expected[server.rules().policy_hash] = (safety, 100 + i)
    stop, changes = threading.Event(), 0

    def change() -> None:
        nonlocal changes
        while not stop.is_set():
            changes += 1
            rewrite(server.policy_file, policies[changes % 3])
            stop.wait(0.001)

    async def many() -> list[Reply]:
        await server.engine.start()
        replies: list[Reply] = []
        while changes < n or len(replies) < n:
            asked = [ask(server.app, chat_body(), key=server.secrets["lab"]) for _ in range(3)]
            replies += await asyncio.gather(*asked)
        return replies

    changer = threading.Thread(target=change)
    changer.start()
    try:
        replies = asyncio.run(many())
    finally:
        stop.set()
        changer.join()
    seen = {reply.json["policy_hash"] for reply in replies}
    for reply in replies:
        safety, _ = expected[reply.json["policy_hash"]]
        assert reply.json["dials"]["effective"]["safety"]["value"] == safety
    assert len(seen) > 1
    manifest = server.model.encoder.manifest
    assert manifest is not None
    pairs = {
        (manifest.token_ids["safety"].index(g.control_ids[1]) / 4, g.sampling.max_tokens)
        for g in server.engine.seen
    }
    assert pairs <= set(expected.values())


# --- starting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "10.0.0.1", ""])
def test_no_strangers_without_keys(tmp_path: Path, host: str) -> None:
    options = ServeOptions(policy=tmp_path / "p", keys=None, host=host)
    with pytest.raises(ConfigError, match="without keys"):
        check_start(options)
    check_start(ServeOptions(policy=tmp_path / "p", keys=tmp_path / "k", host=host))
    assert command("serve", "nowhere", "--policy", "example", "--host", host or "0") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_gets_a_key_of_its_own(tmp_path: Path, host: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(policy_text(example_policy()))
    options = ServeOptions(policy=file, keys=None, host=host)
    check_start(options)
    source, secret = rules_source(options, served_model())
    rules = source.current()
    assert rules is not None and secret is not None
    assert find(rules.keys, secret) is not None
    assert set(rules.keys[0].scenarios) == set(rules.policy.scenarios)
    assert next(iter(rules.policy.scenarios)) != rules.policy.default_scenario
    assert scenario_for(rules.policy, rules.keys[0], None) == rules.policy.default_scenario


def test_keys_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, secret = tmp_path / "keys.json", new_secret()
    add_key(file, Key(id="a", sha256=digest(secret), scenarios=("kids",)))
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_text(example_policy()))
    assert environment_keys() == ()
    monkeypatch.setenv("EQUIPOISE_KEYS", file.read_text())
    options = ServeOptions(policy, None, environment_keys(), host="0.0.0.0")
    check_start(options)
    source, made = rules_source(options, served_model())
    rules = source.current()
    assert made is None and rules is not None
    assert find(rules.keys, secret) == rules.keys[0] and rules.keys[0].scenarios == ("kids",)
    for text in ("", "{}", secret, '{"keys": []}', "{'keys'"):
        monkeypatch.setenv("EQUIPOISE_KEYS", text)
        with pytest.raises(ConfigError) as caught:
            environment_keys()
        assert secret not in str(caught.value)


def test_wildcard_addresses_are_no_host_names(tmp_path: Path) -> None:
    options = ServeOptions(
        policy=tmp_path, keys=tmp_path, host="0.0.0.0", allow_hosts=("API.example.org", "[::7]")
    )
    names = allowed_hosts(options)
    assert names == {"localhost", "127.0.0.1", "::1", "api.example.org", "::7"}


def bad_starts(folder: Path) -> list[dict[str, Any]]:
    policy, keys = folder / "policy.yaml", folder / "keys.json"
    policy.write_text(policy_text(example_policy()))
    add_key(keys, Key(id="a", sha256=digest("a")))
    empty, broken = folder / "empty.json", folder / "broken.yaml"
    empty.write_text('{"version": 1, "keys": []}')
    empty.chmod(0o600)
    broken.write_text("version: 1\n")
    return [
        {"policy": folder / "none.yaml", "keys": keys},
        {"policy": broken, "keys": keys},
        {"policy": policy, "keys": folder / "none.json"},
        {"policy": policy, "keys": empty},
        {"policy": folder, "keys": keys},
    ]


@pytest.mark.parametrize("number", range(5))
def test_without_policy_or_keys_it_does_not_start(tmp_path: Path, number: int) -> None:
    options = ServeOptions(**bad_starts(tmp_path)[number])
    with pytest.raises(ConfigError):
        rules_source(options, served_model())
