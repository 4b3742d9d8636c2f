"""Runs every check of a GPU, each in a process of its own with a time limit, and ends in one table and one JSON file.

A part that fails, hangs or crashes does not stop the others. A part that cannot run here (no flash-attn) is "not
available", never "passed". scripts/gpu_check.sh is the command; `python scripts/docs/gpu_page.py gpu_check.json` writes
the measurements into docs/benchmarks.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from gpu_parts import NOT_AVAILABLE, PARTS

HERE = Path(__file__).parent

BUDGET = 540
"""Seconds for everything."""
CPU_SLOWER = 10
"""Times as long as a GPU has, for tries on a CPU."""
BAD = ("failed", "timed out", "not run")
TOLERANCE = 0.25
"""How far the plan's memory may be from the measured peak, as a share of it."""


def run_part(name: str, limit: float, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one part; its result, whatever happens to the process."""
    out = folder / f"{len(list(folder.iterdir()))}.json"
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--device", args.device, "--json", str(out)]
    command += ["--quick"] if args.quick else []
    command += ["--threads", str(args.threads)] if args.threads else []
    result: dict[str, Any] = {"name": name, "limit_s": round(limit, 1), "rows": [], "reason": ""}
    started = time.perf_counter()
    # A session of its own: a part that hangs is ended with everything it started.
    with (folder / f"{out.stem}.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    result["seconds"] = round(time.perf_counter() - started, 1)
    last = lines[-1] if lines else "no output"
    if code is None:
        result |= {"status": "timed out", "reason": f"over {limit:.0f} s; {last}"[:300]}
    elif code == 0:
        result |= {"status": "passed", "rows": json.loads(out.read_text(encoding="utf-8"))}
    elif code == NOT_AVAILABLE:
        result |= {"status": "not available", "reason": last}
    else:
        result |= {"status": "failed", "reason": f"exit code {code}; {last}"[:300]}
        print("\n".join(lines[-15:]), file=sys.stderr)
    return result


def compare_plan(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `llava-mole plan` expects beside what was measured."""
    rows = []
    for part in parts:
        for row in part["rows"]:
            if "own_peak_bytes" in row and "predicted_bytes" in row:
                rows.append(
                    {
                        "part": part["name"], "variant": row["variant"], "predicted_bytes": row["predicted_bytes"],
                        "measured_bytes": row["own_peak_bytes"],
                        "memory_ratio": row["predicted_bytes"] / row["own_peak_bytes"],
                        "predicted_s": row.get("predicted_s"), "measured_s": row["median_s"],
                    }
                )  # fmt: skip
    result: dict[str, Any] = {"name": "plan and measurement", "limit_s": 0, "seconds": 0.0, "rows": rows, "reason": ""}
    if not rows:
        return result | {"status": "not available", "reason": "no step was measured on a GPU"}
    off = [row for row in rows if abs(row["memory_ratio"] - 1) > TOLERANCE]
    if off:
        names = ", ".join(f"{row['variant']} {row['memory_ratio']:.2f}" for row in off)
        return result | {"status": "failed", "reason": f"memory is off by more than {TOLERANCE:.0%}: {names}"}
    return result | {"status": "passed"}


def table(parts: Sequence[dict[str, Any]]) -> str:
    """One line a part."""
    lines = [("part", "result", "s", "rows", "reason")]
    lines += [
        (part["name"], part["status"], f"{part['seconds']:.1f}", str(len(part["rows"])), part["reason"])
        for part in parts
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    cells = (
        (
            line[0].ljust(widths[0]),
            line[1].ljust(widths[1]),
            line[2].rjust(widths[2]),
            line[3].rjust(widths[3]),
            line[4],
        )
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes: tries the script, measures nothing")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="default: gpu_check.json")
    parser.add_argument("--threads", type=int, help="CPU threads of a part (default: torch's)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts or ()) - PARTS.keys())
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are: {', '.join(PARTS)}")
    import torch

    args.device = args.device or "cuda"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU found (torch.cuda.is_available() is False); --device cpu --quick tries the script")
    if not args.device.startswith("cuda") and not args.quick:
        parser.error(f"--device {args.device} needs --quick: the full shapes are those of a GPU")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: the folder does not exist")
    import mole_common

    from llava_mole.common.files import write_json

    started, results = time.perf_counter(), []
    slower = 1 if args.device.startswith("cuda") else CPU_SLOWER
    chosen = [name for name in PARTS if not args.parts or name in args.parts]
    with tempfile.TemporaryDirectory(prefix="gpu_check") as folder:
        bar = tqdm(chosen, unit="part", disable=None)
        for name in bar:
            bar.set_description(name)
            limit = min(slower * PARTS[name][1], slower * BUDGET - (time.perf_counter() - started))
            if limit < 5:
                results.append(
                    {"name": name, "limit_s": 0, "seconds": 0.0, "rows": [], "status": "not run"}
                    | {"reason": f"the {slower * BUDGET} s for all parts were over"}
                )
                continue
            results.append(run_part(name, limit, args, Path(folder)))
    results.append(compare_plan(results))
    values = {
        "machine": mole_common.machine() if args.device.startswith("cuda") else mole_common.machine() | {"gpu": "none"},
        "device": args.device,
        "quick": args.quick,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started, 1),
        "parts": results,
    }
    write_json(args.out, values, indent=1)
    print(table(results))
    bad = [part["name"] for part in results if part["status"] in BAD]
    print(f"{values['seconds']:.0f} s; {args.out}; " + (f"NOT PASSED: {', '.join(bad)}" if bad else "nothing failed"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
