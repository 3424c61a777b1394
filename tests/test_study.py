"""docs/experiments.md and docs/reserved.md: their tables are what the studies' results give, and nothing else."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import auto
import reserved
import study


def test_the_document_holds_the_tables_of_the_kept_results():
    document = study.DOCUMENT.read_text(encoding="utf-8")
    parts = study.tables(study.kept_results(), json.loads(study.DAMPING.read_bytes()))
    assert study.fill(document, parts) == document, "run `python benchmarks/study.py --tables`"


def test_so_does_that_of_reserved_rows():
    document = reserved.DOCUMENT.read_text(encoding="utf-8")
    parts = reserved.tables(reserved.kept_results())
    assert study.fill(document, parts) == document, "run `python benchmarks/reserved.py --tables`"


def test_and_that_of_steps_that_end_by_themselves():
    document = auto.DOCUMENT.read_text(encoding="utf-8")
    assert study.fill(document, auto.tables(study.kept_in(auto.RESULTS, auto.WANTED))) == document, (
        "run `python benchmarks/auto.py --tables`"
    )


def test_a_part_without_a_place_or_a_place_without_a_part_is_an_error():
    with pytest.raises(ValueError, match="the marks"):
        study.fill("<!-- study:a --><!-- /study:a -->", {"a": "1", "b": "2"})
    assert study.fill("x <!-- study:a -->old<!-- /study:a --> y", {"a": "1"}) == (
        "x <!-- study:a -->\n\n1\n\n<!-- /study:a --> y"
    )
