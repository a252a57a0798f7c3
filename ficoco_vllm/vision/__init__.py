"""The CLIP tower that reduces its tokens on the way."""
