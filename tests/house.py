"""Facts about the house: the size of its rooms, what they show at work, and which way they import.

`test_house.py` asserts them, `python tests/house.py [nbs/5_losses …]` prints them."""

import ast
import json
import re
import symtable
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fgclip_nb"
FLOORS = "core text data batches model losses diagnostics evaluation training runs bench".split()
MOST_LINES, MOST_PUBLIC, MOST_HIDDEN_IN_A_ROW, SHARE_SHOWN = 400, 15, 4, 0.6


def library_notebooks() -> list:
    "Notebooks that export a room, in the order of the house."
    return [p for f in FLOORS for p in sorted((ROOT / "nbs").glob(f"[0-9]*_{f}/*.ipynb"))]


def run_notebooks() -> list:
    "Notebooks at the root of nbs/: papermill executes them, they export nothing."
    return sorted((ROOT / "nbs").glob("*.ipynb"))


def source(cell) -> str:
    return "".join(cell["source"])


def plain(code: str) -> str:
    "Code of a cell; in a cell that is not plain Python, lines of IPython magic become `pass`."
    try:
        ast.parse(code)
    except SyntaxError:
        return re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M)
    return code


def global_names(code: str) -> set:
    "Names that a cell reads from its notebook: at its top level and inside its functions."
    names = set()

    def look(table, top):
        for s in table.get_symbols():
            if s.is_referenced() and (top or s.is_global()):
                names.add(s.get_name())
        for child in table.get_children():
            look(child, False)

    look(symtable.symtable(plain(code), "cell", "exec"), True)
    return names


@dataclass
class CodeCell:
    "A code cell: is it exported, what does it define and read, which names stand in it."

    text: str
    outputs: list

    def __post_init__(self):
        tree = ast.parse(plain(self.text))
        self.exported = bool(re.search(r"^#\s*\|\s*export", self.text, re.M))
        kinds = (ast.FunctionDef, ast.ClassDef)
        self.defines = [n.name for n in tree.body if isinstance(n, kinds)]
        self.reads = global_names(self.text)
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        self.mentions = attributes | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


class Room:
    "A library notebook and the module it exports."

    def __init__(self, path: Path):
        self.path = path
        self.cells = json.loads(path.read_text())["cells"]
        code = [c for c in self.cells if c["cell_type"] == "code" and source(c).strip()]
        self.code = [CodeCell(source(c), c.get("outputs", [])) for c in code]
        self.module = re.search(
            r"#\s*\|\s*default_exp (\S+)", "\n".join(c.text for c in self.code)
        )[1]
        self.file = PACKAGE / (self.module.replace(".", "/") + ".py")

    def lines(self) -> int:
        "Lines of the exported module without blank ones and cell markers."
        lines = self.file.read_text().splitlines()
        return sum(1 for line in lines if line.strip() and not line.startswith("# %%"))

    def public(self) -> list:
        return public_names(self.file)

    def unshown(self) -> list:
        "Exported functions and classes that no later cell of the notebook uses."
        missing = []
        for i, cell in enumerate(self.code):
            shown = {n for c in self.code[i + 1 :] if not c.exported for n in c.mentions}
            missing += [n for n in cell.defines if cell.exported and n[0] != "_" and n not in shown]
        return missing

    def used_before_defined(self) -> list:
        "`user: name` for exported code that reads what only a later cell defines."
        where = {n: i for i, c in enumerate(self.code) if c.exported for n in c.defines}
        return [
            f"{(cell.defines or ['?'])[0]}: {n}"
            for i, cell in enumerate(self.code)
            for n in sorted(cell.reads)
            if cell.exported and where.get(n, -1) > i
        ]

    def shown_at_once(self) -> list:
        "For each exported cell with a definition: does the next code cell use one of its names?"
        pairs = zip(self.code, [*self.code[1:], None])
        return [
            bool(after and not after.exported and set(cell.defines) & after.mentions)
            for cell, after in pairs
            if cell.exported and cell.defines
        ]


@cache
def room(path: Path) -> Room:
    "A library notebook, read once in a process."
    return Room(path)


def public_names(file: Path) -> list:
    "A module's `__all__`."
    for n in ast.parse(file.read_text()).body:
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__":
            return ast.literal_eval(n.value)
    return []


def library_files() -> list:
    return sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)


@cache
def order_of_rooms() -> list:
    "Module names in the order of their notebooks."
    return [re.search(r"default_exp ([\w.]+)", p.read_text())[1] for p in library_notebooks()]


def place_of(module: str) -> tuple:
    "(floor, room) as sortable numbers: modules may import what has a smaller one."
    rooms = order_of_rooms()
    return FLOORS.index(module.split(".")[0]), rooms.index(module) if module in rooms else -1


def imported_rooms(module: str, code: str) -> list:
    "Modules of the package that `code` in `module` imports, inside functions too."
    parts = module.split(".")
    imported = []
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import):
            imported += [
                a.name.removeprefix("fgclip_nb.")
                for a in n.names
                if a.name.startswith("fgclip_nb.")
            ]
        if isinstance(n, ast.ImportFrom):
            base = parts[: len(parts) - n.level] if n.level else []
            whole = ".".join([*base, *(n.module or "").split(".")]).strip(".")
            if not n.level and not f"{whole}.".startswith("fgclip_nb."):
                continue
            whole = whole.removeprefix("fgclip_nb").strip(".")
            files = [".".join(filter(None, (whole, a.name))) for a in n.names]
            rooms = [
                f
                for f in files
                if (PACKAGE / (f.replace(".", "/") + ".py")).exists() or f in FLOORS
            ]
            imported += rooms or [whole] * bool(whole)
    return imported


def wrong_way_imports(module: str, code: str) -> list:
    "Imports that do not point upwards: from a later floor, or from a later room of the same floor."
    here, wrong = place_of(module), []
    for other in imported_rooms(module, code):
        if other in FLOORS:
            bad = FLOORS.index(other) >= here[0]
        else:
            bad = place_of(other) >= here
        wrong += [f"{module} imports {other}"] * bad
    return wrong


def ladders() -> list:
    "Classes that stand on a class of ours that itself stands on one of ours."
    bases = {}
    for p in library_files():
        for n in ast.walk(ast.parse(p.read_text())):
            if isinstance(n, ast.ClassDef):
                bases[n.name] = [
                    b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in n.bases
                ]
    own = {name: [b for b in bs if b in bases] for name, bs in bases.items()}
    return [f"{c} < {b} < {own[b][0]}" for c, bs in own.items() for b in bs if own[b]] + [
        f"{c} has {len(bs)} bases of our own" for c, bs in own.items() if len(bs) > 1
    ]


def report(path: Path) -> str:
    "The facts of one room in a few lines."
    notebook = room(path)
    shown, lines = notebook.shown_at_once(), [notebook.module]
    size = path.stat().st_size // 1000
    lines.append(f"{notebook.lines()} lines, {len(notebook.public())} public names, {size} KB")
    lines.append(f"{sum(shown)} of {len(shown)} exported cells shown at once")
    for name in ("unshown", "used_before_defined"):
        names = getattr(notebook, name)()
        lines += [f"{name}: {', '.join(names)}"] * bool(names)
    lines += wrong_way_imports(notebook.module, notebook.file.read_text())
    if not any(c.outputs for c in notebook.code):
        lines.append("stored without outputs")
    return "\n  ".join(lines)


if __name__ == "__main__":
    wanted = [Path(a).resolve() for a in sys.argv[1:]]
    for notebook in library_notebooks():
        if not wanted or notebook in wanted or notebook.parent in wanted:
            print(report(notebook))
    print("\n".join(ladders()))
