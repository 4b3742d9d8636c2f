"""Archives are unpacked whole or not at all; nothing is written outside the folder."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.common.errors import DataError
from llava_mole.data.prepare.files import unpack_archive


def make_zip(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link is not None:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return path


def make_tar(path: Path, members: dict[str, bytes], kind: bytes | None = None, link: str = "link") -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if kind is not None:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_files_arrive_and_a_second_call_does_nothing(tmp_path: Path, name: str) -> None:
    make = make_zip if name.endswith("zip") else make_tar
    archive = make(tmp_path / name, {"x/1.jpg": b"one", "x/y/2.jpg": b"two"})
    assert unpack_archive(archive, tmp_path / "out") == 2
    assert (tmp_path / "out/x/y/2.jpg").read_bytes() == b"two"
    (tmp_path / "out/x/1.jpg").write_bytes(b"mine")
    assert unpack_archive(archive, tmp_path / "out") == 0
    assert (tmp_path / "out/x/1.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "..\\x", "C:\\x", ".."])
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    make = make_zip if kind.endswith("zip") else make_tar
    archive = make(tmp_path / kind, {"good": b"1", name: b"2"})
    with pytest.raises(DataError, match="would be written elsewhere; nothing was unpacked"):
        unpack_archive(archive, tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [kind]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = make_tar(tmp_path / "a.tar", {"good": b"1"}, kind)
    with pytest.raises(DataError, match="is a (link|device); nothing was unpacked"):
        unpack_archive(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"good": b"1"}, link="link")
    with pytest.raises(DataError, match="is a link"):
        unpack_archive(archive, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_bombs_are_refused(tmp_path: Path, name: str) -> None:
    make = make_zip if name.endswith("zip") else make_tar
    archive = make(tmp_path / name, {f"zeros-{n}": bytes(30 << 20) for n in range(3)})
    with pytest.raises(DataError, match="decompression bomb"):
        unpack_archive(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_members_of_one_name_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("x"), io.BytesIO(b""))
    with pytest.raises(DataError, match="two members"):
        unpack_archive(path, tmp_path / "out")
    for name in ("b.zip", "b.tar"):
        (tmp_path / name).write_bytes(b"rubbish" * 100)
        with pytest.raises(DataError, match="cannot be unpacked"):
            unpack_archive(tmp_path / name, tmp_path / "out")


def test_prepare_reads_what_it_unpacked(tmp_path: Path) -> None:
    published_sets.write_ureader(tmp_path / "full")
    (tmp_path / "raw").mkdir()
    lines = {f"{p.name}": p.read_bytes() for p in (tmp_path / "full/ureader_json").iterdir()}
    images = {
        p.relative_to(tmp_path / "full").as_posix(): p.read_bytes()
        for p in (tmp_path / "full/ureader_images").rglob("*.png")
    }
    make_zip(tmp_path / "raw/ureader_json.zip", lines)
    make_tar(tmp_path / "raw/images.tar.gz", images)
    folder = tmp_path / "unpacked"
    done = raw_sets.prepare("ureader", tmp_path / "raw", tmp_path / "out", "--unpack-archives", str(folder))
    assert len(done.rows) == 6


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_damage_anywhere_in_a_compressed_tar_is_an_error(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.tar.{suffix}"
    data = b"".join(n.to_bytes(4, "big") for n in range(5000))
    with tarfile.open(whole, f"w:{suffix}") as archive:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    packed = whole.read_bytes()
    for position in (20, len(packed) // 2, len(packed) - 6):
        damaged = tmp_path / f"{position}.tar.{suffix}"
        damaged.write_bytes(packed[:position] + bytes([packed[position] ^ 0x55]) + packed[position + 1 :])
        with pytest.raises(DataError, match="cannot be unpacked"):
            unpack_archive(damaged, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert unpack_archive(whole, tmp_path / "out") == 2


@pytest.mark.parametrize("harm", ["header", "zeros", "cut in a header", "cut before a header", "cut in a file"])
def test_a_plain_tar_that_ends_early_is_an_error(tmp_path: Path, harm: str) -> None:
    path = make_tar(tmp_path / "a.tar", {"a": b"1" * 700, "b": b"2" * 700})
    data = bytearray(path.read_bytes())
    second = data.index(b"b\0")
    assert second == 3 * tarfile.BLOCKSIZE
    if harm == "header":
        data[second + 150] ^= 1
    elif harm == "zeros":
        data[second : second + tarfile.BLOCKSIZE] = bytes(tarfile.BLOCKSIZE)
    else:
        del data[second + {"cut in a header": 100, "cut before a header": 0, "cut in a file": 600}[harm] :]
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.tar: cannot be unpacked: .*; download it again"):
        unpack_archive(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_zip_member_is_an_error(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(range(256)) * 50})
    packed = archive.read_bytes()
    archive.write_bytes(packed[:33] + b"\xff" * 20 + packed[53:])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack_archive(archive, tmp_path / "out")


def test_a_link_to_a_folder_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"x/y/1.jpg": b"one"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out-other").mkdir()
    (tmp_path / "out/x").symlink_to(tmp_path / "out-other")
    with pytest.raises(DataError, match="a link leads out of"):
        unpack_archive(archive, tmp_path / "out")
    assert not list((tmp_path / "out-other").iterdir())
