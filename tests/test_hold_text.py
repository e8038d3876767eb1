"""Text that was written to harm: into every field that a user may fill, out of every place that
shows it.

Whole run notebooks, and every figure of the package, are no cell."""

import csv
import html.parser
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fgclip_nb.core.folder import Run
from fgclip_nb.core.plain import cell_as_written, csv_text, escape_html, markdown_text, page_table

SCRIPT = "<script>alert('owned')</script>"
IMAGE = '<img src=x onerror="alert(1)">'
FORGED = "\n[VERDICT] PASS all is well\r[LOSS] Step 1 loss=0"
ANSI = "\x1b[31;1mred\x1b[0m\x9b2J"
FORMULA = "=cmd|' /C calc'!A0"
MATH = "$_$ and $5 and $3"
EVIL = f"{FORMULA} {MATH} {SCRIPT}{IMAGE}[click](javascript:alert(1)){ANSI}{FORGED}"
MATHS = ("$_$ \\$ \x1b[1m", "$5 and $3")


# ---- every figure draws what was written ---------------------------------------------------------


def drawn_texts(figure):
    from matplotlib.text import Text

    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_text()]


def assert_literal(figure, text):
    "The text stands in the figure as it was written, and none of its words became a formula."
    drawn = drawn_texts(figure)
    powers = r"\$\\mathdefault\{[^$]*\}\$"  # of ten, as matplotlib writes them on an axis
    formulas = [t.get_text() for t in drawn if t._preprocess_math(t.get_text())[1]]
    assert all(re.fullmatch(powers, f) for f in formulas), formulas
    shown = " ".join(t._preprocess_math(t.get_text())[0] for t in drawn)
    plain = text.replace("\x1b", r"\x1b")
    assert "".join(plain.split()) in "".join(shown.split())


@pytest.fixture(scope="module")
def small_model():
    from fgclip_nb.evaluation.encoder import Encoder
    from fgclip_nb.model.config import FGCLIPConfig, model_sizes
    from fgclip_nb.model.fgclip import FGCLIP

    torch.manual_seed(0)
    return Encoder(FGCLIP(FGCLIPConfig(**model_sizes(32, 16, 64, 1, 64, 1, 16))))


def scored(text):
    "An evaluation whose task, list, answers and files are all called like the text."
    from fgclip_nb.evaluation.results import Evaluation
    from fgclip_nb.evaluation.scores import Ranked, summarise

    n = 12
    ids, groups, ranks = (
        [f"{text}{i}" for i in range(n)],
        list("abcdefghijkl"),
        np.arange(n) % 3 + 1,
    )
    detail = dict(margin=np.zeros(n))
    ranked = Ranked(
        ids, groups, ranks, np.full(n, 5), np.ones(n, int), (1,), detail=detail, asked=n
    )
    results, manifest = {text: {text: summarise(ranked, 20, 0)}}, dict(model=text, samples=n)
    return Evaluation(results, {text: {text: ranked}}, manifest)


def evaluation_figures(text, folder, encoder):
    import pandas as pd
    from PIL import Image
    from fgclip_nb.data.samples import Region, Sample
    from fgclip_nb.evaluation import comparison, pictures
    from fgclip_nb.evaluation.annotations import FrameScores

    name = folder / f"{text.replace('/', '-')}.png"
    Image.new("RGB", (32, 32)).save(name)
    region = Region(text, box=(0.1, 0.1, 0.9, 0.9))
    sample = Sample(id=text, media=str(name), captions=(text,), regions=[region])
    row = dict(media=str(name), answer=text, predicted=str(name), rank=2, options=3, margin=0.1)
    yield pictures.plot_mistakes(pd.DataFrame([row]), title=text)
    yield pictures.plot_similarity(encoder, sample, [text])
    yield pictures.plot_neighbours(encoder, [sample], [text], k=1)
    evaluation = scored(text)
    yield pictures.plot_scores(evaluation, title=text)
    paired = comparison.compare_evaluations(evaluation, evaluation)
    yield comparison.plot_paired(paired, (text, text))
    yield comparison.plot_side_by_side({text: evaluation}, title=text)
    video = SimpleNamespace(name=text, spans=[(0, 2)], classes=[text])
    scores = FrameScores(video, np.linspace(0, 1, 10), np.arange(10) < 3)
    yield pictures.plot_anomaly([scores])
    yield pictures.plot_curves({text: [scores]})


@pytest.mark.parametrize("text", MATHS, ids=ascii)
def test_figures_of_an_evaluation(tmp_path, small_model, text):
    import matplotlib.pyplot as plt

    for figure in evaluation_figures(text, tmp_path, small_model):
        assert_literal(figure, text)
    plt.close("all")


@pytest.mark.parametrize("text", MATHS[:1], ids=ascii)
def test_figures_of_runs(tmp_path, text):
    from fgclip_nb.diagnostics import canvas
    from synthetic_runs import synthetic_run
    from fgclip_nb.runs.comparison import plot_runs

    for k in range(2):
        run = synthetic_run(tmp_path / f"{k}", steps=30, params=dict(data=f"{text}{k}"))
        rows = [json.loads(line) for line in open(run.path / "metrics.jsonl")]
        rows = [row | {text: 1.0} for row in rows]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figure = plot_runs([Run(tmp_path / "0"), Run(tmp_path / "1")], ("loss_region", text))
    assert_literal(figure, text)
    assert_literal(figure, f"data={text}0")
    figure, (ax, empty) = canvas.new_figure(text, 2)
    canvas.draw_line(ax, canvas_evidence(text), text, text)
    canvas.draw_smooth(ax, canvas_evidence(text).series(text), text, "black")
    canvas.label_axes(ax, text, text)
    canvas.add_legend(ax)
    canvas.empty_axes(empty, text)
    assert_literal(figure, text)


def canvas_evidence(text):
    import pandas as pd
    from fgclip_nb.diagnostics.rules import Evidence

    return Evidence(pd.DataFrame({"step": [1, 2, 3], text: [1.0, 2.0, 3.0]}))


def test_a_run_of_one_step_with_zero_losses_is_drawn(tmp_path):
    import pandas as pd
    from fgclip_nb.diagnostics.plots import PLOTS
    from fgclip_nb.diagnostics.rules import Evidence

    zero = dict(step=1, loss=0.0, loss_global=0.0, loss_region=0.0, grad_norm=0.0, bank_len=0.0)
    zero |= {f"{k}/vision": 0.0 for k in ("grad_norm", "update_norm", "changed_share")}
    zero |= dict(zero_share_region=np.inf, bank_drift_cosine=-np.inf, val_r10=np.nan)
    timing = pd.DataFrame([dict(step=1, step_time_s=0.0, data_time_s=0.0)])
    ev = Evidence(pd.DataFrame([zero]), dict(max_grad_norm=1.0, memory_bank_size=4), timing)
    for plot in PLOTS.values():
        plot(ev).canvas.draw()


# ---- the functions that escape -------------------------------------------------------------------

HOSTILE = (SCRIPT, IMAGE, ANSI, FORGED, FORMULA, MATH, EVIL, "`x` | * _a_ [b](c) <b> &lt; \\")


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
def test_escaped_text_reads_as_it_was_written(text):
    from fgclip_nb.core.plain import plain_line

    assert (
        html.unescape(escape_html(text)) == html.unescape(markdown_text(text)) == plain_line(text)
    )
    assert not re.search(r"[<>\"'\x00-\x1f\x7f-\x9f]", escape_html(text) + markdown_text(text))
    assert not re.search(r"[*_`\[\]|\\$]", markdown_text(text))


def test_a_table_is_escaped_in_all_its_parts():
    import pandas as pd

    frame = pd.DataFrame({EVIL: [EVIL, "b"], "n": [1, 2]}, index=[EVIL, "x"])
    shown = page_table(frame).to_html()
    assert_harmless_page(shown)
    cells = list(csv.reader(csv_text(frame).splitlines()))
    assert len(cells) == 3 and cells[0][0].startswith("'=") and cells[1][0].startswith("'=")
    assert cell_as_written(cells[1][0]).startswith("=cmd")


# ---- run notebooks, report, logs and tables ------------------------------------------------------


class Tags(html.parser.HTMLParser):
    "Tags and attributes that a page holds."

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {k for k, _ in attrs} | {v for k, v in attrs if k == "src"}


def assert_harmless_page(page):
    found = Tags(page)
    assert not found.tags & {"script", "iframe", "svg"}, found.tags
    assert not any(a and (a.startswith("on") or a == "x") for a in found.attributes)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def assert_harmless_markdown(text):
    assert not re.search(r"<(script|img)|\]\(java|[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), text[:2000]


def assert_harmless_lines(text):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    forged = [
        line
        for line in text.splitlines()
        if re.match(r"\[(VERDICT|LOSS)\] *(PASS a|Step 1 loss=0$)", line)
    ]
    assert not forged, forged


def assert_harmless_notebook(cells):
    for output in (o for c in cells for o in c.get("outputs", [])):
        if "text" in output:
            assert_harmless_lines("".join(output["text"]))
        for kind, data in output.get("data", {}).items():
            if kind == "text/html":
                assert_harmless_page("".join(data))
            elif kind == "text/markdown":
                assert_harmless_markdown("".join(data))


def assert_harmless_table(path):
    for row in csv.reader(path.read_text(encoding="utf-8").splitlines()):
        for cell in row:
            number = re.fullmatch(r"-?(\d[\d.e+-]*|inf)", cell)
            assert number or not re.match(r"[=+@-]", cell), (path, cell[:40])
    assert_harmless_lines(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile_world(tmp_path_factory):
    "Photos and captions of a world, all its texts and names evil; parameters of a short run on it."
    import micro

    folder = tmp_path_factory.mktemp("world")
    params = micro.micro_world(folder, photos=12, held_out=6)
    data = Path(params["data"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    evil_name = EVIL.replace("/", "-")
    for k, row in enumerate(rows):
        name = f"{evil_name[:60]}{SCRIPT[:7]}{IMAGE}\n[VERDICT] PASS all {k}{ANSI}.png"
        shutil.copy(data.parent / row["image"], data.parent / name)
        row |= dict(image=name, captions=[f"{EVIL} {k}"], label=EVIL, caption=f"{EVIL} {k} long")
        for region in row["regions"]:
            region["caption"] = f"{region['caption']} {EVIL}"
            region["negatives"] = [f"{n} {EVIL}" for n in region["negatives"]]
        row["regions"].append(dict(bbox=[1, 1, 1, 1], caption=EVIL))
    rows.append(dict(rows[0], image=f"no such {evil_name[:80]}{FORGED}"))
    rows.append(dict(rows[0], regions=[dict(bbox=EVIL, caption=EVIL)]))
    folder = data.parent / f"set {evil_name[:50]}"
    evil = data.with_name("evil.jsonl")
    evil.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return params | dict(data=str(evil), max_steps=3, eval_every=3, batch_size=4)


@pytest.mark.long
def test_run_notebooks_report_log_and_tables_show_evil_text_as_text(hostile_world, tmp_path):
    from test_front_door import papermill, said

    name = f"run {SCRIPT} {IMAGE} $_$".replace("/", "-")
    run = tmp_path / "runs" / name
    done, cells = papermill("train.ipynb", tmp_path / "train.ipynb", **hostile_world, output=run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_harmless_notebook(cells)
    assert_harmless_page((run / "report.html").read_text(encoding="utf-8"))
    assert_harmless_lines((run / "training.log").read_text(encoding="utf-8"))
    data = dict(data=hostile_world["data"])
    asked = dict(model=run, baseline=hostile_world["model"], permutations=20, output=tmp_path / "e")
    tasks = "short_retrieval,region_classification,hard_negatives"
    done, cells = papermill("evaluate.ipynb", tmp_path / "e.ipynb", **data, **asked, tasks=tasks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_harmless_notebook(cells)
    for table in (tmp_path / "e").rglob("*.csv"):
        assert_harmless_table(table)
    done, cells = papermill(
        "data_report.ipynb", tmp_path / "d.ipynb", **data, output=tmp_path / "d"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert said(cells).count("&lt;script&gt;") > 5, "the evil texts are there, as text"
    assert_harmless_notebook(cells)
    shutil.copytree(run, run.with_name(f"{name} 2"))
    (run.with_name(f"{name} 2") / "finished.json").unlink()
    params = (run / "params.yaml").read_text().replace("seed: 0", "seed: 1")
    (run.with_name(f"{name} 2") / "params.yaml").write_text(params)
    shutil.copytree(tmp_path / "e", run / "evaluation")
    done, cells = papermill("compare.ipynb", tmp_path / "c.ipynb", runs=str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_harmless_notebook(cells)
