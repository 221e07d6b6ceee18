"""A seeded writer of Workshop prompts and completions.

``write`` turns two intensities, care and help, into a completion; ``base_intensities`` and
``aligned_intensities`` choose them: the base text covers everything, the aligned text over-refuses
(docs/workshop.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from equipoise.worlds.workshop.tables import (
    ACTIONS,
    CARE_WORDS,
    HELP_WORDS,
    KIND_OF,
    KINDS,
    OPENERS,
    REFERRALS,
    REFUSALS,
    RISKS,
    STEP_LEADS,
    TIP_LEADS,
)

_MINUTES = tuple(kind.minutes for kind in KINDS.values())


@dataclass(frozen=True)
class Request:
    """What a prompt asks: an action on an object."""

    object: str
    action: str
    wording: int
    """Index into the action's wordings; the last one sounds like the other class."""

    @property
    def sounds_hazardous(self) -> bool:
        """Whether the wording alarms, whatever the action is."""
        action = ACTIONS[self.action]
        borderline = self.wording == len(action.wordings) - 1
        return action.hazardous != borderline


@dataclass(frozen=True)
class Plan:
    """The skeleton of a completion: which sentences it has."""

    refuse: bool
    right_steps: int
    wrong_steps: int
    safe_way: bool
    """Hazardous actions: right steps follow the safe way."""
    exact: float
    """Probability that a step names the right tool and the right number of minutes."""
    tips: int
    fitting: float
    """Probability that a tip, expert or piece of gear fits the object."""
    refer: bool
    risks: int


def plan(rng: random.Random, care: float, help_: float) -> Plan:
    """Draw a skeleton for intensities ``care`` and ``help_``, both in [0, 1]."""
    refuse = rng.random() < (0.9 if care > 0.4 and help_ < 0.3 else 0.1 * care * (1.0 - help_))
    most = 1 if refuse else 3
    n_steps = min(most, max(0, round(3.2 * help_ + 0.3 + rng.gauss(0.0, 0.5))))
    right = sum(rng.random() < 1.2 * help_ + 0.08 for _ in range(n_steps))
    # A refusal is curt: what makes an answer as safe as can be is care, not silence.
    tips = 3.4 * care - (0.9 if refuse else 0.4)
    return Plan(
        refuse=refuse,
        right_steps=right,
        wrong_steps=n_steps - right,
        safe_way=rng.random() < 1.5 * care - 0.25,
        exact=0.1 + 0.85 * help_,
        tips=min(3, max(0, round(tips + rng.gauss(0.0, 0.4)))),
        fitting=0.5 + 0.45 * max(care, help_),
        refer=rng.random() < 1.2 * care - 0.5,
        risks=min(2, max(0, round(1.9 - 3.2 * care + rng.gauss(0.0, 0.4)))),
    )


def write(rng: random.Random, request: Request, chosen: Plan) -> str:
    """Write a completion with the given skeleton; sentence order and wording are drawn."""
    kind = KINDS[KIND_OF[request.object]]
    head = REFUSALS if chosen.refuse else OPENERS
    sentences = [rng.choice(head).format(o=request.object)]
    tips = rng.sample(kind.tips, k=min(chosen.tips, 3))
    body = _steps(rng, request, chosen)
    extras = [
        _tip(rng, tip if rng.random() < chosen.fitting else _other_tip(rng, kind.tips))
        for tip in tips
    ]
    body = extras + body if rng.random() < 0.5 else body + extras
    sentences += body
    for risk in rng.sample(RISKS, k=chosen.risks):
        gear = kind.gear if rng.random() < 0.75 else rng.choice(list(KINDS.values())).gear
        sentences.append(risk.format(g=gear))
    if chosen.refer:
        expert = kind.expert
        if rng.random() > chosen.fitting:
            expert = rng.choice(list(KINDS.values())).expert
        sentences.append(rng.choice(REFERRALS).format(e=expert))
    return " ".join(sentences)


def _steps(rng: random.Random, request: Request, chosen: Plan) -> list[str]:
    action, kind = ACTIONS[request.action], KINDS[KIND_OF[request.object]]
    table = action.safe_steps if action.hazardous and chosen.safe_way else action.steps
    right = [
        (motion, tool, rng.choice(kind.parts))
        for motion, tool in rng.sample(table, k=min(chosen.right_steps, len(table)))
    ]
    steps = [(m, _tool(rng, tool, chosen.exact), part) for m, tool, part in right]
    for _ in range(chosen.wrong_steps):
        if rng.random() < 0.5:  # wrong motion for the action
            other = ACTIONS[rng.choice([name for name in ACTIONS if name != request.action])]
            motion, tool = rng.choice(other.safe_steps or other.steps)
            steps.append((motion, tool, rng.choice(kind.parts)))
        else:  # wrong part for the object
            motion, tool = rng.choice(table)
            alien = rng.choice([k for k in KINDS.values() if k is not kind])
            steps.append((motion, tool, rng.choice(alien.parts)))
    rng.shuffle(steps)
    lines = []
    for index, (motion, tool, part) in enumerate(steps):
        lead = STEP_LEADS[0] if index == 0 else rng.choice(STEP_LEADS[1:])
        minutes = ""
        if rng.random() < 0.25 + 0.5 * chosen.exact:
            number = kind.minutes if rng.random() < chosen.exact else rng.choice(_MINUTES)
            minutes = f" for {number} minutes"
        lines.append(f"{lead}{motion} the {part} with {tool}{minutes}.")
    return lines


def _tool(rng: random.Random, right: str, exact: float) -> str:
    if rng.random() < exact:
        return right
    return rng.choice(rng.choice(list(ACTIONS.values())).steps)[1]


def _tip(rng: random.Random, tip: str) -> str:
    line = rng.choice(TIP_LEADS) + tip + "."
    return line[0].upper() + line[1:]


def _other_tip(rng: random.Random, own: tuple[str, ...]) -> str:
    return rng.choice([tip for k in KINDS.values() for tip in k.tips if tip not in own])


@dataclass(frozen=True)
class Intensities:
    """Care and help in [0, 1], and the words that ask for them (may be empty)."""

    care: float
    help: float
    words: str = ""


def base_intensities(rng: random.Random) -> Intensities:
    """Base text: every combination; often the prompt says in words what is wanted."""
    care, help_ = rng.random(), rng.random()
    words = []
    if rng.random() < 0.35:
        words.append(CARE_WORDS[min(4, int(care * 5))])
    if rng.random() < 0.35:
        words.append(HELP_WORDS[min(4, int(help_ * 5))])
    rng.shuffle(words)
    return Intensities(care, help_, " ".join(w for w in words if w))


def aligned_intensities(rng: random.Random, request: Request) -> Intensities:
    """Aligned text: over-refuses, above all where the prompt is or sounds hazardous.

    Where it does help it is seldom reckless: helpful *and* unsafe is the rare corner, as in the
    paper.
    """
    worry = 0.08 + 0.3 * ACTIONS[request.action].hazardous + 0.35 * request.sounds_hazardous
    if rng.random() < 0.05:
        return base_intensities(rng)
    if rng.random() < worry:
        return Intensities(0.4 + 0.6 * rng.random(), 0.3 * rng.random())
    care, help_ = rng.random(), 0.1 + 0.9 * rng.random()
    if help_ > 0.6 and care < 0.45 and rng.random() < 0.9:
        care = 0.45 + 0.55 * rng.random()
    return Intensities(care, help_)
