"""From which checkpoint a run resumes, and the proof that it continues the same experiment.

Everything that determines what the next step computes is compared with the checkpoint: the configuration except for
the keys in MAY_CHANGE, and digests of the contents (base model, vision tower, tokenizer, template, records).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llava_mole.common.distributed import on_main
from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.common.files import read_json, write_errors
from llava_mole.common.locks import locked
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of
from llava_mole.config import MAY_CHANGE, TrainConfig, config_to_dict, load_config
from llava_mole.conversation import Template
from llava_mole.model.adapters import OWN_RATES
from llava_mole.model.builder import CONFIG_FILE
from llava_mole.model.checkpoint import (
    STATE_FILE,
    clean_leftovers,
    is_owned,
    list_checkpoints,
    newest_valid_checkpoint,
    read_manifest,
    resolve_checkpoint,
)
from llava_mole.train.checkpointing import ENVIRONMENT_FILE, SUMMARY_FILE, Progress
from llava_mole.train.tracker import CONFLICT_FILE, METRICS_FILE, read_metrics
from llava_mole.train.validation import ANSWERS_FILE

logger = get_logger(__name__)

MIN_FREE_BYTES = 16 << 20
"""A run is not started with less free disk space: it could not even write its configuration and metrics."""
LOCK_FILE = ".lock"
OWN_FILES = (CONFIG_FILE, METRICS_FILE, CONFLICT_FILE, ANSWERS_FILE, SUMMARY_FILE)
"""What a run writes beside its environment, which comes first."""
STARTS_ANEW = "start a new run in another --train.output_dir (from these weights with --init-from)"


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    run: str
    """Identifier of the run, the same over all its restarts."""
    checkpoint: Path | None = None
    """Checkpoint to resume from; None for a start from step 0."""
    begun: bool = False
    """Whether an earlier process of the run wrote to the directory, even without a checkpoint."""
    finished: bool = False
    """Whether the run is complete: there is nothing to do."""


@contextlib.contextmanager
def run_directory(train: TrainConfig) -> Iterator[None]:
    """Create the run directory, check that it can be written, and lock it during the block; a collective.

    A directory that was created here and is still empty at the end is removed.

    Raises:
        ConfigError: it cannot be written, its disk is full, or another process is writing to it; on every rank.
    """
    run_dir = Path(train.output_dir)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            with write_errors(run_dir):
                if not run_dir.exists():
                    run_dir.mkdir(parents=True)
                    stack.callback(_remove_if_empty, run_dir)
                free = shutil.disk_usage(run_dir).free
                if free < MIN_FREE_BYTES:
                    raise OSError(errno.ENOSPC, f"only {free:,} bytes are free on its disk")
            where = f"train.output_dir {run_dir}"
            stack.enter_context(locked(run_dir / LOCK_FILE, where, "--train.break_lock true", train.break_lock))

        on_main(take)
        yield


def _remove_if_empty(directory: Path) -> None:
    if not any(directory.iterdir()):
        directory.rmdir()


def find_start(train: TrainConfig, values: Mapping[str, Any], *, read_only: bool = False) -> Start:
    """Decide where a run starts. Call it on one rank: it reads whole checkpoints.

    A process that torchrun has restarted (`--max-restarts`) resumes from what its predecessor left, as with `auto`.

    Args:
        values: The complete configuration as plain values.
        read_only: Leave unfinished files of an earlier process where they are.

    Raises:
        CheckpointError: the output directory has checkpoints and `train.resume` is not set, none of them verifies,
            the checkpoint to resume from is of another experiment, does not verify or is not the newest of its run.
        ConfigError: the output directory has files that no run of this program wrote.
    """
    run_dir = Path(train.output_dir)
    if not read_only:
        clean_leftovers(run_dir)
    _check_foreign_files(run_dir)
    if not read_only:
        _remove_torn_files(run_dir)
    existing = list_checkpoints(run_dir)
    automatic = train.resume == "auto" or (_restarted() and (existing or train.resume is None))
    if not automatic and train.resume is None:
        if existing:
            raise CheckpointError(
                f"{run_dir} already has {count_of(len(existing), 'checkpoint')}, newest {existing[0].name}; continue "
                "with --train.resume auto, or choose another --train.output_dir"
            )
        _refuse_metrics(run_dir)
        return Start(_new_run())
    checkpoint = _newest(run_dir, existing) if automatic else _given(str(train.resume), run_dir, existing)
    if checkpoint is None:
        begun = (run_dir / CONFIG_FILE).exists()
        if begun:
            check_same_config(run_dir, values, train.accept_changed)
        return Start(_new_run(), begun=begun)
    manifest, own = read_manifest(checkpoint), checkpoint.parent.resolve() == run_dir.resolve()
    if not (checkpoint / STATE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} has no {STATE_FILE}: it is for inference only, and no run can resume from it; start a new "
            "run from its weights with --init-from"
        )
    check_same_config(checkpoint, values, train.accept_changed)
    run = manifest.get("run") if own else None
    finished = own and _is_finished(run_dir, checkpoint, values)
    begun = own and (run_dir / CONFIG_FILE).exists()
    return Start(run or _new_run(), checkpoint, begun, finished)


def check_steps_free(run_dir: Path, run: str, step: int, total_steps: int) -> None:
    """Raise CheckpointError if the run would have to write a checkpoint where something is that it does not own.

    Names that are not in the way are logged and left alone.
    """
    foreign = [
        p for p in sorted(run_dir.glob("checkpoint-*")) if not is_owned(p, run) and p.name != f"checkpoint-{step}"
    ]
    numbers = {path: path.name.removeprefix("checkpoint-") for path in foreign}
    in_the_way = [p.name for p, n in numbers.items() if n.isdecimal() and step < int(n) <= total_steps]
    if in_the_way:
        raise CheckpointError(
            f"{run_dir} has {', '.join(in_the_way)}, which this run did not write and would have to replace; move "
            f"{'it' if len(in_the_way) == 1 else 'them'} away, or choose another --train.output_dir"
        )
    if foreign:
        logger.warning(
            "%s has %s, which this run did not write: left alone", run_dir, ", ".join(path.name for path in foreign)
        )


def _newest(run_dir: Path, existing: Sequence[Path]) -> Path | None:
    """The newest checkpoint that verifies; None if there is no checkpoint at all."""
    newest = newest_valid_checkpoint(run_dir)
    if newest is None and existing:
        raise CheckpointError(
            f"{run_dir} has {', '.join(path.name for path in existing)}, and the warnings above say why this program "
            "cannot resume from any of them. Nothing was changed: move them away, or choose another --train.output_dir"
        )
    return newest


def _given(resume: str, run_dir: Path, existing: Sequence[Path]) -> Path:
    """The checkpoint that `train.resume` names."""
    checkpoint = resolve_checkpoint(resume)
    if checkpoint.parent.resolve() == run_dir.resolve():
        later = [path.name for path in existing if _step(path) > read_manifest(checkpoint)["step"]]
        if later:
            raise CheckpointError(
                f"{checkpoint} is not the newest checkpoint of its run ({later[0]} is later), and resuming from it "
                "would overwrite the later ones; choose another --train.output_dir, or remove them"
            )
    elif existing:
        raise CheckpointError(
            f"{run_dir} has checkpoints of its own ({existing[0].name}), and --train.resume names another run's "
            f"({checkpoint}); choose another --train.output_dir"
        )
    else:
        _refuse_metrics(run_dir)
    return checkpoint


def _check_foreign_files(run_dir: Path) -> None:
    """Raise ConfigError if a file that a run writes exists and no run has been here."""
    found = [name for name in OWN_FILES if os.path.lexists(run_dir / name)]
    if found and not (run_dir / ENVIRONMENT_FILE).is_file():
        raise ConfigError(
            f"train.output_dir {run_dir} has {', '.join(found)}, but no {ENVIRONMENT_FILE}: no run wrote "
            f"{'it' if len(found) == 1 else 'them'}, and this one would overwrite "
            f"{'it' if len(found) == 1 else 'them'}. Choose another --train.output_dir, or move the files away"
        )


def _remove_torn_files(run_dir: Path) -> None:
    """Remove what a process that was killed while it wrote one of a run's own files left under a temporary name."""
    for name in OWN_FILES if (run_dir / ENVIRONMENT_FILE).is_file() else ():
        for path in run_dir.glob(f".tmp-{name}-*"):
            if path.is_file() and not path.is_symlink() and path.name.rpartition("-")[2].isdecimal():
                path.unlink()


def _refuse_metrics(run_dir: Path) -> None:
    """Raise CheckpointError if the directory has the metrics of an earlier run, which a new run would delete."""
    if entries := read_metrics(run_dir / METRICS_FILE):
        raise CheckpointError(
            f"{run_dir} has the metrics of a run that came to step {entries[-1]['step']}, and no checkpoint; repeat "
            "that run with --train.resume auto, or choose another --train.output_dir"
        )


def _is_finished(run_dir: Path, checkpoint: Path, values: Mapping[str, Any]) -> bool:
    """Whether the run ended with this checkpoint. One whose configuration has changed has not."""
    if not (run_dir / SUMMARY_FILE).is_file() or changed_keys(checkpoint, values):
        return False
    summary, state = read_json(run_dir / SUMMARY_FILE), read_json(checkpoint / STATE_FILE)
    return summary.get("step") == state["step"] and summary.get("plan_digest") == state["plan_digest"]


def _restarted() -> bool:
    """Whether torchrun started this process to replace one that failed (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _new_run() -> str:
    return uuid.uuid4().hex[:16]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


# The same experiment


def changed_keys(directory: Path, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Configuration keys whose value differs from that in `directory`: `{key: (there, here)}`.

    Args:
        directory: A checkpoint or run directory with its `config.yaml`.
        values: The complete configuration as plain values.
    """
    both = config_to_dict(load_config(directory / CONFIG_FILE)), values
    there, here = (dict(_flat(side)) for side in both)
    meant_there, meant_here = (dict(_flat(_with_defaults(side))) for side in both)
    different = [
        key
        for key in {**meant_there, **meant_here}
        if there.get(key) != here.get(key) and meant_there.get(key) != meant_here.get(key)
    ]
    keys = [key for key in different if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)]
    return {key: (meant_there.get(key), meant_here.get(key)) for key in keys}


def check_same_config(directory: Path, values: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Raise CheckpointError if a key that defines the experiment differs and is not accepted (`changed_keys`)."""
    changed = changed_keys(directory, values)
    for key in accepted:
        if key in changed:
            logger.warning("resuming with %s changed from %r to %r", key, *changed.pop(key))
    if changed:
        listed = "; ".join(f"{key} is {there!r} there and {here!r} here" for key, (there, here) in changed.items())
        raise CheckpointError(
            f"{directory} belongs to another experiment: {listed}. Restore the values, or {STARTS_ANEW}; "
            f"--train.accept_changed '[{', '.join(changed)}]' resumes all the same"
        )


def check_same_contents(checkpoint: Path, contents: Mapping[str, str], accepted: Sequence[str]) -> None:
    """Raise CheckpointError if a part of the model or of the data has changed since the checkpoint.

    Args:
        contents: Digests by key, see `contents_of`. A key that an older checkpoint does not record is not compared.
        accepted: Keys whose change is accepted.
    """
    manifest = read_manifest(checkpoint)
    recorded = {
        "model.language_model": manifest["fingerprints"].get("language_model"),
        "model.vision_tower": manifest["fingerprints"].get("vision_tower"),
        **manifest.get("contents", {}),
    }
    unknown = [key for key in contents if recorded.get(key) is None]
    if unknown:
        logger.warning("%s is of an older version and does not record %s: not compared", checkpoint, ", ".join(unknown))
    changed = [key for key in contents if key not in unknown and recorded[key] != contents[key]]
    for key in [key for key in changed if key in accepted]:
        logger.warning("resuming although the content of %s has changed", key)
        changed.remove(key)
    if changed:
        listed = "; ".join(
            f"{key} has digest {recorded[key][:12]} there and {contents[key][:12]} here" for key in changed
        )
        raise CheckpointError(
            f"{checkpoint} was trained on other contents: {listed}. Restore the files, or {STARTS_ANEW}; "
            f"--train.accept_changed '[{', '.join(changed)}]' resumes all the same"
        )


def check_same_plan(progress: Progress, digest: str, global_batch_size: int, checkpoint: Path) -> None:
    """Raise CheckpointError if the coming steps would take other samples than the checkpoint's own run."""
    if progress.samples_consumed != progress.step * global_batch_size:
        raise CheckpointError(
            f"{checkpoint} took {progress.samples_consumed} samples in {progress.step} steps, but "
            f"train.global_batch_size is {global_batch_size}: restore it, or start from the weights with --init-from"
        )
    if progress.plan_digest != digest:
        raise CheckpointError(
            f"{checkpoint} consumed {progress.samples_consumed} samples of another sample order: data files, mixture, "
            "epochs or seed have changed. Restore them, or start a new run in another --train.output_dir"
        )


def contents_of(
    fingerprints: Mapping[str, str], tokenizer: str, template: Template, data: Mapping[str, str]
) -> dict[str, str]:
    """Digests of everything a run reads, by configuration key.

    Args:
        fingerprints: Of the frozen parts, by part.
        tokenizer: Fingerprint of the tokenizer.
        template: The conversation template, whose text may come from the tokenizer's files.
        data: Digest of every source's records, by name.
    """
    return {
        **{f"model.{part}": digest for part, digest in fingerprints.items()},
        "model.tokenizer": tokenizer,
        "data.template": hashlib.sha256(repr(template).encode()).hexdigest(),
        **{f"data.sources.{name}": digest for name, digest in data.items()},
    }


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults filled in that depend on other keys."""
    adapter, train, data = dict(values["adapter"]), dict(values["train"]), dict(values["data"])
    if adapter["alpha"] is None:
        adapter["alpha"] = 2 * adapter["rank"]
    for key in OWN_RATES:
        if train[key] is None:
            train[key] = train["learning_rate"]
    model, parts = dict(values["model"]), dict(values["model"]["train"])
    parts["projector"] = values["train_projector"] if parts["projector"] is None else parts["projector"]
    model["train"] = parts
    data["mixture"] = {name: float(data["mixture"].get(name, 1.0)) for name in data["sources"]}
    return {**values, "model": model, "adapter": adapter, "train": train, "data": data}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value))  # a tuple equals a list
