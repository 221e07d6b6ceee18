"""The table of stages: the one place that says which there are and what each depends on.

The command line, the runner, fingerprints, the plan and a test of the docs read it. A stage's
module is named, not imported: nothing on the way to ``--help`` imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from equipoise.config import Recipe
from equipoise.pipeline import hashes
from equipoise.pipeline.spec import Also, Phase, StageSpec, never

MADE = "made://"
"""``made://STAGE`` in a recipe is the model that this stage of the same run makes."""


def _by_rlhf(recipe: Recipe) -> bool:
    return recipe.tune.objective == "rlhf"


def _leaves_out(recipe: Recipe) -> bool:
    return any(one.leave_out_test or one.leave_out_train for one in recipe.fit_reward.values())


_POLICY = ("model", "chat_template_kwargs")
_DIALS = ("attributes", "levels")
_REWARDS = ("reward_models", "score.batch_size")
_ASKED = ("seed", *_POLICY, *_DIALS, "generate")
"""What every stage that samples the pool, or under steering, reads."""
_EVALUATED = ("seed", *_POLICY, *_DIALS, *_REWARDS, "judges", "evaluate")

STAGES: Mapping[str, StageSpec] = {
    row.name: row
    for row in (
        StageSpec(
            "base", "Train a base model from raw text (recipes that make their start model).",
            "equipoise.stages.base:base",
            reads=("seed", "data", "base"),
            optional="base", phase=Phase.START, prompts_first=never,
        ),
        StageSpec(
            "sft", "Fine-tune it on dialogues.", "equipoise.stages.sft:sft",
            reads=("seed", "data", "chat_template_kwargs", "sft"), inputs=("base",),
            models=hashes.of_sft, optional="sft", phase=Phase.START, prompts_first=never,
        ),
        StageSpec(
            "align", "Align it: DPO on preference pairs, or RLHF on rewards.",
            "equipoise.stages.align:align",
            reads=("seed", "data", "chat_template_kwargs", "prompts", "align"),
            inputs=("base", "sft"),
            models=hashes.of_align, optional="align", phase=Phase.START, prompts_first=never,
        ),
        StageSpec(
            "prompts", "Load the prompts of all splits, and refuse what cannot be used.",
            "equipoise.stages.prompts:prompts",
            reads=("seed", "data", *_POLICY, "prompts"), models=hashes.of_policy,
            checks=(*_DIALS, "generate", "evaluate", "tune"),
            prompts_first=never, computes=False,
        ),
        StageSpec(
            "fit-reward", "Train the recipe's own reward models.",
            "equipoise.stages.fit_reward:fit_reward",
            reads=("seed", "data", "fit_reward"), models=hashes.of_backbones,
            optional="fit_reward", prompts_first=_leaves_out, planned=True,
        ),
        StageSpec(
            "generate", "Sample completions of the training prompts from the untouched model.",
            "equipoise.stages.generate:generate",
            reads=_ASKED, inputs=("prompts",), models=hashes.of_policy, planned=True,
        ),
        StageSpec(
            "score", "Score the pool with the reward models and calibrate.",
            "equipoise.stages.score:score",
            reads=("attributes", "reward_models", "score"), inputs=("generate", "fit-reward"),
            models=hashes.of_reward_models, planned=True,
        ),
        StageSpec(
            "judge", "Let the judges read the pool: the scale of what they will say.",
            "equipoise.stages.judge:judge",
            reads=("attributes", "judges", "score.batch_size"),
            inputs=("prompts", "fit-reward", "score"), models=hashes.of_judges, planned=True,
        ),
        StageSpec(
            "steer", "Find what to add to the model's states to steer it, and how strongly.",
            "equipoise.stages.steer:steer",
            reads=(*_ASKED, *_REWARDS, "steer"), inputs=("prompts", "score"),
            models=hashes.of_steering, optional="steer", planned=True, refuses_thoughts=True,
        ),
        StageSpec(
            "regenerate", "Sample a second pool under steering, for the cells that are rare.",
            "equipoise.stages.regenerate:regenerate",
            reads=(*_ASKED, *_REWARDS, "regenerate"), inputs=("prompts", "score", "steer"),
            models=hashes.of_steering, optional="regenerate", planned=True, refuses_thoughts=True,
        ),
        StageSpec(
            "distil", "Distil the scored pool (MOEC).", "equipoise.stages.distil:distil",
            reads=("seed", *_DIALS, "prompts", "distil"),
            inputs=("prompts", "score", "steer", "regenerate"),
        ),
        StageSpec(
            "tune", "Tune the dials (CLM, ExMATE or RLHF).", "equipoise.stages.tune:tune",
            reads=("seed", *_POLICY, *_DIALS, "reward_models", "tune"), inputs=("steer", "distil"),
            models=hashes.of_tuning,
            # RLHF asks both kinds of judges on the way.
            also=Also(
                _by_rlhf, reads=("judges", "evaluate.sampling", "score.batch_size"),
                inputs=("judge",),
            ),
            planned=True, refuses_thoughts=True,
        ),
        StageSpec(
            "evaluate", "Turn every dial on unseen prompts and measure.",
            "equipoise.stages.evaluate:evaluate",
            reads=(*_EVALUATED, "data", "prompts", "refusal_judge"),
            inputs=("prompts", "fit-reward", "score", "steer", "tune", "judge"),
            models=hashes.of_evaluation, planned=True,
        ),
        StageSpec(
            "report", "Write the report: HTML, JSON and figures.", "equipoise.stages.report:report",
            reads=tuple(Recipe.model_fields),  # it prints the recipe
            inputs=("score", "distil", "tune", "judge", "evaluate"),
            computes=False, shows_text=True,
        ),
        StageSpec(
            "scenarios", "Measure what every scenario of a dial policy delivers.",
            "equipoise.stages.scenarios:scenarios",
            reads=_EVALUATED, inputs=("prompts", "score", "tune", "judge", "evaluate"),
            phase=Phase.BESIDE,
        ),
        StageSpec(
            "forge", "Measure how far typed text can move a dial, through the HTTP server.",
            "equipoise.cli.forge:forge",
            reads=_EVALUATED, inputs=("prompts", "score", "tune", "judge", "evaluate"),
            phase=Phase.BESIDE,
        ),
    )
}  # fmt: skip
"""Name to row, in the order of the run."""

ORDER = tuple(name for name, row in STAGES.items() if row.phase is not Phase.BESIDE)
"""Of the stages that have a folder of their own."""


def of_phase(phase: Phase) -> list[StageSpec]:
    """Return the rows of a phase, in order."""
    return [row for row in STAGES.values() if row.phase is phase]


def is_asked_for(row: StageSpec, recipe: Recipe) -> bool:
    """Return whether a run of this recipe has the stage."""
    return row.optional is None or bool(getattr(recipe, row.optional))


def reads_of(row: StageSpec, recipe: Recipe) -> tuple[str, ...]:
    """Return the fields that a stage reads in a run of this recipe: FIELD, or FIELD.PART."""
    return row.reads + (row.also.reads if row.also.when(recipe) else ())


def inputs_of(row: StageSpec, recipe: Recipe) -> list[str]:
    """Return the stages that a stage reads in a run of this recipe."""
    inputs = row.inputs + (row.also.inputs if row.also.when(recipe) else ())
    return [one for one in inputs if is_asked_for(STAGES[one], recipe)]


def read_fields(plain: Mapping[str, Any], reads: Sequence[str]) -> dict[str, Any]:
    """Return what is read of a plain recipe, by top-level field."""
    found: dict[str, Any] = {}
    for path in reads:
        field, _, part = path.partition(".")
        if part:
            found.setdefault(field, {})[part] = (plain.get(field) or {}).get(part)
        else:
            found[field] = plain.get(field)
    return found


def needed_by(name: str, recipe: Recipe) -> list[str]:
    """Return a stage and all that have to come before it, in order."""
    found = {name}
    for stage in reversed(ORDER):
        if stage in found:
            found.update(inputs_of(STAGES[stage], recipe))
    return [stage for stage in ORDER if stage in found]


def affected_by(changes: Sequence[str], recipe: Recipe) -> list[str]:
    """Return the stages that read a changed field, given as ``diff`` does."""
    paths = [f"{line.split(':')[0]}." for line in changes]

    def affected(name: str) -> bool:
        reads = reads_of(STAGES[name], recipe)
        return any(path.startswith(f"{read}.") for read in reads for path in paths)

    return list(filter(affected, ORDER))


def with_later(names: Collection[str], recipe: Recipe) -> list[str]:
    """Return stages and all that depend on them, in order.

    Inputs that this recipe leaves out count as well: the stage may have read them before.
    """
    found, plain = set(names), recipe.model_dump(mode="json")
    for name in ORDER:
        row = STAGES[name]
        made = _made(read_fields(plain, reads_of(row, recipe)))
        if found & {*row.inputs, *inputs_of(row, recipe), *made}:
            found.add(name)
    return [name for name in ORDER if name in found]


def _made(value: Any) -> Iterator[str]:
    """Yield the stages whose models a plain part of a recipe names."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _made(item)
    elif isinstance(value, str) and value.startswith(MADE):
        yield value.removeprefix(MADE)
