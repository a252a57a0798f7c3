"""Arrays that the host has computed, on the device, without waiting for its work."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any] | Sequence[int], device: torch.device) -> Tensor:
    """Copy to the device through pinned memory. A copy from memory that is not pinned waits for all work before it.

    Args:
        values: values of any shape; a list becomes int64.
        device: where to.
    """
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64)
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def to_device_together(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copy several arrays in one go; see `to_device`.

    Args:
        arrays: arrays of any shapes and types.
        device: where to.

    Returns:
        One tensor for each array, views of the same memory.
    """
    # Each starts at a multiple of 16 bytes, as memory of its own does: kernels are compiled for that.
    starts = [0, *accumulate(array.nbytes + -array.nbytes % 16 for array in arrays)]
    together = np.zeros(starts[-1], dtype=np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + array.nbytes] = np.frombuffer(array.tobytes(), dtype=np.uint8)
    sent = to_device(together, device)
    return [
        sent[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def _dtype(array: npt.NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype


def take_items(values: Any, index: list[int]) -> Any:
    """Items of a batch, which is a tensor or a list.

    Args:
        values: values of all images.
        index: indices of the images to take.
    """
    if isinstance(values, Tensor):
        return values[to_device(index, values.device)]
    return [values[place] for place in index]
