"""Everything `make test` runs, in order, with the time each part took: style, notebooks in sync, notebook tests, pytest.

It is a script and not a cell because it starts the notebooks. Each part runs in its own process; the first failure ends it non-zero."""

import os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PARTS = [
    ("style", [BIN / "ruff", "check", "--quiet", "fgclip_nb", "tests"]),
    (
        "library notebooks",
        [BIN / "nbdev_test", "--file_re", "^[0-9]", "--n_workers", "2", "--timing"],
    ),
    ("tests", [sys.executable, "-m", "pytest", "--durations=10"]),
]


def main() -> int:
    env = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    for name, command in PARTS:
        begun = time.perf_counter()
        print(
            f"== {name}: {' '.join(Path(c).name if i == 0 else str(c) for i, c in enumerate(command))}",
            flush=True,
        )
        code = subprocess.run(
            [str(c) for c in command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL
        ).returncode
        print(
            f"== {name}: {'passed' if code == 0 else 'FAILED'} in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
