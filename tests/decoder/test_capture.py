"""CUDA graphs of decoding read the same memory at every replay, as far as a CPU can show it."""

from typing import Any

import pytest
from vllm import LLM

from tests.support.engine import worker_of
from tests.support.remote import Remote

READ = ("slot_mapping", "seq_lens", "block_table", "query_start_loc")

pytestmark = [pytest.mark.compat, pytest.mark.engine]


def captured(engine: LLM) -> dict[str, Any]:
    """Prepare a decoding step twice as vLLM does for capture and for replay."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.input_batch import InputBatch

    runner = worker_of(engine).model_runner
    state = runner.model_state
    seen = []
    for for_capture in (True, False):
        batch = InputBatch.make_dummy(3, 3, runner.input_buffers)
        tables, slots = runner.prepare_dummy_attn(batch)
        metadata = state.prepare_attn(
            batch,
            CUDAGraphMode.FULL,
            tables,
            slots,
            runner.attn_groups,
            runner.kv_cache_config,
            for_capture=for_capture,
        )
        seen.append(
            {
                "lengths": state.seq_lens.data_ptr(),
                "layers": len(metadata),
                # What the kernels of each layer read, by the metadata that they get.
                "read": [
                    {name: result.data_ptr() for name, result in vars(group).items() if name in READ}
                    for group in metadata.values()
                ],
                "segments": len({group.seq_lens.data_ptr() for group in metadata.values()}),
                "rows": {group.slot_mapping.shape[0] for group in metadata.values()},
                "reduction": state.prepare_inputs(batch, runner.req_states).get("reduction"),
            }
        )
    return {"capture": seen[0], "replay": seen[1]}


def test_capture_and_replay_share_their_buffers(small_engine: Remote) -> None:
    result = small_engine.call(captured)
    assert result["capture"] == result["replay"]
    assert result["capture"]["layers"] == result["capture"]["segments"] == 8
    assert all(set(read) == set(READ) for read in result["capture"]["read"])
    assert result["capture"]["rows"] == {3}
    assert result["capture"]["reduction"] is None
