"""The size and shape of the source: limits that may only tighten.

What is above a limit today stands in ``house.toml`` with its size. An entry that is larger than
what is there, or needed no longer, fails too: so the lists only shrink. To take over what shrank:
``python tests/test_house.py``. It never adds or raises; a raise is written by hand, as
``{ size = N, reason = "..." }``.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/equipoise"
LISTS = Path(__file__).parent / "house.toml"
SLACK = 250
"""Lines that the budget of ``src`` may lie above what is there, modules a hundredth of that."""
NAMES = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}
"""Import name to distribution, where they differ."""

Sizes = dict[str, int]


def house() -> dict[str, Any]:
    return tomllib.loads(LISTS.read_text("utf-8"))


def sources() -> Iterator[tuple[str, ast.Module, int]]:
    """Name below the package, tree and number of lines of every file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text("utf-8")
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(text), len(text.splitlines())


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Dotted name, node, and whether it is a method, of every function."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{inside}.{node.name}" if inside else node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node, isinstance(tree, ast.ClassDef)
        yield from functions(node, name)


def file_lines() -> Sizes:
    return {name: lines for name, _, lines in sources()}


def function_lines() -> Sizes:
    return {
        f"{file}:{name}": node.end_lineno - node.lineno + 1
        for file, tree, _ in sources()
        for name, node, _ in functions(tree)
    }


def arguments() -> Sizes:
    """Of public functions; a constructor is as public as its class."""
    found = {}
    for file, tree, _ in sources():
        for name, node, is_method in functions(tree):
            parts = [part for part in name.split(".") if part not in ("__init__", "__call__")]
            if any(part.startswith("_") for part in parts):
                continue
            static = any(getattr(item, "id", "") == "staticmethod" for item in node.decorator_list)
            given = node.args
            count = len(given.posonlyargs + given.args + given.kwonlyargs)
            found[f"{file}:{name}"] = count - (is_method and not static)
    return found


def config_fields() -> Sizes:
    """Of the recipe's classes, inherited fields included."""
    import equipoise.config as config

    kinds = [kind for kind in vars(config).values() if isinstance(kind, type)]
    return {
        kind.__name__: len(kind.model_fields) for kind in kinds if issubclass(kind, config.Config)
    }


MEASURES = {
    "file_lines": file_lines,
    "function_lines": function_lines,
    "arguments": arguments,
    "config_fields": config_fields,
}


def size(entry: Any) -> int:
    return int(entry["size"] if isinstance(entry, dict) else entry)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_grows_above_its_limit(measure: str) -> None:
    lists, found = house(), MEASURES[measure]()
    assert len(found) > 5
    limit, listed = lists["limits"][measure], lists[measure]
    above = {name: n for name, n in found.items() if n > limit}
    assert above == {name: size(entry) for name, entry in listed.items()}


def budget() -> Sizes:
    lines = file_lines()
    modules = [name for name in lines if not name.endswith("__init__.py")]
    return {"src_lines": sum(lines.values()), "src_modules": len(modules)}


def test_the_source_stays_within_its_budget() -> None:
    allowed = {name: size(entry) for name, entry in house()["budget"].items()}
    found = budget()
    assert found.keys() == allowed.keys()
    assert all(found[name] <= allowed[name] for name in found), found
    assert allowed["src_lines"] - found["src_lines"] <= SLACK, "lower the budget"
    assert allowed["src_modules"] - found["src_modules"] <= SLACK // 100, "lower the budget"


def test_an_entry_that_was_raised_has_a_reason() -> None:
    entries = [item for part in house().values() for item in part.values()]
    for entry in entries:
        assert isinstance(entry, int | list) or entry["reason"].strip(), entry


def layers() -> dict[str, int]:
    """Module (or its first part) to layer, as CONTRIBUTING lists them."""
    listed = re.findall(r"^(\d+)\. (`.+)$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    return {
        name.replace("/", "."): int(number)
        for number, names in listed
        for name in re.findall(r"`([\w/]+)`", names)
    }


def layer(module: str, known: dict[str, int]) -> int | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((known[prefix] for prefix in prefixes if prefix in known), None)


def imported(tree: ast.AST) -> Iterator[str]:
    """What a file imports, wherever in it: modules, and names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{item.name}" for item in node.names)


def modules() -> set[str]:
    found = set()
    for name in file_lines():
        parts = name.removesuffix(".py").removesuffix("/__init__").split("/")
        found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return found


def upwards() -> list[str]:
    """Every import of a module of the same or a higher layer, outside the own package."""
    known, every, wrong = layers(), modules(), set()
    for file, tree, _ in sources():
        own = file.removesuffix(".py").replace("/", ".")
        if own in ("__init__", "__main__"):
            continue  # the package's face, above all
        mine = layer(own, known)
        assert mine is not None, f"{own} stands in no layer of CONTRIBUTING.md"
        for name in imported(tree):
            if not name.startswith("equipoise."):
                continue
            target = name.removeprefix("equipoise.")
            while target and target not in every:
                target = target.rpartition(".")[0]
            theirs = layer(target, known)
            if target and target.split(".")[0] != own.split(".")[0]:
                assert theirs is not None, f"{target} stands in no layer of CONTRIBUTING.md"
                if theirs >= mine:
                    wrong.add(f"{own} imports {target}")
    return sorted(wrong)


def test_imports_go_down_as_contributing_says() -> None:
    known = layers()
    assert known["types"] == 1 and known["cli"] > known["stages"]
    assert set(known) <= modules(), "a layer lists what is not there"
    assert upwards() == house()["layers"]["upwards"]


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"\W", name.replace("-", "_"))[0].lower() for name in wanted}
    pinned = (ROOT / "constraints.txt").read_text("utf-8").lower().replace("-", "_")
    found = {name.split(".")[0] for _, tree, _ in sources() for name in imported(tree)}
    found -= {*sys.stdlib_module_names, "equipoise"}
    needed = {NAMES.get(name, name).replace("-", "_").lower() for name in found}
    assert "torch" in needed
    assert needed - declared == set()
    used = sorted((needed | declared) - {"equipoise"})
    assert [name for name in used if f"\n{name}==" not in pinned] == []


def tightened() -> str:
    """The lists, with what shrank or went taken over."""
    lists = house()
    found = {name: measure() for name, measure in MEASURES.items()} | {"budget": budget()}
    for name, sizes in found.items():
        limit = lists["limits"].get(name, 0)
        for key, entry in list(lists[name].items()):
            now = sizes.get(key, 0)
            if now <= limit:
                del lists[name][key]
            elif now < size(entry):
                lists[name][key] = {**entry, "size": now} if isinstance(entry, dict) else now
    lists["layers"]["upwards"] = [x for x in lists["layers"]["upwards"] if x in upwards()]
    return written(lists)


def written(lists: dict[str, Any]) -> str:
    text = LISTS.read_text("utf-8").split("[", 1)[0]
    for part, entries in lists.items():
        text += f"[{part}]\n"
        for key, entry in entries.items():
            name = key if re.fullmatch(r"\w+", key) else f'"{key}"'
            value = str(entry)
            if isinstance(entry, list):
                value = "[\n" + "".join(f'    "{item}",\n' for item in entry) + "]"
            elif isinstance(entry, dict):
                value = f'{{ size = {entry["size"]}, reason = "{entry["reason"]}" }}'
            text += f"{name} = {value}\n"
        text += "\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    LISTS.write_text(tightened(), "utf-8")
