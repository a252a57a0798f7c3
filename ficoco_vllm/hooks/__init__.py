"""Every place where something of vLLM's is wrapped or replaced."""
