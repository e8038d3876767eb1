"""Puts another function in the place of one of the package's, in every room that has imported it:
what a test that breaks a training needs.

It is no cell because notebooks break nothing."""

import contextlib, importlib, sys


def rooms_with(name: str) -> list:
    "Loaded modules of the package that know `name`, after the training loop has been loaded."
    for room in ("training.loop", "training.__main__"):
        importlib.import_module(f"fgclip_nb.{room}")
    loaded = [
        m for n, m in sorted(sys.modules.items()) if n.startswith("fgclip_nb.") and m is not None
    ]
    knowing = [m for m in loaded if name in vars(m)]
    assert knowing, f"no room of the package knows {name}"
    return knowing


def rebind(name: str, wrapper):
    "Replace `name` everywhere by wrapper(original); returns the function that undoes it."
    rooms = rooms_with(name)
    kept = [(room, getattr(room, name)) for room in rooms]
    assert len({id(value) for _, value in kept}) == 1, (
        f"{name} has several meanings: {[r.__name__ for r in rooms]}"
    )
    new = wrapper(kept[0][1])
    for room, _ in kept:
        setattr(room, name, new)

    def undo():
        for room, value in kept:
            setattr(room, name, value)

    return undo


@contextlib.contextmanager
def rebound(name: str, wrapper):
    "`rebind` as a context."
    undo = rebind(name, wrapper)
    try:
        yield
    finally:
        undo()
