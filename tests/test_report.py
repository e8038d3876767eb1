"""The report as a browser shows it: only a real one tells whether the first screen holds the cause
and nothing spills over."""

import re, shutil, subprocess
import pytest
from fgclip_nb import diagnostics as dx
from fgclip_nb.diagnostics import plots
from synthetic_runs import synthetic_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = synthetic_run(
        tmp_path_factory.mktemp("report") / "broken", steps=60, bank=128, dead="text"
    )
    dx.conclude(run, figures=False)
    return run.path / "report.html"


def test_it_needs_nothing_from_outside(page):
    text = page.read_text()
    assert (
        not re.findall(r'(?:src|href)="(?!data:)', text)
        and "<script" not in text
        and "@import" not in text
    )
    assert (
        text.count("<img") == sum(bool(plot(page.parent).axes) for plot in plots.PLOTS.values())
        and "prefers-color-scheme" in text
        and len(text) < 800_000
    )


def test_the_cause_stands_before_everything_else(page):
    text = page.read_text()
    assert text.index("never updated although it has a gradient") < text.index("<h2>")


def test_equal_runs_give_equal_reports(page, tmp_path):
    run = synthetic_run(tmp_path / "broken", steps=60, bank=128, dead="text")
    assert dx.report_html(run) == page.read_text()


def shown(page, width, height, probe):
    "What a headless browser makes of the page: what the script `probe` leaves in the title."
    scripted = page.with_name(f"probe{width}.html")
    scripted.write_text(
        page.read_text().replace("</body>", f"<script>document.title = {probe}</script></body>")
    )
    r = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},{height}",
            "--dump-dom",
            scripted.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return re.search(r"<title>(.*?)</title>", r.stdout)[1]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width,height", [(1280, 800), (500, 900)])
def test_the_first_screen_holds_the_cause_and_nothing_spills(page, width, height):
    probe = (
        "[document.documentElement.scrollWidth <= innerWidth, "
        "document.querySelector('.cause').getBoundingClientRect().bottom < innerHeight].join()"
    )
    assert shown(page, width, height, probe) == "true,true"
