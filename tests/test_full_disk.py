"""A disk that is full: one sentence, nothing that is finished lost, and with more room the same command goes on."""

import json
import subprocess
import tempfile

import pytest
from conftest import PAIRS, run_cli

from ksl_patch.patch import Patch

SETTINGS = ["--top-k", 4, "--embed-steps", 4, "--steps", 4, "--checkpoint-every", 2, "--dev", 4, "--held-out", 4, "-y"]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, and a function that gives it so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root alone")

    def sized(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
        return folder

    yield sized
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, "auto"])
def test_a_build_goes_on_when_there_is_room_again(disk, tmp_path, base_folder, pairs_file, steps):
    settings = [*SETTINGS, "--lr", 1e-6, "--steps", steps]
    command = ["build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", *settings, "-o"]
    assert run_cli(*command, tmp_path / "es.safetensors")[0] == 0
    failed = 0
    for size in [4_096 * pages for pages in range(2, 60, 9)]:
        folder = disk(size)
        code, _, err = run_cli(*command, folder / "es.safetensors")
        if code == 0:
            break
        failed += 1
        assert code == 1
        assert "cannot " in err
        assert err.count("Error") == 1, err
        assert "--debug" not in err
    assert failed >= 2
    assert code == 0, err
    assert "continues at step" in err or "already done" in err
    found, wanted = (Patch.load(each / "es.safetensors") for each in (folder, tmp_path))
    assert found.digest == wanted.digest


@pytest.mark.slow
def test_a_fleet_goes_on_when_there_is_room_again(disk, tmp_path, base_folder):
    folder = disk(100_000)
    file = folder / "patches.toml"
    settings = "".join(f"{name[2:]} = {value}\n" for name, value in zip(SETTINGS[:-1:2], SETTINGS[1::2], strict=True))
    patches = ""
    for language in ("es", "fr"):
        lines = [json.dumps({"source": s, "target": f"{t} {language}"}) + "\n" for s, t in PAIRS[:40]]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines))
        patches += f'[patches.{language}]\npairs = "{tmp_path / language}.jsonl"\n'
    file.write_text(f'base = "{base_folder}"\n[build]\n{settings}{patches}')
    code, out, _ = run_cli("build", "--config", file, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    failed = [each for each in events if each["event"] == "failed"]
    assert code == 1
    assert failed
    assert all(each["message"].startswith("cannot ") for each in failed)
    disk("10m")
    code, out, err = run_cli("build", "--config", file, "--json")
    assert code == 0, err
    assert all((folder / f"{name}.safetensors").is_file() for name in ("es", "fr"))


def test_a_full_folder_for_temporary_files_is_said(disk, base_folder, pairs_file, tmp_path, monkeypatch):
    from ksl_patch.data.recognition import recogniser

    recogniser.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(disk(8_192)))
    code, _, err = run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", tmp_path / "x", *SETTINGS
    )
    assert code == 1
    assert "make room there, or name another folder in TMPDIR" in " ".join(err.split())
