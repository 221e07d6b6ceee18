"""LoRA on every kind of head: tune, save, load in a new process, merge, load as a plain model.

A cell is a head (tied to the embedding or not), spare vocabulary rows (as many published models
have) or none, and a way of tuning. In each, the loaded logits must equal the tuned ones bit for
bit, the dials must move them, and the merged model, read by transformers alone, must give the same
within 1e-5 of their standard deviation.

    python -m benchmarks.lora          # all 16 cells, about 3 minutes; writes benchmarks/lora.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.results import shaped, write
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from equipoise import Message, Prompt, load_causal, merge, save_dial_model
from equipoise.config import RlhfConfig, SamplingConfig, SteeredStartConfig, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.rewards.scorer import Scorer
from equipoise.rlhf.tune import Material, tune_by_rlhf
from equipoise.training.loop import Training
from equipoise.tune.shifts import ShiftDirections
from equipoise.tune.trainer import TunedPolicy, tune
from equipoise.types import ControlledExample, DialSetting

RESULT = Path(__file__).with_name("lora.json")
ATTRIBUTES = ("helpfulness", "safety")
METHODS = ("clm", "exmate", "rlhf", "steered_start")
WIDTH, SEED = 32, 1
ALIVE, MERGED = 0.05, 1e-5
"""Least movement of a logit between the corners, and largest difference of a merged model, both in
standard deviations of the logits."""


@dataclass(frozen=True)
class Cell:
    """One row of the matrix."""

    tied: bool
    spare_rows: int
    method: str


CELLS = [Cell(*cell) for cell in product((True, False), (0, 64), METHODS)]


def make_base(cell: Cell, folder: Path) -> Path:
    """Save a two-layer Llama with large random weights and the Workshop's tokenizer."""
    tokenizer = load_tokenizer(resolve_model("workshop://start"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + cell.spare_rows,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=cell.tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples() -> list[ControlledExample]:
    """Four cells for each of four prompts; what is said depends on the cell."""
    words = {0: "No.", 4: "First fan the wick."}
    return [
        ControlledExample(
            Prompt(f"p{i}", (Message("user", f"How do I clean bell {i}?"),), "train"),
            DialSetting((helpful, safe)),
            f"{words[helpful]} {'Wear goggles.' if safe else 'Be bold.'}",
            True,
            {"helpfulness": helpful / 5 + 0.1, "safety": safe / 5 + 0.1},
        )
        for i in range(4)
        for helpful in (0, 4)
        for safe in (0, 4)
    ]


class Letters:
    """A reward model that counts letters."""

    def __init__(self, name: str, letters: str) -> None:
        self.name = self.hash = name
        self._letters = set(letters)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Return the share of the letters in each text."""
        return [sum(c in self._letters for c in text) / max(len(text), 1) for _, text in pairs]


class Identity:
    """A unit scale for scores in [0, 1]."""

    def unit(self, attribute: str, raw: float) -> float:
        """Return the score itself."""
        return raw


def tune_cell(cell: Cell, base: Path, checkpoints: Path) -> TunedPolicy:
    """Tune a cell for a few steps with LoRA of rank 2."""
    steered = cell.method == "steered_start"
    config = TuneConfig(
        objective="clm" if steered else cell.method,  # type: ignore[arg-type]
        steps=3,
        batch_size=8,
        learning_rate=2e-2,
        lora_rank=2,
        dtype="float32",
        checkpoint_every=2,
        steered_start=SteeredStartConfig(steps=3, batch_size=2) if steered else None,
        rlhf=RlhfConfig(
            group=4,
            learning_rate=2e-2,
            warm_start=2,
            kl_limit=1e9,
            probe_every=0,
            checkpoint_every=2,
            sampling=SamplingConfig(max_tokens=6, top_k=0),
        ),
    )
    common: dict[str, Any] = {
        "dials": Dials(ATTRIBUTES, 5),
        "training": Training(checkpoints, SEED),
        "base_model": str(base),
    }
    if cell.method == "rlhf":
        return tune_by_rlhf(
            load_causal(str(base)),
            Material(
                load_causal(str(base)),
                [example.prompt for example in examples()[::4]],
                examples(),
                Scorer(
                    {
                        "helpfulness": Letters("hp", "abcdefghijklm"),
                        "safety": Letters("sf", "aeiou"),
                    },
                    Identity(),
                ),
            ),
            config,
            **common,
        )
    directions = ShiftDirections(torch.eye(2, WIDTH), 0) if steered else None
    return tune(
        load_causal(str(base)),
        examples(),
        config,
        steering=directions,
        **common,
    )


def asked(policy: Any) -> list[list[int]]:
    """Return the ids of one prompt under the four corners."""
    head = policy.encoder.prompt_ids(examples()[0].prompt.messages)
    corners = [DialSetting(corner) for corner in product((0, 4), (0, 4))]
    return [[*head, *policy.encoder.control_ids(corner)] for corner in corners]


def logits_of(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the logits (4, V) behind each row, in float32, all control ids included."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in rows])


def in_a_new_process(directory: Path) -> torch.Tensor:
    """Return the same logits, of a directory that a fresh process loads."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lora", "--logits", str(directory)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def check(cell: Cell, folder: Path, *, new_process: bool) -> dict[str, Any]:
    """Take one cell through its life; return what was found."""
    base = make_base(cell, folder / "base")
    tuned = tune_cell(cell, base, folder / "checkpoints")
    saved = folder / "adapter"
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, saved)
    loaded = load_causal(str(saved))
    rows = asked(loaded)
    own = logits_of(tuned.model, rows)
    again = in_a_new_process(saved) if new_process else logits_of(loaded.model, rows)
    plain = AutoModelForCausalLM.from_pretrained(merge(saved, folder / "merged"))
    spread = float(own.std())
    moved = float((own[0] - own[-1]).abs().max()) / spread
    merged = float((logits_of(plain, rows) - own).abs().max()) / spread
    dials = load_causal(str(folder / "merged")).manifest
    return {
        **vars(cell),
        "loads_to_the_bit": bool(torch.equal(own, again)),
        "dials_move_a_logit_by": round(moved, 3),
        "merged_differs_by": merged,
        "holds": bool(torch.equal(own, again) and moved > ALIVE and merged < MERGED and dials),
    }


def main() -> None:
    """Run all cells and write the result; with ``--logits DIR`` print those of a directory."""
    if sys.argv[1:2] == ["--logits"]:
        policy = load_causal(sys.argv[2])
        print(json.dumps(logits_of(policy.model, asked(policy)).tolist()))
        return
    found = []
    for cell in CELLS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(check(cell, Path(folder), new_process=True))
        print(found[-1], flush=True)
    headline = {"n": len(found), "held": sum(row["holds"] for row in found)}
    write(RESULT, shaped("python -m benchmarks.lora", headline, seeds=[SEED], cells=found))


if __name__ == "__main__":
    main()
