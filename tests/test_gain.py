"""Where a gain comes from: content and stopping, the output's language, rows that occur at all, the best single one."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import run_cli
from rich.console import Console
from test_build import Recorder
from test_report import evaluation, make
from tokenizers import processors

from ksl_patch import Patch
from ksl_patch.cli.eval import table
from ksl_patch.data.encoding import encode, source_tokens
from ksl_patch.data.pairs import Pair
from ksl_patch.data.recognition import recogniser
from ksl_patch.errors import RunError
from ksl_patch.evidence.evaluate import occurrences
from ksl_patch.evidence.outputs import Outputs
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.evidence.systems import make_systems
from ksl_patch.patch import TemplateMeta
from ksl_patch.patch.evaluation import Difference, Evaluation, Occurrence, Split, SystemScores, read, write
from ksl_patch.patch.wording import where_from, which_occur
from ksl_patch.report.page import make_report
from ksl_patch.store.card import make_card
from ksl_patch.ticket import given_ticket
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import SilentReporter
from ksl_patch.train.reopen import reopen
from ksl_patch.train.ticket_checks import template_tokens

REFERENCES = ["El gato ve el mar.", "La mano tiene pan.", "El perro ama la casa.", "Un libro en la mesa."]


def outputs(texts):
    n = len(texts)
    return Outputs(list(texts), [True] * n, [1.0] * n, [1] * n, [[1]] * n)


def shown(evaluation):
    """What `eval` prints of an evaluation, in one line."""
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table(evaluation, 140))
    return " ".join(capture.get().split())


# Content and stopping


def test_a_system_that_only_stops_has_gained_no_content():
    scorer = Scorer(REFERENCES, resamples=200)
    runs_on = outputs([f"{text}\nThe cat sees the sea.\nThe cat" for text in REFERENCES])
    found = scorer.split(outputs(REFERENCES), runs_on)
    assert (found.content.value, found.content.low, found.content.high) == (0, 0, 0)
    assert found.stopping == found.raw
    assert found.stopping.low > 10


def test_a_system_with_better_first_lines_has_gained_content_alone():
    scorer = Scorer(REFERENCES, resamples=200)
    found = scorer.split(outputs(REFERENCES), outputs(["The cat", "la mano", "El perro", "no"]))
    assert (found.stopping.value, found.stopping.low, found.stopping.high) == (0, 0, 0)
    assert found.content == found.raw
    assert found.content.low > 10


def test_the_parts_of_a_gain_are_its_figures_and_make_up_the_whole():
    scorer = Scorer(REFERENCES, resamples=200)
    base = outputs([f"{text[:9]}\nand more and more" for text in REFERENCES])
    better = outputs(["El gato ve el mar.\nEl gato", "La mano tiene pan.", "El perro quiere la casa.", "Un libro."])
    for one, other in ((better, base), (base, better)):  # a gain, and a loss
        found, figures = scorer.split(one, other), scorer.figures([one], other)
        for part, metric in ((found.raw, "chrf"), (found.content, "chrf_first_line")):
            figure = figures[metric]
            assert part == Difference(value=figure.difference, low=figure.low, high=figure.high)
        assert found.stopping.value == pytest.approx(found.raw.value - found.content.value)
        assert found.stopping.low < found.stopping.value < found.stopping.high
    assert found.raw.value < 0


def test_references_of_several_lines_are_not_split():
    references = ["El gato.\nLa mano.", *REFERENCES[1:]]
    scorer = Scorer(references, language="es")
    assert scorer.split(outputs(references), outputs(REFERENCES)) is None
    assert "References have several lines" in scorer.notes[-1]


def with_split(split):
    scores = SystemScores(name="patch", rows=[8], seeds=[0], figures={}, split=split)
    return dataclasses.replace(evaluation(), systems=[scores])


def test_a_gain_is_said_in_one_sentence():
    split = Split(
        raw=Difference(value=19.6, low=17.0, high=22.1),
        content=Difference(value=17.7, low=15.2, high=20.1),
        stopping=Difference(value=1.9, low=-0.8, high=3.2),
    )
    assert where_from(with_split(split)) == (
        "Of the patch's +19.6 (+17.0 to +22.1) chrF++ raw, +17.7 (+15.2 to +20.1) are content (the first line) and "
        "+1.9 (-0.8 to +3.2) stopping (what follows the first line)."
    )
    # One document has no interval, and a patch may lose.
    loss = Split(raw=Difference(value=-3.0), content=Difference(value=0.0), stopping=Difference(value=-3.0))
    assert "Of the patch's -3.0 chrF++ raw, 0.0 are content (the first line) and -3.0 stopping" in where_from(
        with_split(loss)
    )
    assert where_from(evaluation()) == ""
    one = Scorer(REFERENCES, groups=["book"] * 4).split(outputs(REFERENCES), outputs(["no"] * 4))
    assert one.raw.low is None
    assert one.raw.value == pytest.approx(one.content.value)


# The language of the output


@pytest.mark.parametrize(
    ("language", "own", "others"),
    [
        ("de", "Klicken Sie auf Barrierefreiheit in der Seitenleiste.", ["Click Accessibility in the sidebar."]),
        ("es", "No te olvides de hacer una copia.", ["N'oubliez pas de faire une copie.", "Do not forget it."]),
        ("id", "Buka ringkasan aktivitas dan mulai mengetik.", ["Open the overview and start typing."]),
        ("nb", "Jeg vet ikke hva det heter på norsk.", ["I do not know what it is called in Norwegian."]),
        ("pt-BR", "Não sei como se diz isso em português.", ["No sé cómo se dice esto en español."]),
        ("zh-Hant", "請打開設定面板。", ["設定パネルを開いてください。", "Open the settings panel."]),
        ("cmn", "请打开设置面板。", ["Open the settings panel."]),
        ("ar", "افتح لوحة الإعدادات.", ["1234", "...", "a", "", " "]),
    ],
)
def test_a_line_is_in_the_language_or_not(language, own, others):
    recognises = recogniser(language)
    assert recognises(own)
    assert [line for line in others if recognises(line)] == []


def test_the_source_s_language_is_an_answer_whatever_it_is():
    line = "Feu clic a la barra lateral per obrir el tauler."
    assert recogniser("es", "en")(line)  # Catalan is close to Spanish, and no other answer is closer
    assert not recogniser("es", "ca")(line)
    assert recogniser("es", "haw") is not None  # one that is not known is no answer


def test_the_share_of_outputs_in_the_language_and_what_it_can_be_at_most():
    references = [*REFERENCES[:3], "OK 42"]
    scorer = Scorer(references, language="es")
    base = outputs(["The cat sees the sea.", "The hand has bread.\nLa mano tiene pan.", "", "El libro está aquí."])
    found = scorer.figures([outputs(["El gato ve el mar.\nThe cat", *references[1:]])], base)["in_language"]
    assert (found.value, found.difference) == (0.75, 0.5)
    assert found.low < found.difference < found.high
    assert "py3langid takes the first lines of 75.0% of the references for Spanish" in scorer.notes[-1]


@pytest.mark.parametrize(
    ("language", "why"), [("haw", "py3langid does not know Hawaiian"), (None, "names no language")]
)
def test_a_language_that_is_not_known_has_no_such_figure(language, why):
    scorer = Scorer(REFERENCES, language=language)
    assert "in_language" not in scorer.of_base(outputs(REFERENCES))
    assert why in scorer.notes[-1]


# Which rows occur


TEMPLATE = TemplateMeta(text="Say: {source}: Now the end:", chat=False)


class Slow:
    """A tokenizer that does not say which characters a token covers."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, *args, **kwargs):
        assert "return_offsets_mapping" not in kwargs
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def counted(model, tokenizer, names, template=TEMPLATE):
    """The occurrences of rows in three pairs, by token; and the notes."""
    pairs = [Pair("The cat.", "El gato."), Pair("the the the", "El El"), Pair("cat: x", "casa")]
    ids = given_ticket(names, tokenizer, 400).token_ids
    rows = model.get_input_embeddings().weight.detach()[ids] + 1
    patch = Patch.from_model(model, ids, rows, name="es", tokenizer=tokenizer, template=template)
    found, notes = occurrences(tokenizer, encode(template, pairs, tokenizer, 1, 64), patch)
    assert [row.token_id for row in found] == ids.tolist()
    return {row.token: (row.instruction, row.source, row.prompt, row.answer, 3 * row.share) for row in found}, notes


def test_rows_are_counted_in_instruction_source_and_answer(model, tokenizer):
    found, notes = counted(model, tokenizer, [":", "The", " the", " cat", "El", " ", "</s>", "Q"])
    assert notes == []
    assert found == {
        ":": (9, 1, 10, 0, 3),  # a colon of a sentence is the source's
        "The": (0, 1, 1, 0, 1),
        " the": (3, 3, 6, 0, 3),
        " cat": (0, 2, 2, 0, 2),  # its space may be the template's, its letters are the source's
        "El": (0, 0, 0, 3, 0),
        " ": (4, 1, 5, 3, 3),
        "</s>": (0, 0, 0, 0, 0),  # the end of an answer is predicted and never read
        "Q": (0, 0, 0, 0, 0),
    }


def test_what_a_tokenizer_puts_before_a_source_is_instruction(model, tokenizer):
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    found, _ = counted(model, begins, ["<s>", "The"], TemplateMeta(text="{source} in Spanish:", chat=False))
    assert found == {"<s>": (3, 0, 3, 0, 3), "The": (0, 1, 1, 0, 1)}


def test_rows_are_counted_in_the_prompts_that_were_measured(model, tokenizer):
    """Which need not be in the patch's own template."""
    pairs = [Pair("The cat.", "El gato."), Pair("the the the", "El El")]
    [i] = given_ticket([":"], tokenizer, 400).token_ids.tolist()
    rows = model.get_input_embeddings().weight.detach()[[i]] + 1
    patch = Patch.from_model(model, [i], rows, name="es", tokenizer=tokenizer, template=TEMPLATE)
    other = encode(TemplateMeta(text="{source}:", chat=False), pairs, tokenizer, 1, 64)
    [found], _ = occurrences(tokenizer, other, patch)
    assert (found.instruction, found.source) == (2, 0)


def test_spaces_of_a_sentence_are_the_sentence_s(tokenizer):
    trimmed = copy.deepcopy(tokenizer)
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    pair, template = Pair("The  cat   x", "El"), TemplateMeta(text="Say: {source}:", chat=False)
    assert source_tokens(trimmed, template, pair) == source_tokens(tokenizer, template, pair)


def test_a_tokenizer_that_does_not_tell_characters_counts_prompts_as_a_whole(model, tokenizer):
    found, [note] = counted(model, Slow(tokenizer), [":", "El"])
    assert found == {":": (None, None, 10, 0, 3), "El": (None, None, 0, 3, 0)}
    assert "does not say which characters" in note


def test_rows_that_never_occur_are_named():
    def row(i, prompt):
        return Occurrence(token_id=i, token=f" {i}", instruction=0, source=prompt, prompt=prompt, answer=5, share=0.5)

    some = dataclasses.replace(evaluation(), occurrences=[row(0, 3), row(1, 0), row(2, 0)])
    assert which_occur(some) == (
        "2 of 3 rows occur in none of the 64 prompts: ' 1', ' 2'; none of these in no reference answer either."
    )
    one = dataclasses.replace(evaluation(), occurrences=[row(0, 3), row(1, 0)])
    assert which_occur(one).startswith("1 of 2 rows occurs in none of the 64 prompts: ' 1';")
    every = dataclasses.replace(evaluation(), occurrences=[row(0, 3)])
    assert which_occur(every) == "Each row occurs in at least one of the 64 prompts."
    many = dataclasses.replace(evaluation(), occurrences=[row(i, 0) for i in range(30)])
    assert "' 23' and 6 more; none" in which_occur(many)
    assert which_occur(evaluation()) == ""


def test_eval_counts_the_rows_and_inspect_and_the_report_show_it(base_folder, pairs_file, tmp_path):
    path, page = tmp_path / "es.safetensors", tmp_path / "page.html"
    code, _, err = run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", path, "--steps", "5",
        "--dev", "8", "--held-out", "8", "--rows", ":", "--rows", "<s>",
    )  # fmt: skip
    assert code == 0, err
    assert "instruction" not in run_cli("inspect", path)[1]
    code, out, err = run_cli("eval", path, "--controls", "noise", "--max-new-tokens", "4")
    assert code == 0, err
    sentences = (
        "1 of 2 rows occurs in none of the 8 prompts: '<s>'; 1 of these in no reference answer either.",
        "chrF++ raw, ",
        "stopping (what follows the first line).",
        "py3langid takes the first lines of ",
    )
    for sentence in sentences:
        assert sentence in " ".join(out.split())
    old = read(Evaluation, Patch.load(path).meta.evaluation)
    [absent, colon] = old.occurrences
    assert (absent.prompt, absent.token, colon.token) == (0, "<s>", ":")
    assert (colon.share, colon.source, colon.instruction % 8, colon.instruction > 0) == (1.0, 0, 0, True)
    out = " ".join(run_cli("inspect", path)[1].split())
    assert f"{colon.instruction} 0 0 100%" in out
    assert sentences[0] in out
    assert run_cli("report", path, "-o", page)[0] == 0
    assert f'<td class="number">{colon.instruction}</td><td class="number">0</td><td class="number">0</td>' in (
        page.read_text()
    )
    assert "&#39;&lt;s&gt;&#39;; 1 of these in no" in page.read_text()


# The best single row


@pytest.fixture
def config(base_folder, pairs_file):
    return BuildConfig(
        base=str(base_folder), pairs=str(pairs_file), language="es", name="es", template="Say: {source}: Now",
        selection="single", steps=6, lr=0.3, dev=12, held_out=8,
    )  # fmt: skip


@pytest.mark.slow
def test_the_best_single_row_is_the_best_of_all_builds_of_one_row(config, tmp_path, tokenizer):
    run, reporter = tmp_path / "run", Recorder()
    made = Build(config, run, reporter)
    patch = made.patch()
    names = ["S", "a", "y", ":", " ", "N", "o", "w"]  # what the template is, around "The cat sees the dog."
    by_hand = {}
    for name in names:
        [token_id] = given_ticket([name], tokenizer, 400).token_ids.tolist()
        one = dataclasses.replace(config, selection="ks", rows=(name,))
        built = Build(one, tmp_path / "by hand", SilentReporter()).patch()
        by_hand[token_id] = built.meta.evaluation["loss_patch"], built
    assert template_tokens(made) == sorted(by_hand)
    best = min(by_hand, key=lambda token_id: (by_hand[token_id][0], token_id))
    assert patch.token_ids.tolist() == [best]
    assert torch.equal(patch.rows, by_hand[best][1].rows)
    assert (patch.meta.ticket.selection, patch.meta.ticket.rule) == ("single", "single")
    assert patch.meta.training.embed_steps == 0
    # What each gave is said, and nothing is trained again.
    said = {fields["token_id"]: fields["loss"] for event, _, fields in reporter.notes if event == "candidate"}
    assert said == {token_id: pytest.approx(loss) for token_id, (loss, _) in by_hand.items()}
    assert reporter.begun == ["partial tuning"] * 8
    again = Recorder()
    assert Build(config, run, again).patch().digest == patch.digest
    assert again.begun == []


@pytest.mark.slow
def test_two_selections_of_the_same_row_are_two(config, tmp_path):
    """Their patches share a digest, and so their record; each is reopened with its own selection."""
    single = Build(config, tmp_path, SilentReporter()).patch()
    rows = tuple(single.token_ids.tolist())
    given = Build(dataclasses.replace(config, selection="ks", rows=rows), tmp_path, SilentReporter()).patch()
    assert single.digest == given.digest
    again = reopen(single, tmp_path)
    assert (again.config.selection, again.config.rows) == ("single", ())
    assert reopen(given, tmp_path).config.rows == rows


@pytest.mark.slow
def test_of_equal_rows_the_first_is_taken(config, tmp_path, monkeypatch):
    made = Build(config, tmp_path, SilentReporter())
    monkeypatch.setattr(made, "patched_loss", lambda patch: 2.0)
    assert made.ticket("single").token_ids.tolist() == template_tokens(made)[:1]


def test_what_is_filled_in_is_no_token_of_the_template(config, tmp_path):
    pairs = tmp_path / "noted.jsonl"
    lines = Path(config.pairs).read_text().splitlines()
    rows = [json.loads(line) | {"note": f"w{n % 7}Q"} for n, line in enumerate(lines)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    noted = dataclasses.replace(config, pairs=str(pairs), template="Say {note}: {source}: Now")
    made = Build(noted, tmp_path / "run", SilentReporter())
    texts = {made.tokenizer.decode([token_id]) for token_id in template_tokens(made)}
    assert texts == {"S", "a", "y", ":", " ", "N", "o", "w"}
    assert "Q" in made.tokenizer.decode(made.train.examples[0].prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev": 0}, "compares rows on the dev pairs, and there are none"),
        ({"template": "{source}"}, "no token of its own"),
    ],
)
def test_what_has_no_best_single_row_says_why(config, tmp_path, changes, message):
    with pytest.raises(RunError, match=message):
        Build(dataclasses.replace(config, **changes), tmp_path, SilentReporter()).patch()


@pytest.mark.slow
def test_the_best_single_row_is_a_control_by_name(config, tmp_path):
    path = tmp_path / "es.safetensors"
    several = dataclasses.replace(config, selection="frequency", top_k=4)
    made = Build(several, tmp_path / "es.safetensors.run", SilentReporter())
    made.patch().save(path)
    code, out, err = run_cli("eval", path, "--controls", "single", "--max-new-tokens", "4", "--json")
    assert code == 0, err
    systems = {system["name"]: system for system in json.loads(out)["systems"]}
    assert set(systems) == {"base", "patch", "single"}
    assert systems["single"]["rows"] == [1]
    single = Build(config, made.run, SilentReporter()).patch()
    loss = made.patched_loss(single, made.held_out)
    assert systems["single"]["figures"]["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert "best single row" in make_card(Patch.load(path), "me/it", "es", None, base_model="a/b")
    assert "single" not in make_systems(made.patch(), made)  # not one of those that are there by default
    code, _, err = run_cli("eval", path, "--controls", "best")
    assert (code, "ks,frequency,l2,random,reserved,noise,single" in err) == (2, True)


def test_a_single_row_is_not_several(base_folder, pairs_file, tmp_path):
    arguments = (
        "build",
        "--base",
        base_folder,
        "--pairs",
        pairs_file,
        "--language",
        "es",
        "-o",
        tmp_path / "es.safetensors",
    )
    for more in (("--top-k", "4"), ("--alpha", "0.1")):
        code, _, err = run_cli(*arguments, "--selection", "single", *more)
        assert (code, "takes one row: leave out --alpha and --top-k" in err) == (2, True)


# Files of before


def of_before():
    """An evaluation as a file of before has it."""
    value = write(evaluation())
    assert all("in_language" not in system["figures"] for system in value["systems"])
    for system in value["systems"]:
        del system["split"]
    del value["occurrences"]
    return value


def test_an_evaluation_of_before_is_shown_everywhere(model, tmp_path):
    patch = make(model, evaluation=of_before())
    old = read(Evaluation, patch.meta.evaluation)
    pages = (
        shown(old),
        make_report([patch, patch], [None, None]),
        make_card(patch, "me/it", "es", None, base_model="a/b"),
    )
    for page in pages:
        assert "stops by itself" in page
        assert "in the target language" not in page
        assert "stopping (what follows" not in page
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    patch.save(path)
    make(model, evaluation=write(evaluation()), name="b").save(other)
    for arguments in (("inspect", path), ("inspect", path, "--json"), ("diff", path, other)):
        code, _, err = run_cli(*arguments)
        assert code == 0, err
    assert json.loads(run_cli("inspect", path, "--json")[1])["evaluation"] == of_before()


def test_what_is_new_is_shown_everywhere(model):
    split = Split(raw=Difference(value=3.0), content=Difference(value=2.0), stopping=Difference(value=1.0))
    systems = [
        dataclasses.replace(
            system, figures=system.figures | {"in_language": system.figures["stop_rate"]},
            split=None if system.name == "base" else split,
        )
        for system in evaluation().systems
    ]  # fmt: skip
    new = dataclasses.replace(evaluation(), systems=systems)
    patch = make(model, evaluation=write(new))
    assert read(Evaluation, patch.meta.evaluation) == new
    sentence = where_from(new)
    assert "Of the patch's +3.0 chrF++ raw, +2.0 are content" in sentence
    for page in (make_report([patch], [None]), make_card(patch, "me/it", "es", None, base_model="a/b")):
        assert "in the target language" in page
        assert sentence.replace("'", "&#39;") in page or sentence in page
    assert "in the target language" in shown(new)
