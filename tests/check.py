"""What `make test`, `make test-ci` and `make test-all` run, in order, with the time of each part.

It is a script and not a cell because it starts the notebooks. Each part runs in its own process;
the first failure ends it non-zero."""

import os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTEST = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--durations=10"]
STYLE = [
    ("style", [BIN / "ruff", "check", "--quiet", "fgclip_nb", "nbs", "tests"]),
    ("format", [BIN / "ruff", "format", "--quiet", "--check", "nbs", "tests"]),
]
NOTEBOOKS = [sys.executable, "tests/rooms.py"]
PARTS = {
    "test": [*STYLE, ("library notebooks", NOTEBOOKS), ("tests", PYTEST)],
    "ci": [("tests of marker ci", [*PYTEST, "-m", "ci"])],
    "all": [("long tests", [*PYTEST, "-m", "long"])],
}
ENVIRONMENT = dict(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    # a rule of the package that fails ends no user's run, and every test
    PYTHONWARNINGS="ignore::DeprecationWarning,"
    "error:fgclip_nb has a fault in its rule:RuntimeWarning",
)


def run_part(name: str, command: list) -> int:
    "Exit status of one part; its name and its time are printed."
    begun = time.perf_counter()
    words = [Path(command[0]).name, *map(str, command[1:])]
    print(f"== {name}: {' '.join(words)}", flush=True)
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env=dict(os.environ, **ENVIRONMENT),
        stdin=subprocess.DEVNULL,
    )
    result = "FAILED" if done.returncode else "passed"
    print(f"== {name}: {result} in {time.perf_counter() - begun:.0f} s", flush=True)
    return done.returncode


def main(what: str = "test") -> int:
    for name, command in PARTS[what]:
        status = run_part(name, command)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
