"""Runs every library notebook, each in a fresh process: what one registers or logs is not there
for the next. The processes are forked from one that has loaded what others wrote and nothing of
the library, so that this is cheap.

    python tests/rooms.py [nbs/5_losses …]"""

import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import house

# What rooms take a second or two to import; the slowest first.
LOADED = """torch._dynamo torch.distributed.tensor torch.utils.tensorboard accelerate datasets
transformers.models.clip.modeling_clip transformers.models.siglip.modeling_siglip
transformers.models.siglip2.modeling_siglip2 transformers.models.auto scipy.stats scipy.ndimage
sklearn.metrics seaborn matplotlib.pyplot pandas jinja2 IPython nbdev.test papermill""".split()


def run_room(path) -> tuple:
    "(notebook, whether all its cells ran, seconds)."
    from nbdev.test import test_nb

    multiprocessing.current_process()._config["daemon"] = False  # a room may start loader processes
    os.chdir(path.parent)
    begun = time.perf_counter()
    passed = test_nb(path)[0]
    return path, passed, time.perf_counter() - begun


def main(wanted) -> int:
    import torch

    for name in LOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    os.environ["IN_TEST"] = "1"
    folders = [Path(w).resolve() for w in wanted]
    rooms = [p for p in house.library_notebooks() if not folders or {p, p.parent} & set(folders)]
    failed = 0
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for path, passed, seconds in pool.imap_unordered(run_room, rooms, chunksize=1):
            failed += not passed
            result = "passed" if passed else "FAILED"
            print(f"{path.relative_to(house.ROOT)}: {result} in {seconds:.1f} s", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
