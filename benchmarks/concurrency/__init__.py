"""How many requests run at once under the same KV memory: stock vLLM, and reduction in tower, decoder, both."""
