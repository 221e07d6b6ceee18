"""The rewind: base and aligned model of one history, both tuned in the same way, four pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.paper.points import Scale
from benchmarks.paper.rewind import Pool, chance_coverage, rewind
from benchmarks.rundirs import execute

from equipoise.config import Recipe
from equipoise.dials.dials import Dials
from equipoise.engine.sample import TransformersEngine
from equipoise.models.load import load_causal
from equipoise.pipeline.readers import read_prompts
from equipoise.pipeline.rundir import RunDir
from equipoise.recipes.load import load_recipe
from equipoise.seeds import derive_seed
from equipoise.steer.responders import Tuned, Untouched
from equipoise.store.shards import to_plain
from equipoise.types import Completion, Prompt

SHARED = ("base", "fit-reward")


def run_rewind(scale: Scale, seed: int) -> dict[str, Any]:
    """Make both histories of a seed, tune both, and compare the four pools on unseen prompts."""
    common = {"seed": str(seed), "evaluate.responders": "[start, tuned]"}
    aligned = _run(scale, f"rewind{seed}-aligned", common, None)
    base_only = {**common, "model": "made://base", "sft": "null", "align": "null"}
    base = _run(scale, f"rewind{seed}-base", base_only, aligned)
    recipe = Recipe.model_validate_json((aligned / "recipe.json").read_text())
    with RunDir.open(aligned, recipe) as opened:
        prompts = [prompt for prompt in read_prompts(opened) if prompt.split == "test"]
    places = {
        "base": aligned / "base/model",
        "aligned": aligned / "align/model",
        "rewound": aligned / "tune/model",
        "tuned_base": base / "tune/model",
    }
    answers = {name: _answers(place, prompts, recipe) for name, place in places.items()}
    found = rewind(
        _judged(answers, prompts), attributes=recipe.attributes, levels=recipe.levels, seed=seed
    )
    cells = recipe.levels ** len(recipe.attributes)
    return {
        "seed": seed,
        "levels": recipe.levels,
        "n_prompts": len(prompts),
        "k": cells,
        "chance_coverage": chance_coverage(cells, cells),
        "rewind": to_plain(found),
    }


def _run(scale: Scale, name: str, overrides: dict[str, str], shares_with: Path | None) -> Path:
    folder = scale.runs / name
    made = load_recipe("workshop-start", overrides=[f"{k}={v}" for k, v in overrides.items()])
    return execute(made, folder, source=shares_with, shares=SHARED)


def _answers(place: Path, prompts: list[Prompt], recipe: Recipe) -> list[list[Completion]]:
    """Sample one completion per cell, or as many unasked, all at the pool's temperature."""
    from equipoise.evaluate.sweep import sweep_settings

    policy = load_causal(str(place))
    engine = TransformersEngine.of(policy, batch_size=recipe.generate.batch_size)
    kind = Untouched if policy.manifest is None else Tuned
    responder = kind(engine, policy.encoder, sampling=recipe.generate.sampling)
    settings = sweep_settings(Dials(tuple(recipe.attributes), recipe.levels), auto=False)
    return responder.respond(prompts, settings, seed=derive_seed(recipe.seed, "rewind"))


def _judged(answers: dict[str, list[list[Completion]]], prompts: list[Prompt]) -> dict[str, Pool]:
    """Judge with the oracle, on the scale of the base model's own pool."""
    from benchmarks.workshop.world import oracle_calibration

    from equipoise.worlds.workshop.oracle import judge, read_request

    by_id = {prompt.id: prompt for prompt in prompts}
    scale = oracle_calibration([c for row in answers["base"] for c in row], by_id)
    pools = {}
    for name, rows in answers.items():
        judged = [
            [judge(read_request(prompt.messages), completion.text) for completion in row]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        unit = [
            [
                [scale.unit("helpfulness", j.helpfulness), scale.unit("safety", j.safety)]
                for j in row
            ]
            for row in judged
        ]
        pools[name] = Pool(np.array(unit), np.array([[j.refused for j in row] for row in judged]))
    return pools
