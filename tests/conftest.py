"""Shared by all tests: few threads, no network, and the long matrix only when asked for."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_configure(config):
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_collection_modifyitems(config, items):
    if os.environ.get("FGCLIP_TEST_ALL") == "1":
        return
    skip = pytest.mark.skip(reason="long matrix: set FGCLIP_TEST_ALL=1")
    for item in items:
        if item.get_closest_marker("all"):
            item.add_marker(skip)
