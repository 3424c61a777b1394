"""What a person sees: tables in a terminal of 80 columns, help, words, phases, questions, errors."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import PAIRS, run_cli

from ksl_patch import Patch
from ksl_patch.cli import _COMMANDS
from ksl_patch.words import WORDS, explain

LONG = "a-name-as-long-as-a-name-of-the-store-may-be-" + "x" * 51
FAST = ["--embed-steps", 20, "--embed-lr", 0.3, "--steps", 20, "--lr", 0.3, "--dev", 16, "--held-out", 16]


@pytest.fixture(scope="module")
def made(base_folder, pairs_file, tmp_path_factory):
    """A folder with two measured patches, their run folder and a store that has them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSL_PATCH_HOME", str(folder / "home"))
        for name, k in (("es", 12), ("few", 3)):
            file = folder / f"{name}.safetensors"
            given = ["build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", file, *FAST]
            code, _, err = run_cli(*given, "--top-k", k, "--name", LONG if name == "es" else name)
            assert code == 0, err
        for command in ("eval", "certify"):
            code, _, err = run_cli(command, folder / "es.safetensors", "--max-new-tokens", 4)
            assert code == 0, err
        assert run_cli("add", folder / "es.safetensors", folder / "few.safetensors")[0] == 0
    return folder


def in_terminal(folder, *arguments, columns=80, answer=None):
    """What a command writes into a terminal, without colours and moves of the cursor; its exit code."""
    import pexpect

    environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", "KSL_PATCH_HOME": str(folder / "home")}
    environment.pop("COLUMNS", None)
    child = pexpect.spawn(
        sys.executable, ["-m", "ksl_patch", *map(str, arguments)], dimensions=(50, columns), cwd=str(folder),
        env=environment, encoding="utf-8", timeout=90,
    )  # fmt: skip
    if answer is not None:
        child.expect("Go on")
        child.sendline(answer)
    child.expect(pexpect.EOF)
    child.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before).replace("\r\n", "\n")
    return text, child.exitstatus


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "list", "diff", "doctor", "eval", "certify"])
def test_every_table_is_whole_in_80_columns(made, base_folder, command):
    arguments = {
        "inspect": ["es.safetensors"],
        "diff": ["es.safetensors", "few.safetensors"],
        "doctor": [base_folder],
        "eval": ["es.safetensors", "--no-save", "--max-new-tokens", 4],
        "certify": ["es.safetensors", "--no-save", "--max-new-tokens", 4],
    }.get(command, [])
    text, code = in_terminal(made, command, *arguments)
    assert code == (command == "diff"), text
    # Bars redraw lines; what is left of them is not a table.
    lines = [line for line in text.split("\n") if "━━━━━━━━━━━━━━━━ " not in line and "answers:" not in line]
    assert [
        line
        for line in lines
        if len(line.strip("\r").rstrip()) > 80 and "Error" not in line and "safetensors" not in line
    ] == []
    assert "…" not in text
    whole = " ".join(text.split())
    patch = Patch.load(made / "es.safetensors")
    if command == "inspect":
        for row in patch.row_facts():
            assert f"{row['statistic']:.4f}" in whole
            assert f"{row['change_norm']:.3f}" in whole
        assert "D: the Kolmogorov-Smirnov statistic" in whole
        assert re.search(r"ks \(at most 12\), \d+ rows? of these with p >= 0.05", whole)
    if command == "list":
        assert patch.digest[:12] in whole
        assert f"{(made / 'es.safetensors').stat().st_size:,}" in whole
        assert LONG in re.sub(r"[\s│]", "", text).replace("│", "") or LONG[:20] in whole
    if command == "eval":
        for system in patch.meta.evaluation["systems"]:
            assert f"{system['figures']['loss']['value']:.3f}" in whole
            assert f"{system['figures']['chrf']['value']:.1f}" in whole
        assert explain("stops by itself") in whole
    if command == "certify":
        bound = patch.meta.certificate["next_token"]
        assert f"On {bound['agreements']} of {bound['examples']} held-out pairs the patch begins with" in whole


def test_help_fits_and_cuts_no_sentence(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_cli("--help")
    assert code == 0
    for command in _COMMANDS:
        assert re.search(rf"^  {command} +\S", out, re.M)
        own = run_cli(command, "--help")[1]
        assert all(len(line) <= 80 for line in own.split("\n"))
        assert "..." not in own.replace("...]", "").replace(" ...", "").replace("P...", "").replace("NAME...", "")
    assert all(len(line) <= 80 for line in out.split("\n"))
    assert "..." not in out.replace("[ARGS]...", "")


def test_words():
    out = run_cli("words")[1]
    assert all(f"\n{word} " in f"\n{out}" for word in WORDS)
    assert "Kolmogorov-Smirnov statistic" in run_cli("words", "D")[1]
    assert json.loads(run_cli("words", "slot", "--json")[1]) == {"slot": WORDS["slot"]}
    assert run_cli("words", "first", "line")[1].startswith("first line  An output")
    assert "there is no 'lottery' among them" in run_cli("words", "lottery")[2]
    glossary = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text()
    assert [f"| **{word}** | {text} |" for word, text in WORDS.items()] == re.findall(r"^\| \*\*.*$", glossary, re.M)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["inspect", "none.safetensors"], 1, "cannot read none.safetensors"),
        (["inspect", "none.safetensors", "--rows", "x"], 2, "Invalid value for '--rows'"),
        (["build", "--base", "x"], 2, "Missing option '--pairs'"),
        (["bulid"], 2, "Did you mean build?"),
    ],
)
def test_an_error_is_json_where_json_is_asked_for(arguments, code, sentence):
    found, out, err = run_cli(*arguments)
    assert (found, out) == (code, "")
    assert sentence in err
    assert "Traceback" not in err
    found, out, err = run_cli(*arguments, "--json")
    assert (found, out) == (code, "")
    error = json.loads(err)
    assert error["exit_code"] == code
    assert sentence in error["error"]


@pytest.mark.slow
def test_every_phase_has_a_line_where_there_is_no_terminal(made, base_folder, pairs_file, tmp_path):
    output = tmp_path / "a.safetensors"
    command = ["build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", output]
    code, out, err = run_cli(*command, *FAST, "--top-k", 12)
    assert code == 0
    lines = [
        "Loading torch and transformers", "English (en) -> Spanish (es)", f"Loading {base_folder}", "pairs to train",
        "embedding tuning: 4/20", "s a step: tuning takes", "embedding tuning: 20/20", "Testing ",
        "ticket (the rows to replace): 12 rows (ks)", "of these 12 rows did not move by the test (p >= 0.05",
        "partial tuning: 20/20", "Measuring the loss on 16 dev pairs", "loss on 16 dev pairs",
    ]  # fmt: skip
    places = [err.index(line) for line in lines]
    assert places == sorted(places)
    assert re.search(r"embedding tuning: 12/20 loss \d+\.\d+, \d+ s left", err) or re.search(r" 0 s left", err)
    assert "Wrote" in out
    code, _, err = run_cli("eval", output, "--controls", "noise", "--max-new-tokens", 4)
    assert code == 0
    for name in ("base", "embedding tuned", "patch", "random change, same norms"):
        assert f"answers: {name}: 16/16" in err
    events = [json.loads(line) for line in run_cli(*command, *FAST, "--top-k", 12, "--force", "--json")[1].splitlines()]
    assert {"loading", "reused", "ticket", "weak_rows", "dev", "patch"} <= {event["event"] for event in events}


@pytest.mark.slow
def test_a_surprising_language_is_asked_about_where_somebody_can_answer(made, base_folder, tmp_path):
    english = [{"source": source, "target": f"The {source} is what they said again."} for source, _ in PAIRS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in english))
    command = ["build", "--base", base_folder, "--pairs", tmp_path / "p.jsonl", "--language", "sv", *FAST]
    output = tmp_path / "a.safetensors"
    text, code = in_terminal(made, *command, "-o", output, answer="n")
    assert code == 1
    assert "stopped, as you said: nothing was trained." in " ".join(text.split())
    assert not output.exists()
    text, code = in_terminal(made, *command, "--top-k", 3, "-o", output, answer="y")
    assert code == 0
    assert output.exists()
    for more in (["--yes"], []):  # told so, or with nobody there
        code, _, err = run_cli(*command, "--top-k", 3, "-o", output, "--force", *more)
        assert code == 0
        assert "Warning: py3langid takes 0% of the targets for Swedish: is --language right?" in err
