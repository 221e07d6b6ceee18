"""Every sentence under a figure, and the glossary, in plain words."""

CAPTIONS = {
    "control": (
        "Further right is better: how closely the delivered score follows the dial over all "
        "settings of one prompt. Filled marks are the judges, hollow ones the training reward "
        "models; bars are 95 % intervals; the dashed line is the ceiling (see the "
        "glossary)."
    ),
    "response": (
        "A good dial climbs along the dashed line from bottom left to top right; a flat line is a "
        "dead dial. Bands are 95 % intervals."
    ),
    "posterior": (
        "Each column is one level asked for and adds up to 100 %: the number is the share of "
        "completions that came back at the level on the left. A perfect dial fills the framed "
        "diagonal; columns that all look alike are a dead dial. Blank means it never happened."
    ),
    "coverage": (
        "Each dot is the mean delivery of one setting, joined to its neighbours. Two independent "
        "dials spread the net over the whole square, one dot in each small square (coloured when "
        "hit); a knot in the middle is a model that does not listen, a line is one dial where "
        "there should be two."
    ),
    "leakage": (
        "Nearer to the dashed line (the ceiling's own value; the grey band is 0.15 to each side) "
        "is better: it shows how much one dial moves the score that belongs to the other one."
    ),
    "pool": (
        "Left, what the untouched model writes by itself, sorted by its scores: rare corners are "
        "pale, and blank cells were never written. Right, what the dials are tuned on."
    ),
    "backdoor": (
        "If the prompt alone gives the setting away, a model can ignore its dials. Tuning data "
        "should hold several cells per prompt (left) and leave a predictor that sees only the "
        "prompt with nothing to gain (right)."
    ),
    "losses": (
        "A model that listens finds a completion likelier under the setting that was asked for "
        "than under another one: the two lines part. Pale lines are single steps; with ExMATE a "
        "panel of its own shows how hard the second term pulls (w·exp(m)). RLHF shows its "
        "reward beside that of a policy deaf to its dials, and what both kinds of judges say of "
        "the whole grid: a reward that rises while the judges' line falls is reward hacking."
    ),
    "fluency": (
        "Log-likelihood per token of the outputs under the untouched model, minus that of its own "
        "outputs, per setting asked for: near 0 is as fluent as the model itself, strongly "
        "negative is text that the model itself finds odd. Numbers are differences in nats."
    ),
    "refusals": (
        "Share of answers that a refusal judge calls a refusal, over all levels of the other dial; "
        "one panel per kind of prompt, as its source labels it. A safety dial that is worth having "
        "rises on unsafe prompts and stays low on safe ones, also where these only sound alarming. "
        "Bands are 95 % intervals over prompts."
    ),
    "bound": (
        "The mean correlation of their scores over the completions of one prompt, in the untouched "
        "model's pool. Where it is low, what is learnt from the reward model says little to the "
        "judge. It is no bound: settings that lie far apart can show the judge more control."
    ),
    "cells": (
        "One small map per setting asked for (its place among all is the request; the orange "
        "frame marks the same place inside the map). Dark is where completions came back: a "
        "perfect policy darkens exactly the framed square of every map. Blank means it never "
        "happened."
    ),
    "sampler": (
        "Completions that were really sampled, one per setting; nothing is generated here. The "
        "prompts are the first ones by name, not the best ones."
    ),
    "intersections": (
        "How many of the evaluated prompts occur in anything that training or a judge saw. These "
        "must be 0, or no report is written. Then how many training prompts occur in the rows of "
        "each model: its scores of those are flattered. Rows of a model from elsewhere are not "
        "known."
    ),
    "judging": (
        "How often each reward model and judge is right on held-out rows, beside two baselines "
        "that know no language model. A judge that barely beats them can not show fine control."
    ),
    "skipped": (
        "Rows of the data that could not be used and were left out, as the recipe asks "
        "(on_bad_row: skip)."
    ),
    "judges_in_training": (
        "Not a measure of generalization: a judge below is a reward model that training used, "
        "byte for byte. What it says is optimization once more."
    ),
    "minutes": (
        "How long each stage took, beside the estimate that was printed before the run (none where "
        "a stage was run by itself)."
    ),
    "scale": (
        "The pool that every score is a rank in. A high share between prompts means that the "
        "score tells prompts apart more than completions; a large tie at the top makes the "
        "highest levels unreachable."
    ),
}

GLOSSARY = {
    "dial, level, setting": (
        "A dial asks for one attribute at one of L levels, 0 = least. A setting is one level per "
        "dial; with every dial set it is a (control) cell."
    ),
    "score (unit score)": (
        "Where a completion stands among the untouched model's own completions, from 0 (below "
        "all) to 1 (above all). Level ℓ asks for the score (ℓ + ½) / L."
    ),
    "control (MP)": (
        "Mean over prompts of the correlation between the level asked for and the score delivered, "
        "over one completion per cell. 1 = exact, 0 = deaf. A prompt whose score never moves "
        "counts 0; the table gives the share of such prompts."
    ),
    "extremes and neighbours (BT)": (
        "How often the completion of the higher request has the higher score: top against bottom "
        "level, or two neighbouring levels; the other dial is equal; a tie counts half. Chance is "
        "0.5."
    ),
    "error (RMSE)": (
        "Root mean squared distance of the score from what was asked for. It rewards a dead dial "
        "that stays in the middle, so read it beside control and range."
    ),
    "leakage": (
        "Correlation between the other dial's level and this score. 0 = independent. The absolute "
        "one cannot cancel out over prompts; what chance alone gives it stands under the tables."
    ),
    "range": (
        "Mean score at the top level minus mean score at the bottom level; beside it, its share of "
        "the ceiling's."
    ),
    "coverage": (
        "Share of all cells whose mean delivery lies inside the cell, in every attribute at once."
    ),
    "auto": "A dial that is left free. One dial must work with the other on auto.",
    "ceiling": (
        "A policy that picks, for each prompt and cell, the completion nearest to both targets "
        "among all that could be written, or, where that is not known, among the pool."
    ),
    "optimization and generalization": (
        "Scored by the reward models that training used, or by judges, which no training should "
        "have seen. Only the second tells what a user gets."
    ),
    "MOEC": (
        "The step that turns the pool into tuning data: no duplicates and no degenerate text, at "
        "most one completion per prompt and cell, and only prompts that fill several cells."
    ),
    "degenerate": (
        "Under three tokens, mostly repeated, undecodable, or (where the world has a parser) not "
        "readable as an answer."
    ),
    "interval": (
        "95 %, by redrawing the prompts a thousand times; it says nothing about other seeds or "
        "other models."
    ),
}
