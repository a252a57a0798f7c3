"""vLLM with its compiled libraries, small enough to carry to a GPU machine that has torch and Triton but no network."""
