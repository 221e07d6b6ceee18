"""A fine-tuned model of the run's own."""

from __future__ import annotations

from equipoise.alignment.sft import encode_rows, teach
from equipoise.data.dialogues import load_rows
from equipoise.data.sources import Skipped
from equipoise.encoding.thoughts import refuse_thoughts
from equipoise.models.load import load_causal
from equipoise.pipeline.job import Job, publish_model
from equipoise.pipeline.readers import note_skipped
from equipoise.seeds import derive_seed
from equipoise.store.stagedir import Stage
from equipoise.training.loop import Training


def sft(job: Job, stage: Stage) -> None:
    """Fine-tune on dialogues; resumes from a checkpoint."""
    recipe, config = job.recipe, job.recipe.sft
    assert config is not None
    policy, skipped = load_causal(job.place(config.model), rendering=job.rendering), Skipped()
    refuse_thoughts(policy.encoder)
    rows = load_rows(
        config.sources,
        n_rows=config.steps * config.batch_size,
        data=job.data,
        seed=derive_seed(recipe.seed, "sft rows"),
        skipped=skipped,
    )
    note_skipped(stage, skipped)
    encoded = encode_rows(rows, policy.encoder, max_length=config.max_length, answers_only=True)
    with job.progress.steps("sft") as on_step, job.run.writing():
        seed = derive_seed(recipe.seed, "sft")
        training = Training(stage.work / "checkpoints", seed, on_step)
        curve = teach(policy.model, policy.tokenizer, encoded, config, training)
    left_out = len(rows) - len(encoded)
    facts = {"rows": len(encoded), "left_out": left_out}
    publish_model(stage, policy.model, policy.tokenizer, curve, **facts)
