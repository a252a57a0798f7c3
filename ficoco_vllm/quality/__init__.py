"""A target for the answers instead of a budget: the control law, without vLLM.

docs/quality.md explains it; the server's part is in `ficoco_vllm.server.quality`.
"""
