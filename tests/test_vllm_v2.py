"""vLLM's V2 model runner, which is the default on GPUs, here on a CPU under Triton's interpreter: slow and exact.

TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 pytest tests/test_vllm_v2.py
"""

import gc
import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from triton.backends import backends

    # vLLM takes no Triton on a CPU that has no backend for it; the interpreter needs none.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))

from test_vllm import (
    PATCHES,
    adapter,
    check_mixed,
    check_real,
    environment,
    expected,
    folder,
    greedy,
    logprobs,
    model,
    output_patch,
    overwritten,
    patches,
    plain,
    prompts,
    request,
    start,
    tokens,
)

__all__ = ["environment", "folder", "model", "patches", "plain"]  # fixtures
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.v2,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1",
        reason="the runner is chosen before vLLM is imported: `make vllm` runs this file by itself",
    ),
]


@pytest.fixture(scope="module")
def engine(folder):
    sizes = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    llm = start(folder, enforce_eager=True, lora_target_modules=["embed_tokens"], **sizes)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    yield llm
    del llm
    gc.collect()


def test_every_row_of_a_mixed_batch_is_its_own_model_s(engine, patches, plain):
    check_mixed(engine, patches, plain, count=6)


@pytest.mark.parametrize("lengths", [(70,), (7, 45)])
def test_the_head_of_a_tied_model_is_patched_too(engine, model, lengths):
    patch = output_patch(model)
    own, texts = overwritten(model, patch), prompts(*lengths)
    for choice, reference in ((request(patch), own), (None, model)):
        found = greedy(engine, texts, [choice] * len(texts), 4, prompt_logprobs=0)
        assert tokens(found) == [expected(reference, text, 4) for text in texts]
        for text, output in zip(texts, found, strict=True):
            given = torch.tensor([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])
            torch.testing.assert_close(given, logprobs(reference, text), rtol=0, atol=2e-3)


def test_two_contents_of_a_name_share_no_block_and_no_slot(engine, patches, plain):
    first, second = request(patches["a"], "sw"), request(patches["b"], "sw")
    prompt = prompts(100, seed=8)[0]
    for choice, key in ((first, "a"), (None, None), (second, "b"), (first, "a")):
        output = greedy(engine, [prompt], [choice], 4)[0]
        assert tokens([output])[0] == expected(plain[key], prompt, 4)
    assert output.num_cached_tokens == 96  # with itself a request shares what it can


def test_warm_up_batches_between_requests(engine, patches, plain):
    """What an idle rank of data parallelism computes, with adapters of the ids 1, 2, ... that are somebody's here."""
    texts = prompts(5, 20, 9)
    own = [adapter(n, i, request(patches[n]).lora_path) for i, n in enumerate(PATCHES, 1)]
    for _ in range(2):
        found = tokens(greedy(engine, texts, own, 4))
        assert found == [expected(plain[name], text, 4) for name, text in zip(PATCHES, texts, strict=True)]
        engine.collective_rpc("execute_dummy_batch")


def test_a_name_that_is_given_another_content_in_flight(engine, patches, plain):
    from vllm import SamplingParams

    text, engine_ = prompts(20)[0], engine.llm_engine
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = {}
    engine_.add_request("old", {"prompt_token_ids": text}, params, lora_request=request(patches["a"], "sw"))
    for step in range(60):
        if step == 3:
            engine_.add_request("new", {"prompt_token_ids": text}, params, lora_request=request(patches["b"], "sw"))
        for output in engine_.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        if len(found) == 2:
            break
    assert found == {"old": expected(plain["a"], text, 8), "new": expected(plain["b"], text, 8)}


def test_what_cannot_be_served_fails_its_own_request(engine, patches, plain, tmp_path):
    """The engine is in this process, where an error would leave a request behind that nobody ends."""
    missing = [adapter(f"missing{i}", 930 + i, tmp_path / "nothing.safetensors") for i in range(2)]
    found = greedy(engine, [text := prompts(20)[0]] * 3, [missing[0], request(patches["a"], "a"), missing[1]], 4)
    assert [output.outputs[0].finish_reason for output in found] == ["error", "length", "error"]
    assert all("missing" in found[i].outputs[0].stop_reason for i in (0, 2))
    assert tokens(found)[1] == expected(plain["a"], text, 4)


@pytest.mark.real
def test_the_real_model_s_patches_in_a_mixed_batch(gemma):
    check_real(gemma, 4)
