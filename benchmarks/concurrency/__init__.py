"""Concurrent requests in the same KV memory: stock vLLM, and reduction in the tower, the decoder and both."""
