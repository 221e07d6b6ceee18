"""Live scores: what an answer delivered, by the reward models that the model was tuned with.

A score that cannot be had is an error, never a missing field: whoever switched scoring on asked
that no answer leaves unscored (fail closed).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from equipoise.dials.manifest import DialManifest
from equipoise.errors import ConfigError, RewardError, ServingError
from equipoise.rewards.scorer import Pair, Scorer
from equipoise.steer.reranking import nearest_first
from equipoise.types import (
    DialSetting,
    Judged,
    Message,
    Prompt,
    RewardModel,
)

_Units = list[dict[str, float]]


class ScorerUnavailableError(ServingError):
    """The scorer failed or took too long; the answer is not blocked by its content."""


class LiveScorer:
    """Scores answers beside the event loop, one batch at a time.

    Args:
        scorer: Of the reward models in the order of the dials, on the scale of the manifest.
        levels: L, for :meth:`ranked`.
        timeout: Seconds after which a batch counts as failed.
    """

    def __init__(self, scorer: Scorer, *, levels: int, timeout: float = 30.0) -> None:
        self.names = {attribute: model.hash for attribute, model in scorer.reward_models.items()}
        """Attribute to the hash of the reward model behind its score."""
        self._scorer, self._levels, self._timeout = scorer, levels, timeout
        self._began: float | None = None
        """When the batch under way began."""
        self._work: SimpleQueue[tuple[Future[_Units], list[Pair]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def stuck(self) -> bool:
        """Whether a batch that counts as failed still holds the thread, so that none can begin."""
        began = self._began
        return began is not None and time.monotonic() - began > self._timeout

    @property
    def lingers(self) -> bool:
        """Whether a batch is under way; after :meth:`close` nobody waits for it."""
        return self._began is not None

    async def score(self, messages: Sequence[Message], answers: Sequence[Judged]) -> _Units:
        """Return unit scores in [0, 1] per answer: attribute to score, in order.

        An answer that was cut is scored up to its last finished sentence, as in evaluation.

        Raises:
            ScorerUnavailableError: For whatever reason there are no finite scores in time.
        """
        if self.stuck:  # in line behind it, the texts would pile up
            raise _unavailable(TimeoutError())
        if self._thread is None:
            # A daemon, as those of an executor are waited for when the process ends, hung or not.
            self._thread = threading.Thread(target=self._run, name="equipoise-scorer", daemon=True)
            self._thread.start()
        prompt = Prompt("live", tuple(messages), "test")
        result: Future[_Units] = Future()
        self._work.put((result, [(prompt, answer.judged) for answer in answers]))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(result), self._timeout)
        except Exception as error:  # whatever a reward model of the user raises
            raise _unavailable(error) from error

    def ranked(self, units: Sequence[Mapping[str, float]], setting: DialSetting) -> list[int]:
        """Return the indices of answers, nearest the setting's targets first, as reranking does."""
        rows = [[unit[attribute] for attribute in self.names] for unit in units]
        return nearest_first(rows, setting, self._levels)

    def close(self) -> None:
        """Stop the thread; a batch under way is not waited for."""
        self._work.put(None)

    def _run(self) -> None:
        """The scorer's thread: one batch after the other, those apart that nobody waits for."""
        while (work := self._work.get()) is not None:
            result, pairs = work
            if not result.set_running_or_notify_cancel():
                continue
            self._began = time.monotonic()
            try:
                units = self._units(pairs)
            except BaseException as error:  # whatever a reward model of the user raises
                self._began = None
                result.set_exception(error)
            else:
                self._began = None
                result.set_result(units)

    def _units(self, pairs: list[Pair]) -> _Units:
        found = self._scorer.units(pairs)
        if any(not 0.0 <= value <= 1.0 for unit in found for value in unit.values()):
            raise RewardError(
                "a unit score is outside of [0, 1]",
                why="the calibration gave it",
                fix="score the pool again, and tune or copy the manifest anew",
            )
        return found


def load_scorer(
    model_dir: Path, manifest: DialManifest, *, run: Path | None = None, timeout: float = 30.0
) -> LiveScorer:
    """Load the reward models and the calibration that a model's manifest names.

    The manifest knows reward models by hash, the run's recipe by name: what is loaded must be both.

    Args:
        model_dir: The tuned model.
        manifest: Its manifest.
        run: The run directory whose recipe names the reward models; by default the one that
            ``model_dir`` lies in.
        timeout: See :class:`LiveScorer`.

    Raises:
        ConfigError: The manifest names none, there is no run, or a model is not the named one.
        ModelError: A reward model cannot be loaded.
    """
    from equipoise.pipeline.stored import stored_recipe
    from equipoise.pool.calibrate import Calibration
    from equipoise.rewards.load import files_hash, load_reward_model, reward_hash

    if manifest.calibration is None or not manifest.reward_models:
        raise _cannot_score(
            model_dir,
            "its dials.json names no reward models and no calibration",
            "tune with `equipoise stage tune`, which writes both; or do not ask for scores",
        )
    place = run or _run_of(model_dir)
    recipe, fitted = stored_recipe(place), place / "fit-reward" / "fitted"
    models: dict[str, RewardModel] = {}
    for attribute in manifest.attributes:
        config = recipe.reward_models.get(attribute)
        wanted = manifest.reward_models.get(attribute)
        if config is None or wanted is None or reward_hash(config, fitted_root=fitted) != wanted:
            # A dials.json of an earlier version: the files alone do not tell a flipped sign.
            if config is not None and files_hash(config, fitted_root=fitted) == wanted:
                raise _cannot_score(
                    model_dir,
                    f"its dials.json names the files of the reward model for {attribute}, but not "
                    "the sign, logit, format and max_length that they were read with",
                    f"write it anew: `equipoise stage tune {place} --fresh`",
                )
            raise _cannot_score(
                model_dir,
                f"the reward model for {attribute} in {place} is not the one of its dials.json: "
                "it has other files, or another sign, logit, format or max_length",
                "name the run directory that this model was tuned in",
            )
        models[attribute] = load_reward_model(config, attribute=attribute, fitted_root=fitted)
    calibration = Calibration.from_json(json.dumps(manifest.calibration))
    return LiveScorer(Scorer(models, calibration), levels=manifest.levels, timeout=timeout)


def _run_of(model_dir: Path) -> Path:
    for folder in model_dir.resolve().parents[:3]:
        if (folder / "recipe.json").is_file():
            return folder
    raise _cannot_score(
        model_dir,
        "it lies in no run directory, whose recipe would name the reward models",
        "name the run directory that it was tuned in",
    )


def _cannot_score(model_dir: Path, why: str, fix: str) -> ConfigError:
    return ConfigError(f"answers of {model_dir} cannot be scored live", why=why, fix=fix)


def _unavailable(error: Exception) -> ScorerUnavailableError:
    return ScorerUnavailableError(
        "the scorer gave no scores for this answer",
        why=f"{type(error).__name__} in a reward model",
        fix="ask again; if it stays so, read the server's log, or serve without scores",
    )
