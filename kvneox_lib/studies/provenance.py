"""Where figures come from: versions, commit, machine, time."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "kvpress")


PROVENANCE = (
    *("python_version", *(f"{package}_version" for package in PACKAGES)),
    *("git_commit", "git_dirty", "device_name", "started_at"),
)


def provenance(device: str | torch.device = "cpu") -> dict[str, str | bool | None]:
    """Where figures come from; call it when the run starts. What cannot be known is None."""
    commit = _git("rev-parse", "HEAD")
    return {
        "python_version": platform.python_version(),
        **{f"{package}_version": _version(package) for package in PACKAGES},
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", ".", ":!results")) if commit else None,
        "device_name": _device_name(torch.device(device)),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask the checkout that this file is part of. An installed copy has none, even inside some repository."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    # a hook of git's sets GIT_DIR and GIT_INDEX_FILE for its own repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
