"""One run, one answer: the folder, its log, its events and its metrics. Whole runs, which a cell
cannot show."""

import contextlib, importlib, io, json, logging, shutil, sys
from pathlib import Path
import pytest
from fgclip_nb import diagnostics as dx
from fgclip_nb.diagnostics import judgement, report
from fgclip_nb.diagnostics.board import Board
from fgclip_nb.diagnostics.recorder import loss_line

sys.path.insert(0, str(Path(__file__).parent / "faultbench"))
bench = importlib.import_module("bench")
PARTS = ("metrics.jsonl", "training.log", "tensorboard")
CHOSEN = ("some_nan", "healthy", "finetuned")
MORE = ("bank_stale", "few_photos", "scale_1", "scale_1000", "grey", "sigmoid", "captions_only")
LATER = [pytest.param(case, marks=pytest.mark.ci) for case in MORE]
RUNS = bench.load("outside")


def with_parts(files: dict, folder: Path) -> Path:
    "A packed run with the log and the events that its rows make."
    run = bench.unpack(files, folder)
    rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    lines = [f"run folder {run}", "expected: samples = 240 (training samples after the filters)"]
    board = Board(run / "tensorboard")
    for row in rows:
        numbers = {k: float(v) if k != "nonfinite" else v for k, v in row.items()}
        board.scalars(numbers | dict(step=row["step"]))
        if row["step"] % 20 == 0 or row["step"] == 1:
            lines.append(loss_line(numbers | dict(step=row["step"])))
    board.close()
    (run / "training.log").write_text("\n".join(lines))
    return run


@pytest.mark.parametrize("case", [*CHOSEN, *LATER])
def test_the_parts_of_a_packed_run(case, tmp_path):
    run = with_parts(RUNS[case], tmp_path / "run")
    whole = dx.verdicts(run)
    first, leads = dx.headline(whole), judgement.leading(whole)
    assert report.cause_facts(whole)["name"].replace(" ", "_") == (
        leads.name if leads else first.replace(" ", "_")
    )
    for part in PARTS:
        assert dx.headline(dx.verdicts(run / part)) == first
    event = next((run / "tensorboard").iterdir())
    assert dx.headline(dx.verdicts(event)) == first
    for part in PARTS:
        elsewhere = tmp_path / "elsewhere" / part
        elsewhere.parent.mkdir(exist_ok=True)
        shutil.move(run / part, elsewhere)
        judged = dx.verdicts(elsewhere)
        assert dx.headline(judged).startswith("read were the run's"), part
        found = judgement.leading(judged)
        if leads is None:
            assert found is None, (part, found)


@pytest.mark.ci
def test_the_parts_of_a_fresh_run(tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train

    logging.getLogger("fgclip_nb").setLevel(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        run = train(
            TrainConfig(
                model="tiny",
                data="world:size=60",
                max_steps=12,
                batch_size=8,
                device="cpu",
                output=str(tmp_path / "run"),
                tracker="tensorboard",
                logit_scale_init=0.0,
            )
        )
    first = dx.headline(dx.verdicts(run))
    assert not first.startswith("read were")
    for part in PARTS:
        assert dx.headline(dx.verdicts(run.path / part)) == first
    for part in PARTS:
        copied = tmp_path / f"copied-{part}"
        copy = shutil.copytree if (run.path / part).is_dir() else shutil.copy
        copy(run.path / part, copied)
        assert dx.headline(dx.verdicts(copied)).startswith("read were the run's"), part
