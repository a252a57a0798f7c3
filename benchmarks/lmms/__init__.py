"""The paper's ten benchmarks through lmms-eval, whose OpenAI-compatible model asks our server."""
