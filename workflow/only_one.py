"""Two sweeps in one folder must not make the same records. Each says which it makes in a file that it keeps locked. The
lock is the kernel's and goes with the process, however that ends; Snakemake's own is a file that outlives a `kill -9`
or a power cut and then stops every later sweep, so the profile turns it off."""

import fcntl
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path

SWEEPS = Path(".snakemake", "sweeps")
OURS = []  # open as long as this process lives


class AnotherSweep(Exception):
    """One is alive and makes some of the same records."""


def claim(outputs: Iterable[str]) -> None:
    outputs = set(map(os.path.abspath, outputs))
    SWEEPS.mkdir(parents=True, exist_ok=True)
    with open(SWEEPS / "lock", "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # a moment: sweeps that start together come one after the other
        for path in SWEEPS.glob("*.json"):
            with path.open("r+") as file:  # network file systems lock what can be written
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()  # its sweep is dead
                    continue
                except BlockingIOError:
                    other = json.load(file)
            if shared := outputs & set(other["outputs"]):
                raise AnotherSweep(_message(other, sorted(shared)))
        ours = open(SWEEPS / f"{socket.gethostname()}-{os.getpid()}.json", "w")
        fcntl.flock(ours, fcntl.LOCK_EX)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "outputs": sorted(outputs)}, ours)
        ours.flush()
        OURS.append(ours)


def _message(other: dict, shared: list[str]) -> str:
    which = f"{os.path.relpath(shared[0])}" + (f" + {len(shared) - 1}" if len(shared) > 1 else "")
    return (
        f"Another sweep is running here (process {other['pid']} on {other['host']}) and makes the same records "
        f"({which}). Nothing was run: wait until it has ended, or stop it, and start this one again.\n"
        f"另一个批量运行正在进行（{other['host']} 上的进程 {other['pid']}），要写的记录与这次有重复（{which}）。"
        "这次什么也没有运行：请等它结束，或先停掉它，再重新开始。"
    )
