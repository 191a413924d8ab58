"""What `import attnopt` costs beyond `import torch`: the best of several fresh processes, in seconds.

python benchmarks/import_time.py [RUNS]
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULT = Path(__file__).parent / "results" / "import_time.json"
STATEMENTS = {"torch": "import torch", "torch and attnopt": "import torch, attnopt"}


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs `statement`, its own start included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(runs: int = 7) -> None:
    """Measures in turns, so that a busy moment meets both; prints and writes the best of each."""
    times = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(runs)]
    best = {name: round(min(time[name] for time in times), 4) for name in STATEMENTS}
    beyond = round(best["torch and attnopt"] - best["torch"], 4)
    result = {
        "seconds": best,
        "beyond torch": beyond,
        "runs": runs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
