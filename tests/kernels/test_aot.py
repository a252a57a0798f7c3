"""Compiling ahead of time: which launches are one kernel, and that another process compiles the same."""

import pickle

import pytest

from tests.kernels.conftest import INTERPRETED

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler"),
]


def test_items_of_a_batch_are_no_new_kernel() -> None:
    """Each specialisation is compiled once: most launches at B = 8 are those at B = 32."""
    from ficoco_vllm.benchmarks.kernels.recording import launches_of
    from ficoco_vllm.benchmarks.kernels.workloads import workloads

    seen = {
        B: {launch.specialisation for workload in workloads(B) for launch in launches_of(workload.run)}
        for B in (8, 32)
    }
    assert len(seen[8] & seen[32]) >= len(seen[32]) - 2
    assert len(seen[8]) > 8, "different kernels are distinguished"


def test_a_launch_travels_to_another_process() -> None:
    from ficoco_vllm.benchmarks.kernels.recording import launches_of
    from ficoco_vllm.benchmarks.kernels.workloads import workloads

    (launch,) = launches_of(workloads(1)[0].run)
    there = pickle.loads(pickle.dumps(launch))
    assert there == launch
    assert there.source(hip=False).fn is launch.source(hip=False).fn
