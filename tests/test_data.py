"""Reading pairs, splitting them, and turning them into token ids."""

import json

import pytest
import torch
from conftest import PAIRS

from ksl_patch.data.columns import Columns
from ksl_patch.data.encoding import IGNORED, Example, collate, encode, token_counts
from ksl_patch.data.languages import language_name
from ksl_patch.data.pairs import Pair
from ksl_patch.data.reading import read_pairs
from ksl_patch.data.split import split_pairs
from ksl_patch.data.templates import make_template
from ksl_patch.errors import DataError, KslPatchError
from ksl_patch.patch import TemplateMeta

PLAIN = TemplateMeta(text="Translate: {source}\nSpanish:", chat=False)


def test_jsonl_tsv_and_dataset_give_the_same_pairs(tmp_path):
    pairs = [Pair('She said "hi".', "Dijo «hola»."), Pair("Two\u2028lines", "Dos")]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(p._asdict(), ensure_ascii=False) for p in pairs) + "\n\n")
    (tmp_path / "p.tsv").write_text("source\ttarget\n" + "".join(f"{s}\t{t}\n" for s, t, *_ in pairs))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(p._asdict()) for p in pairs))
    assert read_pairs(str(tmp_path / "p.jsonl")) == read_pairs(str(tmp_path / "p.tsv")) == pairs
    assert read_pairs(str(folder)) == pairs


def test_other_columns_and_translation_dicts(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"en": "a", "es": "b", "more": 1}\n')
    assert read_pairs(str(tmp_path / "p.jsonl"), Columns("en", "es")) == [Pair("a", "b")]
    folder = tmp_path / "opus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"id": "0", "translation": {"en": "a", "es": "b"}}\n')
    assert read_pairs(str(folder), Columns("en", "es")) == [Pair("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            '{"source": "a", "target": "b"}\n{"source": "a"}\n',
            "line 2: expected the columns",
        ),
        ("p.jsonl", '{"source": "a", "target": "b"\n', "line 1: not valid JSON"),
        ("p.jsonl", '["a", "b"]\n', "item 1: expected an object with columns, found str"),
        ("p.jsonl", '{"source": "a", "target": "  "}\n', "line 1: source and target must both be text"),
        ("p.jsonl", '{"source": "a", "target": 3}\n', "line 1: source and target must both be text"),
        ("p.jsonl", '{"source": "a", "target": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("p.jsonl", "\n\n", "no sentence pairs"),
        ("p.tsv", "a\tb\nc\n", "line 2: expected source, tab, target; found 1 fields"),
        ("p.csv", 'a,b\n"c\nd",e,f\n', "lines 2 to 3: expected source, comma, target; found 3 fields"),
        ("p.xlsx", "a,b\n", "must end in .jsonl, .csv, .tsv or .parquet"),
        ("p.tsv", b"\xff\t\n", "cannot be read as UTF-8"),
    ],
)
def test_wrong_files_are_refused_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_pairs(str(path))


def test_missing_files_and_datasets_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_pairs(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="neither a file nor a dataset that can be loaded"):
        read_pairs("nobody/nothing")


def test_split_holds_out_sources_that_training_never_sees():
    pairs = [Pair(*pair) for pair in PAIRS] * 2 + [Pair(PAIRS[0][0], "another translation")]
    split = split_pairs(pairs, held_out=20, seed=1)
    assert len(split.held_out) == 20
    assert len(split.train) == len(PAIRS) - 20
    assert split.duplicates == len(PAIRS) + 1
    assert split.dev == []
    assert not {p.source for p in split.train} & {p.source for p in split.held_out}
    assert split_pairs(pairs, held_out=20, seed=2).held_out != split.held_out
    with pytest.raises(DataError, match="give more pairs or hold out fewer"):
        split_pairs(pairs, held_out=len(PAIRS), seed=1)


def test_an_example_is_the_prompt_as_generation_sees_it_then_the_answer_and_its_end(tokenizer):
    [example] = encode(PLAIN, [Pair("The cat sees the dog.", "El gato ve el perro.")], tokenizer, 1, 256).examples
    assert example.prompt == tokenizer("Translate: The cat sees the dog.\nSpanish:").input_ids
    assert example.answer[-1] == 1
    assert tokenizer.decode(example.answer[:-1]) == " El gato ve el perro."
    assert encode(PLAIN, [Pair("The cat", "El gato")], tokenizer, 1, max_length=5).pairs == []


def test_braces_in_a_sentence_are_only_text():
    assert PLAIN.render("{source} {0} {language}") == "Translate: {source} {0} {language}\nSpanish:"
    assert PLAIN.matches("Translate: anything\nSpanish:")
    assert not PLAIN.matches("Translate this: anything\nSpanish:")
    assert not TemplateMeta(text="aa{source}aa", chat=False).matches("aaa")


def test_only_the_answer_has_labels():
    batch = collate([Example([5, 6], [7, 1]), Example([5], [1])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 1], [IGNORED, 1, IGNORED, IGNORED]]
    assert batch["labels"].dtype == torch.int64


def test_counts_are_of_inputs():
    counts = token_counts([Example([2, 2], [3, 1]), Example([2], [4, 1])], 6)
    assert counts.tolist() == [0, 0, 3, 1, 1, 0]


def test_templates(tokenizer):
    assert language_name("sw") == "Swahili"
    assert language_name("pt-BR") == "Portuguese (Brazil)"
    plain = make_template("plain", source_language="en", language="sw", tokenizer=tokenizer)
    assert plain.text.count("{source}") == 1
    assert "from English to Swahili" in plain.text
    own = make_template(r"{source}\n=>", source_language="en", language="sw", tokenizer=tokenizer)
    assert own.text == "{source}\n=>"
    for kind, language, message in [
        ("no slot", "sw", "exactly once"),
        ("chat", "sw", "no chat template"),
        ("plain", "xx-nope", "not a known language"),
    ]:
        with pytest.raises(KslPatchError, match=message):
            make_template(kind, source_language="en", language=language, tokenizer=tokenizer)


def test_the_chat_template_brings_its_own_special_tokens(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    try:
        template = make_template("chat", source_language="en", language="es", tokenizer=tokenizer)
        [example] = encode(template, [Pair("The cat", "El gato")], tokenizer, 1, 256).examples
    finally:
        tokenizer.chat_template = None
    assert template.chat
    assert example.prompt[0] == 0
    assert example.prompt[-2:] == [1, 0]
    assert tokenizer.decode(example.answer[:-1]) == "El gato"


def test_a_document_is_text_or_a_number_or_missing(tmp_path):
    file = tmp_path / "p.jsonl"
    values = ["a", 3, 3.0, None, " ", "", float("nan")]
    file.write_text(
        "".join(json.dumps({"source": f"s{i}", "target": "t", "page": v}) + "\n" for i, v in enumerate(values))
    )
    assert [pair.group for pair in read_pairs(str(file), Columns(group="page"))] == ["a", "3", "3", "", "", "", ""]
    file.write_text('{"source": "a", "target": "b", "page": true}\n')
    with pytest.raises(DataError, match="must be text"):
        read_pairs(str(file), Columns(group="page"))
    file = tmp_path / "p.tsv"
    file.write_text("\n\nsource\ttarget\na\tb\n")
    assert read_pairs(str(file)) == [Pair("a", "b")]
