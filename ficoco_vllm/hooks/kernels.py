"""Model runner V2 without a GPU: its Triton kernels are replaced by functions of `compat.kernels`."""

from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor
from vllm.v1.worker.gpu.sample import gumbel

from ficoco_vllm.compat.kernels import KERNELS, blocks
from ficoco_vllm.hooks.wrapping import replace


def hook_kernels() -> None:
    """Replace the kernels in a worker without a GPU. Idempotent.

    Kernels are registered through vLLM's own dispatcher. vLLM uses it for the CPU only where it finds no Triton, and
    has no functions for those of model runner V2.
    """
    if not current_platform.is_cpu() or isinstance(gumbel._gumbel_sample_kernel, KernelOverride):
        return
    register_kernels(KERNELS)
    replace(StagedWriteTensor, "apply_write", blocks.apply_write)
    replace(FusedStagedWriter, "apply", blocks.apply)
    replace(BlockTables, "gather_block_tables", blocks.gather_block_tables)
    replace(BlockTables, "compute_slot_mappings", blocks.compute_slot_mappings)
    # Top-k and top-p: vLLM has them in torch, and takes these where there is no Triton.
    replace(topk_topp_sampler, "HAS_TRITON", False)
