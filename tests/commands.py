"""The shell commands of README.md and docs/*.md, read out of the text, at reduced size.

A command is a line of a block of shell, or stands between backticks. `reduced` makes it small, in
a folder (`user_folder`) that holds what the texts speak of; `SKIPPED` says which are not run, and
why."""

import json, re, shutil, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = "make papermill python accelerate torchrun nohup tail source".split()
FENCED = re.compile(r"^[ \t]*```(\w*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
SHELL = ("", "bash", "sh", "shell")
MAP = re.compile(r"<!-- map of the notebooks.*?<!-- end of the map -->", re.S)  # titles of rooms

SKIPPED = {  # how a command begins: why it is not run
    "make lab": "JupyterLab stays open",
    "make test": "it would run these tests",
    "make train": "its recipe is the line below it, which is run; that they agree is asserted",
    "make gpu": "GPU: its rehearsal is a test of its own (test_pretend.py)",
    "python -m fgclip_nb.bench --gpu": "GPU: as `make gpu`",
    "python -m fgclip_nb.model": "weights of 1.5 GB; tests/test_fgclip2.py runs it on small ones",
    "torchrun --nnodes 2": "network: two machines",
    "nohup make train": "it is `make train`, which is run, behind a shell's idiom",
    "tail -f": "never ends",
    "source .venv/bin/activate": "it changes the caller's shell",
}
PLACES = {  # what stands for something of the reader's: what stands there in a test
    "path/or/hub-id": "tiny",
    "openai/clip-vit-base-patch32": "tiny",
    "RUN_OR_LOG…": "runs/my_run",
    "key=value …": "max_steps=2",
    "data=… …": "data=my.json media_root=photos max_steps=2 batch_size=2 device=cpu",
    "--num_processes 8": "--num_processes 2",
    "logit_scale_init 2.6592,4.6052": "logit_scale_init 2.6592",
    "seed 0,1,2": "seed 0",
}
SMALL = {  # notebook: parameters that make it small, where its text does not ask for less
    "train": dict(
        max_steps=1, batch_size=2, eval_every=0, diag_every=1, device="cpu", model="tiny"
    ),
    "evaluate": dict(permutations=20, device="cpu"),
    "data_report": dict(pages=1),
}
SMALLER = dict(gradient_caching=1, num_workers=0, num_frames=4, max_regions=2)  # where it is given


def in_text(text: str) -> list:
    "The commands of a Markdown text, in order."
    found, text = [], MAP.sub("", text)
    for language, block in FENCED.findall(text):
        if language not in SHELL:
            continue
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ ")).strip()
            if m := re.fullmatch(r'([A-Z]\w*)="(.*)"', line):
                variables[m[1]] = m[2]
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append(" ".join(line.split()))
    found += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    commands = [c for c in found if c.split()[:1] and c.split()[0] in PROGRAMS and " " in c]
    return list(dict.fromkeys(commands))


def all_commands() -> list:
    "(file, command) of README.md and docs/*.md."
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pairs = [(file.name, command) for file in files for command in in_text(file.read_text())]
    return list({command: (name, command) for name, command in pairs}.values())


def skipped(command: str) -> str:
    "Why a command is not run; empty where it is."
    return next((why for start, why in SKIPPED.items() if command.startswith(start)), "")


def reduced(command: str) -> str:
    "The command with the reader's places filled in, and parameters that make it small."
    for place, filled in PLACES.items():
        command = command.replace(place, filled)
    if re.fullmatch(r"python -m [\w.]+", command):
        return f"{command} --help"  # a program that is only named
    notebook = re.search(r"nbs/(\w+)\.ipynb", command)
    if "--help-notebook" in command or not notebook:
        return command
    small = dict(SMALL.get(notebook[1], {}))
    small |= {k: v for k, v in SMALLER.items() if f"-p {k} " in command}
    if notebook[1] == "evaluate":
        small |= {"model": "runs/my_run"} if "-p model" in command else {}
        small.pop("permutations" if '-p tasks ""' in command else "", None)
    if "video" in command or "-p num_frames" in command:
        small |= dict(image_size=32) if notebook[1] == "train" else {}
    return command + "".join(f" -p {k} {v}" for k, v in small.items())


def user_folder(root: Path) -> Path:
    "A folder with all that the commands name: photos, data files, UCF-Crime, a log, parameters."
    from PIL import Image
    from data_formats import FGOVD
    from fgclip_nb.core.folder import asset
    from test_ucf_recipe import make_ucf

    photos = sorted(asset("sample", "images").glob("*.jpg"))[:6]
    (root / "photos").mkdir(parents=True)
    rows = []
    for k, photo in enumerate(photos):
        shutil.copy(photo, root / "photos")
        box = dict(bbox=[0.1, 0.1, 0.6, 0.6 + k / 50], short_expr=f"thing {k}", flag_short_neg=1)
        box |= dict(short_expr_negs={"0": f"a box {k}", "1": f"a cat {k}"})
        row = dict(f_path=photo.name, caption=f"A long caption {k}.", short_caption=f"photo {k}")
        rows.append(row | dict(bbox_info=[box], split="train" if k < 4 else "val"))
    (root / "my.json").write_text(json.dumps(rows))
    small = "data: my.json\nmedia_root: photos\nmax_steps: 1\nbatch_size: 2\ndevice: cpu\n"
    (root / "params.yaml").write_text(small)
    told = "total=1.6 region=1.4000 candidates=4 logit_scale=2.65625"
    lines = [f"[LOSS] Step {s} {told}" for s in (50, 100, 150, 200)]
    (root / "old.log").write_text("\n".join(lines))
    for row in FGOVD:
        place = root / "coco" / row["img_path"]
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 200), "green").save(place)
    (root / "fgovd").mkdir()
    (root / "fgovd/h_attributes.jsonl").write_text("\n".join(map(json.dumps, FGOVD)))
    (root / "ucf").mkdir()
    make_ucf(root / "ucf")
    lines = ["Abuse001_x264.mp4  Abuse  100  300  -1  -1"]
    lines.append("Normal_Videos_004_x264.mp4  Normal  -1  -1  -1  -1")
    (root / "Temporal_Anomaly_Annotation.txt").write_text("\n".join(lines))
    (root / "nbs").symlink_to(ROOT / "nbs")
    (root / "Makefile").symlink_to(ROOT / "Makefile")
    (root / "runs").mkdir()
    return root


def environment() -> dict:
    "Programs of this Python, this checkout's library, one thread, no network, no outer make."
    import os

    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")  # `make test-ci` runs the tests
    here = {name: value for name, value in os.environ.items() if name not in outer}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return dict(here, PATH=path, PYTHONPATH=f"{ROOT}", **quiet)
