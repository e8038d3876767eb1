"""What is public is a list, `tests/public.txt`: a name enters or leaves it on purpose, and is
documented. A cell cannot show this, it is about all rooms at once."""

import ast

import house

LISTED = (house.ROOT / "tests/public.txt").read_text().split()
ROOMS = [house.room(path) for path in house.library_notebooks()]
PLAIN = ("PRESETS",)  # data, explained where it stands


def definitions(room) -> dict:
    "Name -> functions and classes at the top level of a room's module."
    body = ast.parse(room.file.read_text()).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in body if isinstance(node, kinds)}


def undocumented(name, node) -> list:
    "The name itself, and `name.method` for its public methods, where there is no docstring."
    lacking = [] if ast.get_docstring(node) else [name]
    if isinstance(node, ast.ClassDef):
        methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name[0] != "_"]
        lacking += [f"{name}.{m.name}" for m in methods if not ast.get_docstring(m)]
    return lacking


def test_what_is_public_is_on_the_list():
    public = sorted(name for room in ROOMS for name in room.public())
    added, gone = set(public) - set(LISTED), set(LISTED) - set(public)
    assert not added, f"public, but not in tests/public.txt: {sorted(added)}"
    assert not gone, f"in tests/public.txt, but no longer public: {sorted(gone)}"
    assert LISTED == sorted(LISTED)


def test_everything_public_is_documented():
    lacking = []
    for room in ROOMS:
        known = definitions(room)
        for name in room.public():
            if name not in PLAIN:
                lacking += undocumented(name, known[name])
    assert not lacking, f"public without a docstring: {lacking}"
