"""`phalanx data prepare`, `show`, and the check before a run."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from phalanx.train.data import prepare as module
from phalanx.train.data.check import check_data
from phalanx.train.data.config import CorpusConfig, DataConfig, TextSource
from phalanx.train.data.indexed import TokenFile, TokenWriter
from phalanx.train.data.prepare import prepare, show
from phalanx.train.data.tokenizer import eos_id, load_tokenizer

STORIES = [f"Story {n}: the <|eos|> of it.\n" + "A cat sat on a mat. " * n for n in range(1, 80)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    lines = [json.dumps({"text": story}) for story in STORIES]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    return DataConfig(
        dir=str(tmp_path / "data"),
        source=TextSource.files,
        text=[str(tmp_path / "stories.jsonl")],
        vocab_size=300,
    )


def made(config: DataConfig) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path(config.dir).iterdir()
    }


def test_prepared_tokens_are_the_text(
    config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config)
    tokenizer = load_tokenizer(config)
    file = TokenFile(f"{config.dir}/tokens")
    assert file.num_documents == len(STORIES)
    for number, story in enumerate(STORIES):
        *tokens, end = file.document(number).tolist()
        assert end == eos_id(tokenizer, name="t")
        # What looks like a special token in the text is text, and no document's end.
        assert end not in tokens
        assert tokenizer.decode(tokens, skip_special_tokens=False) == story
    stats = json.loads((Path(config.dir) / "stats.json").read_text())
    counts = Counter(file.tokens.tolist())
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert stats["unigram_entropy_nats"] == pytest.approx(entropy, rel=1e-12)
    assert stats["unigram_entropy_bits"] == pytest.approx(entropy / math.log(2), rel=1e-12)
    assert (stats["tokens"], stats["documents"]) == (total, len(STORIES))
    assert stats["bytes_per_token"] == pytest.approx(sum(map(len, STORIES)) / total)
    assert stats["largest_token"] == max(counts)
    assert f"{entropy:.3f} nats" in capsys.readouterr().out


def test_prepare_does_nothing_twice_and_remakes_what_changed(
    config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config)
    first = made(config)
    assert sorted(first) == [
        "prepared.json",
        "stats.json",
        "tokenizer.json",
        "tokens.bin",
        "tokens.idx",
    ]
    capsys.readouterr()
    prepare(config)
    assert made(config) == first
    assert "stands as these settings make it" in capsys.readouterr().out
    config.eval_fraction = 0.1  # decides nothing that is written
    prepare(config)
    assert made(config) == first

    config.vocab_size = 280
    prepare(config)
    assert load_tokenizer(config).get_vocab_size() == 280
    (Path(config.dir) / "tokens.bin").write_bytes(b"cut")
    prepare(config)
    assert TokenFile(f"{config.dir}/tokens").num_documents == len(STORIES)
    config.vocab_size = 300
    prepare(config)
    assert {name: content for name, (content, _) in made(config).items()} == {
        name: content for name, (content, _) in first.items()
    }
    with Path(config.text[0]).open("a") as stream:
        stream.write('\n{"text": "one more"}')
    prepare(config)
    assert TokenFile(f"{config.dir}/tokens").num_documents == len(STORIES) + 1


def test_what_stops_prepare_leaves_the_old_data(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config)
    first = made(config)
    config.vocab_size = 280

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert made(config) == first


def test_half_moved_data_is_not_taken_for_whole(config: DataConfig) -> None:
    prepare(config)
    (Path(config.dir) / "prepared.json").unlink()
    with pytest.raises(ValueError, match="holds no prepared data; run: phalanx data prepare"):
        check_data(config, vocab_size=300, seq_len=16)
    prepare(config)
    check_data(config, vocab_size=300, seq_len=16)


def test_a_given_tokenizer_is_used(config: DataConfig, tmp_path: Path) -> None:
    prepare(config)
    config.tokenizer = f"{config.dir}/tokenizer.json"
    config.dir = str(tmp_path / "second")
    prepare(config)
    assert "tokenizer.json" not in made(config)
    np.testing.assert_array_equal(
        TokenFile(tmp_path / "second" / "tokens").tokens, TokenFile(tmp_path / "data/tokens").tokens
    )


def test_ready_corpora_need_no_preparing(
    config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config.corpora = [CorpusConfig(path="x/tokens")]
    prepare(config)
    assert "x/tokens. There is nothing to prepare" in capsys.readouterr().out
    assert not Path(config.dir).exists()


def test_text_without_text_is_refused(config: DataConfig) -> None:
    Path(config.text[0]).write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match=r"data\.text: the files hold no text"):
        prepare(config)
    assert list(Path(config.dir).iterdir()) == []


def test_show_prints_a_sample_with_its_documents(config: DataConfig) -> None:
    prepare(config)
    shown = show(config)
    assert f"{len(STORIES)} documents (78 to train on, 1 held out)" in shown
    assert "unigram entropy" in shown
    assert "--- document 0" in shown
    assert "--- document 1" in shown
    assert "A cat sat on a mat. " in shown


def test_show_takes_a_corpus_shorter_than_its_sample(config: DataConfig) -> None:
    Path(config.text[0]).write_text('{"text": "abc"}\n{"text": "defg hij"}\n')
    prepare(config)
    assert "sample 0 of the training split, 1 tokens:" in show(config)


def foreign(tmp_path: Path, tokens: list[int]) -> DataConfig:
    with TokenWriter(tmp_path / "ready", vocab_size=100_000) as writer:
        for _ in range(10):
            writer.add(np.array(tokens))
    return DataConfig(
        dir=str(tmp_path / "none"), corpora=[CorpusConfig(path=str(tmp_path / "ready"))]
    )


def test_checks_before_a_run(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.dir=.*run: phalanx data prepare data=files"):
        check_data(config, vocab_size=300, seq_len=16)
    prepare(config)
    check_data(config, vocab_size=300, seq_len=16)
    with pytest.raises(ValueError, match=r"model\.vocab_size=299: .*tokens holds token 299"):
        check_data(config, vocab_size=299, seq_len=16)
    with pytest.raises(ValueError, match=r"training\.seq_len=100000: the train split"):
        check_data(config, vocab_size=300, seq_len=100_000)
    with pytest.raises(ValueError, match=r"the eval split .*raise data\.eval_fraction"):
        check_data(config, vocab_size=300, seq_len=600)
    config.eval_fraction = 0
    check_data(config, vocab_size=300, seq_len=600)


def test_ready_corpora_are_checked(tmp_path: Path) -> None:
    config = foreign(tmp_path, [3, 70_000, 4])
    check_data(config, vocab_size=70_001, seq_len=2)
    with pytest.raises(ValueError, match=r"holds token 70000; use at least 70001"):
        check_data(config, vocab_size=70_000, seq_len=2)
    with pytest.raises(ValueError, match=r"holds token -1; tokens must not be negative"):
        check_data(foreign(tmp_path, [3, -1, 4]), vocab_size=70_001, seq_len=2)
    config.corpora.append(CorpusConfig(path=str(tmp_path / "gone.bin")))
    with pytest.raises(ValueError, match=r"data\.corpora: .*gone\.bin\.bin: no such file; .*with"):
        check_data(config, vocab_size=70_001, seq_len=2)


def test_a_tokenizer_larger_than_the_model_is_refused(config: DataConfig, tmp_path: Path) -> None:
    prepare(config)
    ready = foreign(tmp_path, [3, 4, 5])
    ready.tokenizer = f"{config.dir}/tokenizer.json"
    with pytest.raises(ValueError, match=r"model\.vocab_size=290: smaller than the 300 tokens of"):
        check_data(ready, vocab_size=290, seq_len=2)


def test_preparing_and_checking_do_without_torch() -> None:
    modules = "phalanx.train.data.prepare, phalanx.train.data.check, sys"
    program = f"import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
