"""How many visual tokens each layer and each KV segment holds: integers, no tensors."""
