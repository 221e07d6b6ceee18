"""Every causal architecture of the installed transformers, tried as `equipoise check` tries it.

Each gets two random, narrow layers and the Workshop's tokenizer. It passes when all parts work:
sample, tune, tune with LoRA, serve, merge. What fails is refused when a model of it is loaded; what
cannot even be built from its default config was not tried.

    python -m benchmarks.architectures                 # all of them, about 15 minutes on one core
    python -m benchmarks.architectures llama gemma2    # these anew, the others as they stand

Writes benchmarks/architectures.json and docs/architectures.md.
"""

from __future__ import annotations

import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.results import DOCS, read, shaped, write
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from equipoise.check.trial import Trial, try_model
from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer

RESULT = Path(__file__).with_name("architectures.json")
PAGE = DOCS / "architectures.md"
SECONDS = 300
"""An architecture that takes longer was not tried."""
MUST_PASS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "cohere2"),
    *("glm4", "granite", "olmo2", "smollm3", "gpt2", "gpt_neox", "opt", "starcoder2", "stablelm"),
    *("falcon", "qwen3_moe"),
)
REFUSED = (
    *("bloom", "mpt", "falcon-alibi", "llama4_text", "mamba", "qwen3_next", "lfm2-conv", "jamba"),
)
_WINDOWED = ("mistral", "starcoder2", "phi3")
"""Models of these exist with a window and without; the default config has none."""


def tokenizer() -> Any:
    """Return a fresh copy of the Workshop's tokenizer."""
    return load_tokenizer(resolve_model("workshop://start"))


def config_of(kind: str) -> Any:
    """Return the default config of a type, with a window where one is common."""
    name, _, variant = kind.partition("-")
    config = AutoConfig.for_model(name)
    text = config.get_text_config()
    text.vocab_size = len(tokenizer()) + 8
    for name_of_id in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name_of_id, None)
    if name in _WINDOWED:
        text.sliding_window = 8
    if variant == "alibi":
        config.alibi = True
    if variant == "conv":
        config.layer_types = ["conv", "full_attention"] * (config.num_hidden_layers // 2)
    return config


class TooLongError(BaseException):
    """No fault of the architecture, so nothing may take it for one."""


def tried(kind: str) -> dict[str, Any]:
    """Try one architecture; return its verdict and why."""

    def too_long(*_: Any) -> None:
        raise TooLongError(f"took longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        trials = try_model(config_of(kind), tokenizer(), kind)
    except (Exception, TooLongError) as error:  # its default config is not one of a language model
        return {"verdict": "not tried", "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        signal.alarm(0)
    return {"verdict": verdict(trials), "why": reason(trials), "parts": works(trials)}


def works(trials: list[Trial]) -> list[str]:
    """Return the parts that work."""
    return [trial.part for trial in trials if trial.problem is None]


def verdict(trials: list[Trial]) -> str:
    """Passed, refused, or which parts fail."""
    if len(works(trials)) == len(trials):
        return "passed"
    return "in part" if works(trials) else "refused"


def reason(trials: list[Trial]) -> str:
    """Return why the first part that fails does."""
    problems = [trial.problem for trial in trials if trial.problem is not None]
    return problems[0].why if problems else ""


def short_reason(row: dict[str, Any]) -> str:
    """Return why a type did not pass, without the numbers and messages that are its own."""
    if row["verdict"] == "passed":
        return ""
    if row["verdict"] == "not tried":
        return "its default config cannot be built as a small language model"
    why = re.split(r" \(|: on two |, and the branches |: ", str(row["why"]))[0].replace("|", "\\|")
    if why.startswith("they have layers of kind"):
        why = "they have layers of another kind than full and sliding attention"
    parts = f"works: {', '.join(row['parts'])}; " if row["parts"] else ""
    return parts + why


def page(found: dict[str, dict[str, Any]], versions: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    groups = {
        name: sorted(kind for kind, row in found.items() if row["verdict"] == name)
        for name in ("passed", "in part", "refused", "not tried")
    }
    lines = [
        "# Architectures",
        "",
        "Two random, narrow layers of every causal architecture of transformers "
        f"{versions['transformers']} were sampled, tuned (full weights and LoRA), saved, loaded, "
        "served and merged, as [`equipoise check`](check.md) does with your model. Sampled and "
        "tuned numbers are held against plain forwards of the model. Real weights were not tried. "
        "A type that is refused is refused when a model is loaded, before its weights are read. "
        "Written by `python -m benchmarks.architectures`; the full reasons are in "
        "[architectures.json](../benchmarks/architectures.json).",
        "",
        "| verdict | why | types |",
        "| --- | --- | --- |",
    ]
    for name, kinds in groups.items():
        reasons: dict[str, list[str]] = {}
        for kind in kinds:
            reasons.setdefault(short_reason(found[kind]), []).append(kind)
        for why, same in sorted(reasons.items()):
            lines.append(f"| {name} ({len(same)}) | {why} | {', '.join(same)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the named architectures, or all of them."""
    warnings.simplefilter("ignore")
    named = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    if named and RESULT.is_file():
        found = read(RESULT)["architectures"]
    for kind in named or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *REFUSED}):
        found[kind] = tried(kind)
        print(f"{kind:<28} {found[kind]['verdict']:<10} {found[kind]['why'][:120]}", flush=True)
        publish(dict(sorted(found.items())))


def publish(found: dict[str, dict[str, Any]]) -> None:
    """Write the result and the page."""
    counts = Counter(row["verdict"].replace(" ", "_") for row in found.values())
    headline = {"n": len(found), **counts}
    result = shaped("python -m benchmarks.architectures", headline, architectures=found)
    write(RESULT, result)
    PAGE.write_text(page(found, result["machine"]))


if __name__ == "__main__":
    main()
