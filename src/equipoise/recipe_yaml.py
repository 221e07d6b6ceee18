"""YAML as it looks: the core schema of YAML 1.2, in which 010 is ten and ``yes`` is a word.

PyYAML by itself reads YAML 1.1: ``yes`` and ``on`` as true, 010 as 8, 12:30 as 750, 1e-4 as text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node)).lower()
        try:
            if node.tag.endswith(":int"):
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, "this is no number", node.start_mark
            ) from error


_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.number)


def parse(text: str) -> tuple[Any, yaml.Node | None]:
    """Return what a YAML text says, and its nodes, which know their lines.

    Raises:
        yaml.YAMLError: It is not YAML, or nothing that a recipe can hold.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_loops(node, set(), set())
        return loader.construct_document(node), node
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, LookupError, AttributeError) as error:
        # What a constructor does with a tag that does not fit its text, `!!bool maybe`.
        raise yaml.YAMLError(f"a value does not fit its tag ({error})") from error
    finally:
        loader.dispose()


def _refuse_loops(node: yaml.Node, above: set[int], seen: set[int]) -> None:
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an anchor holds itself", node.start_mark
        )
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
    for pair in pairs:
        for inner in pair:
            _refuse_loops(inner, above | {id(node)}, seen)
