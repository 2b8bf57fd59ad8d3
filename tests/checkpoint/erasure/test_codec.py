"""The codec: what any so many losses leave is enough, in every backend with the same bytes."""

import itertools
import mmap
import random
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_hexdigest

from phalanx.checkpoint.erasure import codec, isal
from phalanx.checkpoint.erasure.codec import Codec, best_backend
from phalanx.checkpoint.erasure.field import (
    Bytes,
    inverse,
    matrix_inverse,
    matrix_product,
    parity_matrix,
    times,
)
from phalanx.checkpoint.erasure.isal import IsaL, candidates
from phalanx.checkpoint.erasure.portable import BLOCK, Backend, Portable

pytestmark = pytest.mark.holders

CODES = [(2, 1), (4, 2), (6, 2), (8, 2), (10, 4)]
DIGESTS = ["62778fcbeb1ef094", "6159d2fe8c2e7460"]
LENGTHS = [0, 1, 63, 64, 65, BLOCK + 1, (1 << 20) + 7]


@pytest.fixture(params=["isal", "portable"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "portable":
        return Portable()
    found = best_backend()
    if not isinstance(found, IsaL):
        pytest.skip("no ISA-L on this machine")
    return found


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    best_backend.cache_clear()
    yield
    best_backend.cache_clear()


def units(k: int, length: int) -> list[Bytes]:
    return list(np.random.default_rng(k * 1000 + length).integers(0, 256, (k, length), np.uint8))


def encoded(codec: Codec, data: list[Bytes]) -> list[Bytes]:
    """Data and parities."""
    parities = [np.full(len(data[0]), 0xA5, np.uint8) for _ in range(codec.m)]
    codec.encode(data, parities)
    return data + parities


def slow_product(a: int, b: int) -> int:
    """Of two elements, by the book: long multiplication, then division."""
    product = 0
    for bit in range(8):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in reversed(range(8, 16)):
        product ^= (0x11D << (bit - 8)) * (product >> bit & 1)
    return product


def test_the_field_is_the_one_of_the_polynomial() -> None:
    elements = np.arange(256, dtype=np.uint8)
    table = times(elements[:, None], elements[None, :])
    assert table.tolist() == [[slow_product(a, b) for b in range(256)] for a in range(256)]
    assert np.all(times(elements[1:], inverse(elements[1:])) == 1)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 4)])
def test_every_square_part_has_an_inverse(k: int, m: int) -> None:
    matrix = parity_matrix(k, m)
    for size in range(1, min(k, m) + 1):
        for rows in itertools.combinations(range(m), size):
            for columns in itertools.combinations(range(k), size):
                part = matrix[np.ix_(rows, columns)]
                product = matrix_product(part, matrix_inverse(part))
                assert np.array_equal(product, np.eye(size, dtype=np.uint8))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 1), (4, 2), (200, 55)])
def test_the_first_parity_is_xor(k: int, m: int) -> None:
    assert np.all(parity_matrix(k, m)[0] == 1)
    data = units(k, 100)
    parity = np.empty(100, np.uint8)
    Codec(k, 1).encode(data, [parity])
    assert np.array_equal(parity, np.bitwise_xor.reduce(data))


@pytest.mark.parametrize(("k", "m"), CODES)
def test_whatever_is_lost_comes_back(k: int, m: int, backend: Backend) -> None:
    codec = Codec(k, m, backend=backend)
    whole = encoded(codec, units(k, 1003))
    for count in range(1, m + 1):
        patterns = list(itertools.combinations(range(k + m), count))
        if len(patterns) > 200:
            patterns = random.Random(7).sample(patterns, 200)
        for lost in patterns:
            check_rebuilt(codec, whole, lost)


def check_rebuilt(codec: Codec, whole: list[Bytes], lost: tuple[int, ...]) -> None:
    found = {unit: np.full(len(whole[0]), 0x5A, np.uint8) for unit in lost}
    codec.rebuild({u: row for u, row in enumerate(whole) if u not in found}, found)
    for unit, row in found.items():
        assert np.array_equal(row, whole[unit]), f"unit {unit} of the lost {lost}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (10, 4)])
def test_any_length_and_address_in_any_backend(k: int, m: int, length: int) -> None:
    data = [row[3:] for row in units(k, length + 3)]
    whole = encoded(Codec(k, m), data)
    portable = encoded(Codec(k, m, backend=Portable()), data)
    assert all(map(np.array_equal, whole, portable))
    check_rebuilt(Codec(k, m), whole, tuple(range(k - m, k)) if k > m else (0,))
    check_rebuilt(Codec(k, m, backend=Portable()), whole, (0, *range(k, k + m - 1)))


def test_bytes_are_the_same_in_every_version(backend: Backend) -> None:
    """Parities in storage are read by later versions: these numbers may never change."""
    codec = Codec(4, 2, backend=backend)
    assert parity_matrix(4, 2).tolist() == [[1, 1, 1, 1], [166, 70, 187, 123]]
    whole = encoded(codec, [np.arange(i, i + 64, dtype=np.uint8) for i in (1, 60, 120, 180)])
    assert [xxh3_64_hexdigest(parity) for parity in whole[4:]] == DIGESTS


@pytest.mark.parametrize(("k", "m"), CODES)
def test_units_folded_in_any_order_make_the_same(k: int, m: int, backend: Backend) -> None:
    codec = Codec(k, m, backend=backend)
    whole = encoded(codec, units(k, 777))
    for parity in range(m):
        order = random.Random(parity).sample(range(k), k)
        target = np.full(777, 0xEE, np.uint8)
        for turn, index in enumerate(order):
            codec.fold(index, whole[index], parity, target, first=turn == 0)
        assert np.array_equal(target, whole[k + parity])
        codec.fold(order[0], whole[order[0]], parity, target, first=False)  # taken out again
        without = [None if i == order[0] else row for i, row in enumerate(whole[:k])]
        rest = [np.empty(777, np.uint8) for _ in range(m)]
        codec.encode(without, rest)
        assert np.array_equal(target, rest[parity])


def test_none_is_zeros(backend: Backend) -> None:
    codec = Codec(4, 2, backend=backend)
    data = units(4, 500)
    data[1][:] = data[3][:] = 0
    whole = encoded(codec, data)
    parities = [np.full(500, 9, np.uint8) for _ in range(2)]
    codec.encode([data[0], None, data[2], None], parities)
    assert all(map(np.array_equal, parities, whole[4:]))
    found = {0: bytearray(500), 5: bytearray(500)}
    codec.rebuild({1: None, 2: data[2], 3: None, 4: whole[4]}, found)
    assert found == {0: data[0].tobytes(), 5: whole[5].tobytes()}
    codec.encode([None] * 4, parities)
    assert not np.any(parities)
    target = np.full(500, 7, np.uint8)
    codec.fold(0, None, 1, target, first=False)
    assert np.all(target == 7)
    codec.fold(0, None, 1, target, first=True)
    assert not np.any(target)


def test_any_kind_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    data = units(4, 4096)
    path.write_bytes(data[1].tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sources = [data[0].tobytes(), mapped, memoryview(data[2]), data[3].view(np.float32)]
        first, second = bytearray(4096), np.zeros((4, 1024), np.uint8)
        Codec(4, 2).encode(sources, [first, memoryview(second)])
    whole = encoded(Codec(4, 2), data)
    assert first == whole[4].tobytes()
    assert second.tobytes() == whole[5].tobytes()


def test_nothing_beside_the_targets_is_written(backend: Backend) -> None:
    codec = Codec(3, 2, backend=backend)
    for length in (1, 31, 64, 65, 200):
        memory = np.full((2, length + 128), 0xC3, np.uint8)
        codec.encode(units(3, length), [row[64 : 64 + length] for row in memory])
        codec.fold(1, units(3, length)[1], 1, memory[1, 64 : 64 + length], first=False)
        assert np.all(memory[:, :64] == 0xC3)
        assert np.all(memory[:, 64 + length :] == 0xC3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Codec(0, 1), "at least 1 of data"),
        (lambda: Codec(254, 2), "at most 255"),
        (lambda: Codec(2, 1).encode([b"a"], [bytearray(1)]), "1 units of data and 1 of parity"),
        (lambda: Codec(2, 1).encode([b"a", b"bc"], [bytearray(1)]), "unequal lengths: 1, 2"),
        (lambda: Codec(2, 1).encode([b"a", b"b"], [bytearray(3)]), "unequal lengths: 1, 3"),
        (lambda: Codec(2, 1).encode([b"a", b"b"], [b"c"]), "read-only"),
        (lambda: Codec(2, 1).fold(0, b"ab", 0, bytearray(3), first=False), "unequal lengths"),
        (lambda: Codec(2, 1).fold(2, b"a", 0, bytearray(1), first=True), "no unit 2 of data"),
        (lambda: Codec(2, 1).fold(0, b"a", 1, bytearray(1), first=True), "no parity 1"),
        (lambda: Codec(2, 1).rebuild({0: b"a"}, {1: bytearray(1)}), "2 \\+ 1 needs 2"),
        (lambda: Codec(2, 1).rebuild({0: b"a", 1: b"b"}, {1: bytearray(1)}), "different units"),
        (lambda: Codec(2, 1).rebuild({0: b"a", 3: b"b"}, {1: bytearray(1)}), "0 to 2"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_long_rows_take_several_calls(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    whole = encoded(Codec(4, 2, backend=backend), units(4, 1000))
    monkeypatch.setattr(isal, "CALL_BYTES", 333)
    codec = Codec(4, 2, backend=backend)
    again = encoded(codec, units(4, 1000))
    assert all(map(np.array_equal, again, whole))
    target = np.zeros(1000, np.uint8)
    for index in range(4):
        codec.fold(index, whole[index], 1, target, first=False)
    assert np.array_equal(target, whole[5])


@pytest.mark.slow
def test_rows_longer_than_an_int_counts() -> None:
    """As ISA-L counts bytes in one: all of the row is worked on, in several calls."""
    length = (1 << 31) + 1001
    source, target = np.zeros(length, np.uint8), np.zeros(length, np.uint8)
    places = [0, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, length - 1]
    source[places] = range(1, len(places) + 1)
    codec = Codec(2, 2)
    codec.encode([None, source], [target, np.empty(length, np.uint8)])
    assert np.flatnonzero(target).tolist() == places
    assert target[places].tolist() == source[places].tolist()
    codec.fold(1, source, 0, target, first=False)
    assert not np.any(target)


def test_threads_share_a_codec(backend: Backend) -> None:
    codec = Codec(4, 2, backend=backend)
    wrong: list[tuple[int, ...]] = []

    def rebuild_all(seed: int) -> None:
        whole = encoded(codec, units(4, 5000 + seed))
        for lost in itertools.combinations(range(6), 2):
            try:
                check_rebuilt(codec, whole, lost)
            except AssertionError:
                wrong.append(lost)

    threads = [threading.Thread(target=rebuild_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_library_that_works_is_found() -> None:
    """pyeclib is a dependency wherever it has wheels; its library must be the one in use."""
    bundled = [path for path in candidates() if "pyeclib" in path]
    if not bundled:
        pytest.skip("pyeclib is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best_backend.cache_clear()
        assert best_backend().name == f"ISA-L ({bundled[0]})"


def compiled(path: Path, source: str) -> str:
    """A shared library of this C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a broken library with")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return str(path)


TABLES = "void ec_init_tables(int k, int rows, unsigned char *a, unsigned char *tables) {}"
ENCODE = """
void ec_encode_data(int len, int k, int rows, unsigned char *g, unsigned char **in,
                    unsigned char **out) {
    for (int row = 0; row < rows; row++)
        for (int at = 0; at < len; at++) out[row][at] = in[0][at];
}
"""
UPDATE = """
void ec_encode_data_update(int len, int k, int rows, int i, unsigned char *g, unsigned char *in,
                           unsigned char **out) {}
"""


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("kind", ["no library", "lacks", "wrong"])
def test_a_broken_library_is_not_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "libisal.so"
    if kind == "no library":
        path.write_bytes(b"not ELF at all" * 100)
        words = "invalid ELF|not a mach-o|slice is not valid"
    elif kind == "lacks":
        compiled(path, TABLES + ENCODE)
        words = "ec_encode_data_update"
    else:
        compiled(path, TABLES + ENCODE + UPDATE)
        words = "makes wrong bytes of rows of 1$"
    monkeypatch.setattr(codec, "candidates", lambda: iter([str(path), "libisal-of-nobody.so"]))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        backend = best_backend()
        assert best_backend() is backend
    assert isinstance(backend, Portable)
    first, second = (str(warning.message) for warning in found)
    assert str(path) in first
    assert re.search(words, first)
    assert "several times slower" in second
    assert "pip install pyeclib" in second
    check_rebuilt(Codec(4, 2), encoded(Codec(4, 2), units(4, 100)), (0, 1))


@pytest.mark.usefixtures("fresh_choice")
def test_the_next_library_takes_the_place_of_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "libisal.so"
    path.write_bytes(b"")
    rest = list(candidates())
    if not any("pyeclib" in candidate for candidate in rest):
        pytest.skip("no ISA-L on this machine")
    monkeypatch.setattr(codec, "candidates", lambda: iter([str(path), *rest]))
    with pytest.warns(UserWarning, match=f"ISA-L is not used from {path}"):
        assert isinstance(best_backend(), IsaL)


def test_torch_is_not_imported() -> None:
    """A holder works with these, and shall stay small."""
    names = ("erasure.codec", "erasure.stripes", "nodes.groups", "nodes.survival")
    code = "".join(f"import phalanx.checkpoint.{name}\n" for name in names)
    code += "phalanx.checkpoint.erasure.codec.best_backend()\nimport sys\n"
    code += "assert not {'torch', 'pyeclib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
