"""LLaVA's own format: ShareGPT4V's and LLaVA's files, and your own data in that form."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError
from llava_mole.data.json_stream import JSON_SUFFIXES
from llava_mole.data.prepare.defects import Defects, SkipRecord
from llava_mole.data.prepare.files import find_files, read_values, split_of
from llava_mole.data.prepare.samples import (
    LLAVA_ROLES,
    TEXT_ONLY,
    WITH_IMAGES,
    RawSample,
    Source,
    SourceOptions,
    Split,
    check_turns,
    read_turns,
    require_object,
    usable_samples,
)
from llava_mole.data.records import unread_image

_READ = {"id", "image", "images", "conversations"}
SubSourceOf = Callable[[str | None], str]
"""First image path of a record (None without an image) -> its sub-source."""


def first_folder(image: str | None) -> str:
    """Return the first folder of an image path (`coco`, `gqa`, `sam`, ...) as sub-source."""
    if image is None:
        return TEXT_ONLY
    folder, slash, _ = image.partition("/")
    return folder if slash else WITH_IMAGES


def to_sample(value: Any, where: str, sub_source_of: SubSourceOf, defects: Defects) -> RawSample:
    """Convert one LLaVA record. Raises SkipRecord if it cannot be used."""
    value = require_object(value)
    images = _images(value, "image")
    if "images" in value:
        more = _images(value, "images")
        if "image" in value and images != more:
            raise SkipRecord("bad-record", f"'image' is {images!r:.60} and 'images' is {more!r:.60}; one is enough")
        images = more
    if len(value) > 2 + ("image" in value):
        defects.add_ignored_keys(value.keys() - _READ, where)
    turns = check_turns(read_turns(value.get("conversations"), LLAVA_ROLES), len(images), where, defects)
    if not images and (unread := unread_image(value, value["conversations"])) is not None:
        raise SkipRecord("image-key", unread)
    identifier = value.get("id")
    if identifier is None:
        identifier = where.rpartition(":")[2]
    return RawSample(str(identifier), sub_source_of(images[0] if images else None), images, turns, where)


def _images(value: dict[str, Any], key: str) -> tuple[str, ...]:
    image: Any = value.get(key, ())
    images: tuple[Any, ...] = tuple(image) if type(image) in (list, tuple) else (image,)
    if not all(type(path) is str and path for path in images):
        raise SkipRecord("bad-record", f"{key!r} is {image!r:.60}; it must be a path or a list of paths")
    return images


def _read_file(
    path: Path, raw: Path, sub_source_of: SubSourceOf, defects: Defects, split: Split = "train"
) -> Iterator[RawSample]:
    make = functools.partial(to_sample, sub_source_of=sub_source_of, defects=defects)
    return usable_samples(read_values(path, raw, defects), make, defects, split)


def _iterate_published(
    names: tuple[str, ...], sub_source_of: SubSourceOf, raw: Path, options: SourceOptions, defects: Defects
) -> Iterator[RawSample]:
    """Yield the samples of the first of `names` (paths below `raw`) that exists; all are of the train split."""
    if not options.wants("train"):
        raise ConfigError(
            f"--train-splits {','.join(options.train_splits) or repr('')}: the file holds the train split only; "
            "leave the option out"
        )
    path = raw if raw.is_file() else next((raw / name for name in names if (raw / name).is_file()), None)
    if path is None:
        raise DataError(f"{raw}: the annotation file does not exist; looked for {', '.join(names)}")
    yield from _read_file(path, raw, sub_source_of, defects)


def _iterate_own(raw: Path, options: SourceOptions, defects: Defects) -> Iterator[RawSample]:
    for path in find_files(raw, JSON_SUFFIXES, "annotation file", options.follow_links):
        split = split_of(path.stem)
        if options.wants(split):
            yield from _read_file(path, raw, first_folder, defects, split)


def _published(name: str, summary: str, expects: str, *names: str, sub_source_of: SubSourceOf = first_folder) -> Source:
    iterate = functools.partial(_iterate_published, names, sub_source_of)
    return Source(name, summary, expects, iterate, searches=False)


_SHAREGPT4V = "Hub data set Lin-Chen/ShareGPT4V, CC-BY-NC-4.0."
_FOLDERS = (
    "Images stay in place, below --image-root (default --raw): coco/train2017, gqa/images,\n"
    "ocr_vqa/images, textvqa/train_images, vg/VG_100K, vg/VG_100K_2"
)

SOURCES = (
    _published(
        "sharegpt4v-pt",
        "stage 1 captions, 1,246K: share-captioner_coco_lcs_sam_1246k_1107.json",
        f"{_SHAREGPT4V}\n"
        "RAW/share-captioner_coco_lcs_sam_1246k_1107.json\n"
        "Images stay in place, below --image-root (default --raw): llava/llava_pretrain/images,\n"
        "coco/train2017, sam/images (SA-1B archives 000000 to 000050).\n"
        "Known: these archives lack about half of the SAM images. Their records are counted and left out;\n"
        "--missing-images error stops instead.",
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json",
    ),
    _published(
        "sharegpt4v-instruct",
        "general instructions, 665K: sharegpt4v_mix665k_cap23k_*.json",
        f"{_SHAREGPT4V}\n"
        "RAW/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json\n"
        f"{_FOLDERS}, sam/images,\n"
        "llava/llava_pretrain/images, share_textvqa/images, web-celebrity/images, web-landmark/images,\n"
        "wikiart/images.\n"
        "Known: 23K records of the mix are replaced, not added. Most OCR-VQA links are dead, and some\n"
        "covers are GIFs called .jpg. Text-only records have the key `model`.",
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        "sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
    ),
    _published(
        "mix665k",
        "LLaVA-1.5's instructions, 665,298: llava_v1_5_mix665k.json",
        "Hub data set liuhaotian/LLaVA-Instruct-150K.\n"
        f"RAW/llava_v1_5_mix665k.json\n{_FOLDERS}.\n"
        "40,688 records are text only.",
        "llava_v1_5_mix665k.json",
    ),
    _published(
        "pretrain-558k",
        "LLaVA-1.5's stage 1 captions, 558K: blip_laion_cc_sbu_558k.json",
        "Hub data set liuhaotian/LLaVA-Pretrain.\n"
        "RAW/blip_laion_cc_sbu_558k.json, with the images (00000 to 00659) beside it or below\n"
        "--image-root.",
        "blip_laion_cc_sbu_558k.json",
        sub_source_of=lambda image: TEXT_ONLY if image is None else "lcs",
    ),
    Source(
        "llava-json",
        "your own data in LLaVA's format, *.json (a list) and *.jsonl",
        "RAW is one file, or a folder whose *.json and *.jsonl files are all read, also compressed ones\n"
        "(.gz, .zst, .bz2, .lz4).\n"
        'Records: {"id", "image" or "images" (a path, a list of paths, or absent), "conversations":\n'
        '[{"from": "human"|"gpt", "value"}]}; one <image> marker for each image.\n'
        "Image paths are relative to --image-root (default: RAW, or the folder of the file).\n"
        "A file with test in its name (`test.json`, `my_test.jsonl`) becomes a question file. One with val\n"
        "in its name is left out unless --train-splits or --test-splits has val.",
        _iterate_own,
    ),
)
