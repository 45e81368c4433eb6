"""What this process occupies of a card's memory, as the card says it. Decides nothing."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch

from expertd_engine.memory import MemoryUse


class DeviceMeter:
    """Of one card: everything that is in use, less what was before this process touched it; context included."""

    def __init__(self, device: torch.device) -> None:
        """Made before the first work on the card."""
        self._device = device
        others = None if torch.cuda.is_initialized() else _used_by_others(device.index or 0)
        self.knows_others = others is not None
        """Whether other programs' memory is told apart; else it counts as ours."""
        self._others = others or 0
        self._peak = 0

    def measure(self) -> MemoryUse:
        free, total = torch.cuda.mem_get_info(self._device)
        used = max(0, total - free - self._others)
        self._peak = max(self._peak, used)
        return MemoryUse(used, self._peak, "device")

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])


def _used_by_others(index: int) -> int | None:
    """Bytes in use on the card before we have a context, as its driver's tool says; None where that cannot be asked."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # the tool does not heed it
    card = visible.split(",")[index] if visible else str(index)
    command = [tool, f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return int(answer.stdout) * 2**20 if answer.returncode == 0 and answer.stdout.strip().isdigit() else None
