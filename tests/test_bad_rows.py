"""Rows that cannot be used: each is named by source and number, and left out on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from equipoise.config import PromptsConfig, SourceConfig
from equipoise.data.dialogues import load_rows
from equipoise.data.pairs import load_labelled, load_pairs
from equipoise.data.prompts import check_lengths, load_prompts
from equipoise.data.sources import Row, Skipped, read_items
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError
from equipoise.store.shards import rows_to_jsonl, rows_to_parquet
from equipoise.types import Message, Prompt
from pipeline_kit import TEMPLATE, build_tokenizer

USER = [{"role": "user", "content": "How do I wax a lamp?"}]
BOM = b"\xef\xbb\xbf"


def read_rows(source: SourceConfig, *, data: Path | None) -> list[Row]:
    return read_items(source, lambda row, _: row, data=data)


def write(file: Path, *rows: Any) -> str:
    """Write JSON lines; bytes and texts stand for lines as they are."""
    lines = [row if isinstance(row, bytes) else text(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file.name


def text(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def prompts_of(folder: Path, *rows: Any, **source: Any) -> list[Prompt]:
    """Load the training prompts of some rows."""
    found, _ = loaded(folder, *rows, **source)
    return [prompt for prompt in found if prompt.split == "train"]


def loaded(folder: Path, *rows: Any, **source: Any) -> tuple[list[Prompt], PromptsConfig]:
    write(folder / "test.jsonl", {"prompt": "Something else"})
    train = SourceConfig(source=write(folder / "a.jsonl", *rows), **source)
    config = PromptsConfig(train=[train], test=[SourceConfig(source="test.jsonl")])
    return load_prompts(config, data=folder, seed=0), config


def first_turns(folder: Path, row: Any) -> tuple[Message, ...]:
    return prompts_of(folder, row)[0].messages


@pytest.fixture(scope="module")
def strict() -> Encoder:
    """An encoder whose template wants the user to begin."""
    tokenizer = build_tokenizer()
    refuse = "{{ raise_exception('begin with the user') }}"
    tokenizer.chat_template = (
        f"{{% if messages[0].role != 'user' %}}{refuse}{{% endif %}}{TEMPLATE}"
    )
    return Encoder(tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    lines = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(BOM + lines.encode())
    assert read_rows(SourceConfig(source=name), data=tmp_path) == rows
    # Two such files, one behind the other.
    write(tmp_path / "b.jsonl", BOM + b'{"prompt": "a"}', BOM + b'{"prompt": "b"}')
    assert read_rows(SourceConfig(source="b.jsonl"), data=tmp_path) == rows


def test_where_looks_at_all_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "label": "unsafe"}, {"prompt": "c", "label": "safe"}]
    write(tmp_path / "a.jsonl", *rows)
    source = SourceConfig(source="a.jsonl", where={"label": "unsafe"})
    assert read_rows(source, data=tmp_path) == [rows[1]]
    with pytest.raises(DataError, match="no field lable"):
        read_rows(SourceConfig(source="a.jsonl", where={"lable": "unsafe"}), data=tmp_path)


def test_a_row_has_the_number_it_has_in_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "label": "unsafe"}, {"prompt": " ", "label": "unsafe"}]
    with pytest.raises(DataError, match=r"a\.jsonl, row 3 has no user turn"):
        prompts_of(tmp_path, *rows, where={"label": "unsafe"})


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_messages_as_json_text_are_messages(tmp_path: Path, field: str) -> None:
    turns = [{"content": "Be kind.", "role": "system"}, *USER]
    asked = (Message("system", "Be kind."), Message("user", "How do I wax a lamp?"))
    assert first_turns(tmp_path, {field: json.dumps(turns)}) == asked


def test_json_text_of_a_parquet_export_is_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"messages": json.dumps(USER)}])
    parquet.write_table(table, tmp_path / "a.parquet")
    config = PromptsConfig(
        train=[SourceConfig(source="a.parquet")], test=[SourceConfig(source="t.jsonl")]
    )
    write(tmp_path / "t.jsonl", {"prompt": "Something else"})
    assert load_prompts(config, data=tmp_path, seed=0)[0].messages[0].content == USER[0]["content"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "[{'role': 'user', 'content': 'SECRET'}]"},
        {"prompt": "[{'content': 'SECRET', 'role': 'user'}\n {'content': 'b', 'role': 'user'}]"},
        {"messages": '{"role": "user", "content": "SECRET"}'},
        {"messages": '[["SECRET"]]'},
        {"messages": "[SECRET"},
        {"messages": '[{"role": "tool", "content": "SECRET"}]'},
    ],
)
def test_text_that_should_have_been_turns_is_never_asked(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, row 2") as caught:
        prompts_of(tmp_path, {"prompt": "fine"}, row)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "asked",
    ["[1, 2, 3] in order?", '[{"role": "user"}] is what?', "{x} and {y}", "[{'a': 1}]", "[]"],
)
def test_text_that_only_looks_like_turns_stays_text(tmp_path: Path, asked: str) -> None:
    assert first_turns(tmp_path, {"prompt": asked}) == (Message("user", asked),)


def test_developer_turns_are_system_turns(tmp_path: Path) -> None:
    row = {"messages": [{"role": "developer", "content": "Be kind."}, *USER]}
    assert first_turns(tmp_path, row)[0] == Message("system", "Be kind.")


def test_parts_that_are_all_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "How do I "}, {"type": "text", "text": "wax?"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert first_turns(tmp_path, row) == (Message("user", "How do I wax?"),)
    parts[1] = {"type": "image_url", "image_url": "x"}  # type: ignore[dict-item]
    with pytest.raises(DataError, match=r"row 1: a turn cannot be read"):
        prompts_of(tmp_path, row)


DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("chosen", [DIALOGUE, TURNS, json.dumps(TURNS)])
def test_a_dialogue_in_chosen_has_to_continue_the_prompt(tmp_path: Path, chosen: Any) -> None:
    pairs = [SourceConfig(source="p.jsonl")]
    write(tmp_path / "p.jsonl", {"prompt": "Hi", "chosen": chosen, "rejected": "no"})
    (pair,) = load_pairs(pairs, data=tmp_path)
    assert (pair.prompt.messages, pair.chosen) == ((Message("user", "Hi"),), "hello")
    other = {"prompt": "write a dialogue", "chosen": chosen, "rejected": "no"}
    write(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, other)
    with pytest.raises(DataError, match=r"p\.jsonl, row 2: the answer is a dialogue with another"):
        load_pairs(pairs, data=tmp_path)
    with pytest.raises(DataError, match=r"p\.jsonl, row 2: the answer is a dialogue with another"):
        load_rows(pairs, n_rows=1, data=tmp_path, seed=0)


@pytest.mark.parametrize("bound", ["low", [1], 10**400, float("nan")])
def test_an_end_of_the_scale_is_a_number(tmp_path: Path, bound: Any) -> None:
    rows = [{"prompt": f"{i}", "response": "g", "score": i, "score_max": 2} for i in range(2)]
    write(tmp_path / "e.jsonl", *rows, {**rows[1], "score_min": bound})
    source = SourceConfig(source="e.jsonl")
    with pytest.raises(DataError, match=r"e\.jsonl, row 3 has a `score_min` that is no number"):
        load_labelled([source], data=tmp_path)


def test_a_score_is_finite(tmp_path: Path) -> None:
    write(tmp_path / "e.jsonl", *({"prompt": "a", "response": "b", "score": s} for s in (0, 1e999)))
    with pytest.raises(DataError, match=r"row 2 has a label that is no score"):
        load_labelled([SourceConfig(source="e.jsonl")], data=tmp_path)


DEEP = '{"prompt": "a", "x": ' + "[" * 99_999 + "]" * 99_999 + "}"
SURROGATE = '{"prompt": "half \\ud83d?"}'
BAD_LINES = [DEEP, SURROGATE, b'{"prompt": "\xff"}', "[1]", '{"prompt": ', '{"question": "a"}']


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_row_stops_or_is_skipped_and_counted(tmp_path: Path, line: Any) -> None:
    rows = ({"prompt": "fine"}, line, {"prompt": "fine too"})
    with pytest.raises(DataError, match=r"a\.jsonl, row 2.*") as caught:
        prompts_of(tmp_path, *rows)
    assert "on_bad_row: skip" in caught.value.fix
    write(tmp_path / "t.jsonl", {"prompt": "Something else"})
    source = SourceConfig(source=write(tmp_path / "a.jsonl", *rows), on_bad_row="skip")
    config = PromptsConfig(train=[source], test=[SourceConfig(source="t.jsonl")])
    skipped = Skipped()
    found = load_prompts(config, data=tmp_path, seed=0, skipped=skipped)
    assert [prompt.messages[0].content for prompt in found[:2]] == ["fine", "fine too"]
    assert skipped.count == 1
    assert skipped.facts()["first"][0].startswith("a.jsonl, row 2: ")


def test_a_file_of_two_splits_counts_its_bad_row_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": " "}, {"prompt": "b"})
    sources = [SourceConfig(source="a.jsonl", limit=1, on_bad_row="skip")]
    skipped = Skipped()
    load_prompts(PromptsConfig(train=sources, test=sources), data=tmp_path, seed=0, skipped=skipped)
    assert skipped.count == 1


def test_no_source_is_skipped_as_a_whole(tmp_path: Path, strict: Encoder) -> None:
    with pytest.raises(DataError, match=r"No row of a\.jsonl can be used[\s\S]*All 2 were skipped"):
        prompts_of(tmp_path, {"prompt": " "}, {"prompt": ""}, on_bad_row="skip")
    row = {"messages": [{"role": "system", "content": "Be kind."}, *USER]}
    found, config = loaded(tmp_path, row, on_bad_row="skip")
    with pytest.raises(DataError, match=r"No row of a\.jsonl can be used"):
        check_lengths(found, strict, config)


def test_an_order_of_turns_that_the_template_refuses_is_named_or_skipped(
    tmp_path: Path, strict: Encoder
) -> None:
    rows = ({"prompt": "a"}, {"messages": [{"role": "assistant", "content": "x"}, *USER]})
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: the chat template refuses"):
        check_lengths(loaded(tmp_path, *rows)[0], strict, loaded(tmp_path, *rows)[1])
    found, config = loaded(tmp_path, *rows, on_bad_row="skip")
    skipped = Skipped()
    kept = check_lengths(found, strict, config, skipped=skipped)
    assert [prompt.messages[0].content for prompt in kept] == ["a", "Something else"]
    assert skipped.count == 1
    assert "begin with the user" in skipped.facts()["first"][0]


def test_a_long_prompt_is_named_by_its_row(tmp_path: Path, strict: Encoder) -> None:
    found, config = loaded(tmp_path, {"prompt": "a"}, {"prompt": "long " * 600})
    with pytest.raises(DataError, match=r"the first is a\.jsonl, row 2\."):
        check_lengths(found, strict, config)


def test_rows_of_later_stages_are_named_too(tmp_path: Path, strict: Encoder) -> None:
    from equipoise.alignment.sft import encode_rows

    turns = [{"role": "system", "content": "Be kind."}, *TURNS]
    write(tmp_path / "s.jsonl", {"messages": turns})
    rows = load_rows([SourceConfig(source="s.jsonl")], n_rows=1, data=tmp_path, seed=0)
    with pytest.raises(DataError, match=r"s\.jsonl, row 1: the chat template refuses"):
        encode_rows(rows, strict, max_length=99, answers_only=True)


def test_the_number_of_a_row_is_in_no_file(tmp_path: Path) -> None:
    (prompt,) = prompts_of(tmp_path, {"prompt": "a"})
    assert prompt.row == 1
    bare = Prompt(prompt.id, prompt.messages, prompt.split, prompt.source, prompt.label)
    assert bare == prompt
    assert rows_to_jsonl([bare]) == rows_to_jsonl([prompt])
    assert rows_to_parquet([bare], Prompt) == rows_to_parquet([prompt], Prompt)
