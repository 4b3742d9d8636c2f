"""Whatever JSON a raw record is, a source yields a row that the store takes, or drops it with a reason."""

import contextlib
import io
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from llava_mole.common.errors import DataError
from llava_mole.data.images import open_image
from llava_mole.data.prepare.defects import KINDS, Defects, SkipRecord
from llava_mole.data.prepare.images import look, path_problem, safe_name
from llava_mole.data.prepare.samples import Embedded, MultiImage, RawSample
from llava_mole.data.prepare.sources import llava, m3it, messages, pathvqa, ureader
from llava_mole.data.store import PreparedRow, StoreWriter

KEYS = (
    "id", "image", "images", "conversations", "conversatons", "messages", "from", "value", "role", "content", "type",
    "text", "image_url", "url", "bytes", "path", "question", "answer", "instruction", "inputs", "outputs", "source",
    "image_base64_str", "prompt", "system_instruction", "task_type", "answer_type", "extra",
)  # fmt: skip
TEXTS = (
    "<image>", "<image>\nWhat?", "<image><image>", "yes", "", " ", "human", "gpt", "user", "assistant", "system",
    "a/b.jpg", "/etc/passwd", "../x", "http://x/y.jpg", "data:image/png;base64,AAAA", "\ud800", "\0", "image_url",
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(TEXTS), st.text(max_size=8))
turn = st.fixed_dictionaries(
    {"from": st.sampled_from(("human", "gpt", "user", "assistant", "x")), "value": st.sampled_from(TEXTS)}
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(turn, max_size=5),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
        st.dictionaries(st.sampled_from(KEYS), st.lists(turn, max_size=4), max_size=3),
    ),
    max_leaves=12,
)
records = st.one_of(
    values,
    st.fixed_dictionaries(
        {"image": st.one_of(leaves, st.lists(st.sampled_from(TEXTS), max_size=3)), "conversations": st.lists(turn)}
    ),
)
MULTI_IMAGE: tuple[MultiImage, ...] = ("skip", "first", "keep")


def from_llava(value: Any, multi_image: MultiImage, defects: Defects) -> Iterator[RawSample]:
    yield llava.to_sample(value, "a:1", llava.first_folder, defects)


def from_m3it(value: Any, multi_image: MultiImage, defects: Defects) -> Iterator[RawSample]:
    options = m3it.Options(multi_image=multi_image)
    yield m3it.to_sample(m3it._fields(value, "a:1", options), "vqa", "a:1", options, defects)


def from_ureader(value: Any, multi_image: MultiImage, defects: Defects) -> Iterator[RawSample]:
    yield ureader.to_sample(value, "a:1", "train", ureader.Options(multi_image=multi_image), defects)


def from_messages(value: Any, multi_image: MultiImage, defects: Defects) -> Iterator[RawSample]:
    options = messages.Options(multi_image=multi_image, system="prepend" if multi_image == "keep" else "drop")
    yield messages.to_sample(value, "a:1", options, defects)


def from_pathvqa(value: Any, multi_image: MultiImage, defects: Defects) -> Iterator[RawSample]:
    path, options = Path("a"), pathvqa.Options()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathvqa, "read_values", lambda *_: [(value, "a:1")])
        yield from pathvqa._json_rows(path, path, "train", options, defects)
        patch.setattr(pathvqa, "load_plain", lambda _: [value])
        yield from pathvqa._pickle_rows(path, path, "train", options, defects)


@pytest.mark.parametrize("convert", [from_llava, from_m3it, from_ureader, from_messages, from_pathvqa])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=records, multi_image=st.sampled_from(MULTI_IMAGE))
def test_any_record(
    convert: Callable[[Any, MultiImage, Defects], Iterator[RawSample]],
    value: Any,
    multi_image: MultiImage,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    defects = Defects()
    try:
        samples = list(convert(value, multi_image, defects))
    except (SkipRecord, DataError):  # the latter for an unknown key of M3IT
        return
    for sample in samples:
        images = tuple("unpacked.png" if isinstance(image, Embedded) else image for image in sample.images)
        if any(path_problem(image) for image in images):
            continue
        row = PreparedRow(sample.id, sample.source, images, sample.turns, (), sample.answer_type, sample.where)
        with StoreWriter(tmp_path_factory.mktemp("fuzz") / "out", name="fuzz") as writer:
            writer.add(row)
            writer.finish({})


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from(
        (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0\x08\0\0\0",
         b"MM\0*\0\0\0\x08", b"P6 ", b"Pf ", b"\x28\0\0\0", b"DDS ", b"BLP2", b"8BPS", b"%!PS-Adobe-3.0 EPSF-3.0\n")
    ),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*EXIF data")
def test_any_bytes_as_an_image(data: bytes, start: bytes) -> None:
    info, _ = look(start + data, "a.jpg", decode=True)
    assert info.problem is None or info.problem.kind in KINDS


def image_of(kind: str, mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 18), 80).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("PNG", "RGB", {}), ("PNG", "P", {}), ("GIF", "P", {}), ("WEBP", "RGB", {}), ("BMP", "RGB", {}), ("BMP", "P", {}),
     ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("JPEG", "RGB", {})],
)  # fmt: skip
def test_damaged_images_are_told_and_nothing_else(
    kind: str, mode: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # damaged sizes are refused instead of allocated
    whole = image_of(kind, mode, **options)
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 6)):  # most of them in the header, where the damage is worst
            data[generator.randrange(min(len(data), generator.choice((200, len(data)))))] = generator.randrange(256)
        damaged = bytes(data[: generator.choice((len(data), len(data), generator.randrange(len(data))))])
        problem = look(damaged, "a.jpg", decode=True)[0].problem
        assert problem is None or problem.kind in ("corrupt-image", "too-large-image")
        (tmp_path / "a.jpg").write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert open_image(tmp_path / "a.jpg").mode == "RGB"
            continue
        refused += 1
    assert refused > 10


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, OverflowError, ZeroDivisionError, MemoryError])
def test_whatever_a_decoder_raises_is_damage(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> None:
        raise error("bad")

    (tmp_path / "a.bmp").write_bytes(image_of("BMP", "RGB"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(DataError, match=r"a\.bmp' .* decode.*: bad; "):
        open_image(tmp_path / "a.bmp")
    problem = look(str(tmp_path / "a.bmp"), "a.bmp", decode=True)[0].problem
    assert problem == ("too-large-image" if error is MemoryError else "corrupt-image", "a.bmp: bad")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=60), start=st.sampled_from((b"", b"\x80\x04", b"(lp0\n", b"cos\nsystem\n")))
def test_any_bytes_as_a_pickle(data: bytes, start: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pkl"
    path.write_bytes(start + data)
    with contextlib.suppress(DataError):
        pathvqa.load_plain(path)


@given(text=st.text(string.printable + "/\\.\0é", max_size=20))
def test_any_name_of_a_group_is_one_visible_folder(text: str) -> None:
    name = safe_name(text)
    assert name
    assert not name.startswith(".")
    assert "/" not in name
    assert "\\" not in name
