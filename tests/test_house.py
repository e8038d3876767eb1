"""What no cell can check: notebooks against the library, the order of the house, what it shows,
tags that papermill needs, packaging, import cost. Files of the repository are read, none is
changed."""

import ast, json, os, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

import faces
import house
import parameters

ROOT = house.ROOT
LIBRARY, RUNS = house.library_notebooks(), house.run_notebooks()
UNSHOWN = ROOT / "tests/unshown.txt"
BIN = Path(sys.executable).parent


def name_of(path):
    return path.relative_to(ROOT / "nbs").as_posix()


every_room = pytest.mark.parametrize("path", LIBRARY, ids=name_of)
every_run = pytest.mark.parametrize("path", RUNS, ids=name_of)
every_notebook = pytest.mark.parametrize("path", LIBRARY + RUNS, ids=name_of)


def cells(path):
    return json.loads(path.read_text())["cells"]


def copied_sources(folder):
    "The notebooks and what the exporter needs besides, copied."
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    hidden = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=hidden)
    for p in house.PACKAGE.rglob("__init__.py"):
        copy = folder / p.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, copy)


# ---- the library is its notebooks ---------------------------------------------------------------


def test_library_is_what_the_notebooks_export(tmp_path):
    copied_sources(tmp_path)
    done = subprocess.run(
        [BIN / "nbdev_export"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    made = {p.relative_to(tmp_path) for p in (tmp_path / "fgclip_nb").rglob("*.py")}
    kept = {p.relative_to(ROOT) for p in house.library_files()}
    assert made == kept, "a file of the package that no notebook exports, or one that is missing"
    stale = [str(p) for p in made if (tmp_path / p).read_text() != (ROOT / p).read_text()]
    assert not stale, f"run `make export`: {stale} differ from their notebooks"


def test_public_faces_are_those_of_the_rooms():
    for path, text in faces.faces().items():
        assert path.read_text() == text, f"run `make export`: {path} is stale"


def test_the_map_in_readme_is_that_of_the_notebooks():
    assert (ROOT / "README.md").read_text() == faces.readme_map(), "run `make export`"


def test_no_public_name_is_that_of_a_room():
    rooms = {part for room in house.order_of_rooms() for part in room.split(".")}
    public = [n for p in LIBRARY for n in house.room(p).public()]
    assert not rooms & set(public)
    assert not {n for n in public if public.count(n) > 1}, "one name, one meaning"


# ---- which way imports point --------------------------------------------------------------------


@every_room
def test_imports_point_upwards(path):
    room = house.room(path)
    assert not house.wrong_way_imports(room.module, room.file.read_text())


def test_a_planted_import_is_noticed():
    wrong = house.wrong_way_imports
    assert wrong("losses.bank", "from ..training.loop import train")
    assert wrong("losses.bank", "def f():\n    from fgclip_nb.training import train")
    assert wrong("losses.bank", "import fgclip_nb.losses.objective")
    assert wrong("losses.bank", "from .objective import compute_losses")
    assert wrong("losses.bank", "from .. import training")
    assert not wrong("losses.bank", "from .processes import gather_rows\nfrom ..core import Run")


# ---- how a room reads ---------------------------------------------------------------------------


@every_room
def test_a_room_is_small_and_reads_from_top_to_bottom(path):
    room = house.room(path)
    assert room.lines() <= house.MOST_LINES
    assert len(room.public()) <= house.MOST_PUBLIC
    assert not room.used_before_defined()
    first = room.cells[0]
    assert first["cell_type"] == "markdown" and "\n> " in house.source(first)
    assert "default_exp" in house.source(room.cells[1])


@every_room
def test_a_room_shows_what_it_defines(path):
    room = house.room(path)
    shown = room.shown_at_once()
    if not shown:
        return
    assert sum(shown) >= house.SHARE_SHOWN * len(shown), f"{sum(shown)} of {len(shown)} cells shown"
    row = longest = 0
    for here in shown:
        row = 0 if here else row + 1
        longest = max(longest, row)
    assert longest <= house.MOST_HIDDEN_IN_A_ROW, f"{longest} exported cells in a row without use"


def test_what_is_not_shown_at_work_only_gets_less():
    listed = UNSHOWN.read_text().split()
    rooms = [house.room(p) for p in LIBRARY]
    now = [f"{room.module}.{n}" for room in rooms for n in room.unshown()]
    assert not set(now) - set(listed), "show these at work in a later cell of their notebook"
    assert not set(listed) - set(now), f"now shown or gone: take them out of {UNSHOWN.name}"


def test_no_class_stands_on_a_ladder():
    assert not house.ladders()


def test_a_planted_ladder_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "rungs.py").write_text("class A: ...\nclass B(A): ...\nclass C(B): ...\n")
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    assert house.ladders() == ["C < B < A"]


# ---- notebooks ----------------------------------------------------------------------------------


@every_notebook
def test_notebooks_are_sound(path):
    ids = [c["id"] for c in cells(path)]
    assert len(ids) == len(set(ids))
    outputs = [o for c in cells(path) for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert path.stat().st_size < (300_000 if path in LIBRARY else 700_000)
    assert outputs or path.name in ("train.ipynb", "evaluate.ipynb", "data_report.ipynb"), (
        "stored without outputs, so nobody sees what it shows"
    )


@every_run
def test_run_notebooks_have_one_parameters_cell(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill would silently run the defaults"
    assert house.source(tagged[0]).startswith("# Parameters")


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs/train.ipynb", tmp_path / "nbs")
    clean = [BIN / "nbdev_clean", "--fname", "nbs/train.ipynb"]
    subprocess.run(clean, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    cleaned = cells(tmp_path / "nbs/train.ipynb")
    assert any("parameters" in c["metadata"].get("tags", []) for c in cleaned)


def test_parameters_cells_are_those_of_the_declarations():
    for path, text in parameters.written_cells().items():
        [cell] = parameters.tagged(json.loads(path.read_text()))
        assert house.source(cell) == text, f"run `make parameters`: {path.name} is stale"


@every_run
def test_papermill_understands_every_parameter(path):
    from papermill.inspection import inspect_notebook

    [cell] = parameters.tagged(json.loads(path.read_text()))
    lines = house.source(cell).splitlines()[1:]
    known = inspect_notebook(str(path))
    assert len(known) == len(lines) and all(p["help"] for p in known.values())


# ---- packaging and import -----------------------------------------------------------------------


def run_python(code, **env):
    command = [sys.executable, "-c", code]
    env = dict(os.environ, **env)
    return subprocess.run(
        command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL
    )


def test_import_is_light():
    heavy = ("torch", "transformers", "IPython", "nbdev", "papermill", "pandas")
    code = (
        "import sys, fgclip_nb, fgclip_nb.core, fgclip_nb.data.load, fgclip_nb.data.filters\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_library_imports_without_notebook_packages():
    "The exported modules never name nbdev, fastcore, papermill or jupyter at import."
    absent = "nbdev fastcore execnb papermill jupyterlab IPython ipywidgets datasets av".split()
    blocker = (
        "import sys\nclass No:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\nimport importlib\n"
    )
    rooms = [f"importlib.import_module('fgclip_nb.{r}')" for r in house.order_of_rooms()]
    done = run_python(blocker + "\n".join(rooms))
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_had_from_the_package_and_from_its_floor():
    import importlib

    import fgclip_nb

    for name, room in fgclip_nb.ROOMS.items():
        floor = importlib.import_module(f"fgclip_nb.{room.split('.')[1]}")
        assert getattr(fgclip_nb, name) is getattr(floor, name)
        assert getattr(fgclip_nb, name).__doc__


def test_code_identity_sees_every_floor(tmp_path):
    "In a copy of the repository: the commit is known, and a changed room is another code."
    shutil.copytree(ROOT / "fgclip_nb", tmp_path / "fgclip_nb")
    (tmp_path / "settings.ini").write_text("")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
    ask = (
        "import json, sys; sys.path.insert(0, '.')\n"
        "from fgclip_nb.core.identity import code_identity; print(json.dumps(code_identity()))"
    )

    def identity():
        command = [sys.executable, "-c", ask]
        return json.loads(
            subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
        )

    before = identity()
    with open(tmp_path / "fgclip_nb/losses/contrast.py", "a") as f:
        f.write("\n# another code\n")
    after = identity()
    assert len(before["commit"]) == 40 and not before["diff"]
    assert after["package"] != before["package"] and after["diff"]


def test_the_wheel_holds_every_floor_and_every_shipped_file(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "."]
    pytest.importorskip("setuptools", reason="needs the build backend beside the package")
    copy = tmp_path / "source"
    copied_sources_of_package(copy)
    subprocess.run([*build, "-w", str(tmp_path)], cwd=copy, check=True, stdin=subprocess.DEVNULL)
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = [p for p in house.PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    missing = {p.relative_to(ROOT).as_posix() for p in wanted} - held
    assert not missing
    assert not [n for n in held if "__pycache__" in n]


def copied_sources_of_package(folder):
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "fgclip_nb", folder / "fgclip_nb")


def test_shipped_photos_are_credited():
    from fgclip_nb.core.folder import asset

    photos = list(asset("sample", "images").glob("*.jpg"))
    assert len(photos) == 151 and sum(p.stat().st_size for p in photos) <= 4_000_000
    texts = "".join(p.read_text() for p in asset("sample").glob("CREDITS*"))
    assert all(p.name in texts for p in photos)


def test_what_a_module_imports_is_declared():
    "Every third-party package that the library imports stands in pyproject.toml."
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {
        d.split(">")[0].split("=")[0].split("<")[0].split("[")[0] for g in groups for d in g
    }
    names = dict(PIL="pillow", sklearn="scikit-learn", yaml="pyyaml")
    imported = set()
    for p in house.library_files():
        for n in ast.walk(ast.parse(p.read_text())):
            if isinstance(n, ast.Import):
                imported |= {a.name.split(".")[0] for a in n.names}
            if isinstance(n, ast.ImportFrom) and not n.level:
                imported.add(n.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"fgclip_nb"}
    assert not {names.get(n, n) for n in foreign} - declared
