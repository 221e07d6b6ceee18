"""Steering: layers found by shape, rows with shifts of their own, directions, level to strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig

from equipoise.config import Sampling
from equipoise.engine.decode import LiveRows
from equipoise.engine.draw import Row
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation
from equipoise.errors import DataError, ModelError
from equipoise.models.layers import decoder_layers, layer_index, shifted, watched
from equipoise.models.likelihood import read_completions
from equipoise.seeds import derive_seed
from equipoise.steer.directions import Directions, PoolReading, find_directions, read_pool
from equipoise.steer.responders import steered_request
from equipoise.steer.strengths import Steering, Strengths, Tried, strengths_for_levels
from equipoise.types import Branch, Completion, DialSetting, GenerationRequest, ScoredCompletion
from steering_kit import SHIFT, steered_engine
from tuning_kit import ATTRIBUTES, prompt, tiny_policy

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=10)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2),
        GPTNeoXConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
        ),
        MixtralConfig(  # as many experts as layers
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_local_experts=3,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_of_any_decoder_are_found_and_moved(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(decoder_layers(model)) == 3
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    shift = torch.stack([torch.zeros(16), torch.randn(16)])
    with torch.no_grad(), watched(model, 1) as plain:
        before = model(ids).logits
    with torch.no_grad(), shifted(model, 1, lambda: shift), watched(model, 1) as moved:
        logits = model(ids).logits
    with torch.no_grad():
        after = model(ids).logits
    assert torch.equal(logits[0], before[0])
    assert (logits[1] - before[1]).abs().max() > 1e-3
    torch.testing.assert_close(moved[0], plain[0] + shift[:, None])
    assert torch.equal(after, before)  # the hook is gone


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = tiny_policy().model
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="decoder layers of LlamaForCausalLM"):
        decoder_layers(model)
    with pytest.raises(ModelError, match="no layer 2"):
        layer_index(tiny_policy().model, 2)


def test_zero_strengths_change_no_bit_of_the_logits() -> None:
    ids = tuple(tiny_policy().encoder.prompt_ids(prompt(3).messages))

    def seen(engine: TransformersEngine, branches: list[Branch]) -> list[torch.Tensor]:
        """Logits (R, V) of every forward."""
        found: list[torch.Tensor] = []
        handle = engine.model.register_forward_hook(
            lambda module, args, output: found.append(output.logits[:, -1].clone())
        )
        rows = engine.generate([GenerationRequest(ids, tuple(branches))], SAMPLING)[0]
        handle.remove()
        assert {row.finish for row in rows} == {"length"}  # so they keep their places
        return found

    # A steered row beside them, so that the hook is at work on the rows of zeros as well.
    beside = Branch((), 99, (0.0, 5.0))
    empty = seen(steered_engine(), [*(Branch((), seed) for seed in range(6)), beside])
    zeros = seen(steered_engine(), [*(Branch((), seed, (0.0, 0.0)) for seed in range(6)), beside])
    policy = tiny_policy()
    plain = seen(
        TransformersEngine(policy.model, policy.encoder, model_hash="h", batch_size=32),
        [*(Branch((), seed) for seed in range(6)), Branch((), 99)],
    )
    assert len(empty) == SAMPLING.max_tokens
    for one, other, third in zip(empty, zeros, plain, strict=True):
        assert torch.equal(one[:6], other[:6])
        assert torch.equal(one[:6], third[:6])
    assert not torch.equal(empty[-1][6], plain[-1][6])


def test_rows_keep_their_own_strengths_when_others_leave() -> None:
    """Each row of a mixed batch equals the same row sampled alone, also after many have left."""
    engine = steered_engine()
    ids = engine.encoder.prompt_ids(prompt(4).messages)
    rng = np.random.default_rng(0)
    strengths = [tuple(rng.normal(0, 2, 2)) for _ in range(24)]
    seeds = [derive_seed("s", i) for i in range(24)]
    hot = Sampling(temperature=3.0, top_p=1.0, top_k=0, max_tokens=40)
    engine.encoder.eos_ids = frozenset(range(0, 400, 9))  # rows end soon, at different steps
    together = engine.generate([steered_request(ids, strengths, seeds)], hot)[0]
    lengths = {one.n_tokens for one in together}
    assert len(lengths) > 8
    alone = [
        engine.generate([steered_request(ids, [one], [seed])], hot)[0][0]
        for one, seed in zip(strengths, seeds, strict=True)
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_steering_reaches_every_sampled_position_and_not_the_shared_prompt() -> None:
    """Sampling with a shift equals plain decoding with a hook on the branch's positions."""
    engine = steered_engine()
    ids = engine.encoder.prompt_ids(prompt(2).messages)
    greedy = Sampling(temperature=1.0, top_p=1.0, top_k=1, max_tokens=8)
    strengths = (1.5, -0.7)
    sampled = engine.generate([steered_request(ids, [strengths], [1])], greedy)[0][0]
    vector = torch.tensor(strengths) @ SHIFT
    sequence = list(ids)
    for _ in range(8):

        def hook(_m: Any, _a: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, len(ids) - 1 :] += vector
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = decoder_layers(engine.model)[0].register_forward_hook(hook)
        with torch.no_grad():
            logits = engine.model(torch.tensor([sequence])).logits[0, -1]
        handle.remove()
        logits[list(engine.encoder.masked_ids)] = -torch.inf
        token = int(logits.argmax())
        if token in engine.encoder.eos_ids:
            break
        sequence.append(token)
    assert sampled.token_ids == tuple(sequence[len(ids) :])


def test_a_steered_row_joins_one_that_is_not() -> None:
    engine = steered_engine()
    ids = tuple(engine.encoder.prompt_ids(prompt(2).messages))
    strengths = ((), (1.5, -0.7), (0.0, 3.0))
    expected = engine.generate([steered_request(ids, strengths, [1, 2, 3])], SAMPLING)[0]
    rows = LiveRows(engine.model, engine.encoder, steering=(SHIFT, 0))
    found: dict[int, list[int]] = {}
    for seed, own in enumerate(strengths, start=1):
        (row,) = rows.join([Generation(ids, (), SAMPLING, seed, "", strengths=own)])
        assert isinstance(row, Row)
        found[seed] = row.ids
        rows.draw()
        rows.advance()
    assert len(list(rows.run())) > 0
    assert [tuple(found[seed]) for seed in (1, 2, 3)] == [one.token_ids for one in expected]


def test_strengths_without_directions_are_refused() -> None:
    policy = tiny_policy()
    engine = TransformersEngine(policy.model, policy.encoder, model_hash="h")
    with pytest.raises(ValueError, match="no directions"):
        engine.generate([GenerationRequest((5, 6), (Branch((), 1, (1.0,)),))], SAMPLING)


def test_reading_equals_one_forward_per_completion() -> None:
    policy = tiny_policy()
    prefix = policy.encoder.prompt_ids(prompt(1).messages)
    completions = [[5, 9, 11], [7], [], [12, 13, 14, 15, 16]]
    found = read_completions(policy.model, prefix, completions, layer=0, batch_size=3)
    for ids, reading in zip(completions, found, strict=True):
        assert reading.n_tokens == len(ids)
        if not ids:
            assert reading.state is None and np.isnan(reading.mean)
            continue
        with torch.no_grad():
            output = policy.model(torch.tensor([[*prefix, *ids]]), output_hidden_states=True)
        logits = output.logits[0, len(prefix) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(ids)[:, None]).sum()
        assert reading.log_likelihood == pytest.approx(float(expected), abs=1e-4)
        state = output.hidden_states[1][0, len(prefix) :].mean(0)
        torch.testing.assert_close(reading.state, state, atol=1e-5, rtol=1e-4)


def scored(n_prompts: int = 4, k: int = 3) -> list[ScoredCompletion]:
    return [
        ScoredCompletion(
            Completion(f"p{p}", i, f"mend the bell number {i}", "stop", 4, "h"),
            {"helpfulness": float(i), "safety": -float(i)},
            {},
        )
        for p in range(n_prompts)
        for i in range(k)
    ]


def test_the_direction_is_the_mean_difference_of_best_and_worst() -> None:
    """By hand: prompt p adds a state of its own, completion i adds i on the first axis."""
    pool = scored()
    states = [torch.tensor([10.0 * p + i, 7.0 * p]) for p in range(4) for i in range(3)]
    reading = PoolReading(states, [-1.0] * len(pool), layer=1)
    found = find_directions(pool, reading, attributes=ATTRIBUTES)
    torch.testing.assert_close(found.vectors, torch.tensor([[2.0, 0.0], [-2.0, 0.0]]))
    assert found.agreement == {"helpfulness": 1.0, "safety": 1.0}
    assert found.n_prompts == {"helpfulness": 4, "safety": 4} and found.layer == 1


def test_agreement_does_not_count_a_prompt_for_itself() -> None:
    """One long difference sets the mean; the three others point the other way."""
    pool = scored()
    ends = {0: 9.0, 1: -1.0, 2: -1.0, 3: -1.0}
    states = [torch.tensor([ends[p] * (i == 2)]) for p in range(4) for i in range(3)]
    found = find_directions(pool, PoolReading(states, [], 0), attributes=["helpfulness"])
    assert found.agreement["helpfulness"] == 0.0


def test_prompts_that_score_alike_give_no_direction() -> None:
    pool = [ScoredCompletion(one.completion, {"safety": 1.0}, {}) for one in scored()]
    states = [torch.zeros(2)] * len(pool)
    with pytest.raises(DataError, match="no direction of safety"):
        find_directions(pool, PoolReading(states, [], 0), attributes=["safety"])


def test_directions_on_disk_are_safetensors_and_json(tmp_path: Path) -> None:
    policy = tiny_policy()
    prompts = {f"p{i}": prompt(i) for i in range(4)}
    reading = read_pool(scored(), prompts, policy)
    found = find_directions(scored(), reading, attributes=ATTRIBUTES)
    found.save(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    back = Directions.load(tmp_path)
    assert torch.equal(back.vectors, found.vectors)
    assert (back.layer, back.agreement) == (found.layer, found.agreement)
    (tmp_path / "directions.json").write_text('{"attributes": ["one"]}')
    with pytest.raises(ModelError, match="equipoise stage steer"):
        Directions.load(tmp_path)


def tries(units: dict[float, float], fluency: dict[float, float] | None = None) -> list[Tried]:
    drops = fluency or {}
    return [Tried(s, unit, drops.get(s, -2.0)) for s, unit in units.items()]


def test_levels_get_the_strength_that_delivers_their_target() -> None:
    """By hand: targets .1 .3 .5 .7 .9 on a straight line from .1 (at -2) to .9 (at 2)."""
    found = strengths_for_levels(tries({-2: 0.1, 0: 0.5, 2: 0.9}), 5, max_fluency_drop=None)
    assert found == pytest.approx((-2, -1, 0, 1, 2))


def test_a_target_out_of_reach_gets_the_mildest_of_the_best() -> None:
    found = strengths_for_levels(
        tries({-1: 0.4, 0: 0.5, 1: 0.6, 2: 0.6, 3: 0.55}), 3, max_fluency_drop=None
    )
    assert found == pytest.approx((-1, 0, 1), abs=0.35)
    assert found[2] == 1 + 0  # not 3: more push, no more effect


def test_strengths_that_babble_are_never_used() -> None:
    units = {-2.0: 0.1, -1.0: 0.3, 0.0: 0.5, 1.0: 0.7, 2.0: 0.9}
    drops = {-2.0: -3.0, -1.0: -2.2, 1.0: -2.2, 2.0: float("nan")}
    found = strengths_for_levels(tries(units, drops), 5, max_fluency_drop=0.3)
    assert min(found) == -1 and max(found) == 1


@given(
    units=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    levels=st.integers(2, 9),
)
def test_strengths_never_fall_with_the_level(units: list[float], levels: int) -> None:
    grid = (-3.0, -1.0, 0.0, 1.0, 3.0)
    found = strengths_for_levels(
        tries(dict(zip(grid, units, strict=True))), levels, max_fluency_drop=None
    )
    assert list(found) == sorted(found) and found[0] >= -3 and found[-1] <= 3


def test_the_responder_answers_every_setting_and_leaves_auto_alone() -> None:
    engine = steered_engine()
    strengths = Strengths({"helpfulness": (-3.0, 0.0, 3.0), "safety": (-2.0, 0.0, 2.0)})
    assert strengths.of(DialSetting((2, None))) == (3.0, 0.0)
    responder = Steering(engine, engine.encoder, sampling=SAMPLING, strengths=strengths)
    settings = [DialSetting((0, 0)), DialSetting((2, 2)), DialSetting((None, None))]
    prompts = [prompt(1), prompt(2)]
    rows = responder.respond(prompts, settings, seed=5)
    assert [[one.setting for one in row] for row in rows] == [settings] * 2
    again = responder.respond(prompts[1:], settings, seed=5)
    assert [one.text for one in again[0]] == [one.text for one in rows[1]]
    lengths = [len(engine.encoder.prompt_ids(one.messages)) for one in prompts]
    sampled = sum(one.n_tokens for row in (*rows, *again) for one in row)
    # Prompts but their last token once each, that token once per branch.
    assert responder.tokens_through_model == sum(lengths) + lengths[1] - 3 + 9 + sampled
