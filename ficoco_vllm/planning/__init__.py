"""Visual token counts of every layer and KV segment: integers, no tensors."""
