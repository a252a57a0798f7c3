"""Indices on their way to the device."""

import numpy as np
import torch

from ficoco_vllm.vision.staging import take_items, to_device, to_device_together

CPU = torch.device("cpu")


def test_together_they_are_what_they_are_alone() -> None:
    """Odd sizes, an empty one, and a view that is not contiguous; each starts where memory of its own might."""
    arrays = [
        np.arange(5),
        np.arange(12).reshape(3, 4)[:, ::2],
        np.empty((0, 2), dtype=np.int64),
        np.array([7]),
        np.arange(4),
    ]
    sent = to_device_together(arrays, CPU)
    for array, tensor in zip(arrays, sent, strict=True):
        assert torch.equal(tensor, to_device(array, CPU))
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == 1


def test_a_list_is_an_index_even_if_it_is_empty() -> None:
    assert to_device([], CPU).dtype == torch.int64
    assert torch.equal(take_items(torch.arange(10, 15), [3, 0]), torch.tensor([13, 10]))
    assert take_items(["a", "b", "c"], [2, 2]) == ["c", "c"]
