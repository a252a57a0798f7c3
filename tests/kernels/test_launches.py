"""Host side of the launchers: no wait for the device, and shapes known in advance."""

import pytest

from tests.kernels.conftest import INTERPRETED

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the launcher"),
]


@pytest.mark.parametrize("B", [1, 32])
def test_no_look_at_the_data(B: int) -> None:
    """On meta tensors there is no data: a launcher that reads a value fails."""
    from ficoco_vllm.benchmarks.kernels.recording import launches_of
    from ficoco_vllm.benchmarks.kernels.workloads import workloads

    for workload in workloads(B):
        launches = launches_of(workload.run)
        assert launches, workload.name
        for launch in launches:
            assert 1 <= launch.num_programs < 2**31
            assert max(launch.grid[1:], default=1) < 2**16, "the second and third axis of a grid hold 16 bits"


def test_the_table_of_launches_is_small() -> None:
    """A reduction of FiCoCo-V is six launches; each further one costs microseconds at every reducing layer."""
    from ficoco_vllm.benchmarks.kernels.recording import launches_of
    from ficoco_vllm.benchmarks.kernels.workloads import workloads

    names = []
    for workload in workloads(1):
        if workload.name.split("/")[1] == "tower" and "sums" not in workload.name:
            names += [launch.name for launch in launches_of(workload.run)]
    names.remove("softmax_stats_kernel")  # not needed where the attention hands out its normalisers
    names.remove("farthest_points_kernel")  # of DivPrune and `best`
    assert len(names) == 6
