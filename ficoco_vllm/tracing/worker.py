"""What the server may ask of a worker: vLLM mixes this class into its own (`worker_extension_cls`)."""

from typing import Any

QUALIFIED_NAME = "ficoco_vllm.tracing.worker.TracingWorker"


class TracingWorker:
    """Hands traces out, called through vLLM's `collective_rpc` by the name of the method."""

    def ficoco_take_trace(self, trace_id: int) -> list[dict[str, Any]]:
        """Hand one trace over and forget it; see `Traces.take`.

        Args:
            trace_id: of the request.
        """
        model = self.get_model()  # type: ignore[attr-defined]  # of vLLM's worker
        taken: list[dict[str, Any]] = model.traces.take(trace_id)
        return taken
