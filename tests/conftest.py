"""Shared by all tests: few threads, no network."""

import logging, os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A rule of the package that fails ends no user's run; here, and in processes of tests, it does.
FAULT = "error:fgclip_nb has a fault in its rule:RuntimeWarning"
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), FAULT]))


def pytest_configure(config):
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture
def told():
    "Lines of the package's log."
    lines, handler, log = [], logging.Handler(), logging.getLogger("fgclip_nb")
    handler.emit = lambda record: lines.append(record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)
