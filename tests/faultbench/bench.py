"""Runs a catalogue of faults and healthy controls, packs what each run left behind, and judges the
packed runs in seconds: `python tests/faultbench/bench.py run|judge CATALOGUE [NAME…]`.

It is no cell: runs take minutes, and broken trainings are no example of how to train."""

import contextlib, gzip, importlib, io, json, logging, sys, tempfile, traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import world  # noqa: E402
from rebind import rebound  # noqa: E402

SMALL = dict(
    model="tiny",
    augment="none",
    batch_size=16,
    max_regions=4,
    max_steps=80,
    learning_rate=3e-3,
    lr_warmup_steps=8,
    region_weight=1.0,
    hard_weight=0.2,
    diag_every=5,
    eval_every=20,
    save_every=100_000,
    log_every=20,
    tracker="none",
    memory_bank_size=64,
    memory_bank_warmup_steps=20,
    device="cpu",
)


@dataclass
class Case:
    """A training as a user may run it.

    accepted: names of rules that answer it on the first line; empty for a healthy control. told:
    what was done. params: parameters beside `SMALL`. world: arguments of `make_world`. plant: a
    function that returns a context in which the package is broken. before: a case trained first,
    whose run folder is the model."""

    told: str
    accepted: tuple = ()
    params: dict = field(default_factory=dict)
    world: dict = field(default_factory=dict)
    plant: object = contextlib.nullcontext
    before: object = None
    harmless: bool = False


def train_case(case: Case, folder: Path, seed: int = 0) -> Path:
    "Train a case below `folder`; returns the run folder, also of a run that ended in an error."
    from fgclip_nb.model import config
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train

    import torch

    torch.set_num_threads(1)
    logging.getLogger("fgclip_nb").setLevel(logging.ERROR)
    data = world.make_world(folder / "data", **(dict(seed=seed) | case.world))
    params = SMALL | dict(data=str(data)) | case.params
    if case.before is not None:
        params["model"] = str(train_case(case.before, folder / "before", seed))
    params |= dict(output=str(folder / "run"), seed=seed)
    small = config.model_sizes(64, 8, 64, 2, 64, 2, 32)
    with (
        patch.dict(config.PRESETS, tiny=small),
        contextlib.redirect_stdout(io.StringIO()),
        rebound("conclude", lambda whole: lambda run: []),
        case.plant(),
    ):
        try:
            train(TrainConfig(**params))
        except Exception as e:
            (folder / "run").mkdir(exist_ok=True)
            (folder / "run" / "error.txt").write_text(f"{type(e).__name__}: {e}")
            if "-v" in sys.argv:
                traceback.print_exc()
    return folder / "run"


KEPT = (
    "params.yaml",
    "manifest.json",
    "metrics.jsonl",
    "audit.json",
    "expectations.json",
    "retrieval.json",
    "bad_steps.jsonl",
    "finished.json",
    "error.txt",
)


def pack(run: Path) -> dict:
    "The text files of a run that its verdicts are made of, by name."
    files = {name: (run / name).read_text() for name in KEPT if (run / name).exists()}
    return {name: text.replace(str(run.parent), "") for name, text in files.items()}


def unpack(files: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def catalogue(name: str) -> dict:
    "The cases of a catalogue: module `<name>`, dict CASES."
    return importlib.import_module(name).CASES


def run_one(which: tuple) -> tuple:
    name, case, seed = which
    with tempfile.TemporaryDirectory() as folder:
        return name, pack(train_case(catalogue(name)[case], Path(folder), seed)), case


def store_of(name: str) -> Path:
    return HERE / f"{name}.json.gz"


def load(name: str) -> dict:
    path = store_of(name)
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def save(name: str, runs: dict):
    text = json.dumps(runs, indent=0, sort_keys=True)
    store_of(name).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def run(name: str, cases=(), processes=2, seed=0):
    "Train cases of a catalogue (all when none is named) and store what they left behind."
    chosen = list(cases) or list(catalogue(name))
    importlib.import_module("fgclip_nb.training.loop")  # once, before the processes part
    with ProcessPoolExecutor(processes) as pool:
        for _, files, case in pool.map(run_one, [(name, case, seed) for case in chosen]):
            runs = load(name)
            runs[case] = files
            save(name, runs)
            print(case, files.get("error.txt", ""), flush=True)


def judged(files: dict) -> list:
    "The verdicts of a packed run."
    from fgclip_nb.diagnostics.judgement import verdicts

    with tempfile.TemporaryDirectory() as folder:
        return verdicts(unpack(files, Path(folder) / "run"))


def first_line(verdicts: list) -> tuple:
    "(rule that leads, the sentence) of verdicts; the name is empty when nothing tripped."
    from fgclip_nb.diagnostics.judgement import headline

    line = headline(verdicts)
    names = {v.name for v in verdicts}
    name = line.split(":", 1)[0]
    return (name if name in names else ""), line


def harm(files: dict) -> float:
    "Held-out mean rank over its chance at the last validation; nan when there was none."
    rows = [json.loads(line) for line in files.get("metrics.jsonl", "").splitlines()]
    rows = [r for r in rows if "val_mean_rank" in r]
    return rows[-1]["val_mean_rank"] / rows[-1]["val_mean_rank_chance"] if rows else float("nan")


def judge(name: str, cases=(), every=False):
    "Print a line per packed run, faults first; returns (right, faults, alarms, controls)."
    runs = load(name)
    right = alarms = faults = controls = 0
    for case, c in catalogue(name).items():
        if case not in runs or (cases and case not in cases):
            continue
        found = judged(runs[case])
        leads, line = first_line(found)
        ok = leads in c.accepted if c.accepted else leads == ""
        faults += bool(c.accepted)
        controls += not c.accepted
        right += bool(c.accepted) and ok
        alarms += not c.accepted and not ok
        print(f"{'ok ' if ok else 'NO '} {case:24} {harm(runs[case]):.2f} {line[:230]}")
        if every:
            for v in found:
                if v.tripped:
                    print(f"        {v.result:15} {v.name:28} {v.why[:150]}")
    print(f"{right} of {faults} faults named, {alarms} false alarms in {controls} controls")
    return right, faults, alarms, controls


if __name__ == "__main__":
    command, catalogue_name, *names = [a for a in sys.argv[1:] if not a.startswith("-")]
    if command == "run":
        run(catalogue_name, names)
    else:
        judge(catalogue_name, names, "-a" in sys.argv)
