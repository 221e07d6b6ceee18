"""Policy file -> DialPolicy: all errors at once, each with file and line; broken means refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.policy.decide import policy_faults
from equipoise.policy.rules import DialPolicy

_MAX_BYTES = 1 << 20


def shipped_policies() -> dict[str, Path]:
    """Return the shipped example policies: name to file."""
    folder = Path(str(resources.files("equipoise") / "policy" / "policies"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_policy(name: str | Path) -> Path:
    """Return the file that a name stands for: an existing file, or a shipped policy."""
    return Path(name) if Path(name).is_file() else shipped_policies().get(str(name), Path(name))


def load_policy(name: str | Path, dials: Dials) -> DialPolicy:
    """Read a policy and hold it against a model's dials.

    Args:
        name: A YAML file, or the name of a shipped policy (``example``).
        dials: Attributes and levels.

    Raises:
        ConfigError: The file is missing, unreadable, not YAML, names a key twice, has unknown or
            missing fields, or does not fit the dials; all faults at once.
    """
    return parse_policy(read_policy(name), dials, file=find_policy(name).name)


def read_policy(name: str | Path, *, owned: bool = False) -> bytes:
    """Return the bytes of a policy's file.

    Args:
        name: See :func:`load_policy`.
        owned: Refuse a file that others than its owner may write, a shipped one apart: who can
            write there can write the program.

    Raises:
        ConfigError: It is missing, cannot be read, or belongs to others too.
    """
    file = find_policy(name)
    try:
        with file.open("rb") as opened:
            mode, data = os.fstat(opened.fileno()).st_mode, opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"no dial policy at {file}",
            why=error.strerror or type(error).__name__,
            fix=f"give a YAML file, or one of: {', '.join(shipped_policies())}",
        ) from error
    if owned and mode & 0o022 and file not in shipped_policies().values():
        raise ConfigError(
            f"{file} can be written by others",
            why=f"its mode is {mode & 0o777:o}; who can write it can move every dial",
            fix=f"chmod go-w {file}",
        )
    return data


def is_closed(data: bytes) -> bool:
    """Whether the last line is YAML's end mark ``...``, so that nothing can be missing."""
    return data.rstrip().endswith(b"\n...")


def parse_policy(data: bytes, dials: Dials, *, file: str = "policy") -> DialPolicy:
    """Return the policy that the bytes of a YAML file hold; see :func:`load_policy`."""
    plain = _plain(data, file)
    try:
        policy = DialPolicy.model_validate(plain)
        faults = policy_faults(policy, dials)
    except ValidationError as error:
        faults = [validation_fault(item) for item in error.errors(include_url=False)]
    if faults:
        raise ConfigError(
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in dial policy {file}",
            why="\n".join(["the rules below cannot be used", *(f"    {text}" for text in faults)]),
            fix=_way_out(dials),
        )
    return policy


def _way_out(dials: Dials) -> str:
    # The shipped policy is for two dials; to a model with others it is what has these faults.
    example = shipped_policies()["example"]
    policy = DialPolicy.model_validate(_plain(example.read_bytes(), example.name))
    if not policy_faults(policy, dials):
        return "correct these lines; `--policy example` is a complete one"
    return (
        "write a policy whose scenarios each have a range and a default for "
        f"{', '.join(dials.attributes)}; {example} shows the form"
    )


def validation_fault(item: Mapping[str, Any]) -> str:
    """Return one pydantic error as ``place: what``, without the value that caused it."""
    place = ".".join(str(part) for part in item["loc"]) or "file"
    kind = {"extra_forbidden": "unknown field", "missing": "is missing"}
    return f"{place}: {kind.get(item['type'], item['msg'])}"


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name each key once: the second of two rules must not win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        plain: dict[object, object] = super().construct_mapping(node, deep=deep)
        if len(plain) != len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "the same key twice (or a merge key)", node.start_mark
            )
        return plain


def _plain(data: bytes, file: str) -> object:
    problem, line = "it is larger than 1 MiB", ""
    if len(data) <= _MAX_BYTES:
        try:
            return yaml.load(data.decode("utf-8"), Loader=_UniqueKeys)
        except Exception as error:  # of PyYAML's constructors, too: KeyError, AttributeError, ...
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = str(getattr(error, "problem", None) or type(error).__name__)
    raise ConfigError(
        f"{file}{line} is not a usable YAML file",
        why=problem,
        fix="correct the line; `--policy example` is a complete one",
    )
