"""Load test: stock vLLM and reducing servers under the same traffic, in turns."""
