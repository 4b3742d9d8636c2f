"""`llava-mole consolidate`: one whole checkpoint of the pieces that the ranks of a run wrote.

    llava-mole consolidate RUN --out DIR [--inference]

RUN is a checkpoint written with `train.checkpoint_files: sharded`, or the newest valid one of a run. The result loads
everywhere and resumes as any other. One tensor is in memory at a time, beside what the writer of a file holds.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import CheckpointError, command
from llava_mole.common.log import setup_logging


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole consolidate", description="make one whole checkpoint of the pieces that ranks wrote"
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN", help="run directory (its newest valid checkpoint) or checkpoint"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier call")
    inference = "leave the optimizer's state out: for chat, evaluation and --init-from; no run resumes from it"
    parser.add_argument("--inference", action="store_true", help=inference)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Consolidate, and say what was written."""
    arguments = _parser().parse_args(argv)
    setup_logging()
    try:
        written = consolidate(
            arguments.source, arguments.out, overwrite=arguments.overwrite, inference=arguments.inference
        )
    except OSError as error:
        raise CheckpointError(f"{arguments.out} could not be written: {error}; it is unchanged") from None
    print(f"wrote {arguments.out}: {written}")
    return 0


def consolidate(source: Path, out: Path, *, overwrite: bool = False, inference: bool = False) -> str:
    """Write the whole checkpoint `out`, and return what is in it, as text.

    Raises:
        CheckpointError: the source does not verify, is whole already, or its pieces are not complete.
        WeightsError: `out` may not be written, or the model that the run started from is gone.
    """
    import shutil

    from safetensors.torch import save_file

    from llava_mole.config import config_to_dict, load_config
    from llava_mole.interop.publishing import check_out, publish
    from llava_mole.interop.tensors import write_label
    from llava_mole.model.builder import CONFIG_FILE
    from llava_mole.model.checkpoint import (
        OPTIMIZER_FILE,
        OWNER_FILE,
        SELF_HASH,
        TRAINER_DIR,
        read_manifest,
        resolve_checkpoint,
        write_checkpoint,
    )
    from llava_mole.train.trained_parts import Origin, write_parts
    from llava_mole.train.trainer_state import TrainerState

    check_out(out, overwrite=overwrite, inputs=[source])
    checkpoint = resolve_checkpoint(source)
    manifest = read_manifest(checkpoint)
    state = TrainerState(checkpoint)
    if state.is_whole:
        raise CheckpointError(f"{checkpoint} is whole already; `llava-mole convert --to inference` makes it smaller")
    origin = Origin.of(config_to_dict(load_config(checkpoint / CONFIG_FILE)), manifest["paths"])
    left_out = {"format", "files", "run", "in_pieces", SELF_HASH}
    fields = {key: value for key, value in manifest.items() if key not in left_out}

    def write_files(folder: Path) -> Mapping[str, Any]:
        pieces = {file.relative_to(checkpoint).as_posix() for file in state.files}
        for name in manifest["files"]:
            dropped = name == OWNER_FILE or name in pieces or (inference and name.startswith(f"{TRAINER_DIR}/"))
            if not dropped:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
        if not inference:
            save_file({key: state[key] for key in state}, folder / OPTIMIZER_FILE)
        return write_parts(folder, state, origin, fields)

    with publish(out, overwrite=overwrite, inputs=[source, checkpoint]) as temporary:
        write_checkpoint(temporary, write_files, fields)
        write_label(temporary, {"converted": "to a whole checkpoint", "from": str(checkpoint.resolve())})
    parts = [part.replace("_", " ") for part in manifest.get("in_pieces", [])]
    return ", ".join([*parts, "adapter and projector", *([] if inference else ["optimizer"])])
