"""Are the evaluated prompts unseen? The sizes of all intersections; none of them may be above 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from equipoise.config import Recipe, RewardModelConfig
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import prompt_keys
from equipoise.pipeline.rundir import RunDir
from equipoise.types import Prompt

REWARD, ALIGN = "reward model", "align reward"
SAID = {"train": "training"}
"""How a split is called where its own name reads badly."""


def check_unseen(job: Job, prompts: Sequence[Prompt]) -> dict[str, int | None]:
    """Compare the evaluated prompts with all that training and the judges saw.

    Returns:
        Name of a set to the number of evaluated prompts in it, then how many prompts of the other
        splits are among the rows of each model: what it says of them is not a result of the test.
        ``None`` where the rows of a reward model from elsewhere are not known.

    Raises:
        DataError: A set shares a prompt with the evaluated ones.
    """
    wanted = {prompt_key(prompt.messages) for prompt in prompts}
    keys = {split: prompt_keys(job.run, (split,)) for split in ("train", "dev", "test")}
    sizes: dict[str, int | None] = {
        f"{split} prompts": len(wanted & found)
        for split, found in keys.items()
        if split != job.recipe.evaluate.split
    }
    others: dict[str, int | None] = {}
    refusal = job.recipe.refusal_judge
    for kind, configs in (
        ("reward model", job.recipe.reward_models),
        ("judge", job.recipe.judges),
        ("judge", {} if refusal is None else {"refusals": refusal}),
    ):
        for attribute, config in configs.items():
            rows, name = _rows_of(config, job), f"{kind} {attribute} rows"
            sizes[name] = None if rows is None else len(wanted & rows)
            for split, found in keys.items():
                if split != job.recipe.evaluate.split:
                    shared = None if rows is None else len(found & rows)
                    others[f"{SAID.get(split, split)} prompts in {name}"] = shared
    seen = {name: size for name, size in sizes.items() if size}
    if seen:
        listed = ", ".join(f"{size} in {name}" for name, size in seen.items())
        raise DataError(
            f"evaluated prompts are not unseen: {listed}",
            why="a dial measured on prompts that training or a judge saw proves nothing",
            fix="give the test split its own source, or take those rows out of the other one",
        )
    return {**sizes, **others}


def judges_in_training(trained: Mapping[str, str], judges: Mapping[str, str]) -> dict[str, str]:
    """Return the judges that training used: judge's attribute to what it is there.

    Args:
        trained: What training used (``reward model safety``) to its identity: a hash, or the name
            of the model in a recipe.
        judges: Attribute to the identity of its judge.
    """
    found: dict[str, str] = {}
    for attribute, identity in judges.items():
        same = [name for name, other in trained.items() if other == identity]
        if same:
            own = f"{REWARD} {attribute}"
            found[attribute] = own if own in same else same[0]
    return found


def warn_of_judges(job: Job, found: Mapping[str, str]) -> None:
    """Say which judges are no judges."""
    for attribute, model in found.items():
        job.progress.say(
            f"warning: judge {attribute} is {model}: what it says is no generalization, and the "
            "report says so"
        )


def judges_by_name(recipe: Recipe) -> dict[str, str]:
    """Return :func:`judges_in_training` as far as the names in a recipe tell."""
    rewards = {f"{REWARD} {name}": one.model for name, one in recipe.reward_models.items()}
    align = {} if recipe.align is None else recipe.align.rewards
    rewards |= {f"{ALIGN} {name}": one.model for name, one in align.items()}
    return judges_in_training(rewards, {name: one.model for name, one in recipe.judges.items()})


def judges_by_hash(run: RunDir) -> dict[str, str]:
    """Return :func:`judges_in_training` of a run that is evaluated."""
    found = run.done("evaluate").facts()["fingerprint"]["models"]
    trained = {f"{REWARD} {name}": digest for name, digest in of_kind("reward", found).items()}
    if run.recipe.align is not None:
        align = run.done("align").facts()["fingerprint"]["models"]
        trained |= {f"{ALIGN} {name}": align[name] for name in run.recipe.align.rewards}
    return judges_in_training(trained, of_kind("judge", found))


def of_kind(kind: str, models: Mapping[str, str]) -> dict[str, str]:
    """Return attribute to hash of the reward models or judges in a fingerprint."""
    start = f"{kind}/"
    return {n.removeprefix(start): digest for n, digest in models.items() if n.startswith(start)}


def _rows_of(config: RewardModelConfig, job: Job) -> set[str] | None:
    if config.oracle is not None:
        return set()  # an exact rule: it was not trained
    from equipoise.models.hub import resolve_model
    from equipoise.rewards.card import read_card

    place = Path(resolve_model(config.model, fitted_root=job.fitted_root))
    card = read_card(place) if place.is_dir() else None
    return None if card is None else {*card.train_prompts, *card.held_out_prompts}
