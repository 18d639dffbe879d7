"""The report of benchmarks.gpu: JSON with everything, markdown with what one compares."""

import json
import os
import subprocess
from pathlib import Path

import torch

COLUMNS = (
    "loss, N, D, dtype",
    "contender",
    "forward",
    "forward + backward",
    "/ GEMM",
    "memory",
    "launches",
    "Python",
)


def command_output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def nvidia_smi(query: str) -> str | None:
    """Of the GPU that is measured, which need not be the machine's first."""
    if not torch.cuda.is_available():
        return None
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    return command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", gpu)


def clocks() -> str | None:
    return nvidia_smi(
        "clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw"
    )


def machine() -> dict:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "commit": command_output("git", "rev-parse", "HEAD"),
        "modified": bool(command_output("git", "status", "--porcelain", "--untracked-files=no")),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{1e3 * value:.3f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"


def size(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MiB"


def case_of(row: dict) -> str:
    return f"{row['loss']}, {row['size']}, {row['dim']}, {row['dtype']}"


def name_of(row: dict) -> str:
    return f"{case_of(row)}, {row['contender']}"


def line(row: dict) -> str:
    step = f"forward + backward {seconds(row['step'])}" if "step" in row else ""
    return (
        f"{row['loss']} N={row['size']} D={row['dim']} {row['dtype']} {row['contender']}:"
        f" forward {seconds(row['forward'])} {step}"
    )


def spread(row: dict, name: str) -> str:
    """± half the distance between the 10 % and 90 % quantiles, in percent of the median."""
    if name not in row:
        return ""
    half = (row[f"{name}_high"] - row[f"{name}_low"]) / 2
    return f"{seconds(row[name])} ± {100 * half / row[name]:.0f} %"


def markdown(result: dict) -> str:
    about = result["machine"]
    lines = []
    if result["dry_run"]:
        lines += ["**A dry run: the numbers below mean nothing.**", ""]
    if result["state"] != "finished":
        lines += [f"**Not complete: {result['state']}.**", ""]
    lines += [
        f"{about['gpu']}, driver {about['driver']}, torch {about['torch']}, CUDA {about['cuda']},"
        f" Triton {about['triton']}, commit {about['commit']}{' + changes' if about['modified'] else ''}.",
        "Under load (clocks of SM and memory, throttling, temperature, power):"
        f" before {result['clocks_before']}; after {result['clocks_after']}.",
        "Medians ± half the distance from the 10 % to the 90 % quantile; / GEMM is relative to the bare"
        " GEMM of the same run. Memory is what a call needs on top of its input. A graph's time is the GPU's"
        " alone, with all replays queued; the others include waiting for Python.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    gemm = {key(row): row["forward"] for row in result["rows"] if row["contender"] == "bare GEMM"}
    for row in result["rows"]:
        full = "step" if "step" in row else "forward"
        relative = row[full] / gemm[key(row)] if key(row) in gemm else None
        cells = [
            case_of(row),
            row["contender"],
            spread(row, "forward"),
            spread(row, "step"),
            "" if relative is None else f"{relative:.2f}",
            size(row[f"{full}_bytes"]),
            " / ".join(
                str(row[f"{name}_launches"] or "?") for name in ("forward", "step") if name in row
            ),
            seconds(row[f"{full}_host"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if result["first_call_seconds"]:
        lines += ["", "In a new process:", ""]
        lines += [
            f"- {name}: {value:.2f} s" for name, value in result["first_call_seconds"].items()
        ]
    for kind in ("failed", "skipped"):
        if result[kind]:
            lines += ["", f"{kind.capitalize()}:", ""]
            lines += [f"- {entry['what']}: {entry['reason']}" for entry in result[kind]]
    return "\n".join(lines) + "\n"


def key(row: dict) -> tuple:
    return row["size"], row["dim"], row["dtype"], row["loss"]


def write(result: dict, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    replace(directory / "gpu.json", json.dumps(result, indent=1) + "\n")
    replace(directory / "gpu.md", markdown(result))


def replace(path: Path, text: str) -> None:
    """At once: whatever happens meanwhile, the file is the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
