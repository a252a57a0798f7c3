"""Programs of this repository that are not shipped; run them from its root as `python -m tools.X`."""
