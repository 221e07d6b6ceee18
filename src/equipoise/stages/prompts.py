"""The prompts of a run: loaded, checked, and kept."""

from __future__ import annotations

from equipoise.data.prompts import check_lengths, load_prompts
from equipoise.data.sources import Skipped
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError
from equipoise.models.files import clear_errors
from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.models.read import read_config
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import PROMPTS, note_skipped
from equipoise.pipeline.room import check_context
from equipoise.store.shards import rows_to_jsonl
from equipoise.store.stagedir import Stage


def prompts(job: Job, stage: Stage) -> None:
    """Load all splits, refuse what cannot be used, and keep the prompts in the run.

    Raises:
        DataError: A prompt cannot be used, or none are left to train or to test on.
    """
    config, skipped = job.recipe.prompts, Skipped()
    loaded = load_prompts(config, data=job.data, seed=job.recipe.seed, skipped=skipped)
    model = job.place(job.recipe.model)
    place = resolve_model(model)
    with clear_errors(model, " (its tokenizer)"):
        encoder = Encoder(load_tokenizer(place), rendering=job.rendering)
    unread = skipped.count
    kept = check_lengths(loaded, encoder, config, skipped=skipped)
    dropped = len(loaded) - len(kept) - (skipped.count - unread)
    counts = {name: sum(p.split == name for p in kept) for name in ("train", "dev", "test")}
    if not counts["train"] or not counts["test"]:
        raise DataError(
            "no prompts left to train or to test on",
            why=f"after dropping over-long ones and skipping bad rows there are {counts}",
            fix="raise prompts.max_prompt_tokens, repair the rows, or add sources",
        )
    check_context(job.recipe, kept, encoder, read_config(place))
    stage.publish_bytes(PROMPTS, rows_to_jsonl(kept))
    note_skipped(stage, skipped)
    stage.finish(counts=counts, dropped=dropped)
    left_out = f"; {skipped.count} bad rows skipped" if skipped.count else ""
    left_out += f"; {dropped} over-long ones dropped" if dropped else ""
    job.progress.say(
        f"prompts: {counts['train']} train, {counts['dev']} dev, {counts['test']} test{left_out}"
    )
