"""Two dials, safety and helpfulness, for an aligned language model."""

__version__ = "0.1.0"
