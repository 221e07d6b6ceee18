"""A base model of the run's own: tokenizer and weights from raw text."""

from __future__ import annotations

from equipoise.alignment.pretrain import new_model, train_tokenizer
from equipoise.alignment.sft import encode_rows, teach
from equipoise.data.dialogues import load_rows
from equipoise.data.sources import Skipped
from equipoise.encoding.encode import Encoder
from equipoise.pipeline.job import Job, publish_model
from equipoise.pipeline.readers import note_skipped
from equipoise.seeds import derive_seed
from equipoise.store.stagedir import Stage
from equipoise.training.loop import Training


def base(job: Job, stage: Stage) -> None:
    """Train a tokenizer and a base model from raw text; resumes from a checkpoint."""
    recipe, config = job.recipe, job.recipe.base
    assert config is not None
    n_rows, skipped = config.steps * config.batch_size, Skipped()
    rows = load_rows(
        config.sources, n_rows=n_rows, data=job.data, seed=recipe.seed, skipped=skipped
    )
    note_skipped(stage, skipped)
    tokenizer = train_tokenizer(rows, config.vocabulary)
    encoded = encode_rows(
        rows, Encoder(tokenizer), max_length=config.max_length, answers_only=False
    )
    model = new_model(tokenizer, config, seed=recipe.seed)
    with job.progress.steps("base") as on_step, job.run.writing():
        seed = derive_seed(recipe.seed, "base")
        training = Training(stage.work / "checkpoints", seed, on_step)
        curve = teach(model, tokenizer, encoded, config, training)
    left_out = len(rows) - len(encoded)
    publish_model(stage, model, tokenizer, curve, rows=len(encoded), left_out=left_out)
