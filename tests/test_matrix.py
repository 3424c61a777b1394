"""The table of docs/transformers.md: every kind of patch in every way of running a model, exact or refused.

KSL_PATCH_WRITE=1 python -m pytest tests/test_matrix.py writes it.
"""

import os

import pytest
import torch
import transformers
from conftest import ROOT, tiny_llama
from test_attach import IDS, PROMPTS
from test_continuous import graphs
from test_hf import some_patch

from ksl_patch import attach
from ksl_patch.errors import KslPatchError

PAGE = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- the table of tests/test_matrix.py -->\n", "<!-- end of the table -->\n"
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 1}
CHOICES = ["a", None, "b", "a"]
ROWS = PROMPTS[[0, 1, 1, 0]]
PATCHES = {
    "side `input`": {},
    "side `input+output`": {"side": "input+output"},
    "`input+output`, other rows for the head": {"side": "input+output", "output_rows": True},
    "scope `prompt`": {"scope": "prompt"},
}


def make(model, seed, output_rows=False, **changes):
    if output_rows:
        g = torch.Generator().manual_seed(100 + seed)
        changes["output_rows"] = torch.randn(len(IDS), 32, generator=g)
    return some_patch(model, seed, IDS, **changes)


class Reference:
    """A model whose tables were overwritten by hand, or the base; scope "prompt" is done by hand, column by column."""

    def __init__(self, patch):
        self.base, self.changed, self.patch = tiny_llama(), tiny_llama(tied=False), patch
        table = self.base.get_input_embeddings().weight
        for module, rows in ((self.changed.model.embed_tokens, patch and patch.rows), (self.changed.lm_head, None)):
            module.weight.copy_(table)
            if rows is not None:
                module.weight[patch.token_ids] = rows
        self.changed.model.layers.load_state_dict(self.base.model.layers.state_dict())
        self.changed.model.norm.load_state_dict(self.base.model.norm.state_dict())
        if patch is not None and patch.meta.side == "input+output":
            rows = patch.rows if patch.output_rows is None else patch.output_rows
            self.changed.lm_head.weight[patch.token_ids] = rows

    def logits(self, ids):
        return self.changed(ids).logits

    def tokens(self, ids, **settings):
        if self.patch is None or self.patch.meta.scope == "all":
            return self.changed.generate(ids, **SETTINGS, **settings)[:, ids.shape[1] :].tolist()
        columns = ids.shape[1]
        while ids.shape[1] < columns + SETTINGS["max_new_tokens"]:
            embeddings = self.base.model.embed_tokens(ids)
            embeddings[:, :columns] = self.changed.model.embed_tokens(ids[:, :columns])
            ids = torch.cat([ids, self.base(inputs_embeds=embeddings).logits[:, -1:].argmax(-1)], dim=1)
        return ids[:, columns:].tolist()


def until_the_end(tokens):
    return tokens[: tokens.index(1) + 1] if 1 in tokens else tokens


def forward(model, handle, plain, atol=1e-5):
    with handle.using(CHOICES):
        logits = model(ROWS).logits
    for row, choice in enumerate(CHOICES):
        expected = plain[choice].logits(ROWS)[row]
        torch.testing.assert_close(logits[row], expected, atol=atol, rtol=1e-4)
        assert torch.equal(logits[row].argmax(-1), expected.argmax(-1))


def generate(model, handle, plain, **settings):
    if settings and handle.meta("a").scope == "prompt":
        settings = {"num_return_sequences": 1, "num_beams": 1}  # beams by hand would be another beam search
    with handle.using(CHOICES):
        found = model.generate(ROWS, **SETTINGS, **settings)[:, ROWS.shape[1] :].tolist()
    each = len(found) // len(CHOICES)
    for row, choice in enumerate(CHOICES):
        expected = plain[choice].tokens(ROWS, **settings)[row * each : (row + 1) * each]
        assert list(map(until_the_end, found[row * each : (row + 1) * each])) == list(map(until_the_end, expected))


def beams(model, handle, plain):
    if handle.meta("a").scope == "prompt":
        return "as `generate`"
    return generate(model, handle, plain, num_beams=2, num_return_sequences=2)


def compiled(model, handle, plain):
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    forward(model, handle, plain, atol=1e-4)


def continuous(model, handle, plain):
    config = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=64, max_batch_tokens=64, cpu_offload_space=0,
        q_padding_interval_size=64, kv_padding_interval_size=1024,
    )  # fmt: skip
    generation = transformers.GenerationConfig(**SETTINGS)
    with handle.using(CHOICES):
        found = model.generate_batch(ROWS.tolist(), generation, continuous_batching_config=config)
    for row, (choice, result) in enumerate(zip(CHOICES, found.values(), strict=True)):
        assert result.generated_tokens == until_the_end(plain[choice].tokens(ROWS)[row])


def merged(model, handle, plain):
    handle.merge("a")
    torch.testing.assert_close(model(ROWS).logits, plain["a"].logits(ROWS), atol=1e-6, rtol=1e-5)


MODES = {
    "a forward pass": (forward, {}),
    "`generate`": (generate, {}),
    "beams": (beams, {}),
    "`max_batch`": (forward, {"max_batch": 8, "capacity": 999, "output_width": 200}),
    "`max_batch`, compiled": (compiled, {"max_batch": 8, "capacity": 999, "output_width": 200}),
    "continuous batching": (continuous, {}),
    "with CUDA graphs, emulated": (continuous, {}),
    "merged": (merged, {}),
}


def cell(kind, mode, monkeypatch):
    """What happens. A wrong answer fails the test."""
    run, options = MODES[mode]
    if "graphs" in mode:
        graphs.__wrapped__(monkeypatch)
    model = tiny_llama()
    patches = {name: make(model, seed, **PATCHES[kind]) for seed, name in enumerate("ab", start=1)}
    plain = {None: Reference(None)} | {name: Reference(patch) for name, patch in patches.items()}
    try:
        with attach(model, **options) as handle:
            for name, patch in patches.items():
                handle.load(patch, name)
            return run(model, handle, plain) or "exact"
    except KslPatchError:
        return "refused"


@pytest.mark.slow
@torch.no_grad()
def test_the_table_of_what_is_exact_and_what_is_refused():
    lines = [f"| | {' | '.join(MODES)} |", f"|---|{'---|' * len(MODES)}"]
    for kind in PATCHES:
        cells = []
        for mode in MODES:
            with pytest.MonkeyPatch.context() as monkeypatch:
                cells.append(cell(kind, mode, monkeypatch))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if os.environ.get("KSL_PATCH_WRITE"):
        PAGE.write_text(before + BEGIN + table + END + after)
    else:
        assert written == table, "KSL_PATCH_WRITE=1 writes it anew"
