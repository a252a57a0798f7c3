"""Visual-token reduction for LLaVA in vLLM (FiCoCo, arXiv:2411.17686)."""

from ficoco_vllm._version import __version__

__all__ = ["__version__"]
