"""Servers that benchmarks start."""

from ficoco_vllm.server.lifecycle.process import OURS, STOCK, Served, serving

__all__ = ["OURS", "STOCK", "Served", "serving"]
