"""What an evaluation found, as it stands in ``measures.json``: plain data by ``to_plain``.

A part that was not measured is ``None`` or empty, and left out of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from equipoise.evaluate.measure import ControlReport
from equipoise.stats import Estimate
from equipoise.store.shards import SPARSE
from equipoise.types import JudgeKind

JUDGES: tuple[JudgeKind, ...] = ("optimization", "generalization")
Curve = Sequence[Estimate]
"""One estimate per level of a dial."""


@dataclass(frozen=True)
class Cost:
    """What the answers of one method took; of the tuned dials also what tuning took."""

    seconds: float
    tokens: float
    steps: float | None = field(default=None, metadata=SPARSE)
    tuning_seconds: float | None = field(default=None, metadata=SPARSE)
    tuning_tokens: float | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True)
class Quality:
    """What one method keeps of the language."""

    degenerate: Estimate | None = None
    """Share of outputs, see :func:`~equipoise.evaluate.quality.degenerate_share`."""
    length: Mapping[str, Curve] = field(default_factory=dict)
    """Attribute to tokens per completion at each of its levels."""
    fluency: Sequence[Estimate | None] = ()
    """Log-likelihood per token under the untouched model, per cell in the order of ``cells()``."""
    fluency_mean: Estimate | None = None
    """The same over all outputs."""
    perplexity: Estimate | None = field(default=None, metadata=SPARSE)
    """On the references; of the tuned dials with all of them on auto."""
    perplexity_ratio: Estimate | None = field(default=None, metadata=SPARSE)
    """Of the tuned model's perplexity to the untouched one's, paired by reference."""
    drift: Mapping[JudgeKind, Mapping[str, Estimate]] = field(default_factory=dict, metadata=SPARSE)
    """Judge and attribute to what the tuned dials on auto score above the untouched model."""


class ByJudge:
    """Control as each kind of judge sees it."""

    optimization: ControlReport | None
    generalization: ControlReport | None

    def by(self, judge: JudgeKind) -> ControlReport | None:
        """Return what one kind of judge sees."""
        return self.generalization if judge == "generalization" else self.optimization


@dataclass(frozen=True)
class Method(ByJudge):
    """All that is known of one responder."""

    optimization: ControlReport | None = field(default=None, metadata=SPARSE)
    generalization: ControlReport | None = field(default=None, metadata=SPARSE)
    cost: Cost | None = None
    quality: Quality | None = None
    refusals: Mapping[str, Curve] | None = field(default=None, metadata=SPARSE)
    """Group of prompts to the share refused at each level of safety."""


@dataclass(frozen=True)
class Ceiling(ByJudge):
    """What could be reached; see ``docs/evaluate.md``."""

    name: str = "ceiling"
    generalization: ControlReport | None = None
    optimization: ControlReport | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True)
class Measures:
    """Everything that the evaluate stage measured."""

    methods: Mapping[str, Method]
    differences: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """``tuned − OTHER`` and attribute to the difference in MP, paired by prompt."""
    ceiling: Ceiling | None = None
    n: Mapping[str, int] = field(default_factory=dict)
    """What was counted, as it is printed."""
    intersections: Mapping[str, int | None] = field(default_factory=dict)
    """Set of prompts to how many evaluated prompts it holds; ``None`` where that is not known."""
