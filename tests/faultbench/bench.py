"""A catalogue of faults and healthy controls: sealed, run, packed, and judged in seconds.

    python tests/faultbench/bench.py seal NAME          before the first run: predictions and hash
    python tests/faultbench/bench.py run NAME [CASE…]   train all cases (or some) and pack them
    python tests/faultbench/bench.py judge NAME         the first line of each packed run

A catalogue is a module of this folder with a dict CASES of `Case`. Its author names the rules that
answer each fault from the public list (`fgclip_nb.diagnostics.judgement.causes()`), without reading
how they judge; `NAME.predictions.json` and its hash are committed before any run.

It is no cell: runs take minutes, and broken trainings are no example of how to train."""

import contextlib, gzip, hashlib, importlib, io, json, logging, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
world = importlib.import_module("world")
rebound = importlib.import_module("rebind").rebound

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


SEED = 0
HARM = "val_mean_rank / val_mean_rank_chance at the last validation, beside the case `healthy`"


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
    return folder / "run"


KEPT = (  # of timing.jsonl see `rounded_waiting`
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


def rounded_waiting(run: Path) -> dict:
    """timing.jsonl with the share of time that a run waited for data, in tenths, at every step.

    Wall-clock figures tell what else the machine did; the tenths of a run hardly do."""
    rows = [json.loads(line) for line in open(run / "timing.jsonl")][5:]
    whole = sum(r["step_time_s"] for r in rows)
    share = round(sum(r["data_time_s"] for r in rows) / whole, 1) if whole else 0.0
    packed = [dict(step=k + 1, step_time_s=1.0, data_time_s=share) for k in range(len(rows) + 5)]
    return {"timing.jsonl": "".join(json.dumps(row) + "\n" for row in packed)}


def lost_on_the_way(run: Path) -> dict:
    "rejects.jsonl without what was rejected before the first step, which the audit counts."
    lines = [line for line in open(run / "rejects.jsonl") if "(tried " in line]
    return {"rejects.jsonl": "".join(lines[:50])} if lines else {}


def pack(run: Path) -> dict:
    "The text files of a run that its verdicts are made of, by name."
    files = {name: (run / name).read_text() for name in KEPT if (run / name).exists()}
    files |= rounded_waiting(run) if (run / "timing.jsonl").exists() else {}
    files |= lost_on_the_way(run) if (run / "rejects.jsonl").exists() else {}
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


# ---- predictions ----------------------------------------------------------------------------
def predictions_of(name: str) -> dict:
    """What the author of a catalogue says before any run: name of each case -> what was done, the
    accepted rules (none: a healthy control), how its harm is measured, and the seed."""
    return {
        case: dict(told=c.told, accepted=list(c.accepted), harm=HARM, seed=SEED)
        for case, c in catalogue(name).items()
    }


def sealed_file(name: str) -> Path:
    return HERE / f"{name}.predictions.json"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(name: str):
    "Write the predictions of a catalogue and their hash, which are committed before the first run."
    text = json.dumps(predictions_of(name), indent=1, sort_keys=True) + "\n"
    sealed_file(name).write_text(text)
    sealed_file(name).with_suffix(".sha256").write_text(digest(sealed_file(name)) + "\n")
    print(f"{digest(sealed_file(name))}  {sealed_file(name).name}")


def predictions(name: str) -> dict:
    "The sealed predictions of a catalogue; AssertionError when they are not those of the hash."
    file = sealed_file(name)
    assert file.exists(), f"{name}: `bench.py seal {name}` comes before the first run"
    kept = file.with_suffix(".sha256").read_text().strip()
    assert digest(file) == kept, f"{file.name} was changed after it was sealed"
    return json.loads(file.read_text())


def run(name: str, cases=(), processes=2):
    "Train cases of a catalogue (all when none is named) and store what they left behind."
    sealed = predictions(name)
    chosen = list(cases) or list(sealed)
    importlib.import_module("fgclip_nb.training.loop")  # once, before the processes part
    with ProcessPoolExecutor(processes) as pool:
        jobs = [(name, case, sealed[case]["seed"]) for case in chosen]
        for _, files, case in pool.map(run_one, jobs):
            runs = load(name)
            runs[case] = files
            save(name, runs)
            print(case, files.get("error.txt", ""), flush=True)


# ---- judging --------------------------------------------------------------------------------
def judged(files: dict) -> list:
    "The verdicts of a packed run."
    from fgclip_nb.diagnostics.judgement import verdicts

    with tempfile.TemporaryDirectory() as folder:
        return verdicts(unpack(files, Path(folder) / "run"))


def first_line(verdicts: list) -> tuple:
    "(rule that leads, the sentence) of verdicts; the name is empty when nothing failed."
    from fgclip_nb.diagnostics.judgement import headline, leading

    first = leading(verdicts)
    return (first.name if first else ""), headline(verdicts)


def harm(files: dict) -> float:
    "Held-out mean rank over its chance at the last validation; nan when there was none."
    rows = [json.loads(line) for line in files.get("metrics.jsonl", "").splitlines()]
    rows = [r for r in rows if "val_mean_rank" in r]
    return rows[-1]["val_mean_rank"] / rows[-1]["val_mean_rank_chance"] if rows else float("nan")


def outcomes(name: str) -> list:
    """A dict per packed run, faults first: case, told, accepted, leads (the rule), line, right,
    harm, harmful (a fifth worse than the healthy run, or not measured)."""
    runs, sealed = load(name), predictions(name)
    healthy = harm(runs["healthy"]) if "healthy" in runs else float("nan")
    table = []
    for case in sorted(sealed, key=lambda c: not sealed[c]["accepted"]):
        if case not in runs:
            continue
        accepted = sealed[case]["accepted"]
        leads, line = first_line(judged(runs[case]))
        measured = harm(runs[case])
        table.append(
            dict(
                case=case,
                told=sealed[case]["told"],
                accepted=accepted,
                leads=leads,
                line=line,
                right=leads in accepted if accepted else leads == "",
                harm=measured,
                harmful=not measured < 1.2 * healthy,
            )
        )
    return table


def judge(name: str):
    "Print a line per packed run, and how many were right."
    table = outcomes(name)
    for row in table:
        mark = "ok" if row["right"] else "NO"
        print(f"{mark:3} {row['case']:20} {row['harm']:.2f} {row['line'][:230]}")
    faults = [r for r in table if r["accepted"]]
    controls = [r for r in table if not r["accepted"]]
    alarms = sum(not r["right"] for r in controls)
    print(
        f"{sum(r['right'] for r in faults)} of {len(faults)} faults named "
        f"({sum(r['right'] for r in faults if r['harmful'])} of "
        f"{sum(r['harmful'] for r in faults)} harmful ones), "
        f"{alarms} false alarms in {len(controls)} controls"
    )


COMMANDS = dict(seal=seal, run=run, judge=judge)

if __name__ == "__main__":
    command, catalogue_name, *names = sys.argv[1:]
    COMMANDS[command](catalogue_name, *([names] if names else []))
