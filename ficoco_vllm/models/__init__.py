"""The model classes that take the place of vLLM's."""
