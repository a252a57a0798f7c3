"""What the fused ops cost: compiled ahead of time, counted, and timed."""
