"""What no cell can check: notebooks against the library, tags that papermill needs, packaging, import cost. Files of the repository are
read, none is changed."""

import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIBRARY = [p for p in NOTEBOOKS if p.name[0].isdigit()]
RUNS = [p for p in NOTEBOOKS if not p.name[0].isdigit()]


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def test_library_is_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    (tmp_path / "fgclip_nb").mkdir()
    (tmp_path / "fgclip_nb/__init__.py").write_text((ROOT / "fgclip_nb/__init__.py").read_text())
    done = subprocess.run(
        [Path(sys.executable).parent / "nbdev_export"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_text() for p in (tmp_path / "fgclip_nb").glob("*.py")}
    kept = {p.name: p.read_text() for p in (ROOT / "fgclip_nb").glob("*.py")}
    assert sorted(made) == sorted(kept)
    stale = [n for n in made if made[n] != kept[n]]
    assert not stale, f"run nbdev_export: {stale} differ from their notebooks"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_run_notebooks_have_one_parameters_cell(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill would silently run the defaults"
    assert source(tagged[0]).startswith("# Parameters")


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs/train.ipynb", tmp_path / "nbs")
    clean = [Path(sys.executable).parent / "nbdev_clean", "--fname", "nbs/train.ipynb"]
    subprocess.run(clean, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    assert any(
        "parameters" in c["metadata"].get("tags", []) for c in cells(tmp_path / "nbs/train.ipynb")
    )


def test_train_notebook_offers_exactly_the_known_parameters():
    from fgclip_nb.core.notebook import parameter_cell

    [cell] = [
        c for c in cells(ROOT / "nbs/train.ipynb") if "parameters" in c["metadata"].get("tags", [])
    ]
    assert source(cell) == parameter_cell()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_sound(path):
    ids = [c["id"] for c in cells(path)]
    assert len(ids) == len(set(ids))
    assert not [o for c in cells(path) for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert path.stat().st_size < 1_500_000
    if path in LIBRARY:
        assert "default_exp" in source(cells(path)[1])
        assert cells(path)[0]["cell_type"] == "markdown" and "\n> " in source(cells(path)[0])


def test_imports_point_only_to_lower_numbers():
    place = {
        re.search(r"#\s*\|\s*default_exp (\w+)", "\n".join(map(source, cells(p))))[1]: i
        for i, p in enumerate(LIBRARY)
    }
    for module, at in place.items():
        tree = ast.parse((ROOT / f"fgclip_nb/{module}.py").read_text())
        top = [
            n
            for n in tree.body
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("fgclip_nb.")
        ]
        for n in top:
            assert place[n.module.split(".")[1]] < at, (
                f"{module} imports {n.module}, which stands in a later notebook"
            )


def run_python(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=dict(os.environ, **env),
        stdin=subprocess.DEVNULL,
    )


def test_import_is_light():
    code = (
        "import sys, fgclip_nb, fgclip_nb.core, fgclip_nb.regions, fgclip_nb.filters\n"
        "print([m for m in ('torch', 'transformers', 'IPython', 'nbdev', 'papermill', 'pandas') if m in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_library_imports_without_notebook_packages():
    """The exported modules never name nbdev, fastcore, papermill or jupyter at import."""
    names = [p.stem for p in (ROOT / "fgclip_nb").glob("*.py") if p.stem[0] != "_"]
    absent = (
        "nbdev",
        "fastcore",
        "execnb",
        "papermill",
        "jupyterlab",
        "IPython",
        "ipywidgets",
        "datasets",
        "av",
    )
    blocker = (
        "import sys\nclass No:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\nimport importlib\n"
        + "\n".join(f"importlib.import_module('fgclip_nb.{n}')" for n in names)
    )
    done = run_python(blocker)
    assert done.returncode == 0, done.stderr


def test_shipped_files_are_packaged():
    sample = ROOT / "fgclip_nb/assets/sample"
    photos = list((sample / "images").glob("*.jpg"))
    assert len(photos) == 151 and sum(p.stat().st_size for p in photos) <= 4_000_000
    credits = "".join(p.read_text() for p in sample.glob("CREDITS*"))
    assert all(p.name in credits for p in photos)
