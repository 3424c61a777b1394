"""TAB in three shells, each run in a pseudoterminal: commands, options, files, folders, names of the local store."""

import json
import os
import shutil
import sys

import pytest
from click.shell_completion import CompletionItem

from ksl_patch.cli import options

# What starts the shell, and what gives it completion.
SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(_KSL_PATCH_COMPLETE=bash_source ksl-patch)"'),
    "zsh": (["-f", "-i"], 'autoload -Uz compinit; compinit -u; eval "$(_KSL_PATCH_COMPLETE=zsh_source ksl-patch)"'),
    "fish": (["--no-config", "-i"], "_KSL_PATCH_COMPLETE=fish_source ksl-patch | source"),
}
# What is typed, with a TAB for each |, and the arguments that the command then gets.
TYPED = {
    "buil| --base mod| --pairs en-s|": ["build", "--base", "models/", "--pairs", "en-sv.jsonl"],
    "build --pairs data/p|": ["build", "--pairs", "data/pairs.tsv"],
    "inspect swa|": ["inspect", "swahili"],
    "inspect oth| --ro|": ["inspect", "other.safetensors", "--rows"],
    "diff swa| oth|": ["diff", "swahili", "other.safetensors"],
    "eval oth| --tes| en-s| --part de|": ["eval", "other.safetensors", "--test", "en-sv.jsonl", "--part", "dev"],
    "generate --patch swa| --prompts en-s|": ["generate", "--patch", "swahili", "--prompts", "en-sv.jsonl"],
    "serve mod| --patch oth| --patch sw=oth|": [
        "serve", "models/", "--patch", "other.safetensors", "--patch", "sw=other.safetensors",
    ],
    "serve mod| --patch sw=swa|": ["serve", "models/", "--patch", "sw=swahili"],
    "add oth|": ["add", "other.safetensors"],
    "remove swa|": ["remove", "swahili"],
    "report oth| -o da|": ["report", "other.safetensors", "-o", "data/"],
}  # fmt: skip


@pytest.fixture(params=SHELLS)
def shell(request, tmp_path):
    """A shell in a folder with some files, whose `ksl-patch` completes, and otherwise prints its arguments."""
    import pexpect

    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    here, own = tmp_path / "here", tmp_path / "bin"
    for folder in (here / "models", here / "data", own, tmp_path / "home" / "names"):
        folder.mkdir(parents=True)
    for file in ("other.safetensors", "en-sv.jsonl", "data/pairs.tsv"):
        (here / file).touch()
    (tmp_path / "home" / "names" / "swahili").write_text(f"{64 * '0'}\n")
    script = f"""#!{sys.executable}
import json, os, sys
if "_KSL_PATCH_COMPLETE" in os.environ:
    from ksl_patch.cli import main
    sys.argv[0] = "ksl-patch"
    main()
print("ARG" + "UMENTS", json.dumps(sys.argv[1:]), "END", flush=True)
"""
    (own / "ksl-patch").write_text(script)
    (own / "ksl-patch").chmod(0o755)
    environment = {
        "PATH": f"{own}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb", "LC_ALL": "C.UTF-8",
        "KSL_PATCH_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    arguments, setup = SHELLS[request.param]
    child = pexpect.spawn(
        program, arguments, cwd=str(here), env=environment, encoding="utf-8", timeout=20, dimensions=(40, 400)
    )
    child.sendline(setup)
    child.sendline("echo rea''dy")
    child.expect("ready")
    yield child
    child.close(force=True)


def test_a_file_whose_name_is_no_plain_word_is_not_offered(tmp_path, monkeypatch):
    """bash puts words on the line as they are: a name such as `$(id)` would be run."""
    monkeypatch.chdir(tmp_path)
    for name in ("swa$(id).safetensors", "swa two.safetensors", "swa;x", "swahili.safetensors"):
        (tmp_path / name).touch()
    found = options._words([CompletionItem("swahili")], "swa")
    assert [item.value for item in found] == ["swahili", "swahili.safetensors"]


@pytest.mark.slow
def test_tab(shell):
    from pexpect import TIMEOUT

    for typed, arguments in TYPED.items():
        first, *parts = typed.split("|")
        shell.send(f"ksl-patch {first}")
        for part in parts:
            shell.expect([TIMEOUT], timeout=0.2)  # its own echo
            shell.send("\t")
            # What is typed while a completion runs may be lost: wait until the word is there.
            shell.expect(r"\S", timeout=20)
            shell.expect([TIMEOUT], timeout=0.2)
            shell.send(part)
        shell.sendline("")
        shell.expect(r"ARGUMENTS (\[.*?\]) END")
        # zsh takes the slash of a folder back where nothing follows.
        found = [each.removesuffix("/") for each in json.loads(shell.match[1])]
        assert found == [each.removesuffix("/") for each in arguments], typed
