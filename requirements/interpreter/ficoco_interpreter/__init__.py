"""Triton backend `cpu` that compiles nothing: kernels run through Triton's interpreter (TRITON_INTERPRET=1).

vLLM's CPU build uses its model runner V2 only if Triton has a backend of this name. Reducing in the decoder needs that
runner, so the CPU install includes this package; a GPU install must not.
"""
