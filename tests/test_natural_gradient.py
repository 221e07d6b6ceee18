"""Directions by natural gradient: by finite differences, and in a world with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.errors import DataError
from equipoise.models.layers import decoder_layers
from equipoise.steer.natural_gradient import PoolGradients, natural_directions, read_gradients
from equipoise.steer.shift_gradients import shift_gradients
from equipoise.types import Completion, ScoredCompletion
from tuning_kit import ATTRIBUTES, prompt, tiny_policy

COMPLETIONS = [[5, 9, 11, 4], [7], [12, 13, 14, 15, 16]]


def log_likelihood(prefix: list[int], ids: list[int], vector: torch.Tensor) -> float:
    """By a forward pass over the whole text, the vector added from the prompt's last token on."""
    model = tiny_policy().model.double()

    def hook(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        moved = (output[0] if isinstance(output, tuple) else output).clone()
        moved[:, len(prefix) - 1 :] += vector
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = decoder_layers(model)[0].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.tensor([[*prefix, *ids]])).logits[0, len(prefix) - 1 : -1]
    handle.remove()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())


def test_a_gradient_is_what_a_small_shift_changes() -> None:
    policy = tiny_policy()
    prefix = policy.encoder.prompt_ids(prompt(1).messages)
    found = shift_gradients(policy.model, prefix, COMPLETIONS, layer=0, batch_size=2)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ids, one in zip(COMPLETIONS, found, strict=True):
        ahead, behind = (log_likelihood(prefix, ids, s * 1e-3 * direction) for s in (1, -1))
        slope = float(one.gradient.double() @ direction)
        assert slope == pytest.approx((ahead - behind) / 2e-3, rel=1e-2, abs=1e-3)
        plain = log_likelihood(prefix, ids, torch.zeros(32))
        assert one.mean == pytest.approx(plain / len(ids), abs=1e-4)


def test_reading_keeps_the_order_of_the_pool_and_leaves_no_trace() -> None:
    policy = tiny_policy()
    texts = ["mend the bell", "", "ring it"]
    rows = [
        ScoredCompletion(Completion(f"p{p}", k, text, "stop", 4, "h"), {"safety": 0.0}, {})
        for k, text in enumerate(texts)
        for p in range(2)
    ]
    prompts = {f"p{i}": prompt(i) for i in range(2)}
    counted: list[int] = []
    found = read_gradients(rows, prompts, policy, layer=0, on_prompt=counted.append)
    assert counted == [1, 1] and found.layer == 0
    for row, gradient, mean in zip(rows, found.gradients, found.means, strict=True):
        one = row.completion
        ids = policy.encoder.completion_ids(one.text, finished=True)
        prefix = policy.encoder.prompt_ids(prompts[one.prompt_id].messages)
        alone = shift_gradients(policy.model, prefix, [ids], layer=0)[0]
        np.testing.assert_allclose(gradient, alone.gradient.numpy(), atol=1e-4)
        assert mean == pytest.approx(alone.mean, abs=1e-4)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def world(
    rng: np.random.Generator, *, n_prompts: int, k: int, mixing: np.ndarray
) -> tuple[list[ScoredCompletion], PoolGradients]:
    """Gradients z·mixing with z standard normal; helpfulness ranks by z0, safety by z0 + z1.

    Each prompt adds gradients and scores of its own, which must not matter.
    """
    rows, gradients = [], []
    for p in range(n_prompts):
        z = rng.normal(size=(k, len(mixing)))
        raw = np.stack([z[:, 0], z[:, 0] + z[:, 1]], axis=1) + 10 * rng.normal(size=2)
        gradients.append(z @ mixing + 5 * rng.normal(size=mixing.shape[1]))
        rows += [
            ScoredCompletion(
                Completion(f"p{p}", i, f"mend the bell number {i}", "stop", 4, "h"),
                dict(zip(ATTRIBUTES, map(float, raw[i]), strict=True)),
                {},
            )
            for i in range(k)
        ]
    stacked = np.concatenate(gradients).astype(np.float32)
    return rows, PoolGradients(stacked, [-1.0] * len(rows), layer=1)


def test_each_vector_moves_its_own_score_and_no_other() -> None:
    """g = M'z and F = M'M: helpfulness without safety is M⁻¹(e0 - e1), safety alone is M⁻¹e1."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4)) + 2 * np.eye(4)
    pool, reading = world(rng, n_prompts=800, k=8, mixing=mixing)
    found = natural_directions(pool, reading, attributes=ATTRIBUTES, damping=1e-6)
    assert (found.layer, found.n_prompts) == (1, {"helpfulness": 800, "safety": 800})
    effects = found.vectors.double().numpy() @ mixing.T  # (A, 4): z moves by so much
    aims = np.array([[1.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    for effect, aim in zip(effects, aims, strict=True):
        cosine = effect @ aim / np.linalg.norm(effect) / np.linalg.norm(aim)
        assert cosine > 0.995
    # Strength 1 is one nat away: E[(v'g)²] = 2, within prompts.
    assert np.square(effects).sum(axis=1) * 7 / 8 == pytest.approx([2.0, 2.0], rel=0.05)
    assert min(found.agreement.values()) > 0.9


def test_a_pool_without_a_signal_agrees_by_chance() -> None:
    rng = np.random.default_rng(1)
    pool, reading = world(rng, n_prompts=400, k=4, mixing=np.eye(4, 6))
    noise = rng.normal(size=reading.gradients.shape).astype(np.float32)
    blind = PoolGradients(noise, reading.means, 1)
    found = natural_directions(pool, blind, attributes=ATTRIBUTES, damping=1.0)
    assert all(0.4 < share < 0.6 for share in found.agreement.values())


def test_a_score_that_never_differs_gives_no_direction() -> None:
    pool, reading = world(np.random.default_rng(2), n_prompts=6, k=3, mixing=np.eye(4))
    flat = [ScoredCompletion(row.completion, {"safety": 1.0}, {}) for row in pool]
    with pytest.raises(DataError, match="no direction of safety"):
        natural_directions(flat, reading, attributes=["safety"], damping=1.0)
