"""Programs of this repository that are not packaged; run them from its root as `python -m tools.X`."""
