"""Sentence pairs as the world writes them: every form gives the same pairs, and none the wrong direction."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest
from conftest import PAIRS, run_cli

from ksl_patch import Patch
from ksl_patch.data.columns import Columns
from ksl_patch.data.pairs import Pair
from ksl_patch.data.reading import Reading, read_pairs
from ksl_patch.errors import DataError
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import SilentReporter

READ = [Pair('She said "hi", twice.', "Dijo «hola»."), Pair("Two\u2028lines", "Dos\nlíneas"), Pair("Yes", "Sí")]
FLAT = [Pair(pair.source, pair.target.replace("\n", " ")) for pair in READ]
EN_ES = ("en", "es")


def jsonl(pairs, names=("source", "target")):
    return "".join(json.dumps(dict(zip(names, pair, strict=False)), ensure_ascii=False) + "\n" for pair in pairs)


def tsv(pairs, names=("source", "target")):
    return "".join("\t".join(row) + "\n" for row in [names, *(pair[:2] for pair in pairs)])


def comma(pairs, names=("source", "target")):
    text = io.StringIO()
    csv.writer(text).writerows([names, *(pair[:2] for pair in pairs)])
    return text.getvalue()


def test_every_form_of_a_file_gives_the_same_pairs(tmp_path):
    import zstandard
    from pyarrow import Table, parquet

    def path(name, content):
        file = tmp_path / name
        file.write_bytes(content)
        return str(file)

    lines = jsonl(READ).encode()
    array = json.dumps([{"source": s, "target": t} for s, t, *_ in READ]).encode()
    parquet.write_table(Table.from_pylist(json.loads(array)), tmp_path / "p.parquet")
    for file in (
        path("a.jsonl", lines),
        path("b.jsonl", b"\xef\xbb\xbf" + lines),
        path("c.jsonl", lines.replace(b"\n", b"\r\n")),
        path("d.jsonl", jsonl(READ).encode("utf-16")),
        path("e.json", array),
        path("f.json", b"\n " + array),
        path("g.csv", comma(READ).encode()),
        path("h.CSV", b"\xef\xbb\xbf" + comma(READ).encode()),
        path("i.jsonl.gz", gzip.compress(lines)),
        path("j.jsonl.bz2", bz2.compress(lines)),
        path("k.csv.xz", lzma.compress(comma(READ).encode())),
        path("l.jsonl.zst", zstandard.compress(lines)),
        str(tmp_path / "p.parquet"),
    ):
        assert read_pairs(file) == READ, file
    for file in (
        path("m.tsv", tsv(FLAT).encode()),
        path("n.txt", b"\xff\xfe" + tsv(FLAT).encode("utf-16-le")),
        path("o.tsv.gz", gzip.compress(tsv(FLAT).encode())),
        path("q.tsv", tsv(FLAT).partition("\n")[2].encode()),  # without names
    ):
        assert read_pairs(file) == FLAT, file
    assert read_pairs([path("r.tsv", tsv(FLAT).encode()), path("s.jsonl", lines)]) == FLAT + READ


@pytest.mark.parametrize("write", [jsonl, tsv, comma])
@pytest.mark.parametrize(
    ("names", "columns", "languages"),
    [
        (("Source", "TARGET"), Columns(), None),
        (("en", "es"), Columns("en", "es"), None),
        (("EN", "Es"), Columns("en", "es"), None),
        (("en", "es"), Columns(), EN_ES),
        (("eng_Latn", "spa_Latn"), Columns(), EN_ES),
        (("en-US", "es-MX"), Columns(), EN_ES),
    ],
)
def test_columns_are_found_by_name_in_any_order_and_case(tmp_path, write, names, columns, languages):
    suffix = {jsonl: "jsonl", tsv: "tsv", comma: "csv"}[write]
    there, back = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    there.write_text(write(FLAT, names))
    back.write_text(write([Pair(t, s) for s, t, *_ in FLAT], names[::-1]))
    assert read_pairs(str(there), columns, languages=languages) == FLAT
    assert read_pairs(str(back), columns, languages=languages) == FLAT


def test_a_record_of_more_columns_has_those_of_its_group_and_fields(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("Topic,Page,TARGET,Source\nhelp,3,Hola,Hello\n")
    read = read_pairs(str(file), Columns(group="page", fields=("topic",)))
    assert read == [Pair("Hello", "Hola", "3", (("topic", "help"),))]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("p.tsv", "es\ten\nHola\tHello\n", Columns(), "line 1: es, en look like names of columns: say which"),
        ("p.csv", "English,Spanish\nHello,Hola\n", Columns(), "English, Spanish look like names of columns"),
        ("p.tsv", "text\ttranslation\nHello\tHola\n", Columns(), "look like names of columns"),
        ("p.tsv", "Hello\tHola\n", Columns("en", "es"), "expected a line with the columns' names 'en', 'es', found"),
        ("p.tsv", "en\tfr\nHello\tBonjour\n", Columns("en", "es"), "expected a line with the columns' names"),
        ("p.jsonl", '{"Source": "a", "source ": "c", "target": "b"}\n', Columns("SOURCE"), "expected the columns"),
        ("p.jsonl.gz", "not packed", Columns(), "cannot be read"),
        ("p.parquet", "not one", Columns(), "not a Parquet file"),
        ("p.json", "[1, 2", Columns(), "not valid JSON"),
        ("p.en", "Hello\n", Columns(), "of two files with a sentence a line each, give both"),
    ],
)
def test_what_could_be_read_in_the_wrong_direction_is_refused(tmp_path, name, content, columns, message):
    file = tmp_path / name
    file.write_text(content)
    for reading in (None, Reading()):
        with pytest.raises(DataError, match=message):
            read_pairs(str(file), columns, reading=reading)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "Fenêtre,Ventana\n".encode("cp1252"), "line 1: cannot be read as UTF-8 text: save it as UTF-8"),
        (
            "p.json",
            b'{\n "data": [\n  {"source": "a", "target": "b"}\n ]\n}\n',
            r"one object \(data\): expected an array",
        ),
        ("p.csv", b"Nr.,Satz,Phrase\n1,a,b\n", "found 3 fields .--columns names two of more"),
    ],
)
def test_messages_say_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_pairs(str(tmp_path / name))


def test_columns_that_contradict_the_languages_are_refused(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("de,en,ru\na,b,c\n")
    assert read_pairs(str(file), Columns("en", "ru"), languages=("en", "ru")) == [Pair("b", "c")]
    for columns, languages in ((("de", "en"), ("en", "de")), (("de", "ru"), ("en", "ru"))):
        with pytest.raises(DataError, match="the columns are de and .*, and the pairs are to be from en to"):
            read_pairs(str(file), columns, languages=languages)


def test_two_files_of_lines_are_told_apart_by_their_names(tmp_path):
    en, es, fr, plain = (tmp_path / name for name in ("train.en", "train.es", "train.fr", "b.source"))
    en.write_text("Hello\n\nYes\n")
    es.write_bytes("Hola\r\n\r\nSí\r\n".encode())
    fr.write_text("Bonjour\n\nOui\n")
    plain.write_text("Bonjour\n\nOui\n")
    read = [Pair("Hello", "Hola"), Pair("Yes", "Sí")]
    assert read_pairs([str(en), str(es)]) == read
    for order in ([str(en), str(es)], [str(es), str(en)]):
        assert read_pairs(order, languages=EN_ES) == read
        assert read_pairs(order, languages=("en-GB", "es-419")) == read
    texts = [tmp_path / "a.es.txt", tmp_path / "a.en.txt.gz"]
    texts[0].write_bytes(es.read_bytes())
    texts[1].write_bytes(gzip.compress(en.read_bytes()))
    assert read_pairs(list(map(str, texts)), languages=EN_ES) == read
    assert read_pairs([str(plain), str(es)], languages=EN_ES)[0] == Pair("Bonjour", "Hola")  # as they were given
    with pytest.raises(DataError, match=r"by their names of en and fr, and the pairs are to be from en to es"):
        read_pairs([str(en), str(fr)], languages=EN_ES)
    fr.write_text(" \n\nOui\n")
    with pytest.raises(DataError, match=r"line 1: source and target must both be text"):
        read_pairs([str(en), str(fr)])
    reading = Reading()
    assert read_pairs([str(en), str(fr)], reading=reading) == [Pair("Yes", "Oui")]
    assert reading.wrong == 1
    es.write_text("Hola\n\nSí\nNo\n")
    with pytest.raises(DataError, match="has 3 lines and .* 4: .* not each other's translation"):
        read_pairs([str(en), str(es)], reading=Reading())


def test_lines_that_are_no_pairs_are_counted_and_the_first_ten_shown(tmp_path):
    file = tmp_path / "p.jsonl"
    good, bad = jsonl(READ[:1]), '{"source": "a"}\n{"source": "a", "target": " "}\nno JSON\n[]\n'
    file.write_text(good + bad * 4 + good * 19)
    reading = Reading()
    assert len(read_pairs(str(file), reading=reading)) == 20
    assert reading.wrong == 16
    assert len(reading.first) == 10
    assert "line 2: expected the columns" in reading.first[0]
    assert "line 4: not valid JSON" in reading.first[2]
    with pytest.raises(DataError, match="line 2: expected the columns 'source', 'target', found \\['source'\\]"):
        read_pairs(str(file))
    file.write_text(bad)
    with pytest.raises(DataError, match="no sentence pairs in it. The first line that is none: .*line 1: expected"):
        read_pairs(str(file), reading=Reading())
    file.write_text(good + bad)
    with pytest.raises(DataError, match="4 lines are no pairs, and 1 are in it"):
        read_pairs(str(file), reading=Reading())


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        # Only a line feed ends a line: another sign on one side would shift all that follow.
        ("p.tsv", "Hello\tHola\rmundo\nYes\tSí\r\n", [Pair("Hello", "Hola\rmundo"), Pair("Yes", "Sí")]),
        ("p.tsv", '"He said ""hi"""\tHola\n"Yes"\t"Sí"\n', [Pair('He said "hi"', "Hola"), Pair('"Yes"', '"Sí"')]),
        ("p.csv", "source;target\nHello, world;Hola, mundo\n", [Pair("Hello, world", "Hola, mundo")]),
        ("p.csv", "A, b.;C\nD, e.;F, g, h\nI;J\n", [Pair("A, b.", "C"), Pair("D, e.", "F, g, h"), Pair("I", "J")]),
        ("p.csv", "sep=;\nES;EN\nHola;Hello\n", [Pair("Hello", "Hola")]),
        ("p.csv", "no,ya\nsun,sol\n", [Pair("no", "ya"), Pair("sun", "sol")]),
        ("p.csv", "French,Francés\nThai,Tailandés\n", [Pair("French", "Francés"), Pair("Thai", "Tailandés")]),
        ("p.jsonl", '{"source": "wiki", "translation": {"en": "a", "es": "b"}}\n', [Pair("a", "b")]),
    ],
)
def test_files_as_other_tools_write_them(tmp_path, name, content, read):
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert read_pairs(str(file), languages=EN_ES) == read


@pytest.mark.parametrize(
    ("content", "languages", "message"),
    [
        ("sw_text\ten_text\na\tb\n", ("en", "sw"), "look like names"),
        ("target_text\tsource_text\na\tb\n", ("en", "sw"), "look like names"),
        ("prompt\tcompletion\na\tb\n", ("en", "sw"), "look like names"),
        ("sentence1\tsentence2\na\tb\n", ("en", "sw"), "look like names"),
        ("sentence_eng_Latn\tsentence_swh_Latn\na\tb\n", ("en", "sw"), "look like names"),
        ("en\tzh-Hans\na\tb\n", ("en", "zh-Hant"), "look like names"),
        ("Englisch\tSuaheli\na\tb\n", ("en", "sw"), "look like names"),
        ("Anglais\tAllemand\na\tb\n", ("en", "de"), "look like names"),
        ("Английский\tНемецкий\na\tb\n", ("en", "de"), "look like names"),
        ("Quelltext\tZieltext\na\tb\n", ("en", "de"), "look like names"),
        ("a\ta\nb\tb\n", ("en", "de"), "source and target are the same"),
        ("en\tsr-Cyrl\na\tb\n", ("en", "sr-Latn"), "look like names"),
        ("en\tpt_PT\na\tb\n", ("en", "pt-BR"), "look like names"),
        ("en\tzh_TW\na\tb\n", ("en", "zh-Hans"), "look like names"),
        ("id\ten\n1\ta\n2\tc\n", ("en", "id"), "what was taken for the target is numbers"),
        ("source\ttarget\tsource\na\tb\tc\n", ("en", "sw"), "expected source, tab, target; found 3 fields"),
        ("a\tb\0\n", ("en", "sw"), "there is a NUL"),
    ],
)
def test_what_nobody_asked_for_is_not_taken(tmp_path, content, languages, message):
    file = tmp_path / "p.tsv"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_pairs(str(file), languages=languages)


@pytest.mark.parametrize(
    ("ends", "languages", "swapped"),
    [
        (("src", "tgt"), EN_ES, False),
        (("trg", "src"), EN_ES, True),
        (("en.bpe", "es.bpe"), EN_ES, False),
        (("eng_Latn", "swh_Latn"), ("en", "sw"), False),
        (("arb_Arab", "eng_Latn"), ("en", "ar"), True),
        (("nob_Latn", "en"), ("en", "no"), True),
        (("en", "nb"), ("en", "no"), False),
        (("zh_TW", "en"), ("en", "zh-Hant"), True),
        (("en", "es"), (None, "es"), False),
        (("es.txt", "en.txt"), EN_ES, True),
        (("es", "en"), (None, "es"), True),
    ],
)
def test_names_of_aligned_files(tmp_path, ends, languages, swapped):
    files = [tmp_path / (end if end.endswith(".txt") else f"t.{end}") for end in ends]  # "es.txt" has no name but that
    for file, text in zip(files, ("one", "two"), strict=True):
        file.write_text(f"{text}\n")
    pair = read_pairs(list(map(str, files)), languages=languages)[0]
    assert pair == (Pair("two", "one") if swapped else Pair("one", "two"))


def test_aligned_files_with_signs_that_look_like_line_ends(tmp_path):
    en, es = tmp_path / "t.en", tmp_path / "t.es"
    en.write_bytes("one\ntwo\rTWO\nthr\u2028ee\n".encode())
    es.write_bytes(b"1\r\n2\nx3\n\n\n")
    with pytest.raises(DataError, match="numbers"):
        read_pairs([str(en), str(es)])
    es.write_bytes(b"x1\r\nx2\nx3\n\n\n")
    assert read_pairs([str(en), str(es)]) == [Pair("one", "x1"), Pair("two\rTWO", "x2"), Pair("thr\u2028ee", "x3")]
    with pytest.raises(DataError, match=r"t\.sw: no such file"):
        read_pairs([str(en), str(tmp_path / "t.sw")])


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_packed_file_that_ends_early_or_is_none(tmp_path, suffix):
    import zstandard

    text = jsonl([Pair(f"a{i}", f"b{i * i}") for i in range(5000)]).encode()
    packed = {"gz": gzip, "bz2": bz2, "xz": lzma, "zst": zstandard}[suffix].compress(text)
    file = tmp_path / f"p.jsonl.{suffix}"
    file.write_bytes(packed)
    assert len(read_pairs(str(file))) == 5000
    for content in (packed[: len(packed) // 2], text):
        file.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_pairs(str(file), reading=Reading())


def test_a_quote_that_nobody_closes_does_not_swallow_the_rest(tmp_path):
    file = tmp_path / "p.csv"
    rest = "".join(f"a{i},b{i}\n" for i in range(200))
    file.write_text(f'Hello,Hola\n"Nice" day,Buen día\nYes,Sí\n{rest}')
    reading = Reading()
    assert len(read_pairs(str(file), reading=reading)) == 202
    assert "line 2: not valid CSV" in reading.first[0]
    file.write_text(f'Hello,Hola\nA,"B, never closed\nYes,"Sí"\n{rest}')
    reading = Reading()
    assert len(read_pairs(str(file), reading=reading)) == 202  # what is behind it is not lost
    assert reading.wrong == 1
    file.write_text(f'Hello,Hola\n"Yes,Sí\n{rest}')
    with pytest.raises(DataError, match="line 2: a quote begins there that ends in line 202, if at all"):
        read_pairs(str(file), reading=Reading())


def test_data_sets_by_reference(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    rows = [{"translation": {"es": f"b{i}", "en": f"a{i}"}} for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = [Pair(f"a{i}", f"b{i}") for i in range(9)]
    assert read_pairs(str(folder), languages=EN_ES) == whole
    assert read_pairs(f"{folder}::train[:4]", languages=EN_ES) == whole[:4]
    assert read_pairs(f"{folder}::train[2:4]+train[:1]", languages=EN_ES) == [*whole[2:4], whole[0]]
    assert read_pairs(str(folder), languages=EN_ES, limit=3) == whole[:3]  # streamed
    with pytest.raises(DataError, match="expected the columns 'source', 'target', found"):
        read_pairs(str(folder), languages=("en", "fr"))


def chats(*turns):
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles * len(turns), turns, strict=False)]
    return json.dumps({"messages": messages}) + "\n"


def test_chats_are_pairs_of_their_turns(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(chats("Say hello.", "Hola.") + chats("a", "b", "c", "d"))
    reading = Reading()
    assert read_pairs(str(file), reading=reading) == [Pair("Say hello.", "Hola.")]
    assert reading.messages
    assert "line 2: expected messages of a user and an assistant" in reading.first[0]


BUILD = ["--language", "es", "--embed-steps", 2, "--steps", 2, "--top-k", 3, "--dev", 8, "--held-out", 8, "--json"]


@pytest.mark.slow
def test_a_build_from_chats_has_the_chat_template_without_words_of_its_own(tmp_path, base_folder, tokenizer):
    import copy

    import transformers

    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(base)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    chatty.save_pretrained(base)
    file, output = tmp_path / "chats.jsonl", tmp_path / "es.safetensors"
    file.write_text("".join(chats(f"Say in Spanish: {s}", t) for s, t in PAIRS))
    command = ["build", "--base", base, "--pairs", file, "-o", output, *BUILD]
    for strict in ([], ["--strict"]):
        code, _, err = run_cli(*command, *strict)
        assert code == 1
        assert "add --template chat" in err
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(jsonl(PAIRS))
    # One run folder keeps the templates of both kinds apart.
    for given, asked in ((file, ""), (pairs, "Translate this sentence from English to Spanish.\n"), (file, "")):
        command[4] = given
        code, _, err = run_cli(*command, "--template", "chat", "--strict", "--force")
        assert code == 0, err
        assert Patch.load(output).meta.template.text == f"<user>{asked}{{source}}\n<assistant>"
    file.write_text(file.read_text() + jsonl(PAIRS))
    with pytest.raises(DataError, match="some records are chats"):
        read_pairs(str(file))


def test_a_build_says_what_it_read_and_from_which_language_to_which(tmp_path, base_folder):
    en, es = tmp_path / "train.en", tmp_path / "train.es"
    en.write_text("".join(f"{s}\n" for s, _ in PAIRS) + "alone\nThe last.\n")
    es.write_text("".join(f"{t}\n" for _, t in PAIRS) + "\nLo último.\n\n")
    command = ["build", "--base", base_folder, "-o", tmp_path / "es.safetensors", *BUILD]
    swapped = ["--pairs", es, "--pairs", en]
    code, out, err = run_cli(*command, *swapped)
    assert code == 0, err
    events = {event["event"]: event for event in map(json.loads, out.splitlines())}
    assert events["pairs"]["message"].startswith(
        f"English (en) -> Spanish (es), {len(PAIRS) + 1:,} pairs. The first:\n"
    )
    assert events["pairs"]["examples"] == [list(pair) for pair in PAIRS[:5]]
    assert events["wrong_lines"]["lines"] == 1
    assert f"line {len(PAIRS) + 1}: source and target must both be text" in events["wrong_lines"]["first"][0]
    code, _, err = run_cli(*command, *swapped, "--strict", "--force")
    assert code == 1
    assert f"line {len(PAIRS) + 1}: source and target must both be text" in err
    # What eval reads again are the same two files.
    code, out, err = run_cli("eval", tmp_path / "es.safetensors", "--json", "--controls", "none")
    assert code == 0, err
    code, _, err = run_cli(*command, *swapped, "--source-language", "es", "--force")
    assert code == 1
    assert "source and target are both Spanish" in err


def test_pairs_behind_a_link_are_found_again(tmp_path, base_folder):
    """As DVC, git-annex and the Hub's cache keep files: what a link leads to has no form in its name."""
    (tmp_path / "blob").write_text(jsonl(PAIRS))
    (tmp_path / "pairs.jsonl").symlink_to(tmp_path / "blob")
    output = tmp_path / "es.safetensors"
    code, _, err = run_cli("build", "--base", base_folder, "--pairs", tmp_path / "pairs.jsonl", "-o", output, *BUILD)
    assert code == 0, err
    code, _, err = run_cli("eval", output, "--json", "--controls", "none")
    assert code == 0, err


@pytest.mark.parametrize(("language", "said"), [("de", True), ("es", False)])
def test_a_build_says_that_the_targets_look_like_another_language(tmp_path, base_folder, pairs_file, language, said):
    doubts = []

    class Doubting(SilentReporter):
        def doubt(self, event, message, **values):
            doubts.append((event, message))

    config = {"base": str(base_folder), "pairs": str(pairs_file), "language": language, "name": "p", "dev": 8}
    Build(BuildConfig(**config, held_out=8), tmp_path, Doubting())
    assert [event for event, _ in doubts] == ["language"] * said
    assert all(message.endswith("for German: is --language right?") for _, message in doubts)


def test_an_extended_language_is_one(tmp_path, base_folder, pairs_file):
    command = ["build", "--base", base_folder, "--pairs", pairs_file, "-o", tmp_path / "p.safetensors", *BUILD]
    code, out, err = run_cli(*command, "--language", "zh-yue")
    assert code == 0, err
    assert "English (en) -> Cantonese (zh-yue)" in out
