"""The start paradigm: base, fine-tuned and aligned models as stages of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import SFTTrainer

from equipoise.alignment.align import align_by_dpo, align_by_rlhf, weighted_reward
from equipoise.alignment.pretrain import new_model, train_tokenizer
from equipoise.alignment.sft import encode_rows, teach
from equipoise.config import (
    AlignConfig,
    PretrainConfig,
    RolloutConfig,
    SamplingConfig,
    SourceConfig,
)
from equipoise.data.dialogues import load_rows
from equipoise.encoding.encode import Encoder
from equipoise.errors import ConfigError, DataError, RunError, TrainingError
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_all, run_stage
from equipoise.progress import Progress
from equipoise.recipes.load import load_recipe
from equipoise.rlhf.online import log_probs
from equipoise.rlhf.rollouts import Ask
from equipoise.training.loop import Training
from equipoise.types import Message, PreferencePair, Prompt
from pipeline_kit import ITEMS, VERBS, blank_pictures, save_assets, tiny_recipe, write_recipe
from rlhf_kit import Constant, Scorer
from tuning_kit import kept_steps, prompt, tiny_policy

QUIET = Progress(quiet=True)


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def texts() -> list[dict[str, Any]]:
    return [{"text": f"{verb} the {item} and rest ."} for verb in VERBS for item in ITEMS]


def chats(answer: str = "take the {item} and {verb} it .") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"how do i {verb} the {item} ?"},
                {"role": "assistant", "content": answer.format(verb=verb, item=item)},
            ]
        }
        for verb in VERBS
        for item in ITEMS
    ]


def hh_pairs() -> list[dict[str, Any]]:
    """Preference pairs as hh-rlhf writes them; the refusal is preferred."""
    return [
        {
            "chosen": f"\n\nHuman: how do i {verb} the {item} ?\n\nAssistant: i will not .",
            "rejected": f"\n\nHuman: how do i {verb} the {item} ?\n\nAssistant: {verb} it .",
        }
        for verb in VERBS
        for item in ITEMS
    ]


def start_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    plain = tiny_recipe(save_assets(root / "assets"), **changes)
    small = {"batch_size": 8, "max_length": 64, "checkpoint_every": 2}
    plain["base"] = {
        "sources": [
            {"source": write_jsonl(root / "texts.jsonl", texts())},
            {"source": write_jsonl(root / "chats.jsonl", chats())},
        ],
        "vocabulary": 320,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "steps": 60,
        "learning_rate": 1e-2,
        **small,
    }
    plain["sft"] = {"sources": [{"source": str(root / "chats.jsonl")}], "steps": 6, **small}
    plain["align"] = {
        "sources": [{"source": write_jsonl(root / "pairs.jsonl", hh_pairs())}],
        "steps": 6,
        **small,
    }
    plain["model"] = "made://align"
    return plain


def opened(root: Path, plain: dict[str, Any], *, fresh: bool = False) -> Any:
    recipe = load_recipe(str(write_recipe(root / "recipe.yaml", plain)))
    return RunDir.open(root / "run", recipe, fresh=fresh)


# Rows


def source(root: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> list[SourceConfig]:
    return [SourceConfig(source=write_jsonl(root / "rows.jsonl", rows), **changes)]


def test_rows_of_every_shape(tmp_path: Path) -> None:
    rows = [
        {"text": "plain words ."},
        {"text": "  "},
        *chats()[:1],
        {"prompt": "and now ?", "completion": "rest ."},
        {"instruction": "Say yes.", "output": "yes"},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        *hh_pairs()[:1],
    ]
    found = load_rows(source(tmp_path, rows), n_rows=9, data=None, seed=0)
    plain = [row for row in found if isinstance(row, str)]
    dialogues = {(row[0].messages[-1].content, row[1]) for row in found if not isinstance(row, str)}
    assert plain == ["plain words ."]
    assert dialogues == {
        ("how do i mend the kettle ?", "take the kettle and mend it ."),
        ("how do i mend the kettle ?", "i will not ."),  # the better side of the pair
        ("and now ?", "rest ."),
        ("Say yes.", "yes"),
    }
    assert len(found) == 5


def test_rows_are_drawn_and_shuffled_by_the_seed(tmp_path: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        return load_rows(source(tmp_path, texts(), limit=9), n_rows=0, data=None, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 9


def test_the_workshop_writes_as_many_rows_as_are_asked_for() -> None:
    endless = [SourceConfig(source="workshop://base")]
    assert len(load_rows(endless, n_rows=12, data=None, seed=0)) == 12
    with pytest.raises(DataError, match="no text 'train'"):
        load_rows([SourceConfig(source="workshop://train")], n_rows=1, data=None, seed=0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"text": ""}], "No usable row"), ([{"body": "words"}], "unknown shape")],
)
def test_rows_without_text_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load_rows(source(tmp_path, rows), n_rows=1, data=None, seed=0)


def test_what_is_learnt_of_a_row() -> None:
    policy = tiny_policy()
    asked = Prompt("p", (Message("user", "who ?"),), "train")
    head, answer = policy.encoder.prompt_ids(asked.messages), "me <|im_end|> ."
    rows = [(asked, answer)]
    (whole,) = encode_rows(rows, policy.encoder, max_length=99, answers_only=False)
    (last,) = encode_rows(rows, policy.encoder, max_length=99, answers_only=True)
    assert whole[0] == whole[1] == last[0]
    assert whole[0][-1] == policy.encoder.eos_id
    assert last[1] == [-100] * len(head) + last[0][len(head) :]
    # A marker in the text is text: the end stands at the end only.
    assert last[0][len(head) :].count(policy.encoder.eos_id) == 1
    with pytest.raises(DataError, match="plain text"):
        encode_rows(["words"], policy.encoder, max_length=99, answers_only=True)
    with pytest.raises(DataError, match="short enough"):
        encode_rows(rows, policy.encoder, max_length=3, answers_only=True)


# Training


def test_teaching_is_exact_after_a_stop_and_stops_on_an_infinite_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [(prompt(i), f"number {i} it is") for i in range(12)]
    config = PretrainConfig(
        sources=[SourceConfig(source="x")], steps=6, batch_size=4, checkpoint_every=2
    )

    class StoppedError(Exception):
        pass

    class LostTrainer(SFTTrainer):  # type: ignore[misc, unused-ignore]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            lost = self.state.global_step == 3
            # The gradient of the sum stays finite.
            return super().compute_loss(*args, **kwargs) + (torch.inf if lost else 0.0)

    def run(folder: str, *, stop: int = 0) -> tuple[LoadedPolicy, Any]:
        policy = tiny_policy()

        def on_step(done: int, _: int) -> None:
            if done == stop:
                raise StoppedError

        curve = teach(
            policy.model,
            policy.tokenizer,
            encode_rows(rows, policy.encoder, max_length=99, answers_only=True),
            config,
            training=Training(tmp_path / folder, seed=1, on_step=on_step),
        )
        return policy, curve

    whole, curve = run("whole")
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[-1]["loss"] < curve[0]["loss"]
    with pytest.raises(StoppedError):
        run("cut", stop=3)
    resumed, again = run("cut")
    assert [row["loss"] for row in again] == [row["loss"] for row in curve]
    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    monkeypatch.setattr("equipoise.alignment.sft.SFTTrainer", LostTrainer)
    with pytest.raises(TrainingError, match="step 4: the loss is not finite"):
        run("spoilt")
    assert kept_steps(tmp_path / "spoilt") == [2]


def likelihood(policy: LoadedPolicy, asked: Prompt, answer: str) -> float:
    head = policy.encoder.prompt_ids(asked.messages)
    ids = policy.encoder.completion_ids(answer, finished=True)
    batch = torch.tensor([[*head, *ids]])
    with torch.no_grad():
        found, _ = log_probs(policy.model, batch, torch.ones_like(batch), len(ids), temperature=1.0)
    return float(found.sum())


def align_config(**changes: Any) -> AlignConfig:
    plain: dict[str, Any] = {
        "sources": [SourceConfig(source="x")],
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "checkpoint_every": 100,
        **changes,
    }
    return AlignConfig(**plain)


def test_dpo_raises_what_is_preferred(tmp_path: Path) -> None:
    pairs = [PreferencePair(prompt(i), "no no no", "yes gladly") for i in range(16)]
    policy, before = tiny_policy(), tiny_policy()
    curve = align_by_dpo(
        policy,
        before,
        pairs,
        align_config(),
        training=Training(tmp_path, seed=1),
    )

    def lead(model: LoadedPolicy) -> float:
        return likelihood(model, prompt(3), "no no no") - likelihood(model, prompt(3), "yes gladly")

    assert lead(policy) > lead(before) + 1.0
    assert lead(before) == pytest.approx(lead(tiny_policy()))
    assert len(curve) == 12
    assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference agree
    with pytest.raises(DataError, match=r"align\.max_length"):
        align_by_dpo(
            policy,
            before,
            pairs,
            align_config(max_length=4),
            training=Training(tmp_path / "short", seed=1),
        )


def test_rlhf_raises_the_weighted_sum(tmp_path: Path) -> None:
    rlhf = RolloutConfig(group=8, kl_limit=50.0, sampling=SamplingConfig(max_tokens=6, top_k=0))
    config = align_config(
        method="rlhf", steps=30, batch_size=32, beta=1e-3, learning_rate=1e-2, rlhf=rlhf,
        weights={"vowels": 1.0, "digits": -0.5},
    )  # fmt: skip
    curve = align_by_rlhf(
        tiny_policy(),
        tiny_policy(),
        [prompt(i) for i in range(6)],
        {"vowels": Scorer("v", "aeiou"), "digits": Scorer("d", "0123456789")},
        config,
        training=Training(tmp_path, seed=1),
    )
    first, last = (sum(row["reward"] for row in part) / 8 for part in (curve[:8], curve[-8:]))
    assert last > first + 0.3


def test_the_weighted_reward_by_hand() -> None:
    own = [(prompt(0), text) for text in ("aaaa", "aaxx", "xxxx")]  # .1 .5 0: mean .5
    reward = weighted_reward({"a": Scorer("a", "a"), "b": Scorer("b", "x")}, {"b": 0.5}, own)
    spread = ((0.5**2 + 0 + 0.5**2) / 3) ** 0.5
    (found,) = reward([(Ask(prompt(1)), "aaax")])
    assert found == pytest.approx((0.75 - 0.5) / spread + 0.5 * (0.25 - 0.5) / spread)
    with pytest.raises(DataError, match="the same for all"):
        weighted_reward({"c": Constant("c", "")}, {}, own)


def test_a_base_model_says_what_it_read(tmp_path: Path) -> None:
    rows = load_rows(source(tmp_path, [*texts(), *chats()]), n_rows=0, data=None, seed=0)
    config = PretrainConfig(
        sources=[SourceConfig(source="x")], vocabulary=320, width=32, layers=2, heads=2, steps=80,
        batch_size=16, learning_rate=1e-2, max_length=64, checkpoint_every=100,
    )  # fmt: skip
    tokenizer = train_tokenizer(rows, 320)
    assert len(tokenizer) == 320
    encoder = Encoder(tokenizer)
    model = new_model(tokenizer, config, seed=0)
    encoded = encode_rows(rows, encoder, max_length=64, answers_only=False)
    curve = teach(
        model,
        tokenizer,
        encoded,
        config,
        training=Training(tmp_path / "c", seed=0),
    )
    assert curve[-1]["loss"] < 0.4 * curve[0]["loss"]
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    policy = load_causal(str(tmp_path / "m"))
    asked = Prompt("p", (Message("user", "how do i mend the kettle ?"),), "train")
    assert likelihood(policy, asked, "take the kettle and mend it .") > likelihood(
        policy, asked, "rest the it and mend kettle ."
    )


# Stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    plain = start_recipe(root)
    plain["fit_reward"] = {}
    with opened(root, plain) as run, blank_pictures():
        run_all(run, progress=QUIET)
    return root


def test_the_whole_run_from_raw_text(finished: Path) -> None:
    run = finished / "run"
    for stage in ("base", "sft", "align"):
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["steps"] == {"base": 60}.get(stage, 6)
        assert len(json.loads((run / stage / "curve.json").read_text())) == record["steps"]
        assert not (run / stage / "work").exists()
    report = json.loads((run / "report/report.json").read_text())
    assert report["recipe"]["model"] == "made://align"
    dials = json.loads((run / "tune/model/dials.json").read_text())
    assert dials["base_model"] == "made://align"
    weights = [load_causal(str(run / s / "model")).hash for s in ("base", "sft", "align")]
    assert len(set(weights)) == 3


def test_a_changed_alignment_keeps_the_base_model(finished: Path) -> None:
    plain = start_recipe(finished)
    plain["fit_reward"] = {}
    plain["align"]["steps"] = 3
    before = (finished / "run/base/stage.json").stat().st_mtime_ns
    with pytest.raises(RunError, match=r"align\.steps: 6 -> 3"), opened(finished, plain):
        pass
    with opened(finished, plain, fresh=True) as run:
        assert run.is_done("base") and run.is_done("sft")
        assert not run.is_done("align") and not run.is_done("generate")
        with pytest.raises(RunError, match="equipoise stage align"):
            run_stage("generate", run, progress=QUIET)
        run_stage("align", run, progress=QUIET)
        assert run.done("align").facts()["steps"] == 3
        assert "align" in run.minutes()
    assert (finished / "run/base/stage.json").stat().st_mtime_ns == before


def test_a_stage_says_which_one_it_waits_for(tmp_path: Path) -> None:
    with (
        opened(tmp_path, start_recipe(tmp_path)) as run,
        pytest.raises(RunError, match=r"stage sft of .* is not complete") as caught,
    ):
        run_stage("align", run, progress=QUIET)
    assert "run it first: equipoise stage base " in caught.value.fix
    assert "all that is missing (base, sft)" in caught.value.fix


def test_alignment_by_rlhf_as_a_stage(tmp_path: Path) -> None:
    plain = start_recipe(tmp_path)
    del plain["sft"]
    plain["base"]["steps"] = 20
    plain["align"] |= {
        "model": "made://base",
        "method": "rlhf",
        "sources": [{"source": str(tmp_path / "assets/train.jsonl")}],
        "rewards": {"helpfulness": {"model": str(tmp_path / "assets/rm_hp")}},
        "rlhf": {"group": 4, "kl_limit": 50, "sampling": {"max_tokens": 8}},
        "steps": 2,
    }
    with opened(tmp_path, plain) as run:
        run_stage("base", run, progress=QUIET)
        run_stage("align", run, progress=QUIET)
        assert run.done("align").facts()["method"] == "rlhf"
        curve = run.done("align").read_json("curve.json")
    assert [row["step"] for row in curve] == [1, 2]
    assert {"reward", "kl", "length", "tokens"} <= curve[0].keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sft": None}, "`made://sft`: this recipe makes base before"),
        ({"align": None}, "`made://align`: this recipe makes base, sft before"),
        ({"align": {"method": "rlhf"}}, "`align.rewards` is missing"),
        ({"align": {"method": "dqo"}}, "did you mean `dpo`"),
        # Those of `align` itself are read.
        ({"align": {"rlhf": {"beta": 0.5}}}, "unknown key `beta`"),
        ({"align": {"rlhf": {"learning_rate": 1e-5}}}, "unknown key `learning_rate`"),
        ({"base": {"widht": 3}}, "did you mean `width`"),
    ],
)
def test_recipes_that_contradict_themselves(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    plain = start_recipe(tmp_path)
    for name, part in change.items():
        plain[name] = None if part is None else {**plain[name], **part}
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(write_recipe(tmp_path / "recipe.yaml", plain)))
    assert said in caught.value.why


REAL = Path(os.environ.get("EQUIPOISE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real data; EQUIPOISE_DATA names one")
def test_a_few_steps_on_real_data(tmp_path: Path) -> None:
    plain = start_recipe(tmp_path)
    plain["data"] = str(REAL)
    few = {"steps": 2, "batch_size": 4, "max_length": 512}
    pairs = [{"source": "preferences/hh_helpful_train.jsonl.gz", "limit": 40}]
    chats = [{"source": "sft/lima.jsonl.gz", "limit": 40}]
    plain["base"] |= {"sources": chats, **few}
    plain["sft"] |= {"sources": chats, **few}
    plain["align"] |= {"sources": pairs, **few}
    with opened(tmp_path, plain) as run:
        for stage in ("base", "sft", "align"):
            run_stage(stage, run, progress=QUIET)
            losses = [row["loss"] for row in run.done(stage).read_json("curve.json")]
            assert len(losses) == 2 and all(0 < loss < 20 for loss in losses), stage
    plain["align"] |= {
        "method": "rlhf",
        "sources": [{"source": "prompts/alpaca_benign.jsonl.gz", "limit": 6}],
        "rewards": {"helpfulness": {"model": str(tmp_path / "assets/rm_hp")}},
        "rlhf": {"group": 4, "kl_limit": 50, "sampling": {"max_tokens": 8}},
    }
    with opened(tmp_path, plain, fresh=True) as run:
        run_stage("align", run, progress=QUIET)
        curve = run.done("align").read_json("curve.json")
    assert len(curve) == 2
    for row in curve:
        assert row["spread"] > 0 and 0 <= row["kl"] < 50 and row["tokens_reference"] > 0
