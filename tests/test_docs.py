"""README and docs: links lead somewhere, commands and options exist, every public name has a line, examples run."""

import functools
import importlib.util
import json
import re
import shlex

import click
import pytest
from conftest import ROOT

import ksl_patch
import ksl_patch.hf
from ksl_patch.cli import cli

README, API, CLI = ROOT / "README.md", ROOT / "docs/api.md", ROOT / "docs/cli.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
CONTEXT = click.Context(cli)
COMMANDS = {name: cli.get_command(CONTEXT, name) for name in cli.list_commands(CONTEXT)}


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


@functools.cache
def blocks(page, language):
    """The fenced code of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


@functools.cache
def prose(page):
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@functools.cache
def anchors(page):
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(*names):
    """Every option of some commands, and help."""
    found = {opt for name in names for param in COMMANDS[name].params for opt in (*param.opts, *param.secondary_opts)}
    return {*found, "--help"}


def command_lines(page):
    """Every `ksl-patch COMMAND ...` of a page, in consoles and in the text."""
    consoles = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    lines = [line[2:] for line in consoles.splitlines() if line.startswith("$ ksl-patch ")]
    return lines + re.findall(r"`(ksl-patch [a-z][^`]*)`", prose(page))


def load(file):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_readme_shows_what_the_demo_showed():
    made = load(ROOT / "examples" / "demo" / "readme.py")
    text, shown = README.read_text(encoding="utf-8"), json.loads(made.SHOWN.read_bytes())
    assert made.written(text, shown) == text, "run `python examples/demo/readme.py`"
    assert shown["languages"][1]["samples"][0]["patch"] in text


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, and {file.name} has no such heading"


@each_page
def test_commands_and_their_options_exist(page):
    for line in command_lines(page):
        words = shlex.split(line.replace("\\|", ";"), comments=True)
        assert words[1] in COMMANDS, f"{page.name}: there is no command {words[1]}"
        if words[1] == "serve":  # passes on what it does not know
            continue
        own, unknown = options(words[1]), []
        for word in words[2:]:
            if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in own:
                unknown.append(word)
        assert not unknown, f"{page.name}: ksl-patch {words[1]} has no {unknown}"


def test_tables_of_options_name_what_there_is():
    """A table under a heading "Options of `NAME`"."""
    seen = set()
    for page in PAGES:
        for heading, text in re.findall(r"^#+ (Options of [^\n]+)\n(.*?)(?=^#|\Z)", prose(page), re.S | re.M):
            names = re.findall(r"`([a-z]+)`", heading)
            listed = set(re.findall(r"`(--?[a-z][a-z-]*)", "\n".join(re.findall(r"^\| (`-.*?) \|", text, re.M))))
            assert listed <= options(*names), f"{page.name}: {listed - options(*names)}"
            seen |= set(names) if listed else set()
    assert {"build", "eval", "certify", "serve"} <= seen


def test_every_command_is_in_cli_md():
    named = {line.split()[1] for line in command_lines(CLI)}
    assert set(COMMANDS) <= named, set(COMMANDS) - named


def test_every_public_name_is_in_api_md():
    text = prose(API)
    names = {*ksl_patch.__all__, *ksl_patch.hf.__all__, "lora_request"}
    missing = {name for name in names if not re.search(rf"^\| `{name}\b", text, re.M)}
    assert not missing, missing


@each_page
def test_python_compiles(page):
    for number, code in enumerate(blocks(page, "python")):
        compile(code, f"{page.name}, block {number}", "exec")


def test_the_examples_of_api_md_run(tmp_path, monkeypatch, model, tokenizer):
    """All but vLLM's, one after the other, on a tiny model."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks(API, "python"):
        if "vllm" not in code:
            exec(code.replace("google/gemma-3-270m", "base"), names)
    assert names["ticket"].token_ids.size == 3


def test_the_layout_is_what_the_files_say_of_themselves():
    layout = load(ROOT / "docs" / "layout.py")
    for page, make in layout.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert layout.written(text, make()) == text, f"{page.name}: run `python docs/layout.py`"


def test_no_file_is_longer_than_a_reader_takes_in_at_once():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "ksl_patch").rglob("*.py")}
    assert not {str(file): n for file, n in lines.items() if n > 300}
