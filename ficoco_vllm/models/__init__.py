"""The model classes that vLLM instantiates; they keep the visual tokens that a reduction method selects."""
