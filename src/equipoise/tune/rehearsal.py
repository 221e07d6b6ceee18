"""A rehearsal before the first step: two random layers of the model are tuned, saved and loaded.

What cannot be loaded again is found out here, in seconds, and not after hours of tuning.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import DialManifest, read_manifest
from equipoise.dials.tokens import save_dial_model
from equipoise.errors import EquipoiseError, ModelError, TrainingError
from equipoise.models.cut import cut_config, empty_model, narrowest_model
from equipoise.models.hub import folder_of
from equipoise.models.load import load_causal, load_tokenizer
from equipoise.models.read import read_config
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune
from equipoise.types import PLAIN, ControlledExample, DialSetting, Message, Prompt, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT_CHECKPOINTS = 3
"""Two are kept, and the third is written before the oldest goes."""
_PER_TRAINED, _PER_SAVED = 12, 4
"""Bytes per number in a checkpoint (weight and Adam's two means) and in the model, float32."""


def small_base(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dials: DialManifest | None = None,
) -> Path:
    """Save two random layers of a model, narrow, with its whole tokenizer; return the folder.

    Args:
        config: Of the whole model.
        tokenizer: Of the same.
        folder: Created.
        dials: Those that the model has already.

    Raises:
        ModelError: It cannot be built.
    """
    model = narrowest_model(cut_config(config, vocabulary=None))
    if dials is not None:
        save_dial_model(model, tokenizer, dials, folder)
        return folder
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rehearse(
    base: Path,
    folder: Path,
    *,
    lora_rank: int,
    dials: Dials,
    rendering: Rendering = PLAIN,
) -> Path:
    """Tune a small base by one step, save it, load it, and compare; return the saved directory.

    Args:
        base: See :func:`small_base`.
        folder: For what is written; created.
        lora_rank: 0 = full weights.
        dials: Attributes and levels.
        rendering: What the chat template is given besides the turns.

    Raises:
        ModelError: What was saved cannot be loaded, or gives other logits.
        EquipoiseError: Tuning itself is refused.
    """
    config = TuneConfig(
        objective="exmate", steps=1, batch_size=2, lora_rank=lora_rank, dtype="float32"
    )
    policy = load_causal(str(base), device="cpu", rendering=rendering)
    tuned = tune(
        policy,
        _examples(len(dials.attributes), dials.levels),
        config,
        dials=dials,
        training=Training(folder / "checkpoints", seed=0),
    )
    saved = folder / "model"
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, saved)
    again = load_causal(str(saved), device="cpu", rendering=rendering)
    rows = [
        [*again.encoder.prompt_ids(example.prompt.messages), *again.encoder.control_ids(setting)]
        for example in _examples(len(dials.attributes), dials.levels)
        for setting in (
            DialSetting((level,) * len(dials.attributes)) for level in (0, dials.levels - 1)
        )
    ]
    whole: Any = tuned.model
    own = whole.to("cpu")
    with torch.inference_mode():
        for ids in rows:
            row = torch.tensor([ids])
            if not torch.equal(own(row).logits, again.model(row).logits):
                raise ModelError(
                    "a tuned model of this kind does not come back as it was saved",
                    why="its logits differ, after one step on two random layers of it",
                    fix="tune full weights (tune.lora_rank=0), or use another model",
                )
    return saved


def rehearse_policy(
    place: str,
    config: TuneConfig,
    folder: Path,
    *,
    dials: Dials,
    rendering: Rendering = PLAIN,
) -> None:
    """Rehearse the tuning of a model and check the disk; ``folder`` is removed afterwards.

    Args:
        place: Directory or hub id of the whole model, whose weights are not read.
        config: How it will be tuned.
        folder: On the disk that checkpoints will be written to.
        dials: Attributes and levels.
        rendering: What the chat template is given besides the turns.

    Raises:
        TrainingError: The rehearsal fails, or the disk has no room for checkpoints and model.
    """
    whole = read_config(place)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        manifest = read_manifest(folder_of(place, weights=False))
        base = small_base(whole, load_tokenizer(place), folder / "base", manifest)
        rehearse(
            base,
            folder / "tuned",
            lora_rank=config.lora_rank,
            dials=dials,
            rendering=rendering,
        )
    except EquipoiseError as error:
        raise TrainingError(
            "this model cannot be tuned as the recipe says; nothing was begun",
            why=f"{error.what}: {error.why}",
            fix=error.fix,
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    check_disk(empty_model(whole), config, folder.parent)


def check_disk(model: Any, config: TuneConfig, folder: Path) -> None:
    """Refuse a tuning whose checkpoints and model do not fit on the disk.

    Raises:
        TrainingError: There is less room than ``3 · 12`` bytes per trained number and 4 per saved
            one.
    """
    trained = trained_numbers(model, config.lora_rank)
    needed = trained * (_KEPT_CHECKPOINTS * _PER_TRAINED + _PER_SAVED)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"the disk has no room for this tuning; nothing was begun in {folder}",
            why=f"its checkpoints and model need about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free",
            fix="make room, give another --dir, or tune with LoRA (tune.lora_rank=16)",
        )


def trained_numbers(model: Any, lora_rank: int) -> int:
    """Return how many numbers tuning trains: all, or those of LoRA on every linear layer."""
    if not lora_rank:
        return sum(weight.numel() for weight in model.parameters())
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(
        lora_rank * (module.weight.shape[0] + module.weight.shape[1])
        for module in model.modules()
        if module not in heads and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def _examples(n_attributes: int, levels: int) -> list[ControlledExample]:
    prompt = Prompt("rehearsal", (Message("user", "How do I do this?"),), "train")
    return [
        ControlledExample(prompt, DialSetting((level,) * n_attributes), text, True, {})
        for level, text in ((0, "No."), (levels - 1, "First do this, then that."))
    ]
