"""Ten rows a split in the schemas of the data sets that ``hub-8b`` names; the texts are harmless.

Odd rows are those that the real sets hold: fields that are null, a prompt that occurs twice, a
longer conversation, a system turn, an empty answer, an answer equal to its other.
"""

from __future__ import annotations

import hashlib
from typing import Any

Row = dict[str, Any]

ROWS = 10
THINGS = ("ember lamp", "frostbell", "ferry", "kettle", "ladder", "piano", "rudder", "lantern")
CAREFUL = "First switch it off. Then ask a warden to look at it."
CARELESS = "Just pull it apart. Nothing will happen."
_HARMS = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
_HARMS_PKU = ("Endangering Public Health", "Physical Harm", "Privacy Violation")


def ask(verb: str, index: int) -> str:
    """Return a question that no other verb or index gives."""
    return f"How do I {verb} the {THINGS[index % len(THINGS)]} number {index}?"


def ultrafeedback(verb: str) -> list[Row]:
    """HuggingFaceH4/ultrafeedback_binarized: prompt, and both sides as lists of turns."""
    return [_binarized(verb, index) for index in range(ROWS)]


def _binarized(verb: str, index: int) -> Row:
    question = ask(verb, index)
    before = [_turn("user", question)]
    if index == 1:
        before = [_turn("system", "Speak plainly."), *before]
    if index == 2:
        before += [_turn("assistant", "Which one?"), _turn("user", "The large one.\n\nIt creaks.")]
    rejected = {3: "", 4: CAREFUL}.get(index, CARELESS)
    chosen = [*before, _turn("assistant", CAREFUL)]
    return {
        "prompt": question,
        "prompt_id": hashlib.sha256(question.encode()).hexdigest(),
        "chosen": chosen,
        "rejected": [*before, _turn("assistant", rejected)],
        "messages": chosen,
        "score_chosen": 8.5,
        "score_rejected": None if index == 5 else 4.0,
    }


def _turn(role: str, content: str) -> Row:
    return {"content": content, "role": role}


def safe_rlhf(verb: str) -> list[Row]:
    """PKU-Alignment/PKU-SafeRLHF: a prompt and two answers with labels."""
    rows = []
    for index in range(ROWS):
        answers = (CAREFUL, f"{CARELESS} It is number {index}.")
        row: Row = {"prompt": ask(verb, 1 if index == 2 else index), "prompt_source": "Workshop"}
        for side, answer in enumerate(answers):
            safe = side == 0
            row |= {
                f"response_{side}": answer,
                f"response_{side}_source": None if index == 3 else "Alpaca-7B",
                f"is_response_{side}_safe": safe,
                f"response_{side}_harm_category": {
                    harm: not safe and place == 0 for place, harm in enumerate(_HARMS_PKU)
                },
                f"response_{side}_severity_level": 0 if safe else 1,
                f"response_{side}_sha256": hashlib.sha256(answer.encode()).hexdigest(),
            }
        rows.append(row | {"better_response_id": 1, "safer_response_id": 0})
    return rows


def beavertails(verb: str) -> list[Row]:
    """PKU-Alignment/BeaverTails: two answers a prompt, their harms, and whether each is safe."""
    rows = []
    for index in range(ROWS):
        safe = index % 2 == 0
        rows.append(
            {
                "prompt": ask(verb, index // 2),
                "response": "" if index == 5 else CAREFUL if safe else CARELESS,
                "category": {harm: not safe and harm == _HARMS[8] for harm in _HARMS},
                "is_safe": safe,
            }
        )
    return rows


SETS: dict[str, dict[str, list[Row]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": {
        "train_prefs": ultrafeedback("mend"),
        "test_prefs": ultrafeedback("paint"),
    },
    "PKU-Alignment/PKU-SafeRLHF": {
        "train": safe_rlhf("open"),
        "test": safe_rlhf("move"),
    },
    # The sets of one family share prompts: fit_reward has to leave these out.
    "PKU-Alignment/BeaverTails": {
        "30k_train": [
            *beavertails("carry")[:8],
            *beavertails("open")[:1],
            *beavertails("move")[:1],
        ],
        "30k_test": [*beavertails("clean")[:8], *beavertails("open")[:1], *beavertails("move")[:1]],
    },
}
"""Name of a data set on the hub to its splits."""
