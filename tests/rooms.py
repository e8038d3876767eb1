"""Runs every library notebook, each in a fresh process: what one registers or logs is not there
for the next. The processes are forked from one that has loaded what others wrote and nothing of
the library, so that this is cheap.

    python tests/rooms.py [nbs/5_losses …]"""

import importlib
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import house

# What rooms take a second or two to import; the slowest first.
LOADED = """torch._dynamo torch.distributed.tensor torch.utils.tensorboard accelerate datasets
transformers.models.clip.modeling_clip transformers.models.siglip.modeling_siglip
transformers.models.siglip2.modeling_siglip2 transformers.models.auto scipy.stats scipy.ndimage
sklearn.metrics matplotlib.pyplot pandas jinja2 IPython nbdev.test papermill""".split()


def run_room(path):
    "Run all cells of a notebook; the process ends with 1 where one fails."
    from nbdev.test import test_nb

    os.chdir(path.parent)
    sys.exit(not test_nb(path)[0])


def run_all(rooms) -> int:
    "Two rooms at a time; how many failed. One whose process is killed has failed."
    context, waiting, running, failed = multiprocessing.get_context("fork"), rooms[::-1], {}, 0
    while waiting or running:
        while waiting and len(running) < 2:
            path = waiting.pop()
            process = context.Process(target=run_room, args=(path,))
            process.start()
            running[process.sentinel] = process, path, time.perf_counter()
        for sentinel in wait(list(running)):
            process, path, begun = running.pop(sentinel)
            process.join()
            seconds, code = time.perf_counter() - begun, process.exitcode
            failed += code != 0
            result = f"FAILED with status {code}" if code else "passed"
            print(f"{path.relative_to(house.ROOT)}: {result} in {seconds:.1f} s", flush=True)
    return failed


def main(wanted) -> int:
    import torch

    for name in LOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    os.environ["IN_TEST"] = "1"
    folders = [Path(w).resolve() for w in wanted]
    rooms = [p for p in house.library_notebooks() if not folders or {p, p.parent} & set(folders)]
    return bool(run_all(rooms))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
