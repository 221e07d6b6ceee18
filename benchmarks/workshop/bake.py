"""Bake the shipped models from seeds: tokenizer, start model and two reward models.

    python -m benchmarks.workshop.bake --out FOLDER      # about 20 minutes on two cores

The same seeds give the same bytes on the same machine; on another machine the same figures within
their intervals. ``recipe.json`` in the assets folder records seeds, sizes, steps and hashes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from equipoise.errors import ConfigError
from equipoise.worlds.workshop.data import dialogues
from equipoise.worlds.workshop.shipped import ASSETS, asset_hashes
from equipoise.worlds.workshop.tables import CARE_WORDS, HELP_WORDS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


class BakeConfig(BaseModel):
    """Sizes and budgets of the bake."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    base_steps: int = 1200
    aligned_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    pairs: int = 24000
    reward_epochs: float = 2.0
    reward_learning_rate: float = 1e-3


def train_tokenizer(config: BakeConfig) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with four role markers on base text."""
    from equipoise.alignment.pretrain import byte_bpe

    texts = (
        " ".join([*(m.content for m in prompt.messages), completion])
        for prompt, completion in itertools.islice(dialogues("base", seed=config.seed), 4000)
    )
    words = [w for w in (*CARE_WORDS, *HELP_WORDS) if w]
    tokenizer: PreTrainedTokenizerFast = byte_bpe(
        itertools.chain(texts, words * 20), config.vocabulary, model_max_length=512
    )
    return tokenizer


def build_model(config: BakeConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about a million parameters."""
    from equipoise.alignment.pretrain import small_llama

    return small_llama(
        tokenizer,
        width=config.width,
        layers=config.layers,
        heads=4,
        positions=512,
        seed=config.seed,
    )


def _batches(
    config: BakeConfig, tokenizer: PreTrainedTokenizerFast, kind: Literal["base", "aligned"]
) -> Iterator[tuple[Any, Any]]:
    """Yield (ids, labels), both (B, T); base text is learnt whole, aligned text from the answer."""
    import torch

    from equipoise.encoding.encode import Encoder

    encoder = Encoder(tokenizer)
    stream = dialogues(kind, seed=config.seed)
    while True:
        # Length-sorted within sixteen batches: a third less padding.
        rows = []
        for prompt, completion in itertools.islice(stream, 16 * config.batch_size):
            asked = encoder.prompt_ids(prompt.messages)
            answer = encoder.completion_ids(completion, finished=True)
            ignored = [-100] * len(asked) if kind == "aligned" else asked
            rows.append((asked + answer, ignored + answer))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        order = torch.randperm(len(groups)).tolist()
        for index in order:
            width = max(len(ids) for ids, _ in groups[index])
            ids = torch.zeros(config.batch_size, width, dtype=torch.long)
            labels = torch.full((config.batch_size, width), -100)
            for row, (row_ids, row_labels) in enumerate(groups[index]):
                ids[row, : len(row_ids)] = torch.tensor(row_ids)
                labels[row, : len(row_labels)] = torch.tensor(row_labels)
            yield ids, labels


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: BakeConfig,
    kind: Literal["base", "aligned"],
) -> None:
    """Train in place on base or aligned text, with a cosine schedule.

    The text is generated without end, so there is no data set to shuffle and no epoch: a page of
    torch reads better here than a trainer.
    """
    import torch

    steps = config.base_steps if kind == "base" else config.aligned_steps
    rate = config.learning_rate if kind == "base" else config.learning_rate / 5
    torch.manual_seed(config.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.05
    )
    model.train()
    begun = time.monotonic()
    for step, (ids, labels) in enumerate(
        itertools.islice(_batches(config, tokenizer, kind), steps)
    ):
        # Padding stands on the right, so a causal model needs no attention mask for it.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            spent = time.monotonic() - begun
            print(
                f"{kind} step {step + 1}/{steps}  loss {loss.item():.3f}  {spent:.0f} s", flush=True
            )
    model.train(False)


BAKED = {*ASSETS, "recipe.json"}
"""What the folder of the packaged models holds."""


def bake(out: Path | None = None, config: BakeConfig | None = None) -> Path:
    """Bake all shipped models from seeds into ``out`` (default: the packaged assets folder).

    About twenty minutes on two cores.

    Returns:
        The folder, which holds the three model directories and ``recipe.json``. The folder is
        replaced as a whole, after everything is baked.

    Raises:
        ConfigError: The folder holds anything else.
    """
    config = config or BakeConfig()
    folder = out or Path(str(files("equipoise.worlds.workshop") / "assets"))
    if folder.exists() and {path.name for path in folder.iterdir()} - BAKED:
        raise ConfigError(
            f"{folder} holds other files",
            why="the folder of the packaged models is replaced as a whole",
            fix="name a new folder with --out",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made, base = Path(work) / "assets", Path(work) / "base"
        bake_base(base, config)
        bake_start(base, made, config)
        # The two need nothing of each other: two cores bake them in half the time.
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
            jobs = [
                workers.submit(bake_reward_model, attribute, made, config)
                for attribute in ("helpfulness", "safety")
            ]
            for job in jobs:
                job.result()
        recipe = {"config": config.model_dump(), "sha256": asset_hashes(made)}
        (made / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def bake_base(base: Path, config: BakeConfig) -> None:
    """Train the tokenizer and the base model, which is not shipped, into ``base``."""
    _one_thread()
    tokenizer = train_tokenizer(config)
    model = build_model(config, tokenizer)
    pretrain(model, tokenizer, config, "base")
    for part in (model, tokenizer):
        part.save_pretrained(base)


def bake_start(base: Path, made: Path, config: BakeConfig) -> None:
    """Align the base model: ``made / "start"``, in half precision."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    _one_thread()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    pretrain(model, tokenizer, config, "aligned")
    model.half()  # type: ignore[no-untyped-call]
    for part in (model, tokenizer):
        part.save_pretrained(made / "start")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # a sum over two threads is not the same sum, to the last bit


def bake_reward_model(attribute: str, made: Path, config: BakeConfig) -> None:
    """Train ``made / "rm_ATTRIBUTE"`` on noisy pairs, from the start model's weights."""
    from transformers import AutoModelForSequenceClassification

    from equipoise.config import FitRewardConfig, SourceConfig
    from equipoise.rewards.fit import fit_reward
    from equipoise.worlds.workshop.data import pairs

    _one_thread()
    out = made / f"rm_{attribute}"
    fit = FitRewardConfig(
        backbone=str(made / "start"),
        kind="pairs",
        sources=[SourceConfig(source=f"workshop://pairs/{attribute}", limit=config.pairs)],
        held_out=500,
        epochs=config.reward_epochs,
        batch_size=32,
        learning_rate=config.reward_learning_rate,
        max_length=160,
    )
    rows = pairs(attribute, limit=config.pairs, seed=config.seed)
    card = fit_reward(rows, fit, attribute=attribute, out_dir=out, seed=config.seed)
    print(f"reward model {attribute}: {card.held_out}", flush=True)
    card.model_copy(update={"backbone": "workshop://start"}).write(out)
    AutoModelForSequenceClassification.from_pretrained(out).half().save_pretrained(out)


def main() -> None:
    """Bake into the named folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the models into")
    bake(parser.parse_args().out)


if __name__ == "__main__":
    main()
