"""Cost of the fused ops: compiled ahead of time, counted, and timed."""
