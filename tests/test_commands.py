"""Every shell command of README.md and docs/*.md is run, at reduced size: none goes stale."""

import re, shutil, subprocess
from pathlib import Path

import pytest

import commands

MY_RUN = "python -m fgclip_nb.training params.yaml output=runs/my_run"


def run(command: str, folder) -> subprocess.CompletedProcess:
    "A command as a user's shell runs it."
    how = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    return subprocess.run(["bash", "-c", command], cwd=folder, env=commands.environment(), **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = commands.user_folder(tmp_path_factory.mktemp("user") / "home")
    done = run(MY_RUN, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def as_recipe(command: str, folder) -> str:
    "What a target of the Makefile runs besides setting things up; other commands as they are."
    if not command.startswith("make "):
        return command
    (folder / ".venv").mkdir(exist_ok=True)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(commands.ROOT / name, folder)
    (folder / ".venv/installed").touch()
    listed = run(command.replace("make ", "make -n ", 1), folder)
    assert listed.returncode == 0, f"{command}: {listed.stderr}"
    return listed.stdout.replace("\\\n", " ").replace(".venv/bin/", "").strip()


RUN = [pair for pair in commands.all_commands() if not commands.skipped(pair[1])]


@pytest.mark.ci
@pytest.mark.parametrize("command", [c for _, c in RUN], ids=[f"{f}: {c[:60]}" for f, c in RUN])
def test_it_runs(command, folder):
    small = commands.reduced(" ".join(as_recipe(command, folder).split()))
    done = run(small, folder)
    assert done.returncode == 0, f"{small}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_make_train_is_the_line_that_the_readme_shows():
    recipe = (commands.ROOT / "Makefile").read_text()
    line = next(c for _, c in commands.all_commands() if c.startswith("papermill nbs/train.ipynb"))
    assert f"$(BIN)/{line} --stdout-file - --no-progress-bar" in recipe


@pytest.mark.ci
def test_a_stale_command_is_found(folder):
    text = Path(commands.ROOT / "README.md").read_text()
    stale = text.replace("-p logit_scale_init", "-p logit_scale_ini", 1)
    new = [c for c in commands.in_text(stale) if c not in commands.in_text(text)]
    assert len(new) == 1 and run(commands.reduced(new[0]), folder).returncode != 0
    gone = "```\npython -m fgclip_nb.data raport my.json     # what is wrong\n```"
    assert run(commands.in_text(gone)[0], folder).returncode != 0


def test_the_texts_hold_commands_and_each_is_run_or_has_a_reason():
    found = [c for _, c in commands.all_commands()]
    assert len(found) > 20 and any("papermill nbs/train.ipynb" in c for c in found)
    for start in commands.SKIPPED:
        assert any(c.startswith(start) for c in found), f"{start} stands in no text any more"


def test_names_of_parameters_between_backticks_are_known():
    from papermill.inspection import inspect_notebook

    known = {n for p in (commands.ROOT / "nbs").glob("*.ipynb") for n in inspect_notebook(str(p))}
    files = [commands.ROOT / "README.md", *(commands.ROOT / "docs").glob("*.md")]
    for file in files:
        for name in re.findall(r"(?<![\w-])-p (\w+) ", file.read_text()):
            assert name in known | {"name"}, f"{file.name}: -p {name}"
