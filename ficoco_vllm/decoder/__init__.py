"""The language model in segments of layers, between which visual tokens are reduced."""
