"""What only a GPU can show of the transformers runtime. Run by hand, on a machine that has one: `make gpu`.

CUDA graphs of continuous batching and of one's own, a bank that grows under them, caches that are offloaded to the
host, readers and writers on streams of their own, two GPUs where there are two. Prints a line for each, exit code 1
for a wrong answer.
"""

import sys
import threading
import traceback

import pytest
import torch
import transformers
from conftest import tiny_llama
from test_attach import IDS
from test_hf import overwritten, some_patch

from ksl_patch import attach
from ksl_patch.bank import PatchBank, SlotRows
from ksl_patch.errors import BankError

GENERATION = transformers.GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=1)
PROMPT = [5, 9, 300, 17, 40] * 9


def model_and_patches(side, count=4):
    model = tiny_llama(dtype=torch.float32, hidden_size=64)
    patches = {f"p{n}": some_patch(model, n, IDS[: 20 * (n + 1)], side=side) for n in range(count)}
    plain = {None: model} | {name: overwritten(model, patch) for name, patch in patches.items()}
    expected = {
        name: m.cuda().generate(torch.tensor([PROMPT]).cuda(), generation_config=GENERATION)[0, len(PROMPT) :].tolist()
        for name, m in plain.items()
    }
    return model.cuda(), patches, expected


def continuous(side, **changes):
    """Requests under graphs that were captured before the patches came."""
    model, patches, expected = model_and_patches(side)
    config = transformers.ContinuousBatchingConfig(page_size=16, max_batch_tokens=64, **changes)
    with (
        attach(model) as handle,
        model.continuous_batching_context_manager(
            generation_config=GENERATION, continuous_batching_config=config
        ) as manager,
    ):
        for name in patches:
            handle.load(patches[name], name)
            asked = {}
            for choice in (name, None, "p0", name):
                with handle.using(choice):
                    asked[manager.add_request(PROMPT, max_new_tokens=24)] = choice
            for _ in list(asked):
                result = manager.get_result(timeout=60)
                assert result is not None, manager.background_thread_status.fatal_error
                assert result.error is None, result.error
                assert result.generated_tokens == expected[asked[result.request_id]], asked[result.request_id]


def own_graph():
    """A forward pass that the user captured: other choices and contents without another capture, and no growth."""
    model, patches, _ = model_and_patches("input+output")
    ids = torch.tensor([PROMPT] * 2).cuda()
    with torch.no_grad(), attach(model, max_batch=2, capacity=400, output_width=80) as handle:
        for name in ("p0", "p1"):
            handle.load(patches[name], name)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), handle.using(None):
            model(ids, use_cache=False)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with handle.using(None), torch.cuda.graph(graph):
            logits = model(ids, use_cache=False).logits
        for choice in (["p0", "p1"], ["p1", None], ["p2", "p0"]):
            if "p2" in choice:
                handle.load(patches["p2"], "p2")
            with handle.using(choice):
                graph.replay()
                torch.cuda.synchronize()
            for row, name in enumerate(choice):
                m = model if name is None else overwritten(tiny_llama(hidden_size=64), patches[name]).cuda()
                torch.testing.assert_close(logits[row], m(ids).logits[row], atol=1e-3, rtol=1e-3)

        def fill():
            for n in range(20):
                handle.load(patches["p3"], f"more{n}")

        with pytest.raises(BankError, match="cannot move"):
            fill()


def streams(seconds=10):
    """Readers on streams of their own, while others add, remove, replace and compact; rows are read after a delay."""
    V, d = 5000, 256
    bank, wrong, done = PatchBank(V, d, dtype=torch.float32, device="cuda", budget=40_000_000, evict=True), [], []
    ids = torch.arange(V, device="cuda")

    def read(seed):
        stream, g = torch.cuda.Stream(), torch.Generator().manual_seed(seed)
        with torch.cuda.stream(stream):
            while not done:
                k = int(torch.randint(1, 900, (1,), generator=g))
                token_ids, value = torch.randperm(V, generator=g)[:k], float(torch.rand(1, generator=g))
                slot = bank.add(SlotRows(token_ids, torch.full((k, d), value)))
                with bank.hold([slot]):
                    bank.remove(slot)
                    torch.cuda._sleep(200_000)
                    tensors = bank.tensors
                    position = tensors.lookup(torch.tensor([slot], device="cuda"), ids)
                    found = tensors.rows[position.clamp(min=0)]
                    seen = torch.where((position >= 0)[:, None], found, 0).sum(1)
                expected = torch.zeros(V)
                expected[token_ids] = value * d
                if not torch.allclose(seen.cpu(), expected, rtol=1e-4):
                    wrong.append((seed, slot))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    threading.Event().wait(seconds)
    done.append(True)
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    assert len(bank) == 0


def two_devices():
    """Embedding on the first GPU, head on the last."""
    _, patches, _ = model_and_patches("input+output")
    expected = overwritten(tiny_llama(hidden_size=64), patches["p0"]).cuda()(torch.tensor([PROMPT]).cuda()).logits
    from accelerate import dispatch_model

    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 0}
    split = dispatch_model(tiny_llama(hidden_size=64), places | {"lm_head": 1})
    with torch.no_grad(), attach(split) as handle, handle.using(handle.load(patches["p0"])):
        logits = split(torch.tensor([PROMPT]).cuda(0)).logits
    torch.testing.assert_close(logits.cuda(0), expected, atol=1e-3, rtol=1e-3)


CHECKS = {
    "continuous, input": lambda: continuous("input"),
    "continuous, input+output": lambda: continuous("input+output"),
    "continuous, graphs on": lambda: continuous("input+output", use_cuda_graph=True),
    "continuous, asynchronous": lambda: continuous("input", use_async_batching=True),
    "continuous, a cache that is offloaded": lambda: continuous("input+output", num_blocks=16, cpu_offload_space=0.5),
    "continuous, a cache that is begun again": lambda: continuous("input+output", num_blocks=16, cpu_offload_space=0),
    "a graph of one's own": own_graph,
    "streams": streams,
}

if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__)
    failed = 0
    for name, check in (CHECKS | ({"two GPUs": two_devices} if torch.cuda.device_count() > 1 else {})).items():
        try:
            check()
            print("right:", name, flush=True)
        except Exception:
            failed += 1
            print("WRONG:", name, flush=True)
            traceback.print_exc(limit=4, file=sys.stdout)
    raise SystemExit(bool(failed))
