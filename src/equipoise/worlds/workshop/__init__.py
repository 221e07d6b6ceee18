"""The Workshop: a fictional world with exact ground truth (DESIGN section 2)."""

from equipoise.worlds.workshop.bake import asset
from equipoise.worlds.workshop.data import pairs, prompts
from equipoise.worlds.workshop.oracle import oracle_model, parses

__all__ = ["asset", "oracle_model", "pairs", "parses", "prompts"]
