"""Seconds, and how much memory is in use at the highest and before."""

import ctypes
import gc
import time
from pathlib import Path

import torch


class Clock:
    def __init__(self, device: torch.device):
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Seconds since the last call, with what a GPU has still to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - getattr(self, "last", now), now
        return seconds


class PeakMemory:
    """The highest use of memory: the allocator's on CUDA, resident memory on Linux, else None."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device):
        self.device = device
        self._begin()

    def lap(self) -> int | None:
        """Since the last call."""
        if self.device.type == "cuda":
            highest = torch.cuda.max_memory_allocated(self.device)
        elif self.known:
            line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            highest = int(line.split()[1]) * 1024
        else:
            return None
        self._begin()
        return highest

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        _give_back()
        try:
            self.RESET.write_text("5")  # Linux: from now on VmHWM counts anew
            self.known = True
        except OSError:
            self.known = False


def resident_bytes(device: torch.device) -> int | None:
    """In use now, in the terms of `PeakMemory`: what a peak is measured above."""
    gc.collect()  # what would be freed in the middle of the run must not be subtracted from its peak
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not PeakMemory.STATUS.exists():
        return None
    _give_back()
    line = next(line for line in PeakMemory.STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _give_back() -> None:
    """To the system, what the C library holds on to of freed memory: else a phase would be charged with what the one
    before it used, or find room that it need not ask for."""
    if PeakMemory.STATUS.exists():
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc's
