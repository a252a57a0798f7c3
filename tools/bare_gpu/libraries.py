"""vLLM's compiled ops on this GPU against PyTorch in float32: that the slimmed libraries run, op by op.

python -m tools.bare_gpu.libraries OUT.json      The exit status counts the ops that fail.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ficoco_vllm.benchmarks.harness.results import environment


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the 2-norm; NaN never passes."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm())


def _rms_norm() -> float:
    x, weight = (
        torch.randn(77, 4096, device="cuda", dtype=torch.bfloat16),
        torch.randn(4096, device="cuda").bfloat16(),
    )
    out = torch.full_like(x, torch.nan)
    torch.ops._C.rms_norm(out, x, weight, 1e-5)
    return _error(out, torch.nn.functional.rms_norm(x.float(), (4096,), weight.float(), 1e-5))


def _fused_add_rms_norm() -> float:
    x, residual = torch.randn(2, 77, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, device="cuda").bfloat16()
    total = x + residual
    torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-5)
    return _error(x, torch.nn.functional.rms_norm(total.float(), (4096,), weight.float(), 1e-5))


def _silu_and_mul() -> float:
    x = torch.randn(77, 2 * 11008, device="cuda", dtype=torch.bfloat16)
    out = torch.full((77, 11008), torch.nan, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, x)
    return _error(out, torch.nn.functional.silu(x[:, :11008].float()) * x[:, 11008:].float())


def _uva_view() -> float:
    host = torch.arange(100, dtype=torch.int32).pin_memory()
    view = torch.ops._C.get_cuda_view_from_cpu_tensor(host)
    host += 1
    return _error(view.cpu(), host)


def _attention(
    head_size: int, causal: bool, paged: bool, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], float]:
    """FlashAttention-3 on two prompts, or on two requests of which one decodes."""

    def run() -> float:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        heads, lengths = 4, (130, 65)
        queries = (130, 1) if paged else lengths
        q = torch.randn(sum(queries), heads, head_size, device="cuda", dtype=dtype)
        bounds = torch.tensor([0, queries[0], sum(queries)], device="cuda", dtype=torch.int32)
        keys = [torch.randn(2, n, heads, head_size, device="cuda", dtype=dtype) for n in lengths]
        options: dict[str, Any] = {}
        if paged:
            size, blocks = 16, -(-max(lengths) // 16)
            cache = torch.zeros(2, 2 * blocks, size, heads, head_size, device="cuda", dtype=dtype)
            table = torch.randperm(2 * blocks, device="cuda").int().view(2, blocks)
            for i, n in enumerate(lengths):
                slots = (table[i].long()[:, None] * size + torch.arange(size, device="cuda")).flatten()[:n]
                cache.view(2, -1, heads, head_size)[:, slots] = keys[i]
            k, v = cache
            options = {
                "block_table": table,
                "seqused_k": torch.tensor(lengths, device="cuda", dtype=torch.int32),
            }
        else:
            k, v = torch.cat(keys, dim=1)
            options = {"cu_seqlens_k": bounds}
        out = flash_attn_varlen_func(
            q, k, v, max(queries), bounds, max(lengths), causal=causal, fa_version=3, **options
        )
        expected = []
        for i, (m, n) in enumerate(zip(queries, lengths, strict=True)):
            part = q[bounds[i] : bounds[i + 1]].float().transpose(0, 1)
            mask = torch.ones(m, n, device="cuda", dtype=torch.bool).tril(n - m) if causal else None
            key, value = (one.float().transpose(0, 1) for one in keys[i])
            expected.append(
                torch.nn.functional.scaled_dot_product_attention(part, key, value, attn_mask=mask).transpose(
                    0, 1
                )
            )
        return _error(out, torch.cat(expected))

    return run


CHECKS: dict[str, Callable[[], float]] = {
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "silu_and_mul": _silu_and_mul,
    "uva_view": _uva_view,
    "attention of the tower, head size 64": _attention(64, causal=False, paged=False),
    "attention of the demo model, head size 32": _attention(32, causal=True, paged=True),
    "attention of the decoder, head size 128": _attention(128, causal=True, paged=True),
    "attention in float16": _attention(128, causal=True, paged=True, dtype=torch.float16),
}


def main() -> int:
    """Run the checks, write their errors.

    Returns:
        How many fail.
    """
    import vllm._C_stable_libtorch  # noqa: F401

    result: dict[str, Any] = {"context": environment(), "errors": {}}
    failed = 0
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            value: float | str = check()
            torch.cuda.synchronize()
            good = value < 1e-2
        except Exception:
            traceback.print_exc()
            value, good = traceback.format_exc().splitlines()[-1], False
        failed += not good
        result["errors"][name] = value
        print(f"{name:45} {value if isinstance(value, str) else f'{value:.2e}'} {'ok' if good else 'FAILS'}")
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
