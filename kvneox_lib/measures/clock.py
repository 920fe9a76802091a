"""Seconds, and the highest use of memory."""

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
    """The highest use of memory from here on."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device):
        self.device, self.known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            self.RESET.write_text("5")  # Linux: from now on VmHWM counts anew
        except OSError:
            self.known = False

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self.known:
            return None
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
