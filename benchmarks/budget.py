"""Equal budget: equal tokens through the model, prompts, controls and every branch included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise.encoding.encode import Encoder
from equipoise.models.load import load_tokenizer, resolve_model
from equipoise.store.rundir import stored_recipe
from equipoise.store.stagefiles import StageFiles
from equipoise.types import ControlledExample


@dataclass(frozen=True)
class RowLengths:
    """Mean tokens of what an example consists of."""

    prompt: float
    controls: float
    completion: float

    def read(self, branches: int = 1) -> float:
        """Return the tokens of one example with so many branches behind one prompt."""
        return self.prompt + branches * (self.controls + self.completion)


def row_lengths(folder: Path) -> RowLengths:
    """Return the lengths of the distilled set of a run."""
    recipe = stored_recipe(folder)
    encoder = Encoder(load_tokenizer(resolve_model(recipe.model)))
    # Read without the run's lock: the reference may still be at work on a later stage.
    examples = StageFiles(folder / "distil").read_shard("examples.parquet", ControlledExample)
    prompts = sum(len(encoder.prompt_ids(e.prompt.messages)) for e in examples)
    completions = sum(len(encoder.completion_ids(e.text, finished=e.finished)) for e in examples)
    return RowLengths(
        prompts / len(examples), float(len(recipe.attributes)), completions / len(examples)
    )


def steps_within(tokens: float, batch_size: int, row: float) -> int:
    """Return how many steps of a method take as many tokens, one row of it having ``row``."""
    return max(1, round(tokens / (batch_size * row)))
