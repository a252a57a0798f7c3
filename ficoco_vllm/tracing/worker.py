"""Worker extension for traces; vLLM mixes it into its worker class (`worker_extension_cls`)."""

from typing import Any

QUALIFIED_NAME = "ficoco_vllm.tracing.worker.TracingWorker"


class TracingWorker:
    """Returns traces, through vLLM's `collective_rpc` by the name of the method."""

    def ficoco_take_trace(self: Any, trace_id: int) -> list[dict[str, Any]]:
        """Return one trace and forget it; see `Traces.take`.

        Args:
            trace_id: trace id of the request.
        """
        taken: list[dict[str, Any]] = self.get_model().traces.take(trace_id)  # `get_model` is vLLM's worker's
        return taken
