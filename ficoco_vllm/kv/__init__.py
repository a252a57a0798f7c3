"""A KV length per segment of decoder layers: the plan, and what makes vLLM's paged cache follow it."""
