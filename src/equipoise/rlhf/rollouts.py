"""Rollouts of online training: groups of samples from the shared-prefill engine, and their rewards.

Prompts and control tokens go in as ids, through the same encoder as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from equipoise.config import Sampling
from equipoise.denoise import is_degenerate
from equipoise.encoding.encode import Encoder
from equipoise.engine.sample import TransformersEngine
from equipoise.seeds import derive_seed
from equipoise.types import Branch, DialSetting, GenerationRequest, Prompt


@dataclass(frozen=True)
class Ask:
    """One group: a prompt, and the setting it is asked under (``None``: a model without dials)."""

    prompt: Prompt
    setting: DialSetting | None = None


Reward = Callable[[Sequence[tuple[Ask, str]]], list[float]]
"""Maps (ask, completion text) to finite rewards, in order."""


@dataclass(frozen=True)
class OnlineConfig:
    """Budget and bounds of an online run; the fields of the recipe explain them."""

    steps: int
    batch_size: int
    group: int
    learning_rate: float
    beta: float
    kl_limit: float
    sampling: Sampling
    checkpoint_every: int
    section: str
    """Of the recipe: where ``beta`` and ``learning_rate`` stand, for messages."""


@dataclass
class Rollouts:
    """Samples and rewards the groups of one step; TRL's ``rollout_func``.

    Row i of the data set is ``asks(i)``, and its samples are seeded by (seed, i): so a resumed run
    repeats what a run without a stop would have done.
    """

    engine: TransformersEngine
    encoder: Encoder
    asks: Callable[[int], Ask]
    reward: Reward
    config: OnlineConfig
    seed: int
    facts: dict[str, float] = field(default_factory=dict)
    """Of the last step: mean reward, spread within groups, length, degenerate, tokens."""

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """Return ``prompt_ids``, ``completion_ids`` and ``earned``, one per requested row."""
        rows = [int(text) for text in prompts[:: self.config.group]]
        asks = [self.asks(row) for row in rows]
        heads = [tuple(self.encoder.prompt_ids(ask.prompt.messages)) for ask in asks]
        controls = [
            () if ask.setting is None else self.encoder.control_ids(ask.setting) for ask in asks
        ]
        requests = [
            GenerationRequest(
                head,
                tuple(
                    Branch(ids, derive_seed(self.seed, "rollout", row, k))
                    for k in range(self.config.group)
                ),
            )
            for row, head, ids in zip(rows, heads, controls, strict=True)
        ]
        before = self.engine.prompt_positions + self.engine.branch_positions
        self.engine.model.train(False)
        sampled = self.engine.generate(requests, self.config.sampling)
        self.engine.model.train()
        tokens = self.engine.prompt_positions + self.engine.branch_positions - before
        pairs = []
        for ask, group in zip(asks, sampled, strict=True):
            for item in group:
                pairs.append((ask, item.judged))
        earned = self.reward(pairs)
        spread = torch.tensor(earned).view(len(asks), -1).std(dim=1)
        flat = [item for group in sampled for item in group]
        self.facts = {
            "reward": sum(earned) / len(earned),
            "spread": float(spread.max()),
            "length": sum(item.n_tokens for item in flat) / len(flat),
            "degenerate": sum(is_degenerate(text) for _, text in pairs) / len(pairs),
            "tokens": float(tokens),
        }
        end = [self.encoder.eos_id]
        return {
            "prompt_ids": [
                [*head, *ids]
                for head, ids, group in zip(heads, controls, sampled, strict=True)
                for _ in group
            ],
            # The end token is a choice of the policy like the others.
            "completion_ids": [
                [*item.token_ids, *(end if item.finish == "stop" else [])] for item in flat
            ],
            "logprobs": None,  # type: ignore[dict-item]  # the trainer computes its own
            "earned": earned,
        }


def earned(earned: list[float | None], **_: Any) -> list[float | None]:
    """Hand the rewards that :class:`Rollouts` has computed to TRL."""
    return earned
