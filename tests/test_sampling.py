"""The sampling engine: counted positions, own seeds, masked control ids, exact nucleus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.config import GenerateConfig, Sampling, SamplingConfig
from equipoise.dials.dials import Dials, cells
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.engine.draw import draw
from equipoise.engine.sample import TransformersEngine
from equipoise.errors import ModelError
from equipoise.pool.generate import batches_of, generate, generate_batch
from equipoise.seeds import derive_seed
from equipoise.types import Branch, DialSetting, GenerationRequest, Message, Prompt
from tuning_kit import ATTRIBUTES, prompt, tiny_policy

SAMPLING = Sampling(temperature=1.0, top_p=0.95, top_k=50, max_tokens=12)


def engine(batch_size: int = 32) -> TransformersEngine:
    policy = tiny_policy()
    return TransformersEngine(policy.model, policy.encoder, model_hash="h", batch_size=batch_size)


def requests(encoder: Encoder, n: int = 7, k: int = 5) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            tuple(encoder.prompt_ids(prompt(i).messages)),
            tuple(Branch((), derive_seed("t", i, j)) for j in range(k)),
        )
        for i in range(n)
    ]


def test_each_prompt_token_goes_through_the_model_once() -> None:
    one = engine(batch_size=4)  # fewer rows than branches, so branches come in chunks
    asked = requests(one.encoder, n=3, k=9)
    positions = 0

    def count(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal positions
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if ids.shape[1] == mask.shape[1]:  # a prefill
            positions += int(mask.sum())

    handle = one.model.register_forward_pre_hook(count, with_kwargs=True)
    one.generate(asked, SAMPLING)
    handle.remove()
    assert positions == sum(len(r.prompt_ids) for r in asked) == one.prompt_positions


def test_a_row_depends_on_its_seed_and_not_on_the_batch() -> None:
    texts = []
    for batch_size in (1, 3, 64):
        one = engine(batch_size)
        asked = requests(one.encoder, n=20)
        texts.append([s.text for row in one.generate(asked, SAMPLING) for s in row])
    same = np.mean([a == b for a, b in zip(texts[0], texts[2], strict=True)])
    same_3 = np.mean([a == b for a, b in zip(texts[1], texts[2], strict=True)])
    assert same >= 0.99
    assert same_3 >= 0.99
    assert len(set(texts[0])) > 50


def test_equal_to_plain_generate_when_greedy() -> None:
    one = engine()
    asked = requests(one.encoder, n=4, k=2)
    greedy = Sampling(temperature=1.0, top_p=1.0, top_k=1, max_tokens=8)
    for request, row in zip(asked, one.generate(asked, greedy), strict=True):
        ids = torch.tensor([request.prompt_ids])
        for _ in range(8):
            with torch.no_grad():
                logits = one.model(ids).logits[0, -1]
            logits[list(one.encoder.masked_ids)] = -torch.inf
            token = int(logits.argmax())
            if token in one.encoder.eos_ids:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        expected = tuple(ids[0, len(request.prompt_ids) :].tolist())
        assert row[0].token_ids == row[1].token_ids == expected


def test_branches_with_controls_share_the_prefill_and_follow_their_controls() -> None:
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    one = TransformersEngine(policy.model, encoder, model_hash="h", batch_size=8)
    settings = [DialSetting((0, 0)), DialSetting((4, None))]
    ids = tuple(encoder.prompt_ids(prompt(3).messages))
    branches = tuple(Branch(encoder.control_ids(s), 5) for s in settings)
    shared = one.generate([GenerationRequest(ids, branches)], SAMPLING)[0]
    assert one.prompt_positions == len(ids)
    for branch, sampled in zip(branches, shared, strict=True):
        alone = GenerationRequest((*ids, *branch.control_ids), (Branch((), 5),))
        assert one.generate([alone], SAMPLING)[0][0].token_ids == sampled.token_ids


def test_a_broken_model_is_noticed_and_writes_no_text() -> None:
    one = engine()
    with torch.no_grad():
        one.model.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        one.generate(requests(one.encoder, n=2), SAMPLING)


def test_control_ids_are_never_sampled() -> None:
    policy = tiny_policy(tied=False)
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    with torch.no_grad():  # a head that wants nothing but control tokens
        policy.model.lm_head.weight.zero_()
        policy.model.lm_head.weight[list(manifest.all_ids)] = 1e3
    one = TransformersEngine(policy.model, encoder, model_hash="h")
    hot = Sampling(temperature=2.0, top_p=1.0, top_k=0, max_tokens=40)
    asked = [GenerationRequest((5, 6, 7), tuple(Branch((), i) for i in range(50)))]
    sampled = {t for row in one.generate(asked, hot) for s in row for t in s.token_ids}
    assert not sampled & set(manifest.all_ids)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.full((200, 90), -30.0)
    logits[:, [7, 11, 40]] = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = draw(logits, torch.linspace(0, 0.999, 200), temperature=1.0, top_p=0.7, top_k=3)
    assert set(drawn.tolist()) == {7, 11}
    assert drawn.tolist().count(7) == pytest.approx(125, abs=2)  # 0.5 / 0.8 of 200


def test_generate_repeats_the_same_bytes_when_some_prompts_are_done() -> None:
    prompts = [prompt(i) for i in range(9)]
    config = GenerateConfig(
        completions_per_prompt=4, sampling=SamplingConfig(max_tokens=8), batch_size=12
    )
    one = engine()
    whole = list(generate(prompts, one, one.encoder, config, seed=3))
    # Three prompts to a batch; the last two batches by themselves.
    batches = batches_of(prompts, one.encoder, config)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    rest = [generate_batch(batch, one, one.encoder, config, seed=3) for batch in batches[1:]]
    assert [rows for batch in rest for rows in batch] == whole[3:]
    assert all(c.finish in ("stop", "length") and c.n_tokens <= 8 for row in whole for c in row)


def test_prompted_completions_stand_behind_the_models_own() -> None:
    prompts = [prompt(i) for i in range(5)]
    config = GenerateConfig(
        completions_per_prompt=3,
        sampling=SamplingConfig(max_tokens=6),
        batch_size=9,
        prompted_per_prompt=2,
    )
    one = engine()
    asked: list[DialSetting] = []

    def ask(about: Prompt, cell: DialSetting) -> tuple[Message, ...]:
        asked.append(cell)
        return (Message("user", f"{about.messages[0].content} {cell.levels}"),)

    grid = cells(2, 3)
    rows = list(generate(prompts, one, one.encoder, config, seed=3, cells=grid, ask=ask))
    plain = config.model_copy(update={"prompted_per_prompt": 0})
    own = list(generate(prompts, one, one.encoder, plain, seed=3))
    assert [row[:3] for row in rows] == own
    assert [c.setting for row in rows for c in row[3:]] == asked
    assert all(len({c.setting for c in row[3:]}) == 2 for row in rows)
    assert [c.sample_index for c in rows[0]] == [0, 1, 2, 3, 4]
