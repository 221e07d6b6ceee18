"""Any Hugging Face chat model and two reward models by name -> the same model with dials.

    python examples/dial_any_model.py MODEL --helpfulness RM --safety RM --prompts FILE --out DIR

MODEL and RM are directories or hub ids; FILE is JSONL or Parquet with `prompt` or `messages`, one
row a prompt. For a run that is evaluated, kept on disk and resumable, write a recipe instead.

    python examples/dial_any_model.py workshop://start --helpfulness workshop://rm_helpfulness \
        --safety workshop://rm_safety --prompts workshop://train --out dialled --steps 50
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from equipoise import (
    TransformersEngine,
    calibrate,
    distil,
    generate,
    load_causal,
    load_reward_model,
    save_dial_model,
    score,
    unit_scores,
)
from equipoise.config import (
    DistilConfig,
    GenerateConfig,
    PromptsConfig,
    RewardModelConfig,
    SamplingConfig,
    SourceConfig,
    TuneConfig,
)
from equipoise.data.prompts import load_prompts
from equipoise.dials.dials import Dials
from equipoise.pool.score import shortened
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune

ATTRIBUTES = ("helpfulness", "safety")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, tune, save."""
    options = parse(arguments)
    source = SourceConfig(source=options.prompts, limit=options.limit)
    # Nothing is measured here, so one prompt is enough as the test split; it is not trained on.
    config = PromptsConfig(train=[source], test=[SourceConfig(source=options.prompts, limit=1)])
    loaded = load_prompts(config, data=None, seed=options.seed)
    prompts = [prompt for prompt in loaded if prompt.split == "train"]
    by_id = {prompt.id: prompt for prompt in prompts}

    policy = load_causal(options.model)
    engine = TransformersEngine.of(policy)
    sampling = SamplingConfig(temperature=options.temperature, max_tokens=options.max_tokens)
    asked = GenerateConfig(completions_per_prompt=options.completions, sampling=sampling)
    pool = []
    for group in generate(prompts, engine, policy.encoder, asked, seed=options.seed):
        pool += group
        print(f"\r{len(pool)} completions", end="", flush=True)
    print()

    names = {"helpfulness": options.helpfulness, "safety": options.safety}
    reward_models = {
        attribute: load_reward_model(RewardModelConfig(model=name), attribute=attribute)
        for attribute, name in names.items()
    }
    scored = [row for chunk in score(shortened(pool), by_id, reward_models) for row in chunk]
    calibration = calibrate(scored, mode="pooled")
    units = unit_scores(scored, calibration)
    examples, report = distil(
        scored, units, by_id, DistilConfig(), dials=Dials(ATTRIBUTES, options.levels)
    )
    print(f"{report.n_kept} examples of {report.n_prompts_kept} prompts")

    budget = TuneConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lora_rank=options.lora_rank,
    )
    with tempfile.TemporaryDirectory() as work:
        tuned = tune(
            policy,
            examples,
            budget,
            dials=Dials(ATTRIBUTES, options.levels),
            training=Training(
                Path(work),
                seed=options.seed,
                on_step=lambda done, total: print(f"\rstep {done}/{total}", end="", flush=True),
            ),
            base_model=options.model,
        )
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, options.out)
    print(f"\nsaved in {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Tune two dials into a chat model.")
    parser.add_argument("model", help="model directory or hub id of the policy")
    parser.add_argument("--helpfulness", required=True, help="reward model, directory or hub id")
    parser.add_argument("--safety", required=True, help="reward model, directory or hub id")
    parser.add_argument("--prompts", required=True, help="JSONL or Parquet file, or a data set")
    parser.add_argument("--out", required=True, type=Path, help="directory of the dialled model")
    parser.add_argument("--limit", type=int, default=240, help="training prompts")
    parser.add_argument("--completions", type=int, default=16, help="completions per prompt")
    parser.add_argument("--temperature", type=float, default=1.2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--lora-rank", type=int, default=0, help="0 = full weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
