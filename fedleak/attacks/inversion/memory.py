"""How much fits."""

from __future__ import annotations

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what `error` says, on any device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
