"""What people reported of tools like this one, as kinds: text, file systems, tokenizers, bases, flags."""

import copy
import errno
import fcntl
import io
import json
import os
import stat
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PAIRS, run_cli, tiny_llama
from peft import TrainableTokensConfig
from test_hf import IDS, some_patch
from test_interop import adapter

from ksl_patch import Patch, attach
from ksl_patch.base.model_digests import tokenizer_digest
from ksl_patch.base.model_id import public_id
from ksl_patch.errors import BaseMismatchError, HubError, OtherVocabularyWarning, PatchError, RunError
from ksl_patch.hf import generate, load_base
from ksl_patch.patch import TemplateMeta
from ksl_patch.store.card import make_card
from ksl_patch.store.local import Store
from ksl_patch.terminal import PlainConsole, visible

ODD = ["[INST]", "[/INST]", "[bold]x[/bold]", ":smile:", "\x1b[2J", "\u202eabc", "<b>&", "a|b"]


@pytest.fixture
def patch_file(tmp_path, base_folder, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    file = tmp_path / "es.safetensors"
    some_patch(model, 1, IDS[:3], tokenizer=tokenizer).save(file)
    return file


@pytest.mark.parametrize("text", ODD)
def test_text_from_outside_is_shown_as_text(model, tokenizer, tmp_path, monkeypatch, text):
    """In every table and line of the command line: a template, a language's licence, a token, a name of a base."""
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    shown = "".join({"\x1b": "\\x1b", "\u202e": "\\u202e"}.get(c, c) for c in text)
    assert visible(text) == shown
    out = io.StringIO()
    PlainConsole(file=out, width=100).print(text)
    assert out.getvalue() == f"{shown}\n"
    patch = some_patch(
        model, 1, IDS[:3], tokenizer=tokenizer, template=TemplateMeta(text=f"{text}{{source}}", chat=False)
    )
    meta = patch.meta
    other = some_patch(model, 2, IDS[1:4], tokenizer=tokenizer)
    patch = patch.with_meta(tokens=[text, *meta.tokens[1:]], licence=text, base=replace(meta.base, model_id=text))
    for name, each in (("a", patch), ("b", other)):
        each.save(tmp_path / f"{name}.safetensors")
    command = ["serve", "base", "--patch", tmp_path / "a.safetensors"]
    assert run_cli(*command, "--dry-run")[0] == 0
    from ksl_patch.cli.served import show

    with pytest.MonkeyPatch.context() as replaced:
        err = io.StringIO()
        replaced.setattr(sys, "stderr", err)
        show(text, [("es", "/p", patch, 3)])
    assert err.getvalue().count(shown) == 2  # the title and the template
    assert run_cli("add", tmp_path / "a.safetensors")[0] == 0
    for arguments, count in ((["inspect", tmp_path / "a.safetensors"], 3), (["list"], 1)):
        code, out, err = run_cli(*arguments)
        assert code == 0, err
        assert out.count(shown) >= (1 if "\\" in shown else count), out
        assert text == shown or text not in out
    code, out, err = run_cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")  # 1: they differ
    assert code == 1, err
    assert shown in out if text == shown else text not in out
    card = make_card(patch, "o/r", "es.safetensors", None, base_model="a/b")
    assert f"```text\n{text}{{source}}\n```" in card


def test_errors_show_text_from_outside_as_text(tmp_path, model, tokenizer, base_folder):
    patch = some_patch(tiny_llama(seed=5), 1, IDS[:3])
    odd = patch.with_meta(base=replace(patch.meta.base, model_id="\x1b]0;evil\x07"))
    odd.save(tmp_path / "odd.safetensors")
    for command in (["verify"], ["generate", "--prompt", "a", "--patch"]):
        code, _, err = run_cli(*command, tmp_path / "odd.safetensors", "--base", base_folder)
        assert code == 1
        assert "\x1b" not in err
        assert "\\x1b]0;evil\\x07" in err


def test_a_card_keeps_its_language_and_what_it_says(model):
    old = """---
language:
- no
- en
license: mit
model-index:
- name: x
  results:
  - task: {type: t}
    dataset: {name: d, type: d}
    metrics: [{type: bleu, value: 1.0, verified: true}]
date: 2026-11-28
version: 1.10
inference: false
sha: 0123456
title: a ---
zero: 0
---
# x
"""
    card = make_card(some_patch(model, 1, IDS[:3]), "o/r", "es.safetensors", old, base_model="a/b")
    header = card.split("\n---\n")[0]
    assert "False" not in header
    assert "- 'no'" in header
    assert "verified: true" in header
    assert "2026-11-28" in header
    for line in ("version: '1.10'", "inference: false", "sha: '0123456'", "title: a ---", "zero: 0"):
        assert line in card
    assert card.split("\n---\n")[1].strip().startswith("# x")
    again = make_card(some_patch(model, 1, IDS[:3]), "o/r", "es.safetensors", card, base_model="a/b")
    assert again == card
    patch = some_patch(model, 1, IDS[:3]).with_meta(licence="MIT\n# Not a heading")
    assert "\n# Not" not in make_card(patch, "o/r", "es.safetensors", None, base_model="a/b")
    with pytest.raises(HubError, match="mend its metadata"):
        make_card(some_patch(model, 1, IDS[:3]), "o/r", "es.safetensors", "---\na: [\n---\n", base_model="a/b")


@pytest.mark.parametrize(
    "flags", [["--api-key", "K"], ["--api-key=K"], ["--api_key", "K"], ["--api_key=K"], ["--api-key", "A", "B"]]
)
def test_every_spelling_of_an_api_key(patch_file, base_folder, flags):
    command = ["serve", base_folder, "--patch", patch_file, "--allow-runtime-patches", "--dry-run"]
    code, out, err = run_cli(*command, *flags)
    assert code == 0, err
    assert out.strip().endswith(" ".join(flags).replace("api_key", "api-key"))
    code, _, err = run_cli(*command, *(["--api-key", ""] if len(flags) == 2 else ["--port", "1"]))
    assert code == 1
    assert "needs an API key" in err


@pytest.mark.parametrize("flags", [["--api-server-count", "4"], ["--api_server_count=4"], ["-asc", "4"], ["-asc=4"]])
def test_every_spelling_of_api_servers(patch_file, base_folder, tmp_path, flags):
    command = ["serve", base_folder, "--patch", patch_file, "--folder", tmp_path, "--dry-run"]
    code, _, err = run_cli(*command, *flags)
    assert code == 1
    assert "one API server" in err
    assert run_cli(*command, *(flag.replace("4", "1") for flag in flags))[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--additional_config", '{"a": 1}'], None),
        (['--additional-config={"a": 1}'], None),
        (["--additional-config", "[]"], "needs a JSON object"),
        (["--additional-config", "no"], "additional-config"),
        (["--additional-config"], "additional-config"),
        (["--additional-config.a", "1"], "as one JSON object"),
        (["--additional_config.a", "1"], "as one JSON object"),
        (["--additional-config", "[1"], "needs a JSON object"),
        (["--api-server-count", "many"], "api-server-count"),
        (["--api", "x"], "ambiguous option"),
    ],
)
def test_other_settings_are_kept_or_refused(patch_file, base_folder, flags, message):
    code, out, err = run_cli("serve", base_folder, "--patch", patch_file, "--dry-run", "--json", *flags)
    if message is not None:
        assert code == 1
        assert message in json.loads(err)["error"]
    else:
        command = json.loads(out)["command"]
        settings = json.loads(command[command.index("--additional-config") + 1])
        assert settings["a"] == 1
        assert settings["ksl_patch"]["max_rows"] == 3
        assert not any("additional_config" in word or word.startswith("--additional-config=") for word in command)


def test_other_flags_of_vllm_are_passed_on_as_they_are(patch_file, base_folder):
    flags = ["--hf-overrides.rope_theta", "1", "--default_chat_template_kwargs.enable_thinking", "false", "-dph", "-1"]
    more = ["--lora", "--lora_modules", "o=/x", "p=/y", "--port", "1"]
    code, out, err = run_cli("serve", base_folder, "--patch", patch_file, "--dry-run", "--json", *flags, *more)
    assert code == 0, err
    command = json.loads(out)["command"]
    assert command[-len(flags) - 2 :] == [*flags, "--port", "1"]
    where = command.index("--lora-modules")
    assert json.loads(command[where + 1])["name"] == "p1"
    assert command[where + 2 : where + 4] == ["o=/x", "p=/y"]
    assert command.count("--lora-modules") == 1


def test_a_path_may_have_an_equals_sign(patch_file, base_folder, tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "es=1.safetensors").write_bytes(patch_file.read_bytes())
    for given in (folder / "es=1.safetensors", f"sv={folder}/es=1.safetensors"):
        code, out, err = run_cli("serve", base_folder, "--patch", given, "--dry-run", "--json")
        assert code == 0, err
        modules = [json.loads(word) for word in json.loads(out)["command"] if word.startswith('{"name"')]
        assert [module["name"] for module in modules] == ["sv" if str(given).startswith("sv=") else "p1"]
    code, _, err = run_cli("serve", base_folder, "--patch", folder / "none.safetensors", "--dry-run")
    assert code == 1
    assert str(folder / "none.safetensors") in err


@pytest.mark.parametrize("ending", ["\n", "\n\n", "\r\n \n", ""])
def test_keys_with_other_ends(patch_file, tmp_path, ending):
    key = tmp_path / "k"
    assert run_cli("keygen", "-o", key)[0] == 0
    for file in (key, Path(f"{key}.pub")):
        file.write_bytes(b"\xef\xbb\xbf" * (ending == "") + file.read_text().rstrip("\n").encode() + ending.encode())
    code, _, err = run_cli("sign", patch_file, "--key", key)
    assert code == 0, err
    code, _, err = run_cli("verify", patch_file, "--key", f"{key}.pub")
    assert code == 0, err


def test_a_tokenizer_with_one_more_token_is_good_enough(model, tokenizer):
    patch = some_patch(model, 1, IDS[:3], tokenizer=tokenizer)
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer_digest(tokenizer) != tokenizer_digest(more)
    with pytest.warns(OtherVocabularyWarning, match="the tokens of p1 read the same in both"):
        patch.check(model, more)
    with attach(model, tokenizer=more) as handle, pytest.warns(OtherVocabularyWarning):
        handle.load(patch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.check(model, tokenizer)


def test_a_tokenizer_that_gives_the_patch_s_ids_other_tokens_is_not(model, tokenizer):
    patch = some_patch(model, 1, IDS[:3], tokenizer=tokenizer)
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    names = {i: name for name, i in vocabulary.items()}
    one, other = names[IDS[1]], names[IDS[1] + 1]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    from tokenizers import Tokenizer

    swapped = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)))
    with pytest.raises(BaseMismatchError, match=rf"token {IDS[1]} is '.*' here, and '.*' to the patch"):
        patch.check(model, swapped)
    with pytest.raises(BaseMismatchError, match="does not say which tokens its ids are"):
        patch.with_meta(tokens=None).check(model, swapped)


def test_tokens_that_a_table_has_not(tokenizer, tmp_path):
    model = tiny_llama(vocab_size=len(tokenizer))
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"pad_token": "[PAD]"})
    alone = generate(model, tokenizer, [[5, 9]], [None], max_new_tokens=4)
    together = generate(model, more, [[5, 9], [5, 9, 17]], [None, None], max_new_tokens=4)
    assert together[0].token_ids == alone[0].token_ids  # padded with a token of the table
    with pytest.raises(RunError, match=rf"gives token {len(tokenizer)}, and the base's table has"):
        generate(model, more, [[5, len(tokenizer)]], [None])


@pytest.mark.parametrize("kind", ["train", "held-out"])
def test_a_build_with_a_tokenizer_of_more_tokens_than_rows(tokenizer, tmp_path, kind):
    """Wherever such a token is: nothing is read past the table, at training or at its figures."""
    model, more = tiny_llama(vocab_size=len(tokenizer)), copy.deepcopy(tokenizer)
    more.add_tokens(["zzz"])
    base, pairs = tmp_path / "base", tmp_path / "pairs.tsv"
    model.save_pretrained(base)
    more.save_pretrained(base)
    sentences = [(f"{s} zzz" if kind == "train" else s, t) for s, t in PAIRS]
    pairs.write_text("".join(f"{s}\t{t}\n" for s, t in sentences))
    sizes = ["--embed-steps", 2, "--steps", 2, "--top-k", 3, "--dev", 8, "--held-out", 8]
    output = tmp_path / "es.safetensors"
    code, _, err = run_cli("build", "--base", base, "--pairs", pairs, "--language", "es", "-o", output, *sizes)
    if kind == "held-out":
        assert code == 0, err
        test = tmp_path / "test.tsv"
        test.write_text("A zzz.\tUn zzz.\nAnother zzz.\tOtro zzz.\n")
        code, _, err = run_cli("eval", output, "--test", test, "--controls", "none", "--no-save")
    assert code == 1
    assert f"gives token {len(tokenizer)}, and the base's table has {len(tokenizer)} rows" in err


def test_an_adapter_s_own_tokenizer_names_its_tokens(tokenizer, tmp_path):
    model = tiny_llama(vocab_size=len(tokenizer) + 16)
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<es>"])
    new = own.convert_tokens_to_ids("<es>")
    base, folder, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "es.safetensors"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter(model, TrainableTokensConfig(token_indices=[new], target_modules=["embed_tokens"]), folder)
    for file in folder.glob("token*"):
        file.unlink()
    code, _, err = run_cli("import", folder, "--base", base, "-o", output)
    assert code == 0, err
    assert Patch.load(output).meta.tokens == [""]  # nobody says
    own.save_pretrained(folder)
    code, _, err = run_cli("import", folder, "--base", base, "-o", output, "--force")
    assert code == 0, err
    patch = Patch.load(output)
    assert patch.meta.tokens == ["<es>"]
    patch.check(model, own)
    (folder / "tokenizer.json").write_text("{")
    code, _, err = run_cli("import", folder, "--base", base, "-o", output, "--force")
    assert code == 1
    assert "cannot load the tokenizer in" in err
    assert "Traceback" not in err


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=400, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip


def small(kind, name):
    config = kind(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bart, "an encoder-decoder"),
        (lambda: small(transformers.RobertaConfig, "RobertaForMaskedLM"), "a RobertaForMaskedLM"),
        (lambda: small(transformers.BertConfig, "BertForSequenceClassification"), "a BertForSequenceClassification"),
        (lambda: small(transformers.LlamaConfig, "LlamaForSequenceClassification"), "a LlamaForSequenceClassif"),
        (lambda: small(transformers.LlamaConfig, "LlamaModel"), "no weights for lm_head.weight, which would be random"),
    ],
)
def test_a_checkpoint_that_is_no_causal_model_is_no_base(tmp_path, tokenizer, make, message):
    make().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RunError, match=message):
        load_base(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_no_base(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    tiny_llama(tied=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_base(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="no weights for model.layers.1.mlp.up_proj.weight and 1 others"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: set_config(folder, hidden_size="abc"),
        lambda folder: set_config(folder, hidden_size=64),
        lambda folder: set_config(folder, hidden_act="nope"),
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
    ],
)
def test_a_damaged_base_is_one_sentence(tmp_path, tokenizer, damage):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match=r"^cannot load the base \S+: \S+.*$"):
        load_base(str(tmp_path))


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("named", [["LLaMAForCausalLM"], "LlamaForCausalLM", ["LlamaForCausalLMEagle3"], None, []])
def test_a_checkpoint_may_call_its_class_otherwise(tmp_path, tokenizer, named):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    set_config(tmp_path, architectures=named)
    load_base(str(tmp_path))


def test_a_quantised_base_is_refused_before_anything_is_computed(tmp_path, base_folder, tokenizer, pairs_file):
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=settings)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    command = ["build", "--base", tmp_path / "base", "--pairs", pairs_file, "--language", "es", "--steps", 2]
    code, _, err = run_cli(*command, "-o", tmp_path / "es.safetensors")
    assert code == 1
    assert "Error: the base is quantised (bitsandbytes), and rows are trained on the whole one" in err


def test_where_a_base_is_kept_is_nobody_s_business(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "gemma"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cached = "/home/me/.cache/huggingface/hub/models--google--gemma-3-270m/snapshots/abc"
    for given, shown in (
        ("google/gemma-3-270m", "google/gemma-3-270m"),
        ("gpt2", "gpt2"),
        (str(folder), "gemma"),
        ("models/gemma", "gemma"),
        ("./models/gemma/", "gemma"),
        ("/not/here/gemma", "gemma"),
        ("~/gemma", "gemma"),
        (cached, "google/gemma-3-270m"),
        ("", None),
    ):
        assert public_id(given) == shown


def test_a_row_outside_the_base_s_norms_is_named(patch_file, base_folder, tmp_path):
    patch = Patch.load(patch_file)
    rows = patch.base_rows.clone()
    Patch(patch.token_ids, rows.roll(1, 0), patch.base_rows, patch.meta).save(patch_file)  # each has another's
    usual = run_cli("verify", patch_file, "--base", base_folder, "--json")[1]
    rows[1] *= 50
    Patch(patch.token_ids, rows, patch.base_rows, patch.meta).save(tmp_path / "odd.safetensors")
    code, out, _ = run_cli("verify", tmp_path / "odd.safetensors", "--base", base_folder, "--json")
    odd = [row["token_id"] for row in json.loads(out)["outside"]]
    assert code == 0
    assert (odd, json.loads(usual)["outside"]) == ([IDS[1]], [])
    for command in ("verify", "inspect"):
        out = run_cli(command, tmp_path / "odd.safetensors", "--base", base_folder)[1]
        assert f"Note: the row of token {IDS[1]} has the norm" in out
    code, _, err = run_cli("inspect", tmp_path / "odd.safetensors", "--base", tmp_path / "none")
    assert (code, "there is no folder" in err) == (1, True)
    assert "outside" in json.loads(run_cli("verify", patch_file, "--json")[1])


def test_storage_without_locks_says_so(tmp_path, model, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for act in (lambda store: store.add(some_patch(model, 1, IDS[:3])), lambda store: store.hold()):
        with pytest.raises(PatchError, match=r"cannot be locked \(No locks available\): set KSL_PATCH_HOME"):
            act(Store(tmp_path / "store"))


def test_storage_without_modes_or_sync_of_folders_holds_what_was_written(tmp_path, model, monkeypatch):
    patch, file = some_patch(model, 1, IDS[:3]), tmp_path / "p.safetensors"

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    sync = os.fsync

    def files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", files_alone)
    patch.save(file)
    assert Patch.load(file).digest == patch.digest
    monkeypatch.setattr(os, "fsync", refuse)  # the content itself cannot be kept
    with pytest.raises(PatchError, match="cannot write"):
        patch.save(file)
    assert Patch.load(file).digest == patch.digest
    assert [each.name for each in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.slow
def test_a_container_without_a_home_or_a_cache(patch_file, base_folder):
    """Nothing can be made under /proc, not even by root."""
    homes = ["HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "TORCH_HOME", "NUMBA_CACHE_DIR"]
    environment = os.environ | dict.fromkeys(homes, "/proc/none") | {"PYTHONWARNINGS": "ignore"}
    environment |= {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator", "HF_HUB_OFFLINE": "1"}
    environment.pop("KSL_PATCH_HOME", None)
    code = "import torch, ksl_patch; print(ksl_patch.ks_test(torch.zeros(3, 8), torch.ones(3, 8)).statistic.tolist())"
    own = [sys.executable, "-m", "ksl_patch"]
    for command, wanted, output in (
        ([sys.executable, "-c", code], 0, "[1.0, 1.0, 1.0]"),
        ([*own, "inspect", patch_file], 0, "p1"),
        ([*own, "verify", patch_file, "--base", base_folder], 0, "valid"),
        ([*own, "generate", "--base", base_folder, "--patch", patch_file, "--prompt", "a"], 0, "a"),
        ([*own, "list"], 0, ""),
        ([*own, "doctor"], None, "/proc/none"),
        ([*own, "add", patch_file], 1, "Error: "),
    ):
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
        assert wanted in (None, done.returncode), (command, done.stderr)
        assert output in done.stdout + done.stderr, (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, (command, done.stderr)


def test_many_languages_at_once(tmp_path, base_folder, tokenizer, monkeypatch):
    """Ten patches: into the store, signed, verified, served and listed, each under its own name."""
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    names = ["es", "sw", "pt-BR", "zh-Hant", "no", "yue", "ar", "hi", "fa", "id"]
    assert run_cli("keygen", "-o", tmp_path / "k")[0] == 0
    files = []
    for seed, name in enumerate(names):
        made = Patch.from_model(
            model, IDS[:3], torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)), name=name, language=name
        )
        files.append(tmp_path / f"{name}.safetensors")
        made.save(files[-1])
        assert run_cli("sign", files[-1], "--key", tmp_path / "k")[0] == 0
        assert run_cli("add", files[-1])[0] == 0
    listed = [json.loads(line) for line in run_cli("list", "--json")[1].splitlines()]
    assert sorted(name for entry in listed for name in entry["names"]) == sorted(names)
    command = ["serve", base_folder, "--dry-run", "--json", "--require-signature", tmp_path / "k.pub"]
    code, out, err = run_cli(*command, *(word for name in names for word in ("--patch", name)))
    assert code == 0, err
    modules = [json.loads(word) for word in json.loads(out)["command"] if word.startswith('{"name"')]
    assert [module["name"] for module in modules] == names
