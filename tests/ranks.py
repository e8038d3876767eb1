"""Processes for a test, as `torch.multiprocessing.spawn` starts them, but with the imports done
once: a server that has imported the package and run nothing is forked per process."""

import multiprocessing

import torch.multiprocessing as mp

IMPORTED = ["fgclip_nb.model.fgclip2", "fgclip_nb.losses.objective", "fgclip_nb.training.build"]


def start_ranks(work, *args, count: int = 2):
    "Runs `work(rank, *args)` in `count` processes; returns when all have ended well."
    multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(work, args, nprocs=count, start_method="forkserver")
