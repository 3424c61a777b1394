"""Reserved rows: which tokens they are, where they stand, that they change nothing else, and who takes which."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import CHAT, NAME, PAIRS, run_cli, some, tiny_llama

from ksl_patch.base import find_embedding
from ksl_patch.base.reserved import ReservedTokens, names_in
from ksl_patch.data.templates import make_template
from ksl_patch.errors import BaseMismatchError, RunError
from ksl_patch.evidence.elsewhere import sample
from ksl_patch.hf import attach, load_base, prompt_ids
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Certificate, Evaluation, read
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import SilentReporter

FREE = [400, 402, *range(404, 412)]
PLAIN = "Translate this sentence from English to Spanish.\nEnglish: {source}\nSpanish:"


@pytest.fixture(scope="module")
def folder(reserved_folder):
    return reserved_folder


def config(folder, pairs_file, **changes):
    settings = {
        "base": str(folder), "pairs": str(pairs_file), "language": "es", "name": "es", "alpha": None, "top_k": 4,
        "selection": "reserved", "steps": 3, "embed_steps": 2, "batch_size": 2, "dev": 2, "held_out": 4,
    }  # fmt: skip
    return BuildConfig(**settings | changes)


def built(tmp_path, folder, pairs_file, **changes):
    return Build(config(folder, pairs_file, **changes), tmp_path / "run", SilentReporter())


def names(*ids):
    return "".join(NAME.format(i - 400) for i in ids)


@pytest.mark.parametrize(
    "name",
    ["<unused5>", "[unused5]", "<|reserved_special_token_7|>", "<reserved_106>", "<|extra_3|>", "<|EXTRA_3_TOKEN|>",
     "<SPECIAL_12>", "<|dummy_7|>", "<|placeholder1|>", "[UNUSED_TOKEN_146]", ">>UNUSED_119<<", "<|reserved003|>",
     "<｜place▁holder▁no▁799｜>", "<extra_id_3>", "<unused_1>"],
)  # fmt: skip
def test_names_of_reserved_tokens_as_tokenizers_write_them(name):
    assert names_in([f"x{name}y{name}"]) == {name.lower()}


@pytest.mark.parametrize(
    "text", ["<unk>", "<|im_start|>", "unused5", "a < unused 5 >", "<unused>", "[control_8]", "<b1>"]
)
def test_what_is_no_such_name(text):
    assert not names_in([text])


def test_the_free_ones_have_no_role_and_no_place_in_the_chat_template(reserved_tokenizer):
    reserved = ReservedTokens(reserved_tokenizer)
    assert list(reserved) == FREE
    assert "role" in reserved.why_not(401)
    assert "chat template" in reserved.why_not(403)
    assert "name" in reserved.why_not(ord("a") % 256)
    assert reserved.in_text(f"a {names(405, 401, 404)} b {names(405)}") == [404, 405]


def test_a_model_s_configuration_gives_roles(reserved_tokenizer):
    model = tiny_llama(vocab_size=416)
    model.config.image_token_id = 400
    model.generation_config.eos_token_id = [1, 402]
    assert list(ReservedTokens(reserved_tokenizer, model)) == FREE[2:]


def test_a_chat_template_that_puts_a_name_together_has_it(reserved_tokenizer, monkeypatch):
    made = CHAT.replace("<|{{ m.role }}|>", "<|reserved_special_token_{{ 2 + 3 }}|>")
    monkeypatch.setattr(reserved_tokenizer, "chat_template", made)
    assert list(ReservedTokens(reserved_tokenizer)) == [i for i in FREE if i != 405]
    monkeypatch.setattr(reserved_tokenizer, "chat_template", {"default": CHAT, "tools": names(411)})
    assert list(ReservedTokens(reserved_tokenizer)) == FREE[:-1]


def test_a_token_without_a_row_is_none(reserved_tokenizer):
    assert list(ReservedTokens(reserved_tokenizer, tiny_llama(vocab_size=410))) == FREE[:-2]


def test_a_name_that_the_tokenizer_alone_finds_in_the_pairs_is_refused(tmp_path, folder, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    texts = [(f"{s} {names(400)}", t) for s, t in PAIRS]
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in texts))
    monkeypatch.setattr("ksl_patch.train.reserved.names_in", lambda texts: set())
    with pytest.raises(RunError, match="remove their names from the pairs"):
        built(tmp_path, folder, file)


def test_a_tokenizer_that_reads_names_as_text_has_none(reserved_tokenizer):
    reserved_tokenizer.split_special_tokens = True
    try:
        reserved = ReservedTokens(reserved_tokenizer)
        assert list(reserved) == []
        assert "one token" in reserved.why_not(400)
    finally:
        reserved_tokenizer.split_special_tokens = False


@pytest.mark.parametrize(
    ("kind", "text"),
    [("plain", names(400, 402, 404) + PLAIN), ("soft", names(400, 402) + "{source}" + names(404)),
     ("Say it: {source}", names(400, 402, 404) + "Say it: {source}"),
     ("a{reserved:1}b{source}c{reserved}", "a" + names(404) + "b{source}c" + names(400, 402)),
     ("{reserved}a{source}{reserved}", names(400, 402, 404) + "a{source}" + names(400, 402, 404)),
     ("{reserved:2}{source}{reserved:1}", names(400, 402) + "{source}" + names(404))],
)  # fmt: skip
def test_where_they_stand(tokenizer, kind, text):
    made = make_template(
        kind, source_language="en", language="es", tokenizer=tokenizer,
        reserved=[NAME.format(i) for i in (0, 2, 4)],
    )  # fmt: skip
    assert made.text == text
    assert made.fields is None
    assert "reserved" not in made.unpatched
    assert made.unpatched.count("{source}") == 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [("Russian: {reserved}", "Russian:"), ("Russian:{reserved}", "Russian:"), ("{reserved} Say", "Say"),
     ("a {reserved} b", "a b"), ("a{reserved}b", "ab"), ("x {reserved}\ny", "x\ny"), ("x\n{reserved}\ny", "x\n\ny")],
)  # fmt: skip
def test_without_them_no_space_of_theirs_stays(tokenizer, text, plain):
    """An answer after a space is cut into other tokens, and the base would look worse than it is."""
    own = [NAME.format(0), NAME.format(2)]
    made = make_template(f"{{source}}\n{text}", source_language="en", language="es", tokenizer=tokenizer, reserved=own)
    assert made.of_base().text == f"{{source}}\n{plain}"
    kind = f"{{source}}\n{text}".replace("{reserved}", "".join(own))
    named = make_template(kind, source_language="en", language="es", tokenizer=tokenizer, named=own)
    assert named == made


def test_in_a_chat_they_are_in_the_user_s_turn(reserved_tokenizer):
    made = make_template(
        "chat", source_language="en", language="es", tokenizer=reserved_tokenizer, reserved=[NAME.format(0)]
    )
    assert made.text.startswith(f"<|user|>\n{names(400)}Translate this sentence")
    with_system = make_template(
        "chat", source_language="en", language="es", tokenizer=reserved_tokenizer, reserved=[NAME.format(0)],
        system="{reserved}Be brief.",
    )  # fmt: skip
    assert with_system.text.startswith(f"<|system|>\n{names(400)}Be brief.")
    assert with_system.text.count("reserved") == 1


@pytest.mark.parametrize(
    "kind", ["{reserved:5}{source}", "{reserved:3}{source}{reserved}", "{reserved:2}{source}", "{reserved:0}{source}"]
)
def test_places_that_do_not_fit_are_refused(tokenizer, kind):
    with pytest.raises(RunError, match="of the 3 reserved rows"):
        make_template(kind, source_language="en", language="es", tokenizer=tokenizer, reserved=["<a>", "<b>", "<c>"])


@pytest.mark.parametrize("kind", ["soft", "{reserved}{source}"])
def test_places_without_reserved_rows_are_refused(tokenizer, kind):
    with pytest.raises(RunError, match="--selection reserved"):
        make_template(kind, source_language="en", language="es", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def patch(tmp_path_factory, folder, pairs_file):
    return built(tmp_path_factory.mktemp("run"), folder, pairs_file).patch()


def test_a_build_takes_the_first_free_ones_and_trains_them(patch, folder):
    assert patch.token_ids.tolist() == FREE[:4]
    assert patch.meta.template.text == names(*FREE[:4]) + PLAIN
    assert (patch.meta.ticket.selection, patch.meta.ticket.top_k) == ("reserved", 4)
    assert not torch.equal(patch.rows, patch.base_rows)
    assert patch.meta.training.embed_steps == 0


def test_text_of_twenty_languages_gets_the_base_s_bits(patch, folder):
    model, tokenizer = load_base(str(folder), device="cpu")
    assert len(sample()) == 20
    with torch.no_grad():
        inputs = [torch.tensor([tokenizer(text).input_ids[:200]]) for text in sample().values()]
        before = [model(ids).logits for ids in inputs]
        own = torch.tensor([prompt_ids(tokenizer, [patch.meta.template.render("One.")])[0]])
        asked = model(own).logits
        with attach(model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
            assert all(torch.equal(model(ids).logits, logits) for ids, logits in zip(inputs, before, strict=True))
            assert not torch.equal(model(own).logits, asked)


def test_training_starts_from_the_instruction_or_from_the_rows_themselves(tmp_path, folder, pairs_file):
    from ksl_patch.train.reserved import start_ids, start_rows

    build = built(tmp_path, folder, pairs_file, top_k=8)
    ids = torch.tensor(build.reserved_ids)
    words = start_ids(build, 40)
    spoken = [
        i for text in (PLAIN.split("{source}")) for i in build.tokenizer(text, add_special_tokens=False).input_ids
    ]
    assert words == [spoken[i % len(spoken)] for i in range(40)]
    table = find_embedding(build.model).weight.detach()
    assert torch.equal(start_rows(build, ids), table[spoken[:8]])
    assert start_rows(built(tmp_path, folder, pairs_file, top_k=8, start="base"), ids) is None
    # Without words of its own, those of the plain instruction.
    assert start_ids(built(tmp_path, folder, pairs_file, template="soft"), 40) == words
    keys = [
        built(tmp_path, folder, pairs_file, start=start).key_of(3, 0.1, build.ticket()) for start in ("text", "base")
    ]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("start", ["text", "base"])
def test_a_build_that_is_run_again_gives_the_same_patch(tmp_path, folder, pairs_file, start):
    first = built(tmp_path / "a", folder, pairs_file, start=start).patch()
    assert built(tmp_path / "b", folder, pairs_file, start=start).patch().digest == first.digest


def test_the_same_pairs_are_kept_as_without_reserved_rows(tmp_path, folder):
    file = tmp_path / "pairs.jsonl"
    texts = [(f"{s} {s}" if i % 3 else s, t) for i, (s, t) in enumerate(PAIRS)]
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in texts))
    lengths = {
        len(example.prompt) + len(example.answer)
        for example in built(tmp_path, folder, file, selection="ks").train.examples
    }
    kept = [
        built(tmp_path, folder, file, selection=selection, max_length=max(lengths) - 1).train.pairs
        for selection in ("ks", "reserved")
    ]
    assert kept[0] == kept[1]
    assert 0 < len(kept[0]) < len(built(tmp_path, folder, file).train)


def test_tokens_that_the_pairs_have_are_left_alone(tmp_path, folder):
    file = tmp_path / "pairs.jsonl"
    texts = [
        (f"{s} {names(400).upper() if i == 3 else ''}", f"{t}{names(404) if i == 5 else ''}")
        for i, (s, t) in enumerate(PAIRS)
    ]
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in texts))
    assert built(tmp_path, folder, file).reserved_ids == [402, 405, 406, 407]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"top_k": 11}, "11 rows asked for, and this base has 10 reserved tokens"),
     ({"template": f"{NAME.format(5)} {{source}}"}, "names <|reserved_special_token_5|> itself"),
     ({"template": "{reserved:9}{source}"}, "places 9 of the 4 reserved rows"),
     ({"template": "soft", "top_k": 1}, "--top-k 2 or more"),
     ({"template": "Hi {reserved:x}{source}"}, "{reserved:x} is no place"),
     ({"template": "{Reserved}{source}"}, "{Reserved} is no place"), ({"scope": "prompt"}, "has scope 'all'"),
     ({"side": "input+output"}, "has side 'input'"), ({"mode": "transfer"}, "has mode 'partial'"),
     ({"top_k": None}, "needs top_k"),
     ({"selection": "frequency", "beside": ("x",)}, "by the selection 'reserved' only"),
     ({"selection": "frequency", "template": "soft"}, "add --selection reserved")],
)  # fmt: skip
def test_what_cannot_be_is_said(tmp_path, folder, pairs_file, changes, sentence):
    with pytest.raises(RunError) as said:
        built(tmp_path, folder, pairs_file, **changes)
    assert sentence in str(said.value)


def test_a_base_without_any_says_so(tmp_path, base_folder, pairs_file):
    with pytest.raises(RunError, match="this base has no reserved token: no name in its vocabulary says so"):
        built(tmp_path, base_folder, pairs_file)


def test_languages_beside_each_other_take_other_tokens_and_merge(tmp_path, folder, pairs_file, patch):
    patch.save(tmp_path / "es.safetensors")
    build = built(tmp_path, folder, pairs_file, beside=(str(tmp_path / "es.safetensors"),), name="fr", template="soft")
    assert build.reserved_ids == FREE[4:8]
    other = build.patch()
    other.save(tmp_path / "fr.safetensors")
    third = built(
        tmp_path, folder, pairs_file, name="ca", top_k=2,
        beside=(str(tmp_path / "es.safetensors"), str(tmp_path / "fr.safetensors")),
    ).patch()  # fmt: skip
    assert third.token_ids.tolist() == FREE[8:]
    third.save(tmp_path / "ca.safetensors")
    code, out, _ = run_cli(
        "merge", *(tmp_path / f"{name}.safetensors" for name in ("es", "fr", "ca")), "-o", tmp_path / "all.safetensors"
    )
    merged = Patch.load(tmp_path / "all.safetensors")
    assert (code, merged.token_ids.tolist()) == (0, FREE)
    assert [origin.name for origin in merged.meta.origin] == ["es", "fr", "ca"]
    assert "different prompt templates" in out
    with pytest.raises(
        RunError, match="4 rows asked for, and this base has 10 reserved tokens, 2 of which nothing else"
    ):
        built(
            tmp_path, folder, pairs_file,
            beside=(str(tmp_path / "es.safetensors"), str(tmp_path / "fr.safetensors")),
        )  # fmt: skip


def test_a_patch_of_another_base_is_no_neighbour(tmp_path, folder, pairs_file, patch):
    patch.save(tmp_path / "es.safetensors")
    other = tmp_path / "other"
    tiny_llama(vocab_size=416, seed=5).save_pretrained(other)
    load_base(str(folder), device="cpu")[1].save_pretrained(other)
    with pytest.raises(BaseMismatchError):
        built(tmp_path, other, pairs_file, beside=(str(tmp_path / "es.safetensors"),))
    # Nor one of a base with the same reserved rows and others elsewhere.
    model = load_base(str(folder), device="cpu")[0]
    with torch.no_grad():
        find_embedding(model).weight[30] += 1
    model.save_pretrained(other)
    with pytest.raises(BaseMismatchError, match="other rows elsewhere"):
        built(tmp_path, other, pairs_file, beside=(str(tmp_path / "es.safetensors"),))


def test_a_tokenizer_that_would_not_reach_the_rows_is_refused(patch, folder):
    model, tokenizer = load_base(str(folder), device="cpu")
    patch.check(model, tokenizer)
    tokenizer.split_special_tokens = True
    with pytest.raises(BaseMismatchError, match="would never be reached"):
        patch.check(model, tokenizer)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [(("--start", "base"), "are for reserved rows"), (("--beside", "x.safetensors"), "are for reserved rows"),
     (("--template", "soft"), "add --selection reserved"),
     (("--selection", "reserved", "--top-k", 2, "--alpha", 0.1), "--alpha is a level of the KS test")],
)  # fmt: skip
def test_their_options_are_theirs(tmp_path, folder, pairs_file, extra, sentence):
    code, _, err = run_cli(
        "build", "--base", folder, "--pairs", pairs_file, "--language", "es", "-o", tmp_path / "x.safetensors", *extra
    )
    assert (code, sentence in " ".join(err.split())) == (2, True)
    assert "Loading" not in err


def test_what_a_prompt_without_its_tokens_gets_is_said(tmp_path, folder, patch):
    file, other = tmp_path / "es.safetensors", tmp_path / "fr.safetensors"
    patch.save(file)
    patch.with_meta(template=replace(patch.meta.template, unpatched="{source} =")).save(other)
    common = ("generate", "--base", folder, "--max-new-tokens", 4, "--json")
    code, bare, err = run_cli(*common, "--patch", file, "--patch", "base", "--prompt", "Hello", "--prompt", "Hello")
    assert code == 0
    assert "prompt 1 is not in the template" in err
    assert "(and 1 more)" in err
    texts = [json.loads(line)["text"] for line in bare.splitlines()]
    assert texts[0] == texts[1]
    # With the template the base gets the prompt without reserved tokens.
    prompt = patch.meta.template.of_base().render("Hello")
    _, asked, err = run_cli(
        *common, "--patch", file, "--patch", "base", "--prompt", "Hello", "--prompt", "Hello", "--apply-template"
    )
    assert "Warning" not in err
    _, wanted, _ = run_cli(*common, "--prompt", prompt)
    assert json.loads(asked.splitlines()[1])["text"] == json.loads(wanted)["text"]
    _, _, err = run_cli(
        *common,
        "--apply-template",
        *(x for each in (file, other, "base") for x in ("--patch", each, "--prompt", "Hello")),
    )
    assert "the patches have different templates, so prompt 3, for the base, is as it was given" in " ".join(
        err.split()
    )


def test_a_build_shows_its_prompt_and_its_rate_and_says_when_it_gained_nothing(
    tmp_path, folder, pairs_file, monkeypatch
):
    class Notes(SilentReporter):
        def __init__(self):
            self.notes = {}

        def note(self, event, message, **values):
            self.notes[event] = message

    reporter = Notes()
    made = Build(config(folder, pairs_file), tmp_path / "run", reporter)
    assert json.dumps(names(*FREE[:4]) + PLAIN) in reporter.notes["start"]
    assert "(rows)" in reporter.notes["start"]
    assert "(embedding)" not in reporter.notes["start"]
    tunings = made.patch().meta.training.tunings
    assert tunings.startswith(f"{made.config.steps} steps of the rows at learning rate ")
    assert "embedding" not in tunings
    assert "no_gain" not in reporter.notes
    monkeypatch.setattr(Build, "patched_loss", lambda *_: 99.0)
    Build(config(folder, pairs_file, steps=2), tmp_path / "run", reporter).patch()
    assert "no better than the base" in reporter.notes["no_gain"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory, folder, pairs_file):
    """A patch of reserved rows and its evaluation, certificate and report, by the command line."""
    work = tmp_path_factory.mktemp("judged")
    file = work / "es.safetensors"
    common = ("--base", folder, "--pairs", pairs_file, "--language", "es", "--dev", 2, "--held-out", 4, "--steps", 3,
              "--embed-steps", 2, "--batch-size", 2, "--top-k", 4, "-y")  # fmt: skip
    assert run_cli("build", *common, "-o", work / "ks.safetensors", "--resume", work / "run")[0] == 0
    assert run_cli("build", *common, "--selection", "reserved", "-o", file, "--resume", work / "run")[0] == 0
    out = {}
    for command in ("eval", "certify"):
        code, out[command], err = run_cli(command, file, "--run", work / "run", "--max-new-tokens", 8)
        assert code == 0, err
    assert run_cli("report", file, "--run", work / "run", "-o", work / "report.html")[0] == 0
    return file, out, (work / "report.html").read_text()


@pytest.mark.slow
def test_eval_has_every_control_in_its_own_prompt(judged, folder):
    file, out, _ = judged
    evaluation = read(Evaluation, Patch.load(file).meta.evaluation)
    systems = {system.name: system for system in evaluation.systems}
    assert systems.keys() == {"base", "patch", "embedding", "ks", "frequency", "l2", "random", "noise"}
    note = next(note for note in evaluation.notes if note.startswith("Another prompt"))
    assert repr(PLAIN) in note
    assert all(label in note for label in ("base", "most frequent rows", "largest KS distance", "embedding tuned"))
    assert "random change" not in note
    found = evaluation.elsewhere
    assert (found.reserved, found.touched, found.equal, found.same) == (True, 0, 20, 8)
    assert systems["patch"].figures["other_loss"].difference == 0
    assert systems["patch"].figures["touched"].value == 0
    assert systems["frequency"].figures["touched"].value > 0
    assert systems["frequency"].figures["other_loss"].difference != 0
    assert "Harmless outside its template" in out["eval"]
    # The base's loss is that of the prompt without reserved tokens.
    build = Build(replace(_config(file), selection="frequency"), file.parent / "run", SilentReporter())
    from ksl_patch.train.loss import token_loss

    assert systems["base"].figures["loss"].value == pytest.approx(token_loss(build.model, build.held_out.examples))


def _config(file):
    from ksl_patch.train.record import read_record

    return BuildConfig(**read_record(file.parent / "run", Patch.load(file).digest).config)


@pytest.mark.slow
def test_certify_says_what_holds_and_no_more(judged):
    file, out, report = judged
    certificate = read(Certificate, Patch.load(file).meta.certificate)
    assert certificate.next_token is certificate.exact is certificate.margin is None
    assert certificate.elsewhere.reserved
    assert certificate.elsewhere.equal == 20
    assert "Agreement with the tuned" not in out["certify"]
    assert "bit for bit" in " ".join(out["certify"].split()).replace("│ │", "")
    assert report.count("Harmless outside its template") >= 2


@pytest.mark.slow
def test_reserved_rows_are_a_control_of_other_patches(judged, folder):
    file = judged[0].with_name("ks.safetensors")
    code, out, err = run_cli(
        "eval", file, "--run", file.parent / "run", "--max-new-tokens", 8, "--controls", "reserved,frequency", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    systems = {system["name"]: system for system in result["systems"]}
    assert systems["reserved"]["rows"] == [4]
    assert systems["reserved"]["figures"]["other_loss"]["difference"] == 0
    assert result["elsewhere"]["reserved"] is False
    assert result["elsewhere"]["touched"] > 0
    assert any(names(*FREE[:4]) in note for note in result["notes"] if note.startswith("Another prompt"))


def test_verify_and_inspect_check_it_with_the_base(tmp_path, folder, patch):
    file = tmp_path / "es.safetensors"
    patch.save(file)
    code, out, _ = run_cli("verify", file, "--base", folder)
    assert code == 0
    assert "Harmless outside its template" in out
    assert json.loads(run_cli("verify", file, "--base", folder, "--json")[1])["harmless"] is True
    assert "Harmless outside its template" in " ".join(run_cli("inspect", file)[1].split())
    # A patch that calls other tokens reserved.
    model, tokenizer = load_base(str(folder), device="cpu")
    rows = find_embedding(model).weight.detach()[[10, 400]] + 1
    false = Patch.from_model(model, [10, 400], rows, name="false", tokenizer=tokenizer)
    false = false.with_meta(ticket=patch.meta.ticket)
    false.save(file)
    code, _, err = run_cli("verify", file, "--base", folder)
    assert code == 1
    assert "calls its tokens reserved, and 1 of them are not" in err
    false.with_meta(ticket=None).save(file)
    code, out, _ = run_cli("verify", file, "--base", folder)
    assert code == 0
    assert "Outside its template it changes" in out


def test_a_patch_of_the_head_is_never_harmless(folder):
    from ksl_patch.evidence.elsewhere import touched

    model, tokenizer = load_base(str(folder), device="cpu")
    rows = find_embedding(model).weight.detach()[[400]] + 1
    whole = Patch.from_model(model, [400], rows, name="whole", tokenizer=tokenizer, side="input+output")
    found = touched(whole, tokenizer, model)
    assert (found.reserved, found.touched) == (False, found.tokens)
    assert touched(replace(whole, meta=replace(whole.meta, side="input")), tokenizer, model).reserved is True


def test_rows_of_prompts_alone_act_on_other_texts_as_on_prompts(folder):
    from ksl_patch.evidence.elsewhere import measured

    model, tokenizer = load_base(str(folder), device="cpu")
    ids = sorted({i for text in sample().values() for i in tokenizer(text).input_ids[1:]})[:8]
    losses = {
        scope: measured(model, tokenizer, some(folder, "x", ids, scope=scope))["losses"] for scope in ("all", "prompt")
    }
    assert losses["prompt"] == losses["all"]
    assert losses["all"] != measured(model, tokenizer, None)["losses"]


@pytest.mark.parametrize(
    ("kind", "system", "unpatched"),
    [("soft", None, PLAIN), ("<|reserved_special_token_1|>{reserved}{source}</s>", None, PLAIN),
     ("{context}\\n{reserved}{source}", None, "{context}\n" + PLAIN),
     ("chat", "{reserved}", f"<|user|>\n{PLAIN.partition(chr(10))[0]}\n{{source}}</s>\n<|assistant|>\n"),
     ("chat", "{reserved} Be brief.", "<|system|>\nBe brief.</s>\n<|user|>\nTranslate this sentence from English to "
      "Spanish.\n{source}</s>\n<|assistant|>\n")],
)  # fmt: skip
def test_what_the_base_alone_is_asked(reserved_tokenizer, kind, system, unpatched):
    """Without words of the template's own, marks of the tokenizer's are none; no turn of a chat is left empty."""
    made = make_template(
        kind, source_language="en", language="es", tokenizer=reserved_tokenizer, system=system,
        reserved=[NAME.format(i) for i in (5, 6)],
    )  # fmt: skip
    assert made.of_base().text == made.unpatched == unpatched
    assert made.of_base().of_base() == made.of_base()
    assert made.of_base().fields == made.fields


def test_the_base_and_the_controls_get_the_same_pairs_however_long_their_prompt_is(tmp_path, folder, pairs_file):
    """`soft` is shorter than the plain prompt, by which no pair is left out then."""
    whole = built(tmp_path, folder, pairs_file, template="soft")
    lengths = [len(example.prompt) + len(example.answer) - 4 for example in whole.dev.examples]
    build = built(tmp_path, folder, pairs_file, template="soft", max_length=max(lengths))
    assert build.of_base(build.dev).pairs == build.dev.pairs
    control = build.selecting("frequency", 4)
    assert (control.train.pairs, control.dev.pairs) == (build.train.pairs, build.dev.pairs)
    assert control.held_out.pairs == build.held_out.pairs
    assert control.template.text == PLAIN
    back = control.selecting("reserved", 4)
    assert (back.reserved_ids, back.train.pairs) == (FREE[:4], build.train.pairs)
    assert build.patch().meta.evaluation["pairs"] == len(build.dev)


def test_rows_named_by_hand_are_compared_without_them_too(tmp_path, folder, pairs_file):
    own = names(400, 404)
    build = built(
        tmp_path, folder, pairs_file, selection="ks", rows=(400, 404, 10), template=f"{own} Say: {{source}} ="
    )
    assert build.reserved_ids == [400, 404]
    assert build.template.of_base().text == "Say: {source} ="
    assert build.selecting("frequency", 3).template.text == "Say: {source} ="
    with pytest.raises(RunError, match="the template names"):
        build.selecting("reserved", 3)


def test_alone_and_with_the_run_folder_the_base_has_one_prompt(tmp_path, folder, pairs_file):
    file, test = tmp_path / "es.safetensors", tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"source": f"{s} Now.", "target": t}) + "\n" for s, t in PAIRS[:4]))
    common = ("--no-save", "--json", "--max-new-tokens", 4, "--controls", "none", "--test", test)
    code, _, err = run_cli(
        "build", "--base", folder, "--pairs", pairs_file, "--language", "es", "--dev", 2, "--held-out", 4, "--steps", 2,
        "--batch-size", 2, "--top-k", 4, "--selection", "reserved", "--template", "soft", "-o", file, "-y",
        "--resume", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    results = []
    for more in (("--run", tmp_path / "run"), ("--alone", "--base", folder)):
        code, out, err = run_cli("eval", file, *common, *more)
        assert code == 0, err
        results.append(json.loads(out))
    assert results[0]["loss_base"] == results[1]["loss_base"]
    # What the template's own tokens are elsewhere in a prompt, nobody measures.
    test.write_text(json.dumps({"source": "a <|reserved_special_token_0|>", "target": "b"}) + "\n" + test.read_text())
    for more in (("--run", tmp_path / "run"), ("--alone", "--base", folder)):
        code, _, err = run_cli("eval", file, *common, *more)
        assert (code, "finds other reserved tokens in the pair" in err) == (1, True)
    for result in results:
        assert any(f"{PLAIN!r}, has: base" in note for note in result["notes"])


def test_a_base_that_gives_a_reserved_token_a_role_now_is_another(tmp_path, folder, pairs_file):
    from ksl_patch.train.reopen import reopen

    patch = built(tmp_path, folder, pairs_file).patch()
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert reopen(patch, tmp_path / "run", base=str(moved)).reserved_ids == FREE[:4]
    generation = json.loads((moved / "generation_config.json").read_text())
    (moved / "generation_config.json").write_text(json.dumps(generation | {"bad_words_ids": [[7, 404]]}))
    with pytest.raises(RunError, match="does not take '<.reserved_special_token_4.>' for reserved.*a role"):
        reopen(patch, tmp_path / "run", base=str(moved))


@pytest.mark.parametrize("moved", ["unknown", "around", "nested", "stops"])
def test_roles_that_nothing_declares(tmp_path, reserved_tokenizer, moved):
    from tokenizers.processors import TemplateProcessing

    state = json.loads(reserved_tokenizer.backend_tokenizer.to_str())
    if moved == "unknown":
        state["model"]["unk_token"] = NAME.format(0)
        state["model"]["vocab"][NAME.format(0)] = 400
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(reserved_tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        bos_token="<s>", eos_token="</s>", pad_token=NAME.format(1),
    )  # fmt: skip
    model = tiny_llama(vocab_size=416)
    if moved == "around":
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{NAME.format(0)} $A", special_tokens=[(NAME.format(0), 400)]
        )
    elif moved == "nested":
        model.config.vision = [{"image_start_id": 400}]
    elif moved == "stops":
        model.generation_config.stop_strings = ["\n", NAME.format(0)]
    assert "role" in ReservedTokens(made, model).why_not(400)
    assert ReservedTokens(made, model).why_not(402) is None


def test_a_column_that_reads_like_a_reserved_name_is_a_column(tmp_path, folder):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps({"source": s, "target": t, "extra_1": "(special2) " + s[:5]}) + "\n" for s, t in PAIRS)
    )
    build = built(tmp_path, folder, file, template="{extra_1} (special2) {reserved}{source} =")
    assert (build.template.fields, build.reserved_ids) == (["extra_1"], FREE[:4])


def test_a_merged_patch_that_would_not_be_reached_is_refused(folder):
    from ksl_patch.merge import merge

    merged = merge(some(folder, "a", [400]), some(folder, "b", [404]), name="both")
    model, tokenizer = load_base(str(folder), device="cpu")
    merged.check(model, tokenizer)
    tokenizer.split_special_tokens = True
    with pytest.raises(BaseMismatchError, match="would never be reached"):
        merged.check(model, tokenizer)


def test_nothing_is_harmless_that_gave_another_answer(folder, patch):
    from ksl_patch.evidence.elsewhere import elsewhere_in, elsewhere_of

    model, tokenizer = load_base(str(folder), device="cpu")
    base = elsewhere_of(model, tokenizer, None)
    assert elsewhere_in(model, tokenizer, patch, base).reserved
    base["losses"][3] += 1e-6
    assert elsewhere_in(model, tokenizer, patch, base).reserved is False
