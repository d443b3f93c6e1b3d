"""A comparison's report: pictures' data against numbers worked out by hand, files, and the page in a browser."""

import html
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from comparisons import NAMES, HandMade, write_comparison
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console

from tune_hypergrad.budget import UNITS
from tune_hypergrad.comparison.ledger import RETRAINING, Account
from tune_hypergrad.comparison.telling import pictures, tables
from tune_hypergrad.comparison.telling.drawing import COST_LABELS, NARROW, Look
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.comparison.telling.report import all_pictures, inline_svg, summary_table, summary_text, write_report
from tune_hypergrad.comparison.telling.series import Granted, curves, distinct_units, spending_parts
from tune_hypergrad.schedules import Schedule

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FDS, FDS1, RS = Account("fds", 0), Account("fds", 1), Account("rs", 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A finished comparison with its report."""
    comparison = write_comparison(tmp_path_factory.mktemp("written"))
    write_report(comparison)
    return comparison


def two_seeds(folder):
    """fds with seed 0 finds 0.8 at 100 and 0.4 at 300, with seed 1 finds 0.6 at 200; rs finds nothing finite."""
    made = HandMade(folder, ["fds", "rs"], [0, 1], budget=[400, "gradients"]).start(FDS).start(FDS1).start(RS)
    made.result(FDS, 0.8, 100, 1).result(FDS, 0.4, 300, 2).result(FDS1, 0.6, 200, 1).result(RS, float("nan"), 250)
    return made.result(FDS1, 0.7, 450, 2).comparison


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def headings_of(text):
    """Those of the table of results in Markdown."""
    return cells_of(next(line for line in text.splitlines() if line.startswith("| method")))


def line_of(figure, method):
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == method]
    return [list(map(float, data)) for data in (line.get_xdata(), line.get_ydata())]


def test_a_curve_is_the_mean_of_the_seeds_steps_from_where_all_have_begun(tmp_path):
    comparison = two_seeds(tmp_path)
    (curve,) = curves(comparison.history, "val_loss", "gradients", comparison.accounts)
    assert list(curve.cost) == [200, 300, 450] and curve.seeds == 2
    assert list(curve.mean) == pytest.approx([0.7, 0.5, 0.5])
    assert list(curve.low) == pytest.approx([0.6, 0.4, 0.4]) and list(curve.high) == pytest.approx([0.8, 0.6, 0.6])


def test_the_picture_of_validation_losses_has_these_steps(tmp_path):
    comparison = two_seeds(tmp_path)
    figure = pictures.validation(comparison, "gradients")
    assert line_of(figure, "fds") == [[200, 300, 450], pytest.approx([0.7, 0.5, 0.5])]
    assert figure.axes[0].lines[0].get_drawstyle() == "steps-post"
    budget = [line for line in figure.axes[0].lines if line.get_label() != "fds"]
    assert [list(line.get_xdata()) for line in budget] == [[400, 400]]
    assert line_of(pictures.validation(comparison, "device_seconds"), "fds")[0] == [4, 6, 9]


def test_the_picture_of_regret_has_what_retraining_found(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"], retraining={"seeds": 1, "shares": [0.5, 1.0]})
    made.start(FDS).result(FDS, 0.5, 5000).start(RS).result(RS, 0.5, 4000)
    made.retraining("fds", 0, 0.5, 1000, 0, test_accuracy=0.80).retraining("fds", 0, 1.0, 4000, 1, test_accuracy=0.90)
    comparison = made.retraining("rs", 0, 1.0, 3000, 2, test_accuracy=0.85).comparison
    figure = pictures.regret(comparison, "gradients")
    assert line_of(figure, "fds") == [[1000, 4000, 5000], pytest.approx([10, 0, 0])]
    assert line_of(figure, "rs") == [[3000, 4000], pytest.approx([5, 5])]
    assert "90.00 %" in figure.axes[0].get_title(loc="left")
    assert figure.axes[0].get_ylabel() == "regret in test accuracy (points)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fds", "rs"]


def test_a_method_of_which_a_seed_found_nothing_says_so(tmp_path):
    made = HandMade(tmp_path, seeds=[0, 1]).start(FDS).result(FDS, 0.5, 10)
    figure = pictures.validation(made.comparison)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fds (1 of 2 seeds)"]


def test_a_diverged_first_incumbent_does_not_hide_the_differences_at_the_end(tmp_path):
    made = HandMade(tmp_path).start(FDS).result(FDS, 1e12, 10, 1).result(FDS, 0.5, 20, 2).result(FDS, 0.4, 30, 3)
    assert pictures.validation(made.comparison).axes[0].get_ylim()[1] < 100


def test_units_in_proportion_are_shown_once(tmp_path):
    assert distinct_units(two_seeds(tmp_path / "a")) == ["gradients"]
    made = HandMade(tmp_path / "b", ["fds", "rs"], budget=[100, "device_seconds"]).start(FDS).start(RS)
    made.result(FDS, 0.5, 100, **{"cost/steps": 10}).result(RS, 0.5, 100, **{"cost/steps": 90})
    assert distinct_units(made.comparison) == ["device_seconds", "steps"]
    assert distinct_units(HandMade(tmp_path / "c").comparison) == ["gradients"]


def test_spending_is_split_into_parts_that_add_up(tmp_path):
    made = HandMade(tmp_path, seeds=[0, 1], budget=[400, "gradients"]).start(FDS, 0).start(FDS, 1)
    parts = {"cost/hypergradients": 30, "cost/evaluations": 10}
    made.result(FDS, 0.5, 100, 1, **parts).result(FDS, 0.5, 160, 2, **parts).result(FDS, 0.5, 120, 2, **parts)
    made.result(FDS, 0.5, 60, number=1).end(FDS, "failed", number=1, error="no memory")
    row = spending_parts(made.comparison).loc["fds"]  # means over two seeds, of which one did nothing
    assert row.to_dict() == pytest.approx(
        {"training": 40, "hypergradients": 15, "validation": 5, "in failed trials": 30, "lost": 30}
    )
    figure = pictures.spending(made.comparison)
    ends = sorted({round(bar.get_x() + bar.get_width(), 6) for bar in figure.axes[0].patches})
    assert ends == [40, 55, 60, 90, 120]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["fds\n22 % + 8 %"]


def test_spending_parts_are_the_accounts_sums(written):
    parts = spending_parts(written)
    spent = written.accounts.groupby("method", sort=False)["spent/gradients"].mean()
    assert parts.drop(columns="lost").sum(axis=1).tolist() == pytest.approx(spent.tolist())
    assert (parts.to_numpy() >= 0).all() and parts.loc["hd", "in failed trials"] > 0


def test_use_of_the_cluster_is_what_trials_were_granted(tmp_path):
    machine = {"nodes": 1, "CPU": 4, "GPU": 0}
    made = HandMade(tmp_path, ["fds", "rs"], machine=machine, budget=[100, "gradients"])
    made.start(FDS, at=0, resources={"CPU": 2}).start(RS, at=0).result(RS, 0.5, 100, at=10)
    made.end(RS, "budget", at=10).stop(RS).result(FDS, 0.5, 50, at=20).resume(["id-fds-0-0", "id-rs-0-0"], at=1020)
    made.start(FDS, at=1020, resources={"CPU": 2}).result(FDS, 0.4, 100, 2, at=1030).end(FDS, at=1030)
    made.start(Account(RETRAINING, 0), at=1030).end(Account(RETRAINING, 0), at=1040)
    granted = Granted.of(made.comparison)
    assert granted.kind == "CPU" and list(granted.gaps) == [20]

    def share(method, when):
        return granted.shares[method][np.searchsorted(granted.times, when, side="right") - 1]

    assert [share("fds", t) for t in (5, 15, 25, 35)] == [0.5, 0.5, 0.5, 0]
    assert [share("rs", t) for t in (5, 15)] == [0.25, 0] and share(RETRAINING, 35) == 0.25
    assert granted.times[-1] == 40 and granted.first_finished is None  # rs has not said again that it is finished
    assert granted.mean == pytest.approx((10 * 0.75 + 20 * 0.5 + 10 * 0.25) / 40)
    after = Granted.of(made.stop(RS).stop(FDS).comparison)
    assert after.first_finished == 10 and after.mean == pytest.approx(0.75)
    assert "75 % of the CPUs" in after.text


def test_thinning_use_of_the_cluster_keeps_its_sum(written):
    granted = Granted.of(written)
    times, shares = granted.thinned(50)
    assert len(times) == 51
    for method, values in granted.shares.items():
        total = (values * np.diff(granted.times)).sum()
        assert (shares[method] * np.diff(times)).sum() == pytest.approx(total)
        assert values.max() <= 1 + 1e-9


def test_gpus_are_shown_where_trials_had_any(tmp_path):
    made = HandMade(tmp_path, machine={"CPU": 8, "GPU": 2}).start(FDS, resources={"CPU": 1, "GPU": 0.5}).end(FDS)
    granted = Granted.of(made.comparison)
    assert granted.kind == "GPU" and granted.mean == 0.25


def test_schedules_are_side_by_side(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"]).start(FDS).start(RS)
    made.result(FDS, 0.5, 10, **{"schedule/lr": float("nan"), "schedule/lr/0": 0.1, "schedule/lr/1": 0.2})
    made.result(RS, 0.5, 10, **{"schedule/lr": 0.3, "schedule/momentum": 0.9})
    figure = pictures.schedules(made.comparison)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["lr", "momentum"]
    first, second = (patch.get_data() for patch in figure.axes[0].patches)
    assert list(first.values) == [0.1, 0.2] and list(first.edges) == [0, 0.5, 1] and list(second.values) == [0.3]
    assert len(figure.axes[1].patches) == 1


def test_many_hyperparameters_are_cut_and_that_is_said(tmp_path):
    made = HandMade(tmp_path, space={}).start(FDS).result(FDS, 0.5, 10, **{f"schedule/h{i}": 0.1 for i in range(40)})
    figure = pictures.schedules(made.comparison)
    assert len(figure.axes) == 24 and "17 more" in figure.get_supxlabel()  # of 41, with lr


def test_methods_keep_their_colours(written):
    look = Look(NAMES)
    assert len({look.color(name) for name in NAMES}) == 12 and look.color("other") not in map(look.color, NAMES)
    figure = pictures.regret(written)
    colors = {line.get_label(): to_hex(line.get_color()) for line in figure.axes[0].lines}
    look = Look(written.methods)
    assert all(colors[method] == look.color(method).lower() for method in ("fds", "hd", "stn", "rs", "bohb"))


CASES = {
    "nothing": lambda folder: HandMade(folder, ["fds", "rs"]).comparison,
    "one result": lambda folder: HandMade(folder).start(FDS).result(FDS, 0.5, 10).comparison,
    "no results": lambda folder: HandMade(folder).start(FDS).end(FDS, "failed", error="a | b\nc").comparison,
    "only lost": lambda folder: HandMade(folder).start(FDS).result(FDS, 0.5, 10).resume([]).comparison,
    "only NaN": lambda folder: HandMade(folder).start(FDS).result(FDS, float("nan"), 10).comparison,
    "no machine": lambda folder: HandMade(folder, machine={}, versions={}).start(FDS).result(FDS, 0.5, 10).comparison,
    "unfinished": lambda folder: write_comparison(folder, until=0.5),
    "twelve": lambda folder: write_comparison(folder, NAMES, [0], windows=1000),
    "one": lambda folder: write_comparison(folder, ["rs"], [7], interrupted=False),
    "untested": lambda folder: write_comparison(folder, ["fds", "bohb"], [0], tested=False, retrained=False),
    "in seconds": lambda folder: write_comparison(folder, ["fds", "rs"], [0], budget=(60, "device_seconds"), gpus=2),
    "a grid": lambda folder: write_comparison(folder, ["fds", "rs"], [0], reference="grid"),
    "beaten": lambda folder: write_comparison(folder, ["fds", "rs"], [0], reference=0.5),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_whatever_has_happened_a_report_can_be_written(case, tmp_path):
    comparison = CASES[case](tmp_path)
    if case in ("nothing", "only lost", "no results", "twelve"):  # which draws all pictures, in both widths
        assert write_report(comparison).stat().st_size < 3e6
    else:
        for found in all_pictures(comparison).values():
            for picture in found:
                for figure in (picture.draw(), picture.draw(width=NARROW)):
                    assert isinstance(figure, Figure)
                    figure.draw_without_rendering()
    Console(width=200, quiet=True).print(summary_table(comparison))


def test_an_unfinished_comparison_says_how_far_it_is(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"], budget=[100, "gradients"]).start(FDS).result(FDS, 0.5, 126)
    made.start(RS).result(RS, 0.5, 26)
    assert tables.state(made.comparison) == "unfinished: 63 % of the budgets spent"
    page = write_report(made.comparison).read_text()
    assert "Unfinished: 63 % of the budgets spent" in page
    assert "unfinished: 63 %" in (tmp_path / "summary.md").read_text()
    made.stop(FDS).stop(RS)
    assert "incumbents are being trained again" in tables.state(made.comparison)


def test_all_files_are_there(written):
    files = {str(path.relative_to(written.folder)) for path in written.folder.rglob("*") if path.is_file()}
    assert {"report.html", "summary.md", "results.csv", "fds/schedule.json", "bohb/schedule.json"} <= files
    assert "broken/schedule.json" not in files
    for name in ("regret_gradients", "regret_device_seconds", "validation", "schedules", "spending", "utilisation"):
        assert {f"pictures/{name}.png", f"pictures/{name}.svg"} <= files
    assert Schedule.load(written.folder / "fds" / "schedule.json") == written.schedule("fds")


def test_results_as_csv_have_all_rows_and_a_stable_order_of_columns(written):
    frame = pd.read_csv(written.folder / "results.csv")
    assert list(frame.columns[:4]) == ["method", "seed", "trial", "iteration"]
    assert list(frame.columns[4:]) == sorted(frame.columns[4:])
    assert len(frame) == len(written.results) and frame["time"].is_monotonic_increasing
    assert frame["val_loss"].tolist() == pytest.approx(written.results["val_loss"].tolist(), nan_ok=True)
    assert frame["lost"].sum() == written.results["lost"].sum() > 0


def test_the_summary_tells_what_came_out_and_what_failed(written):
    text = (written.folder / "summary.md").read_text()
    for words in (
        "State: finished",
        "5,100 gradient evaluations",
        "Example 7000",
        "torch 2.13.0",
        "2026-11-21 12:00 UTC",
        "OutOfMemoryError: no more memory",
        "3 trials in a row failed",
        "forgotten by an interruption",
        "loguniform(1e-06, 0.01)",
        "interrupted once",
    ):
        assert words in text
    (row,) = [line for line in text.split("## Methods")[0].splitlines() if line.startswith("| fds")]
    cells = dict(zip(headings_of(text), cells_of(row), strict=True))
    figures = written.final_figures("fds")["test_accuracy"]
    told = f"{100 * figures.mean():.2f} % ({100 * figures.min():.2f} to {100 * figures.max():.2f})"
    assert cells["test accuracy"] == told
    assert cells["budget spent"] == f"{100 * written.summary.set_index('method')['share']['fds']:.0f} %"
    lines = re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)
    assert len({line.count("|") for line in lines[:8]}) == 1


def test_cells_cannot_break_a_table(tmp_path):
    made = HandMade(tmp_path).start(FDS).end(FDS, "failed", error="left | right\nTraceback")
    write_report(made.comparison)
    assert r"| fds | 1 | failed for good | left \| right |" in (tmp_path / "summary.md").read_text()


def test_the_page_needs_nothing_but_itself(written):
    page = (written.folder / "report.html").read_text()
    assert "http:" not in page and "https:" not in page and "//" not in re.sub(r"/\*.*?\*/", "", page)
    for tag in ("<script", "<link", "<img", "<iframe", "<object", "@import"):
        assert tag not in page
    assert not re.findall(r"url\((?!#)", page) and not re.findall(r'(?:href|src)="(?!#)', page)
    assert page.startswith("<!DOCTYPE html>") and '<html lang="en">' in page and "prefers-color-scheme: dark" in page
    assert len(page) < 3e6
    named = re.findall(r'\bid="([^"]+)"', page)
    assert len(named) == len(set(named))
    assert set(re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^)"]+)', page)) <= set(named)
    assert page.count('role="img"') == len(re.findall(r'role="img" aria-label="[^"]{20,}"', page)) > 10
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1 and set(levels[1:]) == {2}


def test_what_people_named_is_escaped(tmp_path):
    made = HandMade(tmp_path, problem="<script>alert(1)</script>", space={"<b>": "uniform"}).start(FDS)
    page = write_report(made.end(FDS, "failed", error="<script src=x>").comparison).read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;alert(1)" in page


def test_text_in_the_pages_pictures_has_the_pages_colour(written):
    svg = inline_svg(pictures.regret(written), "r", 'says "it"')
    assert "#2b2f36" not in svg and "currentColor" in svg and "xmlns" not in svg and "Bitstream" not in svg
    root = ElementTree.fromstring(svg)
    assert root.attrib == {"class": "picture", "viewBox": root.get("viewBox"), "role": "img", "aria-label": 'says "it"'}
    assert any("test accuracy" in text.text for text in root.iter("text"))
    assert root.find(".//metadata") is None and all(element.get("id") is None for element in root.iter("g"))


def test_the_terminals_table_has_a_row_for_each_method(written):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary_table(written))
    text = captured.get()
    assert "digits: finished" in text
    for method in written.methods:
        assert re.search(rf"^ {method} ", text, flags=re.MULTILINE)
    assert "none" in re.search(r"^ broken .*", text, flags=re.MULTILINE).group()


def test_what_went_wrong_leaves_the_figures_whole_in_a_terminal_of_80_letters(written):
    console = Console(width=80)
    with console.capture() as captured:
        console.print(summary_table(written))
    text = captured.get()
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert re.search(r"^ rs .* \d+ of \d+ trials *$", text, flags=re.MULTILINE)


def test_writing_again_gives_the_same_files(written):
    before = {name: (written.folder / name).read_bytes() for name in ("report.html", "summary.md", "results.csv")}
    write_report(Comparison(written.folder))
    for name, content in before.items():
        assert (written.folder / name).read_bytes() == content


def measured(page, width, folder, extra=""):
    """Widths of a page in a browser's window: the document's, the window's, and of what is drawn."""
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page + extra)}"></iframe>'
    script = """<script>
    addEventListener("load", () => {
      const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
      const drawn = [...page.querySelectorAll("svg.picture")].map(e => e.getBoundingClientRect().width).filter(w => w);
      document.body.innerHTML = "<pre>" + JSON.stringify({
        document: root.scrollWidth, window: root.clientWidth, pictures: drawn,
        texts: [...page.querySelectorAll("svg.picture text")].map(e => e.getBoundingClientRect().height).filter(h => h),
      }) + "</pre>";
    });
    </script>"""
    (folder / "frame.html").write_text(f"<!DOCTYPE html><body style='margin:0'>{frame}{script}</body>")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found.group(1))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_window(written, width, tmp_path):
    page = (written.folder / "report.html").read_text()
    found = measured(page, width, tmp_path)
    assert found["document"] <= found["window"] <= width
    assert len(found["pictures"]) == 7 and all(0.85 * min(width, 860) <= w <= width for w in found["pictures"])
    assert min(found["texts"]) >= 8  # pixels
    too_wide = measured(page, width, tmp_path, '<div style="width:2000px">wide</div>')
    assert too_wide["document"] > too_wide["window"]  # what is measured would show it


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_can_be_printed(written, tmp_path):
    target = tmp_path / "report.pdf"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command += [f"--print-to-pdf={target}", (written.folder / "report.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pages = re.findall(rb"/Type\s*/Page\b", target.read_bytes())
    assert target.read_bytes().startswith(b"%PDF") and 3 <= len(pages) <= 9


def test_notes_tell_what_some_methods_results_have_that_others_have_not(tmp_path):
    made = HandMade(tmp_path, ("rs", "stn", "fds"), steps=100)
    fds, stn, rs = Account("fds", 0), Account("stn", 0), Account("rs", 0)
    for number in range(3):
        made.start(rs, number).result(rs, None if number else 0.5, 100, number=number, **{"run/steps": 100})
        made.start(stn, number).result(stn, 0.3, 1000, number=number, **{"run/steps": 1000})
    made.start(fds).result(fds, 2.3, 5000, **{"run/steps": 100})
    for number, (method, steps) in enumerate([("rs", 100), ("stn", 1000), ("stn", 800)]):
        made.retraining(method, number % 2, 1.0, 100, number, test_loss=0.5, **{"run/step": steps})
    text = summary_text(made.comparison)
    assert "without a finite validation loss, which cannot be incumbents: rs 2 of 3.\n" in text
    assert "of another length than 100 steps were trained again as long: stn 800 to 1,000." in text
    assert "too small for more than a few results, which say little, of: fds 1." in text


def test_retrainings_that_diverge_are_counted_and_left_out_of_means(tmp_path):
    made, rs = HandMade(tmp_path, ("rs",)), Account("rs", 0)
    made.start(rs).result(rs, 0.5, 100).end(rs)
    for number, loss in enumerate((0.25, float("nan"), 0.75)):
        made.retraining("rs", 0, 1.0, 100, number, number, test_loss=loss)
    text = summary_text(made.comparison)
    assert "1 of 3 retrainings ended without a finite test loss; means of the test loss leave them out." in text
    (row,) = [line for line in text.splitlines() if line.startswith("| rs")][:1]
    assert dict(zip(headings_of(text), cells_of(row), strict=True))["test loss"].startswith("0.5")


def test_there_are_no_such_notes_where_there_is_nothing_to_tell(tmp_path):
    made, rs = HandMade(tmp_path, ("rs",)), Account("rs", 0)
    for number in range(3):
        made.start(rs, number).result(rs, 0.5, 100, number=number)
    text = summary_text(made.comparison)
    assert not any(words in text for words in ("without a finite validation", "another length", "too small"))


def test_every_unit_has_a_label():
    assert set(COST_LABELS) == set(UNITS)
