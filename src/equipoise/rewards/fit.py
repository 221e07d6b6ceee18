"""Train a reward model from preference pairs or from labelled answers.

Pairs go through TRL's ``RewardTrainer`` (Bradley-Terry: ``-log σ(r(chosen) - r(rejected))``),
labelled answers through ``transformers.Trainer`` (binary cross-entropy on the score in [0, 1]).
Both get ids of our encoder, ready made. The result is an ordinary Hugging Face
sequence-classification directory with one logit, and ``reward.json`` beside it.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from equipoise.config import FitRewardConfig, RewardModelConfig
from equipoise.data.pairs import LabelledAnswer
from equipoise.errors import DataError, named
from equipoise.models.hub import model_hash, resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.overlap import prompt_key
from equipoise.rewards import baselines
from equipoise.rewards.card import HeldOut, Pooling, RewardCard
from equipoise.rewards.classifier import longest_input, read_classifier, settle_padding
from equipoise.rewards.input import EncodedRow, InputEncoder
from equipoise.rewards.load import load_reward_model
from equipoise.seeds import derive_seed
from equipoise.store.publish import publish_directory
from equipoise.types import PreferencePair

Row = PreferencePair | LabelledAnswer
OnStep = Callable[[int, int], None]


def fit_reward(
    rows: Sequence[PreferencePair] | Sequence[LabelledAnswer],
    config: FitRewardConfig,
    *,
    attribute: str,
    out_dir: Path,
    seed: int,
    fitted_root: Path | None = None,
    on_step: OnStep | None = None,
) -> RewardCard:
    """Train one reward model and measure it on held-out prompts.

    Args:
        rows: Pairs for ``kind: pairs``, labelled answers with scores in [0, 1] for ``labels``.
        config: Backbone and budget.
        attribute: What the model will score.
        out_dir: Made by this function, wholly or not at all; an older one is replaced.
        seed: Of the split, the new head and the order of rows.
        fitted_root: See :func:`equipoise.models.hub.resolve_model`.
        on_step: Called with (steps done, steps in all).

    Returns:
        The content of ``reward.json``.

    Raises:
        DataError: Wrong kind of rows, too few, or held-out answers that all have one label.
        ModelError: The backbone cannot be loaded or used so.
    """
    made: list[RewardCard] = []

    def build(directory: Path) -> None:
        card = build_reward(
            rows,
            config,
            directory,
            attribute=attribute,
            seed=seed,
            fitted_root=fitted_root,
            on_step=on_step,
        )
        made.append(card)

    publish_directory(out_dir, build)
    return made[0]


def build_reward(
    rows: Sequence[PreferencePair] | Sequence[LabelledAnswer],
    config: FitRewardConfig,
    directory: Path,
    *,
    attribute: str,
    seed: int,
    fitted_root: Path | None = None,
    on_step: OnStep | None = None,
) -> RewardCard:
    """Train one reward model into a folder that is there already; see :func:`fit_reward`."""
    from transformers import set_seed

    from equipoise.encoding.encode import Encoder
    from equipoise.rewards import training

    start = time.perf_counter()
    _check_kind(rows, config)
    train, held_out = split_by_prompt(rows, n_held_out=config.held_out, seed=seed)
    _check_both_labels(held_out)
    place = resolve_model(config.backbone, fitted_root=fitted_root)
    tokenizer = load_tokenizer(place)
    set_seed(derive_seed(seed, "fit_reward", attribute) % 2**31)
    model = read_classifier(place, attribute=attribute, num_labels=1)
    settle_padding(model, tokenizer)
    encode = InputEncoder.of(
        Encoder(tokenizer),
        format=config.format,
        max_length=longest_input(model.config, tokenizer, config.max_length),
    )
    encoded = [encode_row(encode, row) for row in train]
    pooling: Pooling = "answer_mean" if config.head_only else "model"
    if config.head_only:
        training.fit_head(model, encoded, config, on_step=on_step)
        losses: tuple[float, ...] = ()
    else:
        losses = training.fit_whole(model, tokenizer, encoded, config, on_step=on_step, seed=seed)

    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    def card(held: HeldOut | None, n_truncated: int) -> RewardCard:
        return RewardCard(
            attribute=attribute,
            kind=config.kind,
            backbone=config.backbone,
            backbone_hash=model_hash(place),
            head_only=config.head_only,
            pooling=pooling,
            format=encode.format,
            max_length=encode.max_length,
            seed=seed,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            n_train=len(train),
            n_held_out=len(held_out),
            n_truncated=n_truncated,
            data_hash=data_hash(train, held_out),
            train_prompts=_keys(train),
            held_out_prompts=_keys(held_out),
            held_out=held,
            losses=losses,
            seconds=round(time.perf_counter() - start, 2),
        )

    n_truncated = sum(side.truncated for row in encoded for side in row.sides)
    card(None, n_truncated).write(directory)
    # Measured as it will be used: read back from its files, through the scoring code.
    loaded = load_reward_model(
        RewardModelConfig(model=str(directory), max_length=encode.max_length),
        attribute=attribute,
        batch_size=max(config.batch_size, 32),
    )
    held, more = baselines.measure(loaded, train, held_out, seed=seed)
    final = card(held, n_truncated + more)
    final.write(directory)
    return final


def split_by_prompt(
    rows: Sequence[Row], *, n_held_out: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Keep back at least ``n_held_out`` rows; all rows of one prompt stay on one side.

    Raises:
        DataError: More than half of the rows would be held out.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(prompt_key(row.prompt.messages), []).append(row)
    order = sorted(groups)
    random.Random(derive_seed(seed, "held_out")).shuffle(order)
    held_out: list[Row] = []
    train: list[Row] = []
    for key in order:
        (held_out if len(held_out) < n_held_out else train).extend(groups[key])
    if len(train) < len(held_out) or not held_out:
        raise DataError(
            f"Too few rows to train a reward model: {len(rows)} of {len(groups)} prompts",
            why=f"held_out keeps {len(held_out)} of them for the accuracy that is reported.",
            fix="Add rows, or lower held_out.",
        )
    return train, held_out


def encode_row(encode: InputEncoder, row: Row) -> EncodedRow:
    """Encode a labelled answer, or both sides of a pair."""
    messages = row.prompt.messages
    with named(row.prompt.place):
        if isinstance(row, PreferencePair):
            return EncodedRow((encode(messages, row.chosen), encode(messages, row.rejected)), 1.0)
        return EncodedRow((encode(messages, row.completion),), row.score)


def data_hash(train: Sequence[Row], held_out: Sequence[Row]) -> str:
    """SHA-256 over all rows and the side of the split that each is on."""
    digest = hashlib.sha256()
    for side, rows in (("train", train), ("held_out", held_out)):
        for row in rows:
            parts = [side, prompt_key(row.prompt.messages)]
            if isinstance(row, PreferencePair):
                parts += [row.chosen, row.rejected]
            else:
                parts += [row.completion, repr(row.score)]
            digest.update("\x1e".join(parts).encode("utf-8", "surrogatepass") + b"\x1d")
    return digest.hexdigest()


def _check_both_labels(held_out: Sequence[Row]) -> None:
    """Refuse, before anything is trained, what no AUC can be measured on."""
    labels = {row.score > 0.5 for row in held_out if isinstance(row, LabelledAnswer)}
    if len(labels) == 1:
        raise DataError(
            f"The {len(held_out)} held-out answers all have one label",
            why="How well a reward model tells good from bad can only be measured on both: a score "
            "above ½ is good, any other is bad.",
            fix="Raise held_out, add rows of the other label, or set `min_score` for the sources.",
        )


def _keys(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(sorted({prompt_key(row.prompt.messages) for row in rows}))


def _check_kind(rows: Sequence[Row], config: FitRewardConfig) -> None:
    wanted = PreferencePair if config.kind == "pairs" else LabelledAnswer
    if not rows or not all(isinstance(row, wanted) for row in rows):
        raise DataError(
            f"kind: {config.kind} needs {wanted.__name__} rows",
            why=f"There are {len(rows)} rows, and not all of them are of that type.",
            fix="Set kind to pairs for chosen / rejected, to labels for scores.",
        )
