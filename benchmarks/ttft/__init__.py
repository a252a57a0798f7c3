"""Time to first token at LLaVA-1.5-7B's width, stock vLLM and ours side by side."""
