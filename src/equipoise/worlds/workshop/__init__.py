"""The Workshop: a fictional world with exact ground truth (DESIGN section 2)."""
