"""Token reduction on plain tensors, without vLLM: `python examples/reduce_tensors.py`."""

import torch

from ficoco_vllm.reduction import Signals, reduce

B, N, D, GRID = 1, 576, 1024, (24, 24)


def main() -> None:
    """Remove 43 of 576 tokens with FiCoCo-V, as one layer of LLaVA-1.5's vision tower does."""
    torch.manual_seed(0)
    tokens = torch.randn(B, N, D)
    signals = Signals(
        visual_attention=torch.rand(B, N, N).softmax(dim=-1),
        cls_attention=torch.rand(B, N).softmax(dim=-1),
        position=torch.arange(N).expand(B, N),
        grid=GRID,
    )
    tokens, size, position = reduce("ficoco-v", tokens, signals, num_removed=43)
    print(f"{tokens.shape[1]} tokens stand for {size.sum():.0f} patches; the first is patch {position[0, 0]}")


if __name__ == "__main__":
    main()
