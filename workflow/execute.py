"""Execute a notebook for the sweep: execute.py NOTEBOOK EXECUTED PARAMETERS GPUS RECORD...

The executed notebook stays where it is put whatever happens, with the traceback in it when a cell fails. The run ends
when the process that started it is gone: a sweep that was killed leaves nothing behind that goes on writing.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import papermill
import psutil


def main(notebook: str, executed: str, parameters: str, gpus: str, *records: str) -> int:
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    values = {name: _expanded(value) for name, value in json.loads(parameters).items()}
    Path(executed).parent.mkdir(parents=True, exist_ok=True)
    with own_gpus(int(gpus)):
        try:
            papermill.execute_notebook(notebook, executed, values, progress_bar=False)
        except papermill.PapermillExecutionError as error:
            print(f"{executed}: {error.ename}: {error.evalue}", file=sys.stderr)
            # Snakemake would remove the records of a run that failed. A picture that fails costs no measurement.
            return 0 if records and all(Path(record).exists() for record in records) else 1
    return 0


def end_with(parent: int) -> None:
    """Kill this process and its kernel once `parent` no longer is the parent. Asked again and again: no system but
    Linux tells."""
    while os.getppid() == parent:
        time.sleep(1)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def _expanded(value):
    return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value


@contextmanager
def own_gpus(count: int):
    """`count` of the visible GPUs for this run alone, by CUDA_VISIBLE_DEVICES. Snakemake counts GPUs (`--resources
    gpu=4`) without saying which; runs on one machine settle that by locks, which go when their holder goes."""
    if count == 0 or "SLURM_JOB_ID" in os.environ:  # Slurm has chosen
        yield
        return
    import fcntl

    visible = visible_gpus()
    if len(visible) < count:
        raise SystemExit(f"gpus: {count}, but this machine shows {len(visible)}: {', '.join(visible) or 'none'}")
    held = {}
    while len(held) < count:
        for gpu in visible:
            if gpu not in held and len(held) < count:
                file = open(Path(tempfile.gettempdir()) / f"kvneox-{os.getuid()}-gpu-{gpu}.lock", "a")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held[gpu] = file
                except OSError:
                    file.close()
        if len(held) < count:  # let go of all: two runs that each hold a part would wait for ever
            release(held)
            time.sleep(1 + os.getpid() % 10 / 10)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
    try:
        yield
    finally:
        release(held)


def release(held: dict) -> None:
    while held:
        held.popitem()[1].close()


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
