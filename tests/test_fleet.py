"""Several patches from one file: what is built, continued, refused, and what is said of each."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PAIRS, run_cli, some

from ksl_patch.errors import RunError
from ksl_patch.patch import Patch
from ksl_patch.store.lock import read_config, read_recipes

BUILD = """
steps = 2
embed-steps = 2
batch_size = 2
dev = 2
held-out = 4
top-k = 4
"""


@pytest.fixture
def fleet(tmp_path, base_folder):
    """A function that writes a patches.toml beside pairs of three languages."""
    for language in ("es", "fr", "it"):
        lines = [json.dumps({"source": s, "target": f"{t} {language}"}) + "\n" for s, t in PAIRS[:40]]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines))

    def write(patches, build=BUILD):
        file = tmp_path / "patches.toml"
        file.write_text(f'base = "{base_folder}"\n[build]\n{build}\n{patches}')
        return file

    return write


THREE = "".join(f'[patches.{each}]\npairs = "{each}.jsonl"\n' for each in ("es", "fr", "it"))


def built(file, *more):
    code, out, err = run_cli("build", "--config", file, "--json", *more)
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return code, {each["patch"]: each for each in events if each["event"] in ("patch", "failed")}, events, err


def test_each_is_the_patch_that_its_own_build_gives(fleet, tmp_path, base_folder):
    file = fleet(THREE)
    code, found, events, err = built(file)
    assert (code, list(found)) == (0, ["es", "fr", "it"]), err
    assert sum(each["event"] == "loading" for each in events) == 0  # once, and for all
    alone = run_cli(
        "build", "--base", base_folder, "--pairs", tmp_path / "fr.jsonl", "--language", "fr", "--steps", 2,
        "--embed-steps", 2, "--batch-size", 2, "--dev", 2, "--held-out", 4, "--top-k", 4,
        "-o", tmp_path / "alone.safetensors", "--json",
    )  # fmt: skip
    assert alone[0] == 0, alone[2]
    fr = Patch.load(tmp_path / "fr.safetensors")
    assert fr.digest == Patch.load(tmp_path / "alone.safetensors").digest == found["fr"]["digest"]
    assert (fr.meta.language, fr.meta.name) == ("fr", "fr")
    assert found["fr"]["loss_patch"] < found["fr"]["loss_base"]
    assert events[-1] == {"event": "fleet", "report": str(file.with_suffix(".html"))}
    page = file.with_suffix(".html").read_text()
    assert all(f">{name}<" in page for name in ("es", "fr", "it"))
    # The same file is what `lock` and `serve` read.
    assert read_config(file).patches["fr"] == str(tmp_path / "fr.safetensors")
    assert run_cli("lock", file)[0] == 0
    assert run_cli("lock", "--check", file)[0] == 0


def test_what_fails_stops_none_and_the_same_command_goes_on(fleet, tmp_path):
    file = fleet(THREE.replace("fr.jsonl", "none.jsonl"))
    code, found, _, _ = built(file)
    assert (code, [each["event"] for each in found.values()]) == (1, ["patch", "failed", "patch"])
    assert "none.jsonl" in found["fr"]["message"]
    before = Patch.load(tmp_path / "es.safetensors")
    before.with_meta(licence="CC0-1.0").save(tmp_path / "es.safetensors")  # said of it later
    fleet(THREE)
    code, found, events, _ = built(file)
    assert code == 0
    assert [found[name]["unchanged"] for name in ("es", "fr", "it")] == [True, False, True]
    assert Patch.load(tmp_path / "es.safetensors").meta.licence == "CC0-1.0"
    assert not any(each["event"] in ("begin", "measuring") for each in events if each.get("patch") == "es")


def test_names_and_options_of_the_command_line(fleet, tmp_path):
    file = fleet(THREE)
    code, found, _, err = built(file, "--steps", 1, "it", "es")
    assert (code, list(found)) == (0, ["es", "it"]), err
    assert Patch.load(tmp_path / "es.safetensors").meta.training.steps == 1
    # Other settings for a file that is there: nothing is trained, and nothing replaced.
    code, found, events, _ = built(file, "es")
    assert code == 1
    assert "was built with other settings (steps 1, now 2): --force replaces it" in found["es"]["message"]
    assert not any(each["event"] == "begin" for each in events)
    assert built(file, "es", "--force")[1]["es"]["event"] == "patch"
    assert Patch.load(tmp_path / "es.safetensors").meta.training.steps == 2


def test_a_failure_that_nobody_foresaw_is_one_too(fleet, monkeypatch):
    from ksl_patch.train.build import Build

    real = Build.ticket

    def ticket(self, *arguments):
        if self.config.name == "fr":
            raise ZeroDivisionError("by zero")
        return real(self, *arguments)

    monkeypatch.setattr(Build, "ticket", ticket)
    code, found, _, _ = built(fleet(THREE))
    assert (code, found["fr"]["event"], found["it"]["event"]) == (1, "failed", "patch")
    assert "ZeroDivisionError: by zero" in found["fr"]["message"]
    kept = found["fr"]["message"].partition("(")[2].partition(" has")[0]
    assert "by zero" in Path(kept).read_text()


@pytest.mark.parametrize("beside", [([], ["es"], ["es", "fr"]), ("false", '"es"', "true")])
def test_reserved_rows_of_a_file_take_their_own_tokens(tmp_path, reserved_folder, fleet, beside):
    patches = "".join(
        f'[patches.{name}]\npairs = "{name}.jsonl"\nfile = "out/{name}.safetensors"\nbeside = {others}\n'
        for name, others in zip(("es", "fr", "it"), beside, strict=True)
    )
    build = BUILD.replace("top-k = 4", 'top-k = 3\nselection = "reserved"\ndamp-rare = false')
    file = fleet(patches, build)
    file.write_text(file.read_text().replace(file.read_text().splitlines()[0], f'base = "{reserved_folder}"'))
    (tmp_path / "out").mkdir()
    code, found, _, err = built(file)
    assert code == 0, (err, found)
    ids = [Patch.load(tmp_path / "out" / f"{name}.safetensors").token_ids.tolist() for name in ("es", "fr", "it")]
    assert sum(map(len, ids)) == len({i for each in ids for i in each}) == 9


def test_a_patch_that_is_only_served_is_a_neighbour_too(tmp_path, reserved_folder, fleet):
    """By the file's own names first, whatever the store, or a folder here, is called."""
    (tmp_path / "out").mkdir()
    (tmp_path / "de").mkdir()
    some(reserved_folder, "served", [400, 402]).save(tmp_path / "out/de.safetensors")
    build = BUILD.replace("top-k = 4", 'top-k = 2\nselection = "reserved"\ndamp-rare = false')
    for beside in ("true", '"de"', '["de"]'):
        file = fleet(
            'de = "out/de.safetensors"\n[patches.es]\npairs = "es.jsonl"\nfile = "out/es.safetensors"\n'
            f"beside = {beside}\n",
            build + "[patches]\n",
        )
        file.write_text(file.read_text().replace(file.read_text().splitlines()[0], f'base = "{reserved_folder}"'))
        code, found, _, err = built(file, "--force")
        assert code == 0, (err, found)
        assert Patch.load(tmp_path / "out/es.safetensors").token_ids.tolist() == [404, 405]


def test_what_is_said_of_the_same_rows_is_replaced_with_force(fleet, tmp_path):
    built(fleet(THREE), "es")
    file = tmp_path / "es.safetensors"
    measured = Patch.load(file).meta.evaluation | {"part": "held-out"}
    Patch.load(file).with_meta(evaluation=measured).save(file)
    code, found, _, _ = built(fleet(THREE, BUILD + 'licence = "CC0-1.0"\n'), "es")
    assert (code, "licence None, now 'CC0-1.0'): --force replaces it" in found["es"]["message"]) == (1, True)
    assert Patch.load(file).meta.licence is None
    code, found, _, _ = built(fleet(THREE, BUILD + 'licence = "CC0-1.0"\n'), "es", "--force")
    assert (code, found["es"]["unchanged"]) == (0, False)
    assert (Patch.load(file).meta.licence, Patch.load(file).meta.evaluation) == ("CC0-1.0", measured)
    code, found, _, _ = built(fleet(THREE, BUILD + 'licence = "CC0-1.0"\n'), "es", "--force")
    assert (code, found["es"]["unchanged"]) == (0, True)


@pytest.mark.slow
def test_one_that_is_killed_goes_on_where_it_was_and_makes_nothing_again(fleet, tmp_path):
    file = fleet(THREE, BUILD.replace("steps = 2\n", "steps = 6\ncheckpoint-every = 3\n", 1))
    whole = {name: each["digest"] for name, each in built(file)[1].items()}
    kept = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in whole}
    for name in whole:
        (tmp_path / f"{name}.safetensors").unlink()
        shutil.rmtree(tmp_path / f"{name}.safetensors.run")
    command = [sys.executable, "-m", "ksl_patch", "build", "--config", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            event = json.loads(line)
            if (event.get("patch"), event["event"], event.get("step")) == ("fr", "step", 5):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert Patch.load(tmp_path / "es.safetensors").rows.equal(Patch.from_bytes(kept["es"]).rows)
    assert not (tmp_path / "fr.safetensors").exists()
    code, found, events, err = built(file)
    assert code == 0, err
    assert {name: each["digest"] for name, each in found.items()} == whole
    assert [each["unchanged"] for each in found.values()] == [True, False, False]
    own = {name: [each for each in events if each.get("patch") == name] for name in whole}
    assert not any(each["event"] in ("begin", "step") for each in own["es"])
    assert "partial tuning: continues at step 3" in [
        each["message"] for each in own["fr"] if each["event"] == "resumed"
    ]


def test_in_plain_lines_each_has_its_name(fleet):
    code, out, err = run_cli("build", "--config", fleet(THREE), "es", "fr")
    assert code == 0, err
    assert "es: ticket" in err
    assert "fr: ticket" in err
    assert "2 patches" in out
    assert "built" in out


@pytest.mark.parametrize(
    ("patches", "arguments", "sentence"),
    [("[patches]\nes = 'es.safetensors'", (), "no [patches.NAME] with pairs"),
     (THREE, ("de",), "does not say how to build 'de': it has es, fr, it"),
     (THREE, ("-o", "x.safetensors"), "--output is what"), (THREE, ("--language", "de"), "--language is what"),
     ('[patches.es]\npairs = "es.jsonl"\nstep = 3', (), "patch es: there is no option 'step'"),
     ('[patches.es]\npairs = "es.jsonl"\nsteps = "many"', (), "patch es: Invalid value for '--steps'"),
     ('[patches.es]\npairs = "es.jsonl"\nsteps = [1, 2]', (), "patch es: steps takes one value"),
     ('[patches.es]\npairs = "es.jsonl"\nstrict = "yes"', (), "patch es: strict is true or false"),
     ('[patches.es]\nlanguage = "es"', (), "patch es: Missing option '--pairs'"),
     ('[patches.es]\npairs = "es.jsonl"\nfile = 3', (), "a path that ends in .safetensors"),
     ('[patches.es]\npairs = "es.jsonl"\nfile = "hf://a/b/c.safetensors"', (), "is to be written"),
     ('[patches.es]\npairs = "es.jsonl"\nrun = {a = 1}', (), "patch es: there is no option 'run'"),
     ("[patches.es]\npairs = {a = 1}", (), "patch es: pairs is a value, or a list"),
     ('[patches."../es"]\npairs = "es.jsonl"', (), "is not a list of patches"), ("[other]", (), "is not a list")],
)  # fmt: skip
def test_what_cannot_be_is_said_before_any_work(fleet, patches, arguments, sentence):
    code, _, err = run_cli("build", "--config", fleet(patches), *arguments)
    assert code in (1, 2)
    assert sentence in " ".join(err.split())
    assert "Loading" not in err


def test_rows_of_a_file_keep_ids_and_texts_apart(fleet):
    _, recipes = read_recipes(fleet('[patches.es]\npairs = ["es.jsonl"]\nrows = [10, "10", "\\n"]'))
    from ksl_patch.cli.build import build, named_rows
    from ksl_patch.cli.fleet import _arguments

    arguments = _arguments(build, {"rows": recipes["es"].options["rows"]})
    assert named_rows(None, None, tuple(arguments[1::2])) == (10, "10", "\n")


def test_the_paper_s_file_is_one(tmp_path):
    from ksl_patch.cli.build import build
    from ksl_patch.cli.fleet import _arguments

    base, recipes = read_recipes(Path(__file__).parents[1] / "examples" / "paper" / "patches.toml")
    assert list(recipes) == ["ca", "de", "es", "ro"]
    for name, recipe in recipes.items():
        given = {"base": base, "language": name} | recipe.options
        params = build.make_context("build", [*_arguments(build, given), "-o", str(recipe.file)]).params
        assert (params["preset"], params["embed_lr"], params["held_out"]) == ("paper", 2e-5, 512)


def test_a_base_that_is_not_there_is_said_once(fleet, base_folder, tmp_path):
    file = fleet(THREE)
    file.write_text(file.read_text().replace(str(base_folder), str(tmp_path / "nobase")))
    code, _, err = run_cli("build", "--config", file)
    assert (code, err.count("nobase")) == (1, 1), err


def test_patches_of_two_bases_are_no_fleet(tmp_path):
    from ksl_patch.train.config import BuildConfig
    from ksl_patch.train.fleet import Member, build_fleet

    members = [
        Member(BuildConfig(base=base, pairs="p", language="es", name="es"), tmp_path / "a", tmp_path / "r")
        for base in ("a", "b")
    ]
    with pytest.raises(RunError, match="of one base"):
        build_fleet(members, lambda _: None, lambda _: None)


def test_the_folder_of_a_file_says_where_pairs_are(tmp_path, fleet, monkeypatch):
    file = fleet(THREE)
    moved = tmp_path / "moved"
    moved.mkdir()
    for each in (file, tmp_path / "es.jsonl"):
        shutil.copy(each, moved / each.name)
    monkeypatch.chdir("/")
    _, recipes = read_recipes(moved / "patches.toml")
    assert recipes["es"].options["pairs"] == str(moved / "es.jsonl")
    assert recipes["fr"].options["pairs"] == "fr.jsonl"
    assert recipes["es"].file == moved / "es.safetensors"


def test_patches_that_share_a_folder_train_their_embedding_once(fleet, tmp_path):
    patches = '[patches.a]\n[patches.b]\nselection = "l2"\n[patches.c]\nside = "input+output"\nscope = "all"\n'
    build = f'{BUILD}pairs = "es.jsonl"\nlanguage = "es"\nresume = "shared.run"\n'
    code, found, events, err = built(fleet(patches, build))
    assert code == 0, (err, found)
    assert (tmp_path / "shared.run").is_dir()
    tuned = [each["patch"] for each in events if each["event"] == "begin" and each["stage"] == "embedding tuning"]
    assert tuned == ["a", "c"]  # of the other side it is another
    # `eval` finds the folder by the patch's record in it.
    code, out, err = run_cli("eval", tmp_path / "b.safetensors", "--controls", "none", "--max-new-tokens", 4, "--json")
    assert code == 0, err
    assert json.loads(out)["digest"] == found["b"]["digest"]
