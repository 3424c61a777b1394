"""Parts of the vLLM integration by themselves, with vLLM's own classes around them and no engine."""

import asyncio
import functools
import gc
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import run_cli

from ksl_patch import Patch
from ksl_patch.bank import SlotBank, SlotRows
from ksl_patch.overlay import correct_logits

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
D, V = 8, 50


def punica(mapping_ids, prompt_ids, slots, size=64):
    """vLLM's own record of which position has which adapter, made by vLLM itself."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(size, max_batches=8, device="cpu")
    for tensor in (wrapper._token_lora_indices, wrapper._sampler_indices):
        tensor.fill_(77)  # what is left of other steps
    mapping = LoRAMapping(tuple(mapping_ids), tuple(prompt_ids), is_prefill=True)
    return wrapper, mapping, (mapping, slots, len(slots) + 1, V)


def test_the_record_is_the_one_that_vllm_makes_with_its_loop():
    from ksl_patch.vllm.layer import update_indices

    ids = [0, 9, 9, 0, 4, 4, 4, 2**31 - 1, 0]
    for prompt_ids in ([0, 9, 4, 2**31 - 1, 0], ids):
        slots = [4, None, 9, 2**31 - 1]
        stock, mapping, arguments = punica(ids, prompt_ids, slots)
        stock.update_metadata(*arguments)
        ours, mapping, arguments = punica(ids, prompt_ids, slots)
        update_indices(ours)
        ours.update_metadata(*arguments)
        assert ours.token_lora_indices.tolist() == stock.token_lora_indices.tolist() == [-1, 2, 2, -1, 0, 0, 0, 3, -1]
        assert ours.sampler_indices.tolist() == stock.sampler_indices.tolist()
        assert mapping.prompt_mapping == tuple(prompt_ids)


def test_rows_of_logits_have_the_adapter_of_their_position_or_raise():
    from ksl_patch.vllm.layer import _indices, update_indices

    # Two requests, of 5 and 3 tokens, with the adapters in slots 0 and 1.
    wrapper, _, arguments = punica([7] * 5 + [8] * 3, [7, 8], [7, 8])
    update_indices(wrapper)
    wrapper.update_metadata(*arguments)
    hidden = torch.randn(8, D)
    assert _indices(wrapper, hidden[torch.tensor([4, 7])]).tolist() == [0, 1]  # what is sampled from
    assert _indices(wrapper, hidden[:5]).tolist() == [0] * 5  # log-probabilities of a prompt
    assert _indices(wrapper, hidden[5:7]).tolist() == [1, 1]
    # All positions at once: the V2 runner, and a chunk of a prompt that fills the batch of V1.
    assert _indices(wrapper, hidden).tolist() == _indices(wrapper, hidden[:8]).tolist() == [0] * 5 + [1] * 3
    padded = torch.randn(12, D)
    assert _indices(wrapper, padded[:8]).tolist() == [0] * 5 + [1] * 3
    with pytest.raises(RuntimeError, match="3 rows of logits are neither the 2 sampled nor all 8"):
        _indices(wrapper, torch.randn(3, D))
    with pytest.raises(RuntimeError, match="in strides"):
        _indices(wrapper, torch.randn(8, 2 * D)[:, :D])


def test_a_correction_in_pieces_is_the_correction_and_bounded(monkeypatch):
    from ksl_patch.vllm import layer as module

    bank = SlotBank(3, 6, V, D, dtype=torch.float32, device="cpu")
    g = torch.Generator().manual_seed(0)
    head = torch.randn(V, D, generator=g)
    for slot in (1, 2):
        bank.write(slot, SlotRows(torch.randperm(V, generator=g)[:5], torch.randn(5, D, generator=g), output=True))
    slots = torch.tensor([0, 1, 2, 2, 1, 0, 3, 1, 2])
    hidden = torch.randn(9, D, generator=g)
    whole = correct_logits(bank.tensors, slots[:, None], 6, hidden[:, None], (hidden @ head.T)[:, None])[:, 0]
    gathered = []
    stock = module.correct_logits

    def watched(bank, slots, *rest):
        gathered.append(len(slots))
        return stock(bank, slots, *rest)

    monkeypatch.setattr(module, "correct_logits", watched)
    monkeypatch.setattr(module, "_PIECE", 2 * 6 * D * 4)
    wrapper = SimpleNamespace(_sampler_indices=slots - 1, indices_len=[20, 9])
    layer = SimpleNamespace(bank=bank, measured=True, punica_wrapper=wrapper, slot_of=lambda i: i.clamp(-1, 2) + 1)
    processor = SimpleNamespace(soft_cap=None, scale=1.0, head_dtype=None)
    found = module._correct(layer, processor, (None, hidden, None), hidden @ head.T)
    assert gathered == [2, 2, 2, 2, 1]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert (found != hidden @ head.T).any()


def test_the_first_step_takes_the_memory_of_a_correction_and_changes_nothing(monkeypatch):
    """vLLM measures what a step takes before there is any patch."""
    from ksl_patch.vllm import layer as module

    bank = SlotBank(2, 4, V, D, dtype=torch.float32, device="cpu")
    layer = SimpleNamespace(bank=bank, measured=False, punica_wrapper=None, slot_of=None)
    processor = SimpleNamespace(soft_cap=None, scale=1.0, head_dtype=None)
    logits = torch.randn(3, V)
    calls = []
    stock = module.correct_logits
    monkeypatch.setattr(module, "correct_logits", lambda *given: calls.append(1) or stock(*given))
    for _ in range(2):
        found = module._correct(layer, processor, (None, torch.randn(3, D), None), logits.clone())
        assert torch.equal(found, logits)
    assert calls == [1]


def test_padding_finds_nothing_in_any_slot():
    bank = SlotBank(2, 4, V, D, dtype=torch.float32, device="cpu")
    bank.write(1, SlotRows(torch.tensor([0, 3]), torch.ones(2, D)))
    ids = torch.tensor([-1, 0, 3, 4])
    for slot, wanted in ((0, [-1] * 4), (1, [-1, 0, 1, -1]), (2, [-1] * 4)):
        assert bank.tensors.lookup(torch.full((4,), slot), ids).tolist() == wanted


def test_compiled_code_of_an_engine_without_this_package_is_not_taken_for_ours():
    from vllm.config.lora import LoRAConfig

    from ksl_patch.vllm import plugin

    plugin.register()
    config = LoRAConfig(max_lora_rank=8)
    stock = LoRAConfig.compute_hash.__wrapped__
    assert config.compute_hash() == f"{stock(config)}-{plugin._code()}"


def test_a_class_without_adapters_is_said_before_weights_are_loaded(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)  # and no weights
    sentence = "vLLM's GPT2LMHeadModel takes no adapters, and so no patches"
    code, out, _ = run_cli("doctor", tmp_path, "--json")
    found = {each["what"]: each for each in map(json.loads, out.splitlines())}[str(tmp_path)]
    assert (code, found["state"], found["detail"]) == (1, "error", sentence)
    command = [sys.executable, "-m", "ksl_patch", "serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: {sentence}: serve it with `ksl_patch.attach`")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_a_class_with_adapters_is_said_too(tmp_path, tokenizer, architecture):
    tokenizer.save_pretrained(tmp_path)
    kind = getattr(transformers, f"{architecture.removesuffix('ForCausalLM')}Config")
    kind(vocab_size=400, hidden_size=64, num_hidden_layers=1, architectures=[architecture]).save_pretrained(tmp_path)
    found = [json.loads(line) for line in run_cli("doctor", tmp_path, "--json")[1].splitlines()]
    assert f"vLLM's {architecture} takes patches" in [each["detail"] for each in found if each["state"] == "ok"]


def test_a_refusal_of_a_value_names_its_option():
    from ksl_patch.vllm.launch import _in_words

    assert _in_words("Value error, no.", ("gpu",)) == "no."
    assert _in_words("Input should be less than 1", ("max_loras",)) == "max_loras: Input should be less than 1."


def test_a_build_of_vllm_that_lacks_a_module_is_left_alone(monkeypatch):
    from ksl_patch.vllm import plugin

    def moved():
        raise ModuleNotFoundError("No module named 'vllm.lora.punica_wrapper'")

    monkeypatch.setattr(plugin, "_touched", moved)
    assert plugin.incompatibility().endswith("lacks what it builds on: No module named 'vllm.lora.punica_wrapper'.")


def test_a_lora_that_nobody_made_rows_of_is_an_error_and_a_warm_up_is_none():
    from ksl_patch.vllm.layer import PatchedEmbedding

    cleared = []
    layer = SimpleNamespace(bank=SimpleNamespace(clear=cleared.append))
    PatchedEmbedding.set_lora(layer, 2, torch.zeros(4, V), torch.zeros(D, 4))
    assert cleared == [3]
    with pytest.raises(ValueError, match="came past the manager"):
        PatchedEmbedding.set_lora(layer, 2, torch.ones(4, V), torch.ones(D, 4))


def test_vllm_s_own_trained_tokens_are_not_taken_beside_ours(monkeypatch):
    """The option of its pull request 55796, as it is there."""
    from vllm.config.lora import LoRAConfig

    from ksl_patch.vllm import plugin

    plugin.register()
    monkeypatch.setattr(plugin, "takes_no_adapters", lambda config: None)
    monkeypatch.setattr(LoRAConfig, "max_lora_trainable_tokens", 8, raising=False)
    with pytest.raises(ValueError, match="--max-lora-trainable-tokens gives .* leave it out"):
        LoRAConfig(max_lora_rank=8).verify_with_model_config(SimpleNamespace(runner_type="generate"))


def test_a_lock_of_a_name_goes_when_nobody_holds_it():
    from ksl_patch.vllm.routes import _Locks

    async def ask():
        locks = _Locks()
        order = []

        async def hold(name, number):
            async with locks[name]:
                order.append(number)
                await asyncio.sleep(0.01)
                order.append(number)

        await asyncio.gather(hold("a", 1), hold("a", 2), hold("b", 3))
        for i in range(1000):
            async with locks[f"name{i}"]:
                pass
        gc.collect()
        return [each for each in order if each != 3], len(locks)

    assert asyncio.run(ask()) == ([1, 1, 2, 2], 0)


def test_a_name_that_is_nobody_s_is_looked_up_once_in_some_seconds(tmp_path, monkeypatch, caplog):
    from cachetools import TTLCache

    from ksl_patch.vllm import resolver
    from ksl_patch.vllm.settings import Settings

    looked_up = []
    stock = resolver.from_folders
    monkeypatch.setattr(resolver, "from_folders", lambda path, own: looked_up.append(path) or stock(path, own))
    now = [0.0]
    monkeypatch.setattr(resolver, "TTLCache", functools.partial(TTLCache, timer=lambda: now[0]))
    found = resolver.PatchResolver(Settings(folders=(str(tmp_path),)))

    async def ask(name, times):
        return [await found.resolve_lora("base", name) for _ in range(times)]

    assert asyncio.run(ask("nobody", 20)) == [None] * 20
    assert len(looked_up) == 1
    now[0] = 1.1 * resolver._SECONDS
    asyncio.run(ask("nobody", 1))
    assert len(looked_up) == 2
    with caplog.at_level("WARNING"):
        asyncio.run(ask("a\n[31mforged: everything is well", 1))
    assert "\n" not in caplog.messages[-1]


class Core:
    """An engine's core as far as the door sees it: its scheduler's requests and its workers' answers."""

    def __init__(self, workers):
        self.vllm_config = SimpleNamespace(additional_config={"ksl_patch": {"kept_bytes": 250}})
        self.scheduler, self.model_executor = SimpleNamespace(requests={}), self
        self.is_sleeping, self.workers, self.dropped = False, workers, []

    def collective_rpc(self, method, args):
        assert method == "ksl_patch_add"
        request, drop = args
        self.dropped += drop
        return [worker(request) for worker in self.workers]


def lora(number, path=None):
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"n{number}", number, path or f"/p{number}")


def test_the_door_lets_in_what_every_worker_has_read_and_keeps_what_a_request_needs():
    from ksl_patch.vllm.engine import Admission

    asked = []

    def worker(request):
        asked.append(request.lora_int_id)
        return {9: (None, "a sentence"), 8: (None, None)}.get(request.lora_int_id, (100, None))

    core = Core([worker])
    door = Admission(core)
    for _ in range(3):
        door.admit(lora(1))
    assert asked == [1]
    door.base_may_be_another("any")
    door.admit(lora(1))
    assert asked == [1, 1]
    with pytest.raises(ValueError, match="a sentence"):
        door.admit(lora(9))
    door.admit(lora(8))  # an ordinary adapter, of which the workers keep nothing
    door.admit(lora(8))
    assert asked == [1, 1, 9, 8]
    # Beyond 250 bytes the oldest goes, but not one that a request in flight has.
    core.scheduler.requests = {"r": asking(lora(1), 5), "s": asking(None, 0)}
    for number in (2, 3, 4, 5):
        door.admit(lora(number))
    assert core.dropped == [2, 3]
    with pytest.raises(ValueError, match="given one adapter id, 1"):
        door.admit(lora(1, "/other"))
    core.is_sleeping = True
    with pytest.raises(ValueError, match="the engine sleeps"):
        door.admit(lora(6, __file__))
    door.admit(lora(7))  # an ordinary one waits, as vLLM has it


def asking(request, computed):
    return SimpleNamespace(lora_request=request, num_computed_tokens=computed, request_id="r", client_index=0)


def test_two_contents_of_one_id_are_not_both_let_in():
    from ksl_patch.vllm.engine import Admission

    core = Core([lambda request: (100, None)])
    door = Admission(core)
    door.admit(lora(7, "/a"))
    door.admit(lora(7, "/b"))  # nobody has the other any more
    core.scheduler.requests = {"r": asking(lora(7, "/b"), 3)}
    with pytest.raises(ValueError, match="/a and /b were given one adapter id"):
        door.admit(lora(7, "/a"))
    door.admit(lora(7, "/b"))
    assert core.dropped == []


def test_what_waits_is_checked_again_when_the_base_is_another_and_what_began_goes_on():
    from ksl_patch.vllm.engine import Admission

    fits = [True]
    core = Core([lambda request: (100, None if fits[0] else "another base")])
    core.output_queue = SimpleNamespace(put_nowait=lambda given: out.append(given))
    ended, out = [], []
    core.scheduler.finish_requests = lambda ids, status: ended.append((ids, status.name))
    door = Admission(core)
    door.admit(lora(1))
    core.scheduler.requests = {"began": asking(lora(1), 3), "waits": asking(lora(1), 0)}
    fits[0] = False
    door.base_may_be_another("start_weight_update")
    assert not ended
    with pytest.raises(ValueError, match="is getting other weights"):
        door.admit(lora(2, __file__))
    door.base_may_be_another("finish_weight_update")
    assert ended == [(["r"], "FINISHED_ERROR")]
    assert out[0][1].outputs[0].stop_reason == "ksl_patch: another base"


def test_one_worker_s_sentence_is_enough():
    from ksl_patch.vllm.engine import Admission

    core = Core([lambda request: (100, None), lambda request: (None, "rank 1 says no")])
    with pytest.raises(ValueError, match="rank 1 says no"):
        Admission(core).admit(lora(1))


def test_a_refusal_is_the_caller_s_error_where_somebody_waits_for_it():
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    from ksl_patch.vllm.engine import _refused

    def refused(queue, detokenizer):
        given, finished = [], []
        waiting = SimpleNamespace(put=given.append) if queue else None
        state = SimpleNamespace(queue=waiting, detokenizer=detokenizer)
        processor = SimpleNamespace(request_states={"r": state}, _finish_request=finished.append)
        output = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR, stop_reason="ksl_patch: a sentence")
        return _refused(processor, output), given, finished, output

    taken, given, finished, _ = refused(True, None)
    assert taken
    assert isinstance(given[0], VLLMValidationError)
    assert len(finished) == 1
    taken, _, finished, output = refused(False, "a generation's")
    assert not taken
    assert not finished
    assert output.stop_reason == "a sentence"
    with pytest.raises(ValueError, match="a sentence"):  # an embedding has no place for it
        refused(False, None)
    other = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR, stop_reason="another's")
    assert not _refused(SimpleNamespace(request_states={}), other)


@pytest.mark.parametrize("last", [False, True])
def test_a_pipeline_s_rank_without_an_embedding_takes_a_patch_and_has_nothing_of_it(monkeypatch, tmp_path, last):
    from vllm.lora.lora_model import LoRAModel

    from ksl_patch.vllm import manager as module

    monkeypatch.setattr(module, "get_pp_group", lambda: SimpleNamespace(world_size=2, is_last_rank=last))
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path))
    manager = object.__new__(module.PatchManager)
    manager._kept, manager._digests = {}, {}
    manager._adapter_manager = SimpleNamespace(get_adapter=lambda number: None, modules={})
    table = torch.randn(V, D)
    for side in ("input", "input+output"):
        path = tmp_path / f"{side}.safetensors"
        patch_of(table, side).save(path)
        request = lora(1 if side == "input" else 2, str(path))
        if side == "input+output" and last:
            with pytest.raises(ValueError, match="the last rank of this pipeline has the head and no embedding"):
                manager._read(request)
        else:
            assert manager._read(request) > 0
            adapter = manager._load_adapter(request)
            assert isinstance(adapter, LoRAModel)
            assert adapter.loras == {}
            model = object.__new__(module._AdapterManager)
            model._create_merged_loras_inplace(adapter)  # vLLM's own wants one at least


def patch_of(table, side):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data.copy_(table)
    return Patch.from_model(model, [3, 7], torch.ones(2, D), name="p", side=side)
