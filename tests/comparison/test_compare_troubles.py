"""What went wrong with a method is counted and told with its first error, and its figures are those of runs that ended.

By hand-made ledgers."""

import math
import re

import pytest
from comparisons import HandMade
from rich.console import Console

from tune_hypergrad.comparison.ledger import RETRAINING, Account
from tune_hypergrad.comparison.telling import pictures, tables
from tune_hypergrad.comparison.telling.report import all_pictures, summary_table, summary_text, write_report
from tune_hypergrad.errors import InputError

FDS, FDS1, RS, RS1 = (Account(method, seed) for method in ("fds", "rs") for seed in (0, 1))
UNTRAINED = {"run/step": 0, "run/steps": 170, "run/completed": 0}
HALF, WHOLE = {"run/step": 85, "run/steps": 170}, {"run/step": 170, "run/steps": 170}


def made_of(folder):
    """A comparison of fds and rs, of which rs completes a run."""
    made = HandMade(folder, ["fds", "rs"], budget=[400, "gradients"])
    return made.start(RS).result(RS, 0.5, 400, **WHOLE).end(RS, "budget").stop(RS)


def told(comparison, method):
    return [trouble.text for trouble in comparison.troubles(method)]


def row_of(comparison, method):
    """The method's row of the first table, by heading."""
    table = tables.results(comparison)
    (row,) = [row for row in table.rows if row[0] == method]
    return dict(zip([column.heading for column in table.columns], row, strict=True))


def untrained_failures(made):
    for number in range(2):
        made.start(FDS, number).result(FDS, 2.3, 200, number=number, **UNTRAINED)
        made.end(FDS, "failed", number, error=f"ValueError: a bug in trial {number}")
    return made.stop(FDS)


def partial_run(made):
    return made.start(FDS).result(FDS, 0.1, 400, **HALF).end(FDS, "budget").stop(FDS)


def failed_online_run(made):
    """Its schedule so far is what was found so far, and so its run is as long as it has come."""
    made.start(FDS).result(FDS, 0.1, 400, **{"run/step": 85, "run/steps": 85})
    return made.end(FDS, "failed", error="ValueError: a bug").stop(FDS)


def failed_function(made):
    return made.start(FDS).result(FDS, 0.1, 400).end(FDS, "failed", error="ValueError: a bug").stop(FDS)


def cut_after_failure(made):
    made.start(FDS, 0).result(FDS, 0.1, 300).end(FDS, "failed", error="ValueError: a bug")
    return made.start(FDS, 1).result(FDS, 0.2, 100, number=1).end(FDS, "budget", 1).stop(FDS)


WITHOUT_RUN = [untrained_failures, partial_run, failed_online_run, failed_function, cut_after_failure]


@pytest.mark.parametrize("happens", WITHOUT_RUN)
def test_a_method_that_never_completed_a_run_has_no_figure(happens, tmp_path):
    comparison = happens(made_of(tmp_path)).comparison
    row = row_of(comparison, "fds")
    assert row["validation loss"] == row["regret in validation loss"] == "none" and row["budget spent"] == "100 %"
    assert row["trouble"].startswith("no run completed: budget spent ")
    assert comparison.incumbents(FDS).empty and set(comparison.history["method"]) == {"rs"}
    assert set(comparison.regret["method"]) == {"rs"} and comparison.yardstick.reference == 0.5
    summary = comparison.summary.set_index("method")
    assert summary.loc["fds", ["val_loss", "val_loss_min", "val_loss_max"]].isna().all()
    with pytest.raises(InputError, match="fds has no incumbent"):
        comparison.schedule("fds")
    assert list(pictures.best_schedules(comparison)) == ["rs"]
    (picture,) = all_pictures(comparison)["validation"]
    assert "At the end: fds none; rs 0.5." in picture.alt
    assert "fds" not in [line.get_label() for line in picture.draw().axes[0].lines]


@pytest.mark.parametrize("happens", WITHOUT_RUN)
def test_nor_do_retrainings_of_it_give_it_one(happens, tmp_path):
    made = happens(made_of(tmp_path)).retraining("fds", 0, 1.0, 400, 0, test_accuracy=0.99)
    comparison = made.retraining("rs", 0, 1.0, 400, 1, test_accuracy=0.9).comparison
    row = row_of(comparison, "fds")
    assert row["test accuracy"] == row["regret in test accuracy (points)"] == "none"
    assert comparison.yardstick.reference == 0.9 and math.isnan(
        comparison.summary.set_index("method")["test_accuracy"]["fds"]
    )


def test_a_retraining_of_no_steps_is_none(tmp_path):
    made = made_of(tmp_path).retraining("rs", 0, 0.5, 200, 0, test_accuracy=0.99, **UNTRAINED)
    comparison = made.retraining("rs", 0, 1.0, 400, 1, test_accuracy=0.9, **WHOLE).comparison
    assert list(comparison.retrained["test_accuracy"]) == [0.9] and list(comparison.regret["regret"]) == [0]


def test_untrained_figures_are_no_result_though_they_be_the_lowest(tmp_path):
    made = made_of(tmp_path).start(FDS).result(FDS, 2.3, 10, 1, **UNTRAINED)
    assert made.comparison.incumbents(FDS).empty
    made.result(FDS, 9.0, 200, 2, **{**WHOLE, "run/completed": 1})
    assert list(made.comparison.incumbents(FDS)["val_loss"]) == [9.0]


def test_parts_of_runs_are_results_once_a_run_has_ended(tmp_path):
    made = made_of(tmp_path).start(FDS).result(FDS, 0.4, 100, 1, **HALF)
    assert made.comparison.incumbents(FDS).empty and told(made.comparison, "fds") == ["no run completed so far"]
    made.result(FDS, 0.6, 200, 2, **WHOLE)
    assert list(made.comparison.incumbents(FDS)["val_loss"]) == [0.4] and not told(made.comparison, "fds")


def test_runs_that_a_trial_completed_before_it_failed_count(tmp_path):
    made = made_of(tmp_path).start(FDS).result(FDS, 2.3, 10, 1, **UNTRAINED)
    made.result(FDS, 0.7, 400, 2, **{**WHOLE, "run/completed": 1}).end(FDS, "failed", error="killed").stop(FDS)
    row = row_of(made.comparison, "fds")
    assert (row["validation loss"], row["trouble"]) == ("0.7", "1 of 1 trials failed: killed")


def test_what_a_budget_went_into_without_a_completed_run_is_said(tmp_path):
    comparison = untrained_failures(made_of(tmp_path / "a")).comparison
    assert list(comparison.accounts["reason"]) == ["budget spent in failing trials", "budget spent"]
    assert "| budget spent in failing trials |" in summary_text(comparison).split("## Methods")[1]
    comparison = cut_after_failure(made_of(tmp_path / "c")).comparison
    assert comparison.accounts["reason"][0] == "budget spent in trials that failed or were cut short"
    comparison = partial_run(made_of(tmp_path / "b")).comparison
    reasons = comparison.summary.set_index("method")["reason"]
    assert reasons.to_dict() == {"rs": "budget spent", "fds": "budget spent before a run ended"}
    assert told(comparison, "fds") == ["no run completed: budget spent before a run ended"]


def test_seeds_without_a_completed_run_are_counted(tmp_path):
    made = HandMade(tmp_path, ["rs"], [0, 1]).start(RS).result(RS, 0.5, 400, **WHOLE).end(RS)
    made.start(RS1).result(RS1, 0.1, 100, **HALF).end(RS1, "failed", error="killed").stop(RS).stop(RS1)
    assert row_of(made.comparison, "rs")["validation loss"] == "0.5"
    assert told(made.comparison, "rs") == [
        "no run completed with 1 of 2 seeds: budget spent in failing trials",
        "1 of 2 trials failed: killed",
    ]
    assert any("no training run was completed have no figures" in note for note in tables.notes(made.comparison))


def test_trials_that_failed_or_began_again_are_counted_with_the_first_error(tmp_path):
    made = made_of(tmp_path)
    for number in range(4):
        made.start(FDS, number).result(FDS, 0.5, 50, number=number)
    for number, error in ((1, "\n  OSError: first\nits traceback"), (0, "again")):
        made.event("retry", FDS, number, error=error).start(FDS, number)
    for number, error in ((0, "KeyError: 'second'\nits traceback"), (1, "ValueError: third")):
        made.end(FDS, "failed", number, error=error)
    made.end(FDS, number=2).event("retry", FDS, 3, error="killed")
    assert told(made.comparison, "fds") == [
        "2 of 4 trials failed: KeyError: 'second'",
        "3 of 4 trials restarted: OSError: first",
    ]
    assert made.comparison.summary["trouble"][0] == "; ".join(told(made.comparison, "fds"))
    assert list(made.comparison.summary["failed"]) == [2, 0] and not told(made.comparison, "rs")


def test_what_an_interruption_did_is_told_from_errors(tmp_path):
    made = made_of(tmp_path).start(FDS, 0).result(FDS, 0.5, 10).start(FDS, 1).resume(["id-fds-0-0", "id-rs-0-0"])
    made.start(FDS, 0).stop(RS)
    assert told(made.comparison, "fds") == ["1 of 1 trials restarted: the comparison was interrupted"]


def test_equal_causes_are_told_once(tmp_path):
    made = made_of(tmp_path)
    for number in range(3):
        made.start(FDS, number).event("retry", FDS, number, error="ValueError: a bug").start(FDS, number)
        made.end(FDS, "failed", number, error="ValueError: a bug")
    made.stop(FDS, "3 trials in a row failed: ValueError: a bug")
    assert told(made.comparison, "fds") == [
        "no run completed",
        "3 of 3 trials failed: ValueError: a bug",
        "3 of 3 trials restarted",
        "1 of 1 searches broke off",
    ]


def test_a_searcher_that_fails_is_told_of(tmp_path):
    made = made_of(tmp_path).start(FDS).result(FDS, 0.5, 100).end(FDS)
    made.stop(FDS, "its searcher failed: KeyError: 'a bug'")
    assert told(made.comparison, "fds") == ["1 of 1 searches broke off: its searcher failed: KeyError: 'a bug'"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_results_that_diverged_are_counted(tmp_path, loss):
    made = made_of(tmp_path).start(FDS).result(FDS, loss, 100, 1).result(FDS, 0.5, 200, 2)
    made.event("retry", FDS, error="killed").start(FDS).result(FDS, loss, 200, 2).result(FDS, 0.5, 300, 3)
    assert told(made.comparison, "fds")[1:] == ["2 of 3 results diverged"]  # what was lost does not count


def test_retrainings_that_failed_or_diverged_are_counted(tmp_path):
    made, account = made_of(tmp_path), Account(RETRAINING, 0)
    for number, loss in enumerate((0.5, math.nan)):
        made.retraining("rs", 0, 1.0, 400, number, number, test_loss=loss)
    made.start(account, 2, retrains={"method": "rs", "seed": 0, "share": 1.0, "training_seed": 2})
    made.end(account, "failed", 2, error="OutOfMemoryError: no more memory")
    assert told(made.comparison, "rs") == [
        "1 of 3 retrainings failed: OutOfMemoryError: no more memory",
        "1 of 2 retrainings diverged",
    ]
    assert not told(made.comparison, "fds")


def test_where_nothing_went_wrong_nothing_is_said_of_it(tmp_path):
    comparison = made_of(tmp_path).start(FDS).result(FDS, 0.6, 400).end(FDS).stop(FDS).comparison
    assert "trouble" not in [column.heading for column in tables.results(comparison).columns]
    assert list(comparison.summary["trouble"]) == ["", ""]
    assert not any("no training run" in note for note in tables.notes(comparison))
    assert '<small class="remark">' not in write_report(comparison).read_text()


def test_the_row_says_so_in_markdown_and_on_the_page(tmp_path):
    comparison = untrained_failures(made_of(tmp_path)).comparison
    page = write_report(comparison).read_text()
    (row,) = [line for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("| fds | none")]
    lines = [
        "no run completed: budget spent in failing trials",
        "2 of 2 trials failed: ValueError: a bug in trial 0",
    ]
    assert row.endswith(f"| 2 | {'; '.join(lines)} |")
    head = re.search(r'<th scope="row"><span class="name">[^\n]*fds</span>(.*?)</th>', page)
    assert re.findall(r'<small class="remark">(.*?)</small>', head.group(1)) == lines
    table = page[page.index("<table>") : page.index("</table>")]
    assert table.count("<td") == 2 * (table.count('scope="col"') - 1) and ">trouble<" not in table


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_says_how_many_in_the_row_and_why_below(tmp_path, width):
    comparison = untrained_failures(made_of(tmp_path)).comparison
    console = Console(width=width)
    with console.capture() as captured:
        console.print(summary_table(comparison))
    lines = captured.get().splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith(" fds ")]
    assert "none" in lines[first] and "no run completed" in lines[first] and "2.3" not in captured.get()
    assert "2 of 2 trials" in lines[first + 1]
    assert "fds: 2 of 2 trials failed: ValueError: a bug in trial 0" in captured.get()
    assert all(len(line) <= width for line in lines) and "…" not in captured.get()
