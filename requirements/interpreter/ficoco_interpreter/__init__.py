"""A Triton backend `cpu` that compiles nothing: kernels run through Triton's interpreter (TRITON_INTERPRET=1).

vLLM's CPU build takes its model runner V2 only where Triton has a backend of this name. Reducing in the decoder needs
that runner, so the CPU install carries this package; a GPU install must not.
"""
