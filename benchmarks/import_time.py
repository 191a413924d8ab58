"""What `import attnopt` costs beyond `import torch`: the best of several fresh processes, in seconds.

python benchmarks/import_time.py [RUNS]
"""

import subprocess
import sys
import time

from _record import write

STATEMENTS = {"torch": "import torch", "torch and attnopt": "import torch, attnopt"}


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs `statement`, its own start included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(runs: int = 9) -> None:
    """Measures in turns, so that a busy moment meets both; prints and writes the best of each."""
    times = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(runs)]
    best = {name: round(min(time[name] for time in times), 4) for name in STATEMENTS}
    beyond = round(best["torch and attnopt"] - best["torch"], 4)
    path = write("import_time", {"runs": runs, "best_seconds": best, "beyond_torch_seconds": beyond})
    print(f"import torch {best['torch']:.2f} s, attnopt beyond it {beyond:.3f} s; see {path}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
