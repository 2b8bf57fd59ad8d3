"""Megatron's token files: read as its builder lays them out, written and read back, refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from phalanx.train.data.indexed import HEADER, TokenFile, TokenWriter, pair

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11], [], [12, 13, 14, 15]]]


def megatron_pair(prefix: Path, *, code: int, dtype: str, multimodal: bool = False) -> None:
    """The bytes that Megatron's IndexedDatasetBuilder writes for DOCUMENTS, put down by hand."""
    lengths, pointers, marks, tokens = [], [], [0], b""
    for document in DOCUMENTS:
        for sequence in document:
            lengths.append(len(sequence))
            pointers.append(len(tokens))
            tokens += np.array(sequence, dtype=dtype).tobytes()
        marks.append(len(lengths))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(marks))
    index += struct.pack(f"<{len(lengths)}i", *lengths)
    index += struct.pack(f"<{len(pointers)}q", *pointers)
    index += struct.pack(f"<{len(marks)}q", *marks)
    if multimodal:
        index += bytes(len(lengths))
    Path(f"{prefix}.bin").write_bytes(tokens)
    Path(f"{prefix}.idx").write_bytes(index)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")],
)
@pytest.mark.parametrize("multimodal", [False, True])
def test_reads_what_megatron_writes(
    tmp_path: Path, code: int, dtype: str, multimodal: bool
) -> None:
    megatron_pair(tmp_path / "c", code=code, dtype=dtype, multimodal=multimodal)
    file = TokenFile(tmp_path / "c")
    expected = [[token for sequence in document for token in sequence] for document in DOCUMENTS]
    assert [file.document(d).tolist() for d in range(file.num_documents)] == expected
    assert file.num_tokens == 11


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(4096, 2), (65499, 2), (65500, 4)])
def test_written_corpora_read_back(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab_size, n) for n in (3, 0, 1, 500)]
    with TokenWriter(tmp_path / "sub" / "c", vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add(document)
    file = TokenFile(tmp_path / "sub" / "c")
    assert file.tokens.dtype.itemsize == itemsize
    assert file.num_documents == 4
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(file.document(number), document)
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["c.bin", "c.idx"]


def test_an_error_while_writing_leaves_no_corpus(tmp_path: Path) -> None:
    def write() -> None:
        with TokenWriter(tmp_path / "c", vocab_size=300) as writer:
            writer.add(np.arange(5))
            raise KeyError("from the caller")

    with pytest.raises(KeyError, match="from the caller"):
        write()
    assert list(tmp_path.iterdir()) == []


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    bin_path, idx_path = pair(prefix)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            TokenFile(prefix)
        assert str(tmp_path) in str(caught.value)
        megatron_pair(prefix, code=4, dtype="<i4")
        assert TokenFile(prefix).num_documents == 3

    refused(r"c\.bin: no such file")
    idx_path.unlink()
    refused(r"c\.idx: no such file")
    bin_path.write_bytes(bin_path.read_bytes()[:-4])
    refused(r"c\.bin: 40 bytes, cut short: c\.idx speaks of 44")
    bin_path.write_bytes(bin_path.read_bytes() + b"\0")
    refused(r"c\.bin: 45 bytes, too long")
    patch(idx_path, 0, b"TNTIDX\0\0\0")
    refused("no Megatron index")
    patch(idx_path, 9, struct.pack("<Q", 2))
    refused("version 2 of the index format; only 1")
    patch(idx_path, 17, bytes([7]))
    refused(r"number format 7 \(float32\); tokens must be integers")
    patch(idx_path, 17, bytes([77]))
    refused(r"number format 77 \(unknown\)")
    idx_path.write_bytes(b"")
    refused("no Megatron index")
    idx_path.write_bytes(idx_path.read_bytes()[:20])
    refused("cut short within the header")
    idx_path.write_bytes(idx_path.read_bytes()[:-1])
    refused("cut short: 6 sequences and 4 document marks")
    patch(idx_path, HEADER.size, struct.pack("<i", 4))
    refused("do not follow each other")
    patch(idx_path, HEADER.size, struct.pack("<i", -3))
    refused("negative length")
    patch(idx_path, idx_path.stat().st_size - 8, struct.pack("<q", 5))
    refused("document marks go from 0 to 5")


def test_a_corpus_without_tokens_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "none", vocab_size=300):
        pass
    with pytest.raises(ValueError, match="holds no documents"):
        TokenFile(tmp_path / "none")
    with TokenWriter(tmp_path / "empty", vocab_size=300) as writer:
        writer.add(np.arange(0))
    with pytest.raises(ValueError, match="holds no tokens"):
        TokenFile(tmp_path / "empty")
