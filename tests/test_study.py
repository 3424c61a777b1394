"""docs/experiments.md: its tables are what the study's results give, and nothing else."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from study import DAMPING, DOCUMENT, fill, kept_results, tables


def test_the_document_holds_the_tables_of_the_kept_results():
    document = DOCUMENT.read_text(encoding="utf-8")
    parts = tables(kept_results(), json.loads(DAMPING.read_bytes()))
    assert fill(document, parts) == document, "run `python benchmarks/study.py --tables`"


def test_a_part_without_a_place_or_a_place_without_a_part_is_an_error():
    with pytest.raises(ValueError, match="the marks"):
        fill("<!-- study:a --><!-- /study:a -->", {"a": "1", "b": "2"})
    assert fill("x <!-- study:a -->old<!-- /study:a --> y", {"a": "1"}) == (
        "x <!-- study:a -->\n\n1\n\n<!-- /study:a --> y"
    )
