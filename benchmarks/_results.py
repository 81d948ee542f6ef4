"""Where benchmark lines are kept: results/<device>.csv, one row a line, the figures as JSON."""

import csv
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
_COLUMNS = ("date", "benchmark", "figures")


def device_name(kind: str) -> str:
    """The GPU, or the processor with its cores and what it has for bfloat16."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name().replace(" ", "-")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", flags)
    name = (model[1] if model else platform.processor() or "cpu").strip()
    feature = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return re.sub(r"[^A-Za-z0-9_]+", "-", f"{name} {feature} {cores}-cores").strip("-")


def record(benchmark: str, line: dict[str, Any]) -> None:
    """Append a line to the file of its device."""
    path = FOLDER / f"{line['device']}.csv"
    is_new = not path.exists()
    FOLDER.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(_COLUMNS)
        figures = {key: value for key, value in line.items() if key != "device"}
        writer.writerow([datetime.now(UTC).date().isoformat(), benchmark, json.dumps(figures)])
