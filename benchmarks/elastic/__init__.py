"""Overload of a small KV cache: a fixed budget and one that follows the load."""
