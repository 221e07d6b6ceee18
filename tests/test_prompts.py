"""Data sources to prompts, pairs and labelled answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.config import PromptsConfig, SourceConfig
from equipoise.data.pairs import load_labelled, load_pairs
from equipoise.data.prompts import check_lengths, load_prompts
from equipoise.data.shapes import parse_transcript
from equipoise.data.sources import Row, draw, read_items
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.types import Message, Prompt

USER = [{"role": "user", "content": "How do I wax a lamp?"}]


def read_rows(source: SourceConfig, *, data: Path | None) -> list[Row]:
    return read_items(source, lambda row, _: row, data=data)


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def config(train: str, test: str, **more: Any) -> PromptsConfig:
    limits = {name: more.pop(name, None) for name in ("train_limit", "test_limit")}
    return PromptsConfig(
        train=[SourceConfig(source=train, limit=limits["train_limit"])],
        test=[SourceConfig(source=test, limit=limits["test_limit"])],
        **more,
    )


def one(tmp_path: Path, row: dict[str, Any]) -> Prompt:
    write(tmp_path / "one.jsonl", [row])
    write(tmp_path / "other.jsonl", [{"prompt": "Something else"}])
    found = load_prompts(config("one.jsonl", "other.jsonl"), data=tmp_path, seed=0)
    return found[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": USER},
        {"messages": [*USER, {"role": "assistant", "content": "Gladly."}]},
        {"prompt": "How do I wax a lamp?"},
        {"prompt": USER},
        {"prompt": "\n\nHuman: How do I wax a lamp?\n\nAssistant:"},
        {"prompt": "Human: How do I wax a lamp?\n\nAssistant: Gladly."},
        {"instruction": "How do I wax a lamp?", "input": "", "output": "Gladly."},
        {"chosen": "\n\nHuman: How do I wax a lamp?\n\nAssistant: Yes", "rejected": "…"},
        {"conversations": None, "messages": [{"from": "human", "value": "How do I wax a lamp?"}]},
    ],
)
def test_common_shapes_give_the_same_prompt(tmp_path: Path, row: dict[str, Any]) -> None:
    found = one(tmp_path, row)
    assert found.messages == (Message("user", "How do I wax a lamp?"),)
    assert found.id == f"one-{prompt_key(found.messages)[:16]}"
    assert (found.split, found.source) == ("train", "one.jsonl")


def test_turns_before_the_last_user_turn_stay(tmp_path: Path) -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Wax:\n\nbees or palm?\n\nAssistant: Bees"
    assert [(m.role, m.content) for m in one(tmp_path, {"prompt": text}).messages] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Wax:\n\nbees or palm?"),
    ]


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    found = one(tmp_path, {"instruction": "Shorten.", "input": "A long lamp."})
    assert found.messages[0].content == "Shorten.\n\nA long lamp."


@pytest.mark.parametrize(
    "text", ["Human: is this a word?", "What does Assistant: mean?", "", "a\n\nHuman: b"]
)
def test_plain_text_is_no_transcript(text: str) -> None:
    assert parse_transcript(text) is None


def test_label_is_kept(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": "Hi", "label": "safe"}).label == "safe"
    assert one(tmp_path, {"prompt": "Hi", "label": 3}).label == ""


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_file_kinds(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"Question {i} with \u2028 in it"} for i in range(3)]
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        write(tmp_path / name, rows)
    assert read_rows(SourceConfig(source=name), data=tmp_path) == rows


def test_relative_source_is_looked_up_in_data_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(tmp_path / "cwd" / "a.jsonl", [{"prompt": "from cwd"}])
    assert read_rows(SourceConfig(source="a.jsonl"), data=tmp_path / "data")[0]["prompt"] == (
        "from cwd"
    )
    write(tmp_path / "data" / "a.jsonl", [{"prompt": "from data"}])
    assert read_rows(SourceConfig(source="a.jsonl"), data=tmp_path / "data")[0]["prompt"] == (
        "from data"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', "Line 2"),
        ("[1]\n", "Line 1 is not"),
        ('{"question": "a", "id": 1}\n', "id, question"),
        ('{"messages": []}\n', "row 1 has no user turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "row 1 has no user turn"),
        ('{"prompt": "fine"}\n{"prompt": " "}\n', "row 2 has no user turn"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}\n', "a turn cannot be read"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "a turn cannot be read"),
        ('{"prompt": 3}\n', "a int is no chat"),
    ],
)
def test_bad_prompt_file_is_refused_with_the_place(tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    write(tmp_path / "other.jsonl", [{"prompt": "Something else"}])
    with pytest.raises(DataError, match=what):
        load_prompts(config("bad.jsonl", "other.jsonl"), data=tmp_path, seed=0)


@pytest.mark.parametrize("name", ["no.jsonl", "no.jsonl.gz", "/no/where", "no.parquet"])
def test_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="No data file"):
        read_rows(SourceConfig(source=name), data=tmp_path)


def test_datasets_name_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, *, split: str) -> datasets.Dataset:
        if name != "owner/name":
            raise FileNotFoundError(f"no {name}")
        return datasets.Dataset.from_list([{"prompt": split, "label": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceConfig(source="owner/name", split="validation")
    assert read_rows(source, data=None) == [{"prompt": "validation", "label": None}]
    with pytest.raises(DataError, match="No data set owner/other"):
        read_rows(SourceConfig(source="owner/other"), data=None)


def test_damaged_gzip_and_parquet_are_refused(tmp_path: Path) -> None:
    inside = bytearray(gzip.compress(b'{"prompt": "a"}\n' * 50))
    inside[15] ^= 0xFF
    damaged = {"a.jsonl.gz": b"nonsense", "b.jsonl.gz": bytes(inside), "a.parquet": b"nonsense"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="Cannot read"):
            read_rows(SourceConfig(source=name), data=tmp_path)


def test_where_keeps_rows_and_names_a_missing_field(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a", "ok": True}, {"prompt": "b", "ok": False}])
    kept = read_rows(SourceConfig(source="a.jsonl", where={"ok": "true"}), data=tmp_path)
    assert [row["prompt"] for row in kept] == ["a"]
    with pytest.raises(DataError, match="no field kind"):
        read_rows(SourceConfig(source="a.jsonl", where={"kind": "x"}), data=tmp_path)
    with pytest.raises(DataError, match="No row"):
        read_rows(SourceConfig(source="a.jsonl", where={"ok": "maybe"}), data=tmp_path)


def test_one_file_serves_both_splits_without_overlap(tmp_path: Path) -> None:
    texts = [f"Question {i % 30}" for i in range(40)] + ["  QUESTION 3\n", "question 4"]
    write(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    settings = config("a.jsonl", "a.jsonl", train_limit=12, test_limit=10, n_dev=4)
    found = load_prompts(settings, data=tmp_path, seed=7)
    assert [p.split for p in found] == ["train"] * 8 + ["dev"] * 4 + ["test"] * 10
    keys = {prompt_key(p.messages) for p in found}
    assert len(keys) == len({p.id for p in found}) == len(found)
    assert load_prompts(settings, data=tmp_path, seed=7) == found
    other = load_prompts(settings, data=tmp_path, seed=8)
    assert other != found
    by_key = {prompt_key(p.messages): p.id for p in other}
    assert all(by_key.get(prompt_key(p.messages), p.id) == p.id for p in found)


def test_test_prompts_leave_the_training_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": t} for t in ("A", "b", "c  d", "e")])
    write(tmp_path / "test.jsonl", [{"prompt": t} for t in ("a ", "C d", "z")])
    found = load_prompts(config("train.jsonl", "test.jsonl"), data=tmp_path, seed=0)
    train = [p.messages[0].content for p in found if p.split == "train"]
    assert train == ["b", "e"]
    write(tmp_path / "train.jsonl", [{"prompt": "A"}])
    with pytest.raises(DataError, match="Too few prompts"):
        load_prompts(config("train.jsonl", "test.jsonl"), data=tmp_path, seed=0)


def test_no_training_prompt_left_beside_dev_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(5)])
    with pytest.raises(DataError, match="Too few prompts"):
        load_prompts(config("a.jsonl", "a.jsonl", test_limit=2, n_dev=3), data=tmp_path, seed=0)


@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 5))
def test_draw_keeps_order_and_size(n: int, limit: int, seed: int) -> None:
    source = SourceConfig(source="x", limit=limit)
    drawn = draw(list(range(n)), source, seed=seed)
    assert drawn == sorted(set(drawn)) and len(drawn) == min(n, limit)


class Lengths:
    """An encoder whose prompt length is that of the text."""

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        return [0] * len(messages[-1].content)


def test_long_prompts_are_refused_or_dropped() -> None:
    prompts = [Prompt(t, (Message("user", t),), "train", "s") for t in ("ab", "abc", "abcd")]
    settings = config("x", "y", max_prompt_tokens=3)
    with pytest.raises(DataError, match=r"1 prompts are longer than 3 tokens[\s\S]*abcd of s"):
        check_lengths(prompts, Lengths(), settings)  # type: ignore[arg-type]
    dropping = settings.model_copy(update={"on_long_prompt": "drop"})
    kept = check_lengths(prompts, Lengths(), dropping)  # type: ignore[arg-type]
    assert [p.id for p in kept] == ["ab", "abc"]
    none = dropping.model_copy(update={"max_prompt_tokens": 1})
    with pytest.raises(DataError, match="longer than 1"):
        check_lengths(prompts, Lengths(), none)  # type: ignore[arg-type]


HEAD = "\n\nHuman: Wax?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Wax?", "chosen": "yes", "rejected": "no"},
        {"messages": [{"role": "user", "content": "Wax?"}], "chosen": "yes", "rejected": "no"},
        {"chosen": f"{HEAD} yes", "rejected": f"{HEAD} no"},
        {"prompt": HEAD, "chosen": " yes".strip(), "rejected": "no"},
        {
            side: [{"role": "user", "content": "Wax?"}, {"role": "assistant", "content": text}]
            for side, text in (("chosen", "yes"), ("rejected", "no"))
        },
        {
            "prompt": [{"role": "user", "content": "Wax?"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
    ],
)
def test_pair_shapes(tmp_path: Path, row: dict[str, Any]) -> None:
    write(tmp_path / "p.jsonl", [row])
    (pair,) = load_pairs([SourceConfig(source="p.jsonl")], data=tmp_path)
    assert pair.prompt.messages == (Message("user", "Wax?"),)
    assert (pair.chosen, pair.rejected) == ("yes", "no")


def test_useless_pairs_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"chosen": f"{HEAD} yes", "rejected": f"{HEAD} no"}
    useless = [
        {"prompt": "Wax?", "chosen": "same", "rejected": "same"},
        {"prompt": "Wax?", "chosen": "", "rejected": "no"},
        {"chosen": f"{HEAD} yes", "rejected": "\n\nHuman: Oil?\n\nAssistant: no"},
    ]
    write(tmp_path / "p.jsonl", [*useless, good])
    assert len(load_pairs([SourceConfig(source="p.jsonl")], data=tmp_path)) == 1
    assert "3 pairs left out" in caplog.text
    write(tmp_path / "p.jsonl", useless)
    with pytest.raises(DataError, match="No usable pair"):
        load_pairs([SourceConfig(source="p.jsonl")], data=tmp_path)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b"}, "unknown shape"),
        ({"chosen": "b", "rejected": "c"}, "has no prompt"),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    write(tmp_path / "p.jsonl", [row])
    with pytest.raises(DataError, match=what):
        load_pairs([SourceConfig(source="p.jsonl")], data=tmp_path)


@pytest.mark.parametrize(
    ("labels", "min_score", "wanted"),
    [
        ([{"score": 1}, {"score": 0}], None, [1.0, 0.0]),
        ([{"is_safe": True}, {"is_safe": False}], None, [1.0, 0.0]),
        ([{"label": "unsafe"}, {"label": "Safe"}], None, [0.0, 1.0]),
        ([{"score": 2}, {"score": 6}, {"score": 3}], None, [0.0, 1.0, 0.25]),
        ([{"score": s, "score_min": 1, "score_max": 5} for s in (2, 4)], None, [0.25, 0.75]),
        ([{"score": s, "score_min": 1, "score_max": 5} for s in (2, 4)], 3.0, [0.0, 1.0]),
    ],
)
def test_labels_are_brought_to_the_unit_interval(
    tmp_path: Path, labels: list[dict[str, Any]], min_score: float | None, wanted: list[float]
) -> None:
    rows = [{"prompt": f"q{i}", "response": "yes", **label} for i, label in enumerate(labels)]
    write(tmp_path / "l.jsonl", rows)
    source = SourceConfig(source="l.jsonl", min_score=min_score)
    assert [a.score for a in load_labelled([source], data=tmp_path)] == wanted


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"prompt": "a", "response": "b"}], "unknown shape"),
        ([{"prompt": "a", "score": 1}], "unknown shape"),
        ([{"prompt": "a", "response": "b", "label": "meh"}], "no score"),
        ([{"prompt": "a", "response": "b", "score": 1}] * 2, "teach nothing"),
        (
            [{"prompt": "a", "response": "b", "score": s, "score_max": 1} for s in (0, 5)],
            "teach nothing",
        ),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, rows: list[Any], what: str) -> None:
    write(tmp_path / "l.jsonl", rows)
    with pytest.raises(DataError, match=what):
        load_labelled([SourceConfig(source="l.jsonl")], data=tmp_path)


def test_no_message_shows_text_of_a_prompt(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "SECRET words"}, {"other": "SECRET words"}])
    with pytest.raises(DataError) as caught:
        load_prompts(config("a.jsonl", "a.jsonl"), data=tmp_path, seed=0)
    assert "SECRET" not in str(caught.value)
