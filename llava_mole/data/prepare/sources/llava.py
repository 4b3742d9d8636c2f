"""LLaVA's own format: ShareGPT4V's and LLaVA's files, and anyone's data in it."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.data.prepare.drafts import (
    LLAVA_ROLES,
    TEXT_ONLY,
    WITH_IMAGES,
    Converter,
    Defects,
    Draft,
    Dropped,
    Options,
    check_turns,
    read_turns,
    usable_drafts,
)
from llava_mole.data.prepare.files import JSON_SUFFIXES, find_files, find_one, read_values, split_of

_READ = {"id", "image", "images", "conversations"}


def first_folder(image: str | None) -> str:
    """Sub-source of a record: the first folder of its image path (`coco`, `gqa`, `sam`, ...)."""
    if image is None:
        return TEXT_ONLY
    folder, slash, _ = image.partition("/")
    return folder if slash else WITH_IMAGES


def to_draft(value: Any, where: str, source_of: Callable[[str | None], str], defects: Defects) -> Draft:
    """One LLaVA record. Raises Dropped where it cannot be used."""
    if type(value) is not dict:
        raise Dropped("bad-record", f"not an object but {type(value).__name__}")
    images = _images(value, "image")
    if "images" in value:
        more = _images(value, "images")
        if "image" in value and images != more:
            raise Dropped("bad-record", f"'image' is {images!r:.60} and 'images' is {more!r:.60}; one is enough")
        images = more
    if len(value) > 2 + ("image" in value):
        _count_keys(value, where, defects)
    turns = check_turns(read_turns(value.get("conversations"), LLAVA_ROLES), len(images), where, defects)
    identifier = value.get("id")
    if identifier is None:
        identifier = where.rpartition(":")[2]
    return Draft(str(identifier), source_of(images[0] if images else None), images, turns, where)


def _images(value: dict[str, Any], key: str) -> tuple[str, ...]:
    image: Any = value.get(key, ())
    images: tuple[Any, ...] = (
        (image,) if type(image) is str else tuple(image) if type(image) in (list, tuple) else (None,)
    )
    if not all(type(path) is str and path for path in images):
        raise Dropped("bad-record", f"{key!r} is {image!r:.60}; it must be a path or a list of paths")
    return images


def _count_keys(value: dict[str, Any], where: str, defects: Defects) -> None:
    extra = sorted(value.keys() - _READ)
    if extra:
        defects.ignored_keys.update(extra)
        defects.add("ignored-keys", where, ", ".join(map(str, extra)), "kept")


def iterate_file(
    path: Path, raw: Path, source_of: Callable[[str | None], str], defects: Defects, split: Any = "train"
) -> Iterator[Draft]:
    """Every usable record of one file; the others are counted."""
    make = functools.partial(to_draft, source_of=source_of, defects=defects)
    return usable_drafts(read_values(path, raw, defects), make, defects, split)


def _iterate_named(
    names: tuple[str, ...],
    source_of: Callable[[str | None], str],
    raw: Path,
    options: Options,
    defects: Defects,
) -> Iterator[Draft]:
    if not options.wants("train"):
        raise ConfigError(
            f"--train-splits {','.join(options.train_splits) or repr('')}: the file holds the train split only; "
            "leave the option out"
        )
    yield from iterate_file(find_one(raw, names, "the annotation file"), raw, source_of, defects)


def _iterate_own(raw: Path, options: Options, defects: Defects) -> Iterator[Draft]:
    for path in find_files(raw, JSON_SUFFIXES, "annotation file"):
        split = split_of(path.stem)
        if options.wants(split):
            yield from iterate_file(path, raw, first_folder, defects, split)


def _named(name: str, summary: str, expects: str, *names: str, source_of: Any = first_folder) -> Converter:
    return Converter(name, summary, expects, functools.partial(_iterate_named, names, source_of), searches=False)


_SHAREGPT4V = "Hub data set Lin-Chen/ShareGPT4V, CC-BY-NC-4.0."
_FOLDERS = (
    "Images stay where they are, below --image-root (default --raw): coco/train2017, gqa/images, ocr_vqa/images,\n"
    "textvqa/train_images, vg/VG_100K, vg/VG_100K_2"
)

CONVERTERS = (
    _named(
        "sharegpt4v-pt",
        "stage 1 captions, 1,246K: share-captioner_coco_lcs_sam_1246k_1107.json",
        f"{_SHAREGPT4V}\n"
        "RAW/share-captioner_coco_lcs_sam_1246k_1107.json\n"
        "Images stay where they are, below --image-root (default --raw): llava/llava_pretrain/images, coco/train2017,\n"
        "sam/images (SA-1B archives 000000 to 000050).\n"
        "Known: about half of the SAM images are in none of these archives. They are counted and left out;\n"
        "--missing-images error stops instead.",
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json",
    ),
    _named(
        "sharegpt4v-instruct",
        "general instructions, 665K: sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        f"{_SHAREGPT4V}\n"
        "RAW/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json\n"
        f"{_FOLDERS}, sam/images, llava/llava_pretrain/images,\n"
        "share_textvqa/images, web-celebrity/images, web-landmark/images, wikiart/images.\n"
        "Known: 23K records of the mix are replaced, not added; OCR-VQA links are mostly dead, some covers are GIFs\n"
        "called .jpg; text-only records carry the key `model`.",
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        "sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
    ),
    _named(
        "mix665k",
        "LLaVA-1.5's instructions, 665,298: llava_v1_5_mix665k.json",
        "Hub data set liuhaotian/LLaVA-Instruct-150K.\n"
        f"RAW/llava_v1_5_mix665k.json\n{_FOLDERS}.\n"
        "40,688 records are text only.",
        "llava_v1_5_mix665k.json",
    ),
    _named(
        "pretrain-558k",
        "LLaVA-1.5's stage 1 captions, 558K: blip_laion_cc_sbu_558k.json",
        "Hub data set liuhaotian/LLaVA-Pretrain.\n"
        "RAW/blip_laion_cc_sbu_558k.json, images (00000 to 00659) beside it or below --image-root.",
        "blip_laion_cc_sbu_558k.json",
        source_of=lambda image: TEXT_ONLY if image is None else "lcs",
    ),
    Converter(
        "llava-json",
        "your own data in LLaVA's format, *.json (a list) and *.jsonl",
        "RAW is one file, or a folder whose *.json and *.jsonl files are all read.\n"
        'Records: {"id", "image" or "images" (a path, a list of paths, or absent), "conversations":\n'
        '[{"from": "human"|"gpt", "value"}]}; one <image> marker for each image.\n'
        "Image paths are relative to --image-root (default: RAW, or\n"
        "the folder of the file). A file whose name says test (`test.json`, `my_test.jsonl`) becomes a question file;\n"
        "one that says val is left out unless --train-splits or --test-splits names it.",
        _iterate_own,
    ),
)
