"""The table of docs/serving.md: architectures of vLLM, tiny and with random weights, each with patches in one batch.

`KSL_PATCH_WRITE=1 make matrix` writes it.
"""

import functools
import gc
import itertools
import json
import os

import pytest
import torch
import transformers
from conftest import ROOT
from test_vllm import environment, greedy, prompts, tokens

from ksl_patch import Patch

__all__ = ["environment"]
pytestmark = [pytest.mark.vllm, pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- the table of tests/test_vllm_matrix.py -->\n", "<!-- end of the table -->\n"
IDS = list(range(2, 372, 12))
SIZES = {
    "vocab_size": 400, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.3, "head_dim": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
# These take text alone here: what cuts pictures into pieces needs torchvision.
MULTIMODAL = ("PaliGemma", "Idefics3")
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Of each its configuration's class in transformers and what it has beside SIZES.
ARCHITECTURES = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {}),
    "Mixtral": ("MixtralConfig", LOCAL),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Qwen3Moe": ("Qwen3MoeConfig", EXPERTS),
    "Gemma": ("GemmaConfig", {}),
    "Gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 32}),
    "Gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32}),
    "Gemma3 by transformers": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32}),
    "Phi3": ("Phi3Config", {}),
    "Olmo2": ("Olmo2Config", {}),
    "Granite": ("GraniteConfig", {}),
    "Glm4": ("Glm4Config", {}),
    "GptOss": ("GptOssConfig", LOCAL),
    "Starcoder2": ("Starcoder2Config", {}),
    "Cohere": ("CohereConfig", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "Exaone4": ("Exaone4Config", {}),
    "Olmo3": ("Olmo3Config", {}),
    "Ernie4_5": ("Ernie4_5Config", {}),
    "GraniteMoe": ("GraniteMoeConfig", LOCAL),
    "Nemotron": ("NemotronConfig", {}),
    "SeedOss": ("SeedOssConfig", {}),
    "Apertus": ("ApertusConfig", {}),
    "DeepseekV2": (
        "DeepseekV2Config",
        {"kv_lora_rank": 512, "q_lora_rank": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
         "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "PaliGemma": ("PaliGemmaConfig", {}),
    "Idefics3": ("Idefics3Config", {}),
    "GPT2": ("GPT2Config", {}),
    "GPTNeoX": ("GPTNeoXConfig", {}),
    "Falcon": ("FalconConfig", {}),
    "StableLm": ("StableLmConfig", {}),
    # Of these transformers has no class: their weights are vLLM's dummies.
    "InternLM2": ("LlamaConfig", {"bias": False}),
    "Exaone": ("LlamaConfig", {"activation_function": "silu", "layer_norm_epsilon": 1e-6}),
    "BailingMoe": ("LlamaConfig", EXPERTS | {"num_shared_experts": 1, "norm_topk_prob": True, "use_bias": False,
                                             "use_qkv_bias": False, "first_k_dense_replace": 0,
                                             "embedding_dropout": 0.0, "moe_shared_expert_intermediate_size": 32}),
    "ChatGLM": (None, {"model_type": "chatglm", "num_layers": 2, "padded_vocab_size": 400, "hidden_size": 128,
                       "ffn_hidden_size": 64, "kv_channels": 32, "num_attention_heads": 4, "seq_length": 256,
                       "original_rope": True, "tie_word_embeddings": False}),
}  # fmt: skip
SHORT = (
    "GptOss",
    "InternLM2",
    "Idefics3",
    "Gemma3 by transformers",
)  # the others have a target of their own, `make matrix`
FOREIGN = ("InternLM2", "Exaone", "BailingMoe", "ChatGLM")


def write(name, folder):
    """Write a tiny model of an architecture, or where that is vLLM's alone its configuration. Returns its class."""
    kind, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    if name in FOREIGN:
        config = getattr(transformers, kind)(**(SIZES | own)).to_dict() if kind else own
        own_type = own.get("model_type", "llama")
        config |= {"architectures": [f"{name}ForCausalLM"], "model_type": own_type, "torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return config["architectures"][0]
    model = tiny(name)
    model.save_pretrained(folder)
    return (model.config.architectures or [type(model).__name__])[0]


def tiny(name):
    kind, own = ARCHITECTURES[name]
    if name in MULTIMODAL:
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        text = {"model_type": "gemma" if name == "PaliGemma" else "llama"} | SIZES
        config = getattr(transformers, kind)(text_config=text, vision_config=vision | {"projection_dim": 128})
        config.image_token_id = 391
        return getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or kind != "FalconConfig"}
    config = getattr(transformers, kind)(**(sizes | own))
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def patch(layer, seed):
    """A patch for an engine's table."""
    table = layer.base_layer.weight.detach()[: layer.base_layer.org_vocab_size]
    config = transformers.LlamaConfig(**(SIZES | {"num_hidden_layers": 0}))
    model = transformers.LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data.copy_(table)
    g = torch.Generator().manual_seed(seed)
    return Patch.from_model(model, IDS, 0.3 * torch.randn(len(IDS), table.shape[1], generator=g), name=f"p{seed}")


class Overwritten:
    """The engine's own table, overwritten by hand around each lookup of a `with` block, for every position."""

    def __init__(self, layer, patch):
        base, ids = layer.base_layer, patch.token_ids
        before, rows = base.weight.detach()[ids].clone(), patch.rows.to(base.weight.dtype)

        def put(values):
            base.weight.data[ids] = values

        self.hooks = [
            base.register_forward_pre_hook(lambda *_: put(rows)),
            base.register_forward_hook(lambda *_: put(before)),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def said(outputs):
    """Of each output its tokens and their log-probabilities."""
    entries = [output.outputs[0].logprobs for output in outputs]
    scores = [torch.tensor([next(iter(entry.values())).logprob for entry in each]) for each in entries]
    return list(zip(tokens(outputs), scores, strict=True))


def answer(folder, **options):
    """What the engine answers in a mixed batch, or the sentence with which it refuses."""
    from vllm import LLM

    from ksl_patch.vllm import lora_request

    llm = None
    try:
        llm = LLM(
            folder, dtype="float32", max_model_len=96, enable_lora=True, max_loras=2, max_lora_rank=8,
            enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False, max_num_seqs=4,
            additional_config={"ksl_patch": {"max_rows": 64}}, **options,
        )  # fmt: skip
        manager = llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager
        made = [patch(manager.layer, seed) for seed in (1, 2)]
        texts = [[*text, IDS[i]] for i, text in enumerate(prompts(6, 40, 17))]
        alone = [said(greedy(llm, [text], [None], 8, logprobs=0))[0][0] for text in texts]
        if alone != [ids for ids, _ in said(greedy(llm, texts, [None] * 3, 8, logprobs=0))]:
            return f"`{manager.name}`", "not judged: vLLM's own answers change with the batch"
        requests = [None, *(lora_request(each) for each in made)]
        wanted = []
        for choice in (None, *made):
            if choice is None:
                wanted.append(said(greedy(llm, texts, [None] * 3, 8, logprobs=0)))
            else:
                with Overwritten(manager.layer, choice):
                    wanted.append(said(greedy(llm, texts, [None] * 3, 8, logprobs=0)))
        for one, other in itertools.combinations(wanted, 2):  # the patches do something
            assert all((a[1] - b[1]).abs().max() > 1e-2 for a, b in zip(one, other, strict=True))
        for turn in range(3):
            turned = requests[turn:] + requests[:turn]
            for place, (ids, scores) in enumerate(said(greedy(llm, texts, turned, 8, logprobs=0))):
                own_ids, own_scores = wanted[(place + turn) % 3][place]
                assert ids == own_ids, (turn, place)
                torch.testing.assert_close(scores, own_scores, rtol=0, atol=1e-4)
        return f"`{manager.name}`", "exact"
    except (ValueError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "adapters" in line or "patch" in line), lines[-1])
        if "takes no adapters" in reason:
            return "", "refused: takes no adapters"
        return "", f"refused: {reason.removeprefix('Value error, ').partition(' [type=')[0]}"
    finally:
        del llm
        cleanup()


def cleanup():
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    from vllm.model_executor.model_loader import dummy_loader

    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # vLLM's dummies are so small that the answers would be the same whatever the table.
        larger = functools.partial(dummy_loader.initialize_single_dummy_weight, low=-0.5, high=0.5)
        changed.setattr(dummy_loader, "initialize_single_dummy_weight", larger)
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.short] if name in SHORT else []) for name in ARCHITECTURES]
)
def test_a_mixed_batch(name, tmp_path):
    name_of_class = write(name, tmp_path)
    options = {"limit_mm_per_prompt": {"image": 0}} if name in MULTIMODAL else {}
    options |= {"load_format": "dummy"} if name in FOREIGN else {}
    if name.endswith(" by transformers"):
        options["model_impl"], name_of_class = "transformers", f"{name_of_class}, `--model-impl transformers`"
    own, alone = answer(str(tmp_path), lora_target_modules=["embed_tokens"], **options)
    experts = any("experts" in key for key in ARCHITECTURES[name][1])
    beside = "not run: LoRA's kernels for experts need a GPU" if experts else answer(str(tmp_path), **options)[1]
    line = f"| {name_of_class} | {own} | {alone} | {beside} |"
    print(line)
    before, found, after = split(PAGE.read_text(encoding="utf-8"))
    if os.environ.get("KSL_PATCH_WRITE"):
        lines = {each.split("|")[1].strip(): each for each in found.splitlines()[2:]}
        lines[line.split("|")[1].strip()] = line
        head = found.splitlines()[:2]
        PAGE.write_text(before + "\n".join([*head, *sorted(lines.values())]) + "\n" + after, encoding="utf-8")
    else:
        assert line in found.splitlines()


@pytest.mark.short
def test_what_would_read_the_table_past_its_layer_does_not(tmp_path, monkeypatch):
    """DeepSeek's classes for CUDA do so where this attribute is true, which is set before there is a layer of ours."""
    from vllm import LLM
    from vllm.model_executor.models.llama import LlamaModel

    from ksl_patch.vllm import manager

    write("Llama", tmp_path)
    options = {
        "dtype": "float32", "max_model_len": 96, "enforce_eager": True, "skip_tokenizer_init": True,
        "enable_lora": True, "lora_target_modules": ["embed_tokens"], "max_lora_rank": 8,
    }  # fmt: skip
    monkeypatch.setattr(LlamaModel, "replicated_embed", True, raising=False)
    for looks_up in (True, False):
        monkeypatch.setattr(manager.PatchedEmbedding, "looks_up", lambda self, answer=looks_up: answer)
        llm = LLM(str(tmp_path), **options)
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        assert runner.model.model.replicated_embed is False
        assert (runner.lora_manager.reason is None) is looks_up
        assert looks_up or "does more than look a row up" in runner.lora_manager.reason
        # What is loaded later, such as a drafter, is still told that the embedding alone takes adapters.
        assert runner.lora_config.target_modules == ["model.embed_tokens"]
        assert manager.embedding_alone(runner.lora_config)
        del llm, runner
        cleanup()


def split(page):
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start], page[start:end], page[end:]
