"""Everything that a GPU host shows in one command: right answers, kernels, tower, serving."""
