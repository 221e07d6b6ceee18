"""The Workshop: a fictional world with exact ground truth (docs/workshop.md)."""

from equipoise.worlds.workshop.data import pairs, prompts
from equipoise.worlds.workshop.oracle import oracle_model, parses
from equipoise.worlds.workshop.shipped import asset

__all__ = ["asset", "oracle_model", "pairs", "parses", "prompts"]
