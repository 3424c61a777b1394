"""What serving in vLLM is made of, without vLLM: the bank of a fixed shape, the store, PEFT's files, the command."""

import json
import os
import shutil

import pytest
import torch
from conftest import run_cli, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf import some_patch

from ksl_patch import Patch
from ksl_patch.bank import SlotBank, SlotRows
from ksl_patch.errors import BankError, PatchError, RunError
from ksl_patch.interop import peft
from ksl_patch.overlay import correct_logits
from ksl_patch.patch import TemplateMeta
from ksl_patch.vllm.settings import Settings, read_settings

V, D = 500, 8


def rows(ids, seed=0, **more):
    return SlotRows(torch.tensor(ids), torch.randn(len(ids), D, generator=torch.Generator().manual_seed(seed)), **more)


def bank(slots=3, max_rows=16):
    return SlotBank(slots, max_rows, V, D, dtype=torch.float32, device="cpu")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.none() | st.sets(st.integers(0, V - 1), min_size=1, max_size=16)), max_size=12
    )
)
def test_a_slot_finds_its_last_content_and_nothing_else(writes):
    own, content = bank(), {}
    for turn, (slot, ids) in enumerate(writes):
        if ids is None:
            own.clear(slot)
            content.pop(slot, None)
        else:
            content[slot] = rows(sorted(ids), turn)
            own.write(slot, content[slot])
    everything = torch.arange(V)
    for slot in range(4):
        found = own.tensors.lookup(torch.tensor(slot), everything)
        wanted = content.get(slot)
        known = torch.zeros(V, dtype=torch.bool)
        if wanted is not None:
            known[wanted.token_ids] = True
            assert torch.equal(own.tensors.rows[found[wanted.token_ids]], wanted.rows)
        assert torch.equal(found >= 0, known)


def test_nothing_of_a_fixed_bank_ever_moves():
    own = bank()
    before = [getattr(own.tensors, name).data_ptr() for name in ("rows", "entries", "outputs", "table")]
    for turn in range(50):
        own.write(1 + turn % 3, rows(list(range(turn, turn + 16)), turn, output=turn % 2 == 0))
    assert before == [getattr(own.tensors, name).data_ptr() for name in ("rows", "entries", "outputs", "table")]


def test_the_head_s_rows_are_the_slot_s_own_or_shared():
    own, hidden = bank(), torch.randn(3, 1, D)
    shared, separate = rows([3, 9], 1, output=True), rows([4, 9], 2, output=True, output_rows=torch.randn(2, D))
    assert not own.changes_head
    own.write(1, shared)
    own.write(2, separate)
    assert own.changes_head
    logits = torch.randn(3, 1, V)
    found = correct_logits(own.tensors, torch.tensor([[0], [1], [2]]), own.max_rows, hidden, logits)
    wanted = logits.clone()
    wanted[1, 0, [3, 9]] = shared.rows @ hidden[1, 0]
    wanted[2, 0, [4, 9]] = separate.output_rows @ hidden[2, 0]
    torch.testing.assert_close(found, wanted)
    own.clear(1)
    own.write(2, rows([4]))
    assert not own.changes_head


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (rows(list(range(17))), "has 17 rows, and a slot has room for 16"),
        (rows(list(range(9)), output=True, output_rows=torch.zeros(9, D)), "has 18 rows"),
        (rows([1], prompt_only=True), "prompt only"),
        (rows([V]), "from 0 to 499"),
        (rows([1, 1]), "different"),
    ],
)
def test_what_does_not_fit_a_slot_is_refused_before_anything_is_written(bad, why):
    own = bank()
    with pytest.raises(BankError, match=why):
        own.write(1, bad)
    assert not own.tensors.table.any()


def test_a_slot_takes_little_more_than_its_rows():
    large = SlotBank(64, 32, 128_256, 4096, dtype=torch.bfloat16, device="meta")
    assert large.tensors.nbytes / 64 < 1.02 * 32 * 4096 * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["alone", "in lora", "both sides"])
def test_peft_s_trained_tokens_are_read_as_rows(tmp_path, tied, kind):
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    lora = {"r": 4, "target_modules": ["q_proj"]}
    config = {
        "alone": TrainableTokensConfig(token_indices=[9, 5, 17], target_modules=["embed_tokens"]),
        "in lora": LoraConfig(**lora, trainable_token_indices=[9, 5, 17]),
        "both sides": LoraConfig(**lora, trainable_token_indices={"embed_tokens": [9, 5, 17], "lm_head": [9, 5, 17]}),
    }[kind]
    model = get_peft_model(tiny_llama(tied), config)
    deltas = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    for parameter in deltas.values():
        parameter.data.normal_()
    model.save_pretrained(tmp_path)
    assert peft.trains_tokens(tmp_path)
    found = peft.read_trainable_tokens(tmp_path, embedding="embed_tokens", tied=tied)
    assert found.token_ids.tolist() == [9, 5, 17]
    own = next(p for n, p in deltas.items() if "embed_tokens" in n)
    assert torch.equal(found.rows, own)
    assert found.output == (tied or kind == "both sides")
    if kind == "both sides" and not tied:  # PEFT ties what a tied model has on both sides
        head = next(p for n, p in deltas.items() if "lm_head" in n)
        assert torch.equal(found.output_rows, head)
    else:
        assert found.output_rows is None
    if kind == "in lora":
        (tmp_path / "lora").mkdir()
        peft.split_lora(tmp_path, tmp_path / "lora")
        assert not peft.trains_tokens(tmp_path / "lora")


def test_an_adapter_that_is_no_patch_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(PatchError, match="cannot read"):
        peft.read_config(tmp_path)
    indices = {"embed_tokens": [9, 5], "lm_head": [7]}
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="different tokens in the embedding and the head"):
        peft.read_trainable_tokens(tmp_path, tied=True)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    config["trainable_token_indices"] = [1, 2, 3]
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(PatchError, match=r"for 3 token ids"):
        peft.read_trainable_tokens(tmp_path, tied=True)
    (tmp_path / peft.WEIGHTS).write_bytes(b"x")
    with pytest.raises(PatchError, match="cannot read"):
        peft.read_trainable_tokens(tmp_path, tied=True)
    (tmp_path / peft.CONFIG).write_text("[]")
    with pytest.raises(PatchError, match="no JSON object"):
        peft.read_config(tmp_path)


def test_settings_are_checked():
    assert read_settings({}) == Settings()
    assert read_settings({"ksl_patch": {"max_rows": 7}}).max_rows == 7
    for bad in ({"max_rows": "7"}, {"rows": 7}, 7):
        with pytest.raises(RunError, match="no valid 'ksl_patch'"):
            read_settings({"ksl_patch": bad})


@pytest.fixture
def files(model, tmp_path, monkeypatch):
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("VLLM")]:
        monkeypatch.delenv(name)
    template = TemplateMeta(text="{source} =>", chat=False)
    for name, ids in (("es", [3, 4, 5]), ("fr", [3, 4])):
        some_patch(model, 1, ids, template=template).with_meta(name=name).save(tmp_path / f"{name}.safetensors")
    return tmp_path


def dry(*arguments):
    code, out, err = run_cli("serve", "base", *arguments, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)


def value(command, flag):
    return command[command.index(flag) + 1]


def test_a_dry_run_prints_vllm_s_own_command(files):
    found = dry(
        files, "--patch", files / "es.safetensors", "--patch", f"sw={files / 'fr.safetensors'}", "--port", 9, "-tp", 2
    )
    command = found["command"]
    assert command[:4] == ["vllm", "serve", "base", "--enable-lora"]
    assert value(command, "--lora-target-modules") == "embed_tokens"
    assert (value(command, "--port"), value(command, "-tp")) == ("9", "2")
    own = json.loads(value(command, "--additional-config"))["ksl_patch"]
    assert own == {
        "max_rows": 3,
        "folders": [],
        "orgs": [],
        "runtime": False,
        "template": False,
        "guard": False,
        "key": None,
    }
    start = command.index("--lora-modules")
    modules = [json.loads(text) for text in command[start + 1 : start + 3]]
    assert [module["name"] for module in modules] == ["es", "sw"]
    for module, name in zip(modules, ("es", "fr"), strict=True):
        digest = Patch.load(files / f"{name}.safetensors").digest
        assert module == {"name": module["name"], "path": module["path"], "base_model_name": "base"}
        assert module["path"] == str((files / "home" / "patches" / f"{digest}.safetensors").resolve())
    assert "ksl_patch" in found["environment"]["VLLM_PLUGINS"].split(",")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in found["environment"]


def test_options_reach_vllm(files, monkeypatch):
    found = dry(
        "--folder", files, "--slots", 5, "--max-rows", 40, "--apply-template", "--lora",
        "--allow-runtime-patches", "--api-key", "k", '--additional-config={"other": 1}',
    )  # fmt: skip
    command = found["command"]
    config = json.loads(value(command, "--additional-config"))
    assert config["other"] == 1
    assert config["ksl_patch"] == {
        "max_rows": 40, "folders": [str(files.resolve())], "orgs": [], "runtime": True, "template": True, "guard": True,
        "key": None,
    }  # fmt: skip
    assert value(command, "--max-loras") == "5"
    assert value(command, "--api-server-count") == "1"
    assert "--lora-target-modules" not in command
    assert command.count("--additional-config") == 1
    assert found["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    named = dry()
    assert named["environment"]["VLLM_PLUGINS"] == "mine,ksl_patch"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--allow-runtime-patches",), "needs an API key"),
        (("--patch", "{files}/none.safetensors"), "cannot read"),
        (("--patch", "{files}/es.safetensors", "--patch", "es={files}/fr.safetensors"), "two patches are called es"),
        (("--patch", "a/b={files}/es.safetensors"), "is not a patch name"),
        (("--patch", "{files}/es.safetensors", "--max-rows", "2"), "has 3 rows, more than --max-rows 2"),
        (("--additional-config", "{"), "needs a JSON object"),
        (("--patch", "0" * 64), "add it again"),
        (("--folder", "{files}", "--api-server-count", "2"), "belong to one API server"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(files, arguments, why):
    arguments = [argument.replace("{files}", str(files)) for argument in arguments]
    code, out, err = run_cli("serve", "base", *arguments, "--dry-run")
    assert (code, out) == (1, "")
    assert why in err
    assert len(err.strip().splitlines()) == 1


def test_the_base_is_looked_at_before_anything_starts(files):
    """In its files: one with the patch's rows, others with other values, another shape, several files, or no table."""
    base = files / "base"
    tiny_llama().save_pretrained(base)
    command = ["serve", base, "--patch", files / "es.safetensors", "--dry-run"]
    assert run_cli(*command)[0] == 0
    tiny_llama().save_pretrained(base, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    assert run_cli(*command)[0] == 0
    for other, why in (
        (tiny_llama(seed=1), "es: 3 of the patch's 3 base rows differ"),
        (tiny_llama(hidden_size=48), "es: the patch is for a table of shape [400, 32], but this model's is [400, 48]"),
    ):
        shutil.rmtree(base)
        other.save_pretrained(base, max_shard_size="40KB")
        code, _, err = run_cli(*command)
        assert code == 1
        assert why in err
    for file in base.iterdir():
        file.write_bytes(b"{}")
    assert run_cli(*command)[0] == 0  # vLLM's to say
    wide = some_patch(tiny_llama(hidden_size=48), 1, [3, 4])
    wide.save(files / "wide.safetensors")
    for arguments, why in (
        ([files / "none" / "x", "--patch", files / "es.safetensors"], "there is no folder"),
        (["b", "--patch", files / "es.safetensors", "--patch", f"w={files / 'wide.safetensors'}"], "different bases"),
        (["es", "--patch", files / "es.safetensors"], "a patch is called es, as the base is"),
        (["b", "--max-loras", 3], "--slots says how many"),
        (["b", "--max_loras=3"], "--slots says how many"),
        (["b", "--served-model-name", "x", "es", "--patch", files / "es.safetensors"], "a patch is called es"),
    ):
        code, _, err = run_cli("serve", *arguments, "--dry-run")
        assert code == 1
        assert why in err


def test_other_places_of_a_base_and_names_of_the_store(files, monkeypatch):
    patch = files / "es.safetensors"
    for base in ("s3://bucket/model", "org/repo/model-Q4.gguf", "org/repo"):
        assert run_cli("serve", base, "--patch", patch, "--dry-run")[0] == 0
    assert run_cli("serve", "es", "--served-model-name", "b", "--patch", patch, "--dry-run")[0] == 0
    # A name of the store goes before a folder, is said, and is what a request says.
    assert run_cli("add", patch, "--name", "sv")[0] == 0
    monkeypatch.chdir(files)
    (files / "sv").mkdir()
    code, out, err = run_cli("serve", "base", "--patch", "sv", "--dry-run", "--json")
    assert code == 0
    command = json.loads(out)["command"]
    assert json.loads(value(command, "--lora-modules"))["name"] == "sv"
    assert "sv is the store's patch of that name; ./sv is the folder." in err


def test_without_vllm_it_says_what_to_install(files):
    code, _, err = run_cli("serve", "base")
    assert code == 1
    assert "pip install 'ksl-patch[vllm]'" in err
