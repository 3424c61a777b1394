"""The loss on answers alone is the model's own, and so is its gradient."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from ksl_patch.bank import SlotRows
from ksl_patch.base import find_embedding
from ksl_patch.data.encoding import IGNORED, Example, collate
from ksl_patch.overlay import training
from ksl_patch.train.loss import answer_logits, answer_losses, losses_by_token

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What each does beside the head: nothing, a scaled embedding, soft caps, a scale, another scale, positions of its own.
KINDS = {
    "llama": {}, "gemma3_text": {}, "gemma2": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0}, "qwen3": {"tie_word_embeddings": True}, "gpt2": {}, "opt": {"ffn_dim": 64},
}  # fmt: skip
TIED = [kind for kind in KINDS if kind not in ("llama", "granite")]
IDS = torch.tensor([5, 9, 300])


def build(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2).requires_grad_(False)
    return model


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    draw = lambda n: [5, *torch.randint(3, 400, (n,), generator=g).tolist()]  # noqa: E731
    return collate([Example(draw(4), draw(3)), Example(draw(7), draw(1)), Example(draw(2), draw(9))], pad=0)


@pytest.mark.parametrize(
    ("kind", "side"), [*((kind, "input") for kind in KINDS), *((kind, "input+output") for kind in TIED)]
)
def test_loss_and_gradient_are_the_model_s_own(kind, side, batch):
    model = build(kind)
    table = find_embedding(model)
    rows = table.weight[IDS] + 0.1
    labels = batch["labels"]
    with training(model, SlotRows(IDS, rows, output=side == "input+output")) as trained:
        whole = model(**batch)
        (expected,) = torch.autograd.grad(whole.loss, trained.rows)
        seen = []
        head = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape))
        logits = answer_logits(model, {k: v for k, v in batch.items() if k != "labels"}, labels)
        head.remove()
        wanted = labels[:, 1:] != IGNORED
        assert seen == [(1, 16, 400)]  # the head computed no others
        assert torch.allclose(logits, whole.logits[:, :-1][wanted], atol=1e-5)
        loss = F.cross_entropy(logits, labels[:, 1:][wanted])
        (found,) = torch.autograd.grad(loss, trained.rows)
    assert torch.allclose(loss, whole.loss, rtol=1e-6)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found.abs().sum() > 0


def test_a_model_that_reads_its_head_s_weight_itself_computes_all_logits(batch):
    model = build("llama")
    expected = model(**batch).logits[:, :-1][batch["labels"][:, 1:] != IGNORED]

    class Direct(torch.nn.Linear):
        def __call__(self, hidden):  # no hooks
            return self.forward(hidden)

    model.lm_head.__class__ = Direct
    labels = batch.pop("labels")
    assert torch.allclose(answer_logits(model, batch, labels), expected, atol=1e-5)


@torch.no_grad()
def test_losses_by_token_are_those_of_the_answers():
    model, g = build("gemma3_text"), torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 400, (n,), generator=g).tolist()

    examples = [Example(ids(5 + i % 4), ids(2 + i % 7)) for i in range(11)]
    by_token, (losses, counts) = losses_by_token(model, examples), answer_losses(model, examples)
    assert [len(each) for each in by_token] == counts == [len(each.answer) for each in examples]
    assert [sum(each) for each in by_token] == pytest.approx(losses)
    prompt, answer = examples[3]
    scores = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert by_token[3] == pytest.approx((-scores.gather(-1, torch.tensor(answer)[:, None])[:, 0]).tolist(), rel=1e-4)
