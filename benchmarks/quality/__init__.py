"""A target agreement instead of a budget: replay of a log, and the live experiment (docs/quality.md)."""
