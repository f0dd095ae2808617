"""How long the commands take to answer, as ratios to a bare ``python -c "import importlib.metadata"``.

    python benchmarks/startup.py [ROUNDS]

Medians of interleaved runs; the aim is less than 4.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = [sys.executable, "-c", "import importlib.metadata"]
SCRIPTS = Path(sys.executable).parent
COMMANDS = {
    "opensora --help": [str(SCRIPTS / "opensora"), "--help"],
    "opensora plugins": [str(SCRIPTS / "opensora"), "plugins"],
    "opensora configs": [str(SCRIPTS / "opensora"), "configs"],
    "opensora-run --help": [str(SCRIPTS / "opensora-run"), "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall-clock time of one run."""
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Print a line for each command."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    times: dict[str, list[float]] = {name: [] for name in ("bare", *COMMANDS)}
    for command in (BARE, *COMMANDS.values()):  # once, to fill the caches
        seconds(command)
    for _ in range(rounds):
        for name, command in [("bare", BARE), *COMMANDS.items()]:
            times[name].append(seconds(command))
    bare = statistics.median(times["bare"])
    print(f"bare python with importlib.metadata: {bare * 1000:.0f} ms (median of {rounds})")
    for name in COMMANDS:
        median = statistics.median(times[name])
        print(f"{name:20} {median * 1000:5.0f} ms  {median / bare:.2f}x")


if __name__ == "__main__":
    main()
