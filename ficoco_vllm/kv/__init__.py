"""A KV length per segment of decoder layers in vLLM's paged cache, and the checks of requests."""
