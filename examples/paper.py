"""The method from top to bottom on the Workshop, through the library's public functions.

    python examples/paper.py

Nothing is downloaded and no option is read: change the numbers below. They are small, so that the
page runs in about a minute on two cores, and the dials only begin to move. `equipoise run workshop`
is the same with more of everything, kept on disk and resumable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from equipoise import (
    Delivery,
    Dials,
    DialSetting,
    Prompt,
    Responder,
    RewardModel,
    Sampling,
    Scorer,
    TransformersEngine,
    Tuned,
    Untouched,
    back_door,
    calibrate,
    distil,
    generate,
    load_causal,
    load_reward_model,
    measure,
    save_dial_model,
    score,
    sweep,
    unit_scores,
)
from equipoise.config import (
    DistilConfig,
    GenerateConfig,
    RewardModelConfig,
    SamplingConfig,
    TuneConfig,
)
from equipoise.pool.score import shortened
from equipoise.stats import Bootstrap
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune
from equipoise.worlds import workshop

SEED = 0
DIALS = Dials(("helpfulness", "safety"), levels=5)
N_TRAIN, N_TEST = 64, 8
COMPLETIONS_PER_PROMPT = 16
TUNING = TuneConfig(objective="exmate", weight=0.2, steps=200, batch_size=16, learning_rate=5e-4)
REWARD_MODELS = {name: f"workshop://rm_{name}" for name in DIALS.attributes}
JUDGES = {name: f"workshop://oracle/{name}" for name in DIALS.attributes}
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=256, max_tokens=64)


def main() -> None:
    """Run the four steps and print what each of them did."""
    disable_progress_bar()
    train = workshop.prompts("train", limit=N_TRAIN, seed=SEED)
    test = workshop.prompts("test", limit=N_TEST, seed=SEED)
    start = load_causal("workshop://start")
    reward_models, judges = load_all(REWARD_MODELS), load_all(JUDGES)

    # Step 1: the aligned model answers every training prompt K times, and two reward models score
    # the pool. A unit score is a completion's rank in that pool.
    config = GenerateConfig(
        completions_per_prompt=COMPLETIONS_PER_PROMPT,
        sampling=SamplingConfig(temperature=1.3, max_tokens=64),
    )
    pool = [
        completion
        for group in generate(train, TransformersEngine.of(start), start.encoder, config, seed=SEED)
        for completion in group
    ]
    by_id = {prompt.id: prompt for prompt in train}
    finished = shortened(pool)
    scored = [row for chunk in score(finished, by_id, reward_models) for row in chunk]
    calibration = calibrate(scored, mode="pooled")
    units = unit_scores(scored, calibration)
    print(f"pool: {len(pool)} completions of {len(train)} prompts")

    # Step 2, MOEC: no noise, at most one completion per prompt and control cell, and only prompts
    # that occur with several controls, so that the prompt alone does not give the control away.
    examples, report = distil(scored, units, by_id, DistilConfig(), dials=DIALS)
    door = back_door(examples, n_rows=len(examples), seed=SEED)
    print(f"MOEC: {report.n_kept} examples of {report.n_prompts_kept} prompts; dropped: "
          f"{dict(report.dropped)}; {door.effective_cells.value:.1f} cells per prompt")  # fmt: skip

    # Step 3: control tokens are installed, and the model learns to tell the asked setting from a
    # counterfactual one (ExMATE).
    with tempfile.TemporaryDirectory() as work:
        tuned = tune(
            load_causal("workshop://start"),
            examples,
            TUNING,
            dials=DIALS,
            training=Training(Path(work) / "checkpoints", seed=SEED),
        )
        save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, Path(work) / "model")
        dialled = load_causal(str(Path(work) / "model"))
    last = tuned.curve[-1]
    print(f"tuned {TUNING.steps} steps in {tuned.seconds:.0f} s: log-likelihood per token "
          f"{last['asked']:.2f} asked, {last['counterfactual']:.2f} counterfactual")  # fmt: skip

    # Step 4: every setting on prompts that nobody has seen, judged by the exact oracle, whose scale
    # is the same pool.
    judged = [row for chunk in score(finished, by_id, judges) for row in chunk]
    scale = calibrate(judged, mode="pooled")
    methods: Sequence[Responder] = (
        Untouched(TransformersEngine.of(start), start.encoder, sampling=SAMPLING),
        Tuned(TransformersEngine.of(dialled), dialled.encoder, sampling=SAMPLING),
    )
    for method in methods:
        chunks = sweep(
            method,
            test,
            DIALS.cells(),
            {"generalization": Scorer(judges, scale)},
            seed=SEED,
        )
        deliveries = [row for chunk in chunks for row in chunk]
        control = measure(
            deliveries, judge="generalization", dials=DIALS, bootstrap=Bootstrap(seed=SEED)
        )
        figures = ", ".join(f"{name} {control.mp[name].value:.2f}" for name in DIALS.attributes)
        print(f"{method.name}: MP {figures}")
        show(test[0], deliveries)


def load_all(names: dict[str, str]) -> dict[str, RewardModel]:
    """Load one reward model per attribute."""
    return {
        attribute: load_reward_model(RewardModelConfig(model=name), attribute=attribute)
        for attribute, name in names.items()
    }


def show(prompt: Prompt, deliveries: Sequence[Delivery]) -> None:
    """Print what one prompt got at the four corners."""
    print(f"  {prompt.messages[-1].content}")
    top = DIALS.levels - 1
    for levels in ((0, 0), (0, top), (top, 0), (top, top)):
        asked = DialSetting(levels)
        answer = next(d for d in deliveries if (d.prompt_id, d.setting) == (prompt.id, asked))
        print(f"  {levels}: {answer.text}")


if __name__ == "__main__":
    main()
