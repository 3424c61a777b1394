"""Evaluation: figures against sacrebleu's own and hand-made sums, intervals, controls, and where rows act."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import run_cli
from sacrebleu.metrics import BLEU, CHRF
from test_hf import overwritten

from ksl_patch import Patch
from ksl_patch.errors import DataError, RunError
from ksl_patch.evidence.ablate import PLACES, run_at
from ksl_patch.evidence.outputs import Cache, Outputs, outputs_of
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.evidence.systems import make_systems, noise_patch
from ksl_patch.patch.evaluation import Evaluation, read
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import token_loss
from ksl_patch.train.progress import SilentReporter
from ksl_patch.train.reopen import reopen

REFERENCES = ["El gato ve el mar.", "La mano tiene pan.", "El perro ama la casa.", "Un libro."]
BASE = ["The cat\nsees", "la mano", "El perro ama", "no no no no"]
BETTER = ["El gato ve el mar.\nEl gato", "La mano tiene pan.", "El perro quiere la casa.", "Un libro."]


def outputs(texts, losses=(4.0, 6.0, 8.0, 2.0), stopped=(True, False, True, True)):
    return Outputs(list(texts), list(stopped), list(losses), [2, 3, 4, 1], [[1]] * len(texts))


def test_figures_are_sacrebleu_s_own_raw_and_on_the_first_line():
    scorer = Scorer(REFERENCES)
    found = scorer.figures([outputs(BETTER)], outputs(BASE))
    lines = [text.splitlines()[0] for text in BETTER]
    bleu_words = "sacrebleu's tokenizer 13a; it is not spBLEU"
    for name, metric in (("chrf", CHRF(word_order=2)), ("bleu", BLEU())):
        assert found[name].value == pytest.approx(metric.corpus_score(BETTER, [REFERENCES]).score)
        assert found[f"{name}_first_line"].value == pytest.approx(metric.corpus_score(lines, [REFERENCES]).score)
        assert scorer.signatures[name] == str(metric.get_signature())
        base = metric.corpus_score(BASE, [REFERENCES]).score
        assert found[name].difference == pytest.approx(found[name].value - base)
    assert found["loss"].value == 2.0  # 20 nats over 10 tokens
    assert found["stop_rate"].value == 0.75
    assert found["characters"].value == np.mean([len(text) for text in BETTER])
    assert scorer.of_base(outputs(BASE))["loss"].difference is None
    assert "nw:2" in scorer.signatures["chrf"]
    assert bleu_words in scorer.notes[0]


def test_spbleu_is_used_where_its_tokenizer_model_is_at_hand(tmp_path, monkeypatch):
    import sentencepiece

    (tmp_path / "models").mkdir()
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([*REFERENCES, *BETTER] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "pieces"), vocab_size=30, minloglevel=2
    )
    (tmp_path / "pieces.model").rename(tmp_path / "models" / "flores200sacrebleuspm")
    for module in ("sacrebleu.utils", "sacrebleu.tokenizers.tokenizer_spm"):
        monkeypatch.setattr(f"{module}.SACREBLEU_DIR", str(tmp_path))
    scorer = Scorer(REFERENCES)
    assert not any("BLEU" in note for note in scorer.notes)
    assert "tok:flores200" in scorer.signatures["bleu"]
    found = scorer.figures([outputs(BETTER)], outputs(BASE))["bleu"].value
    assert found == pytest.approx(BLEU(tokenize="flores200").corpus_score(BETTER, [REFERENCES]).score)
    assert found != pytest.approx(BLEU().corpus_score(BETTER, [REFERENCES]).score)


def test_intervals_are_paired_over_sentences_and_seeds_are_averaged():
    scorer = Scorer(REFERENCES, resamples=500)
    base = outputs(BASE)
    # Every sentence gains 0.5 nats a token: the difference has no spread though the losses have.
    shifted = outputs(BASE, [loss - 0.5 * n for loss, n in zip(base.losses, base.tokens, strict=True)])
    loss = scorer.figures([shifted], base)["loss"]
    assert (loss.difference, loss.low, loss.high) == pytest.approx((-0.5, -0.5, -0.5))
    # One that gains on one sentence and loses on another has an interval with zero inside.
    mixed = outputs(BASE, [1.0, 9.0, 8.0, 2.0])
    loss = scorer.figures([mixed], base)["loss"]
    assert loss.low < 0 < loss.high
    # Value and interval are those of the patch's own seed, whatever the others gave.
    both = scorer.figures([shifted, base], base)["loss"]
    assert (both.value, both.difference, both.low) == pytest.approx((1.5, -0.5, -0.5))
    assert both.per_seed == pytest.approx([1.5, 2.0])
    # The patch's lead over a control is paired too: two intervals may overlap where it has none that holds zero.
    lead = scorer.figures([mixed], base, shifted)["loss"].patch_minus
    assert lead.value == pytest.approx(-0.5)
    tilted = outputs(BASE, [loss - 0.4 * n for loss, n in zip(mixed.losses, mixed.tokens, strict=True)])
    better = scorer.figures([mixed], base, tilted)["loss"]
    assert better.low < 0 < better.high
    assert (better.patch_minus.low, better.patch_minus.high) == pytest.approx((-0.4, -0.4))


def test_the_interval_of_a_mean_is_that_of_scipy_s_bootstrap():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    n = 40
    base, system = (rng.exponential(2, n) for _ in range(2))
    texts = ["a"] * n
    scorer = Scorer(texts, resamples=4000)
    make = [Outputs(texts, [True] * n, list(losses), [1] * n, []) for losses in (system, base)]
    loss = scorer.figures([make[0]], make[1])["loss"]
    reference = bootstrap((system - base,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    assert (loss.low, loss.high) == pytest.approx(tuple(reference), abs=0.08)


FAST = {
    "embed_steps": 20,
    "embed_lr": 2.0,
    "steps": 20,
    "lr": 0.3,
    "dev": 16,
    "held_out": 16,
    "alpha": None,
    "top_k": 8,
}


@pytest.fixture(scope="module")
def built(base_folder, pairs_file, tmp_path_factory):
    config = BuildConfig(base=str(base_folder), pairs=str(pairs_file), language="es", name="es", **FAST)
    build = Build(config, tmp_path_factory.mktemp("eval") / "es.safetensors.run", SilentReporter())
    patch = build.patch()
    path = build.run.with_suffix("")
    patch.save(path)
    return build, patch, path


def test_what_is_run_is_what_an_overwritten_table_does(built, tmp_path):
    build, patch, _ = built
    held_out, cache = build.held_out.first(6), Cache(tmp_path, "a")
    found = outputs_of(build.model, build.tokenizer, held_out, patch, max_new_tokens=12, cache=cache)
    by_hand = outputs_of(overwritten(build.model, patch), build.tokenizer, held_out, None, max_new_tokens=12)
    assert found.token_ids == by_hand.token_ids
    assert found.losses == by_hand.losses
    assert found.tokens == [len(example.answer) for example in held_out.examples]
    # The kept result is used again, and is another one for other settings.
    [file] = tmp_path.iterdir()
    file.write_text(json.dumps(dataclasses.asdict(found) | {"texts": ["kept"] * 6}))
    again = outputs_of(build.model, build.tokenizer, held_out, patch, max_new_tokens=12, cache=cache)
    assert again.texts == ["kept"] * 6
    assert outputs_of(build.model, build.tokenizer, held_out, None, max_new_tokens=12, cache=cache).texts != again.texts
    other = Cache(tmp_path, "b")  # another base with the same tokenizer
    assert (
        outputs_of(build.model, build.tokenizer, held_out, patch, max_new_tokens=12, cache=other).texts == found.texts
    )


def test_a_random_change_has_the_patch_s_norms_and_another_direction(built):
    _, patch, _ = built
    noise = noise_patch(patch, 0)
    change, other = ((each.rows - each.base_rows).float() for each in (patch, noise))
    assert torch.allclose(change.norm(dim=1), other.norm(dim=1), rtol=1e-4)
    assert torch.cosine_similarity(change, other, dim=1).abs().max() < 0.7
    assert torch.equal(noise.rows, noise_patch(patch, 0).rows)
    assert not torch.equal(noise.rows, noise_patch(patch, 1).rows)


@pytest.mark.slow
def test_controls_have_the_patch_s_size_and_seeds_share_the_held_out_pairs(built):
    build, patch, _ = built
    systems = make_systems(patch, build, seeds=2)
    assert set(systems) == {"patch", "embedding", "frequency", "l2", "random", "noise"}
    assert systems["patch"][0] is patch
    for name, by_seed in systems.items():
        assert list(by_seed) == [0, 1]
        if name != "embedding":
            assert {len(each.token_ids) for each in by_seed.values()} == {8}
    assert not torch.equal(systems["patch"][0].rows, systems["patch"][1].rows)
    assert build.seeded(1).held_out == build.held_out
    assert build.seeded(1).pairs.train == build.pairs.train
    with pytest.raises(RunError, match="several training seeds"):
        make_systems(patch, None, seeds=2)


@pytest.mark.slow
def test_eval_writes_its_figures_into_the_patch(built):
    build, patch, path = built
    code, out, err = run_cli("eval", path, "--max-new-tokens", "12", "--seeds", "2", "--json")
    assert code == 0, err
    saved = Patch.load(path)
    assert saved.digest == patch.digest
    evaluation = read(Evaluation, saved.meta.evaluation)
    assert evaluation.data_digest == build.held_out.digest == json.loads(out)["data_digest"]
    by_name = {system.name: system for system in evaluation.systems}
    assert by_name["patch"].seeds == [0, 1]
    loss = by_name["patch"].figures["loss"]
    assert loss.value == loss.per_seed[0] == evaluation.loss_patch
    assert loss.value == pytest.approx(build.patched_loss(patch, build.held_out), rel=1e-5)
    assert by_name["base"].figures["loss"].value == pytest.approx(token_loss(build.model, build.held_out.examples))
    assert by_name["random"].figures["loss"].patch_minus.high < 0
    assert loss.patch_minus is None
    assert evaluation.part == "held-out"
    # Trained rows help, and moving the same rows as far anywhere does not: for this tiny model as for the real one.
    assert by_name["patch"].figures["loss"].high < 0
    assert by_name["noise"].figures["loss"].value > by_name["patch"].figures["loss"].value + 0.1
    assert [sample.source for sample in evaluation.samples] == [pair.source for pair in build.held_out.pairs[:6]]

    # Again: nothing is trained or generated, and a table comes out.
    before = sorted(file.stat().st_mtime_ns for file in (build.run / "outputs").iterdir())
    code, out, err = run_cli("eval", path, "--max-new-tokens", "12", "--seeds", "2", "--no-save")
    assert code == 0, err
    assert "embedding tuning:" not in err.replace("embedding tuning: already done", "")
    assert sorted(file.stat().st_mtime_ns for file in (build.run / "outputs").iterdir()) == before
    for text in ("16 held-out pairs; in brackets", "2 training seeds", "most frequent", "95% interval", "Note: BLEU"):
        assert text in out


def test_eval_without_the_run_folder_takes_a_base_and_test_pairs(built, base_folder, tmp_path):
    build, patch, _ = built
    lone = tmp_path / "lone.safetensors"
    patch.save(lone)
    code, _, err = run_cli("eval", lone)
    assert (code, "measure the patch alone with --base M --test G" in err) == (2, True)
    test = tmp_path / "test.tsv"
    test.write_text("".join("\t".join(pair[:2]) + "\n" for pair in build.pairs.held_out[:4]))
    target = tmp_path / "measured.safetensors"
    arguments = ("eval", lone, "--base", base_folder, "--test", test, "--max-new-tokens", "8", "-o", target)
    code, _, err = run_cli(*arguments)
    assert code == 0, err
    evaluation = read(Evaluation, Patch.load(target).meta.evaluation)
    assert {system.name for system in evaluation.systems} == {"base", "patch", "noise"}
    assert evaluation.pairs == 4
    assert Patch.load(lone).meta.evaluation == patch.meta.evaluation
    assert run_cli(*arguments, "--force", "--controls", "best")[0] == 2
    test.write_text("one\tuno\n")
    code, _, err = run_cli(*arguments, "--force")
    assert (code, "fewer than two test pairs" in err) == (2, True)


def test_pairs_that_were_trained_on_are_refused(built, pairs_file):
    _, _, path = built
    code, _, err = run_cli("eval", path, "--test", pairs_file, "--no-save")
    assert (code, "are in the patch's own training data" in err) == (1, True)


def test_a_build_is_opened_again_only_with_its_own_pairs(built, tmp_path):
    build, patch, _ = built
    again = reopen(patch, build.run)
    assert (again.config.language, again.pairs) == ("es", build.pairs)
    other = tmp_path / "other.tsv"
    other.write_text("".join(f"{s}\t{t}\n" for s, t, *_ in build.pairs.train[:40]))
    with pytest.raises(DataError, match="do not give the training data of this patch"):
        reopen(patch, build.run, pairs=str(other))
    [record] = build.run.glob("patch-*.json")
    (tmp_path / record.name).write_text('{"base": 1}')
    with pytest.raises(RunError, match="cannot read the record of the build"):
        reopen(patch, tmp_path)


def test_rows_act_only_where_they_are_let(built):
    build, patch, _ = built
    held_out = build.held_out.first(6)
    found = {
        place: run_at(build.model, build.tokenizer, held_out, patch, place, max_new_tokens=12, batch_size=4)
        for place in PLACES
    }
    everywhere = outputs_of(build.model, build.tokenizer, held_out, patch, max_new_tokens=12)
    assert found["everywhere"].token_ids == everywhere.token_ids
    assert found["everywhere"].losses == pytest.approx(everywhere.losses, rel=1e-5)
    # Scope "prompt" is what the runtimes call it.
    prompt_only = dataclasses.replace(patch, meta=dataclasses.replace(patch.meta, scope="prompt"))
    in_scope = outputs_of(build.model, build.tokenizer, held_out, prompt_only, max_new_tokens=12)
    assert found["prompt"].token_ids == in_scope.token_ids
    assert found["prompt"].losses == pytest.approx(in_scope.losses, rel=1e-5)
    assert found["prompt"].losses != pytest.approx(everywhere.losses, rel=1e-5)

    # By hand, from embeddings: one example, the rows put in at the positions in question.
    example, pair = held_out.examples[0], held_out.pairs[0]
    text = build.template.render(pair.source)
    begin = text.index(pair.source)
    offsets = build.tokenizer(text, return_offsets_mapping=True).offset_mapping
    inside = [a < begin + len(pair.source) and b > begin for a, b in offsets]
    assert build.tokenizer.decode([t for t, i in zip(example.prompt, inside, strict=True) if i]).strip() == pair.source
    n, ids = len(example.prompt), torch.tensor([example.prompt + example.answer])
    places = {
        "template": [not i for i in inside] + [False] * len(example.answer),
        "source": inside + [False] * len(example.answer),
        "target": [False] * n + [True] * len(example.answer),
    }
    with torch.no_grad():
        base = build.model.get_input_embeddings()(ids)
        patched = overwritten(build.model, patch).get_input_embeddings()(ids)
        for place, mask in places.items():
            mixed = torch.where(torch.tensor(mask)[None, :, None], patched, base)
            logits = build.model(inputs_embeds=mixed).logits[0, n - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example.answer), reduction="sum")
            assert found[place].losses[0] == pytest.approx(float(loss), rel=1e-4)
    assert len({tuple(outputs.losses) for outputs in found.values()}) == len(PLACES)


def test_where_rows_act_needs_an_input_side_patch(built):
    build, patch, _ = built
    both = patch.with_meta(side="input+output")
    with pytest.raises(RunError, match="patches of side 'input'"):
        run_at(build.model, build.tokenizer, build.held_out, both, "prompt", max_new_tokens=4)
