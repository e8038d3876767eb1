"""Pictures as a newcomer meets them: letters that can be read on a telephone, legends beside the
lines and not over them, sentences where there is nothing to see, TensorBoard open on the losses."""

import json, re

import numpy as np
import pytest

from fgclip_nb.core.folder import Run
from fgclip_nb.diagnostics.board import board_tag
from fgclip_nb.diagnostics.judgement import run_evidence
from fgclip_nb.diagnostics.logs import column_of
from fgclip_nb.diagnostics.plots import PLOTS
from fgclip_nb.diagnostics.report import report_html
from synthetic_runs import synthetic_run

TELEPHONE, EIGHT_POINTS = 420, 8 * 96 / 72  # both in pixels


@pytest.fixture(scope="module")
def ev(tmp_path_factory):
    """A run with everything that can be drawn: validation, bank with ages, gradients, times."""
    folder = tmp_path_factory.mktemp("run")
    run = synthetic_run(folder / "run", steps=300, bank=128, params=dict(max_grad_norm=1.0))
    ev = run_evidence(run)
    step = ev.frame.step
    seen = step % 50 == 0
    more = dict(val_loss_global=2 + step / 100, val_loss_region=1 + step / 90, val_r10=0.4)
    more |= dict(val_r10_chance=0.2, val_r10_chance_high=0.3)
    ev.frame = ev.frame.copy().assign(
        **{k: np.where(seen, v, np.nan) for k, v in more.items()},
        loss_region=14 * np.exp(-step / 40) + 0.05,
        bank_age_mean=ev.frame.bank_len / 24,
        bank_age_max=ev.frame.bank_len / 12,
    )
    return ev


@pytest.fixture(params=PLOTS)
def drawn(ev, request):
    "Each picture of that run in turn, laid out."
    figure = PLOTS[request.param](ev)
    figure.draw_without_rendering()
    return figure


def letters(figure):
    "Every text of a figure that is seen, with its height in pixels on a telephone."
    from matplotlib.text import Text

    pixels_per_point = TELEPHONE / figure.get_figwidth() / 72
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_fontsize() * pixels_per_point) for t in shown]


def test_letters_can_be_read_on_a_telephone(drawn):
    small = [(text, round(size, 1)) for text, size in letters(drawn) if size < EIGHT_POINTS]
    assert not small


def test_no_legend_covers_a_line_and_nothing_leaves_the_figure(drawn):
    for ax in drawn.axes:
        legend = ax.get_legend()
        if not legend:
            continue
        box, frame = legend.get_window_extent(), ax.get_window_extent()
        assert box.y0 >= frame.y1 - 1 and box.x0 >= 0 and box.x1 <= drawn.bbox.x1 + 1
        title = ax._left_title.get_window_extent()
        assert title.y0 >= box.y1 - 2, "the title stands above the legend"


def test_a_legend_names_all_lines_of_the_frame_and_no_others(drawn):
    for ax in drawn.axes:
        legend = ax.get_legend()
        named = [text.get_text() for text in legend.get_texts()] if legend else []
        frame = ax.get_window_extent()
        for line in ax.lines:
            y = line.get_transform().transform(line.get_xydata())[:, 1]
            inside = np.nanmax(y) >= frame.y0 - 1 and np.nanmin(y) <= frame.y1 + 1
            if legend and not line.get_label().startswith("_"):
                assert (line.get_label() in named) == inside, (
                    drawn.get_suptitle(),
                    line.get_label(),
                )


def test_right_pairs_are_drawn_at_the_steps_of_all_pairs(ev):
    ax = PLOTS["similarities"](ev).axes[1]
    lines = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert lines["right pairs, mean"] == lines["median"] and "bank on" in lines


def test_the_bank_is_marked_where_it_plays_a_part(ev):
    titles = {
        ax.get_title("left"): "bank on" in [line.get_label() for line in ax.lines]
        for ax in PLOTS["losses"](ev).axes
    }
    assert not any(on for title, on in titles.items() if title.startswith(("global", "hard")))
    assert any(on for title, on in titles.items() if title.startswith("region"))


def test_the_end_of_a_loss_can_be_seen(ev):
    figure = PLOTS["losses"](ev)
    ax = next(ax for ax in figure.axes if ax.get_title("left").startswith("region"))
    figure.draw_without_rendering()
    where = [
        ax.transAxes.inverted().transform(ax.transData.transform((1, v)))[1] for v in (0.05, 0.1)
    ]
    assert where[1] - where[0] > 0.05, "half the loss at the end is a visible step"
    shares = figure.axes[0]
    assert shares.get_ylabel() == "loss / chance" and shares.get_yscale() == "log"


def test_what_never_changes_is_a_sentence(tmp_path):
    run = synthetic_run(tmp_path / "run", steps=60, bank=8)
    ev = run_evidence(run)
    held = np.where(ev.frame.step < 50, 0.0, 8.0)
    ev.frame = ev.frame.assign(bank_len=held, bank_age_mean=0.0, bank_age_max=0.0, logit_scale=4.6)
    ev.frame = ev.frame.drop(columns=[c for c in ev.frame if c.startswith("logit_scale_")])
    bank = PLOTS["bank"](ev)
    assert not bank.axes and "from step 50 on" in bank.sentences[0]
    assert "No region had norm zero" in PLOTS["norms"](ev).sentences[0]
    assert "at all steps" in PLOTS["temperatures"](ev).sentences[0]
    assert "Nothing was validated" in PLOTS["validation"](ev).sentences[0]


def test_tensorboard_opens_the_losses_and_reads_back_what_was_written():
    columns = ("loss", "loss_region", "val_r10", "bank_ptr", "lr", "grad_norm/vision")
    groups = sorted({board_tag(c).partition("/")[0] for c in columns} | {"watch_plots"})
    assert groups[:2] == ["train", "val"], "it opens the first two groups and folds the rest"
    assert [column_of(board_tag(c)) for c in columns] == list(columns)


def test_backticks_of_a_reason_are_code_in_the_report(tmp_path):
    run = synthetic_run(tmp_path / "run", steps=60, bank=128, dead="text")
    rows = [dict(name="total steps", value=60, explanation="by `max_steps` <b>")]
    (run.path / "expectations.json").write_text(json.dumps(rows))
    page = report_html(run)
    assert "by <code>max_steps</code> &lt;b&gt;" in page and not re.search(
        r"<(?:p|td)[^>]*>[^<]*`\w+`", page
    )


@pytest.mark.ci
def test_a_trained_run_shows_photos_mistakes_and_a_heat_map(tmp_path):
    from fgclip_nb.core.config import TrainConfig
    from fgclip_nb.training.loop import train

    small = dict(max_steps=2, batch_size=4, tracker="none", device="cpu", eval_every=0)
    run = train(TrainConfig(**small, output=str(tmp_path / "run")))
    titles = json.loads((run.path / "pictures/pictures.json").read_text())
    assert set(titles) == {"samples.jpg", "mistakes.jpg", "heat_map.jpg"}
    page = (run.path / "report.html").read_text()
    assert page.count("data:image/jpeg") == 3 and isinstance(run, Run) and len(page) < 1_200_000
