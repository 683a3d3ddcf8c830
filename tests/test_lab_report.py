"""The laboratory's report: verdicts, claims about what did not run, and one small run of it."""

import re

import numpy as np
import pytest
from common import ROOT

from configs import lab as variants
from examples.lab import __main__ as command
from examples.lab.claims import CLAIMS, verdict
from examples.lab.measuring import needed
from examples.lab.report import report


def test_a_verdict_needs_two_standard_errors():
    # Mean 1; standard errors 0.577 and 0.346.
    assert verdict([0.0, 1.0, 2.0]) == "not shown"
    assert verdict([0.4, 1.0, 1.6]) == "shown"
    assert verdict([-0.4, -1.0, -1.6]) == "contrary"
    assert verdict([5.0]) == "one seed"


def test_the_tokens_needed_are_for_one_error_of_all_images():
    errors = np.array([[0.2, 0.1, 0.1], [0.5, 0.3, 0.2], [0.9, 0.8, 0.4]])
    assert needed(errors, (2, 4, 6)).tolist() == [2, 4, 6]  # The error is 0.3.


def test_every_claim_is_of_a_variant_and_said_of_it():
    names = ("f", "sauvola", "correlation", "psnr", "frechet", "loss", "accuracy")
    names += ("own resolution", "probe first", "probe last", "psnr of others")
    names += ("accuracy of 2 steps",)
    for claim in CLAIMS:
        assert claim.variant in variants.VARIANTS
        results = {name: dict.fromkeys(names, 0.0) for name in variants.VARIANTS}
        for result in results.values():
            result["psnr by tokens"] = {"1": 0.0, "2": 0.0, "4": 0.0}
        before = claim.margin(results)
        changed = {name: i + 1.0 for i, name in enumerate(names)}
        results[claim.variant] |= changed | {"psnr by tokens": {"1": 0.0, "2": 1.0, "4": 1.5}}
        assert claim.margin(results) != before, claim


def rows(text):
    """{first two cells: the others} of all tables."""
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    return {(cells[0], cells[1]): cells[2:] for cells in lines}


def test_the_report_says_what_ran():
    base = {"tokens": 16, "passes": 8, "parameters": 1234, "seconds": 0.5, "frechet": 1.0}
    base["steps"] = 1000
    found = {
        seed: {
            "single": base | {"accuracy": 0.9, "loss": 2.0},
            "pairs": base | {"accuracy": 0.85 + 0.001 * seed, "loss": 2.2 + 0.01 * seed},
        }
        for seed in (0, 1)
    }
    table = rows(report(found))
    assert "## Generators" in report(found) and "## Canvases\n" not in report(found)
    assert table["pairs", "2"][:2] == ["0.8505 ± 0.000707", "2.205 ± 0.00707"]
    assert table["pairs", "2"][3:8] == ["1,000", "16", "8", "1,234", "500 ± 0"]
    said = {c.sentence: table[c.variant, c.sentence] for c in CLAIMS}
    loss, accuracy = (said[c.sentence] for c in CLAIMS if c.variant == "pairs")
    assert (loss[0], loss[2]) == ("2", "shown") and accuracy[2] == "contrary"
    assert said["5 steps cost at most 5 points of accuracy beside 16"] == ["0", "", "not run"]


def test_the_readme_has_rows_of_the_report():
    measured = (ROOT / "docs" / "laboratory.md").read_text().splitlines()
    lines = (ROOT / "README.md").read_text().splitlines()
    claimed = [line for line in lines if re.search(r"\| (not shown|shown|contrary) \|$", line)]
    assert len(claimed) == 12
    assert set(claimed) <= set(measured)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    args = ["--out", str(tmp_path), "--seeds", "1", "--steps", "1"]
    command.main([*args, "--variants", "elastictok,doubling"])
    first = (tmp_path / "report.md").read_text()
    assert {name for name, _ in rows(first)} >= {"elastictok", "doubling"}
    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("it was trained again"))
    command.main([*args, "--variants", "elastictok,doubling"])
    assert (tmp_path / "report.md").read_text() == first
    args[args.index("--steps") + 1] = "2"
    with pytest.raises(SystemExit):
        command.main([*args, "--variants", "elastictok"])
    assert "measured after 1 steps, not 2" in capsys.readouterr().err
