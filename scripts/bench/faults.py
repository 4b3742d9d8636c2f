"""The fault campaign: a small run on two CPU ranks is killed, starved of disk, damaged and resumed until it ends.

    python scripts/bench/faults.py [--quick] [--kills N] [--seed N] [--distributed NAME] [--json FILE]

Each run starts with `--train.resume auto`, has something done to it at a random moment, and starts again, until it is
complete. Then its weights, its optimizer, its counters and the losses of all its steps must equal, bit for bit, those
of a run that nothing was done to. A run that cannot be finished is *lost*; one that ends with another result has
*resumed wrongly*. Some samples of all runs, the undisturbed one too, are NaN and some images cannot be read, so the
skipped steps and replaced samples have to be the same as well.

Between two starts somebody tries to continue the run as another experiment (edited answers, another base model, another
rank), on a disk that is read-only, or beside itself. Every such start must be refused with exit code 2 and change
nothing. Checkpoints of other tools lie in every run directory; a changed byte of them is a *foreign file touched*. Exit
code 1 if a run was lost, resumed wrongly, or touched a foreign file.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from faults_ranks import Farm, Ranks
from mole_common import report, save

STEPS, SAVE_EVERY = 32, 4
FIRST_START_S = 300.0
RUN_S = 120.0
"""No incarnation of a run takes nearly that long: one that does hangs."""
CALLS_IN_A_SAVE = 48
FOREIGN = ("checkpoint-500", "checkpoint-998", "checkpoint-999", "checkpoint-1000", "checkpoint-notes",
           ".tmp-checkpoint-7-1")  # fmt: skip
MOST_RESTARTS = 60
FULL = {"model.train.language_model": "full", "model.train.tower": "all", "train.learning_rate": "1e-3"}
SPREAD = {
    "zero3": {**FULL, "train.deepspeed_config": str(Path(__file__).parents[1] / "zero3.json")},
    "fsdp2": {**FULL, "train.checkpoint_files": "sharded"},
}
"""Further options of strategies that spread weights: everything trains, and with `fsdp2` every rank writes."""


@dataclass
class Campaign:
    """The world, the undisturbed result, and what has been done so far."""

    farm: Farm
    directory: Path
    distributed: str
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    restarts: int = 0
    run_s: float = 2.0
    """Seconds of the undisturbed run: moments for faults are drawn from them."""

    @property
    def kills(self) -> int:
        return self.counts["kill -9, random moment"] + self.counts["kill -9 in a save"] + self.counts["kill -9, all"]

    @property
    def lost_image(self) -> Path:
        return self.directory / "red" / "images" / "red-7.png"

    def prepare(self) -> None:
        """Make the models and the data, with samples that are NaN and images that cannot be read."""
        from worlds.tiny_models import make_language_model, make_world

        make_world(self.directory, samples=40, text_only_every=5)
        for number in (7, 21):
            image = self.directory / "red" / "images" / f"red-{number}.png"
            image.write_bytes(image.read_bytes()[:30])
        self.counts["unreadable image (records)"] = 2
        self.counts["NaN sample (records)"] = len(self.nan_ids)
        make_language_model(self.directory / "other_base", seed=1)

    nan_ids = ("blue-3", "red-18")

    def start(self, name: str, changes: Mapping[str, str] | None = None, **sabotage: Any) -> Ranks:
        """Start or resume the run of that name, with changed options if given."""
        from faults_rank import Sabotage

        options = {
            "train.output_dir": str(self.directory / name),
            "train.distributed": self.distributed,
            **SPREAD.get(self.distributed, {}),
            "train.resume": "auto",
            "train.epochs": "3",
            "train.max_steps": str(STEPS),
            "train.save_every": str(SAVE_EVERY),
            "train.micro_batch_size": "1",
            "train.check_ranks_every": "5",
            **(changes or {}),
        }
        arguments = [str(self.directory / "config.yaml"), *(w for k, v in options.items() for w in (f"--{k}", v))]
        return self.farm.start(arguments, self.directory / f"{name}.log", Sabotage(self.nan_ids, **sabotage))

    def reference(self) -> dict[str, Any]:
        """The run that nothing is done to, twice: the first one also starts the fork server."""
        for name, limit_s in (("undisturbed-0", FIRST_START_S), ("undisturbed", RUN_S)):
            started = time.monotonic()
            codes = self.start(name).wait(limit_s)
            self.run_s = time.monotonic() - started
            if codes != [0, 0]:
                raise SystemExit(f"the undisturbed run ended with {codes}:\n{self.tail(name)}")
        if self.result("undisturbed") != self.result("undisturbed-0"):
            raise SystemExit("two undisturbed runs differ: this machine does not compute the same twice")
        return self.result("undisturbed")

    def result(self, name: str) -> dict[str, Any]:
        """Everything that must not depend on faults: tensors as bytes, counters, losses."""
        from llava_mole.model.checkpoint import verify_checkpoint
        from llava_mole.train.tracker import read_metrics
        from llava_mole.train.trainer_state import TrainerState

        run_dir = self.directory / name
        newest = self.checkpoints(name)[0]
        verify_checkpoint(newest)
        tensors = TrainerState(newest)
        entries = read_metrics(run_dir / "metrics.jsonl")
        return {
            "checkpoint": newest.name,
            "tensors": {key: value.numpy().tobytes() for key, value in tensors.items()},
            "progress": json.loads((newest / "trainer" / "state.json").read_text(encoding="utf-8")),
            "steps": repr([[e["step"], e["loss"], e.get("auxiliary_loss")] for e in entries]),  # a NaN equals itself
            "leftovers": [path.name for path in run_dir.iterdir() if path.name.startswith(".")],
        }

    def disturb_until_done(self, name: str, expected: dict[str, Any], kills: int) -> None:
        """One run from start to end, with something going wrong in each of its lives but the last."""
        self.lost_image.write_bytes(b"\x89PNG")  # what an earlier run has lost
        foreign: dict[str, str] = {}
        for life in range(MOST_RESTARTS):
            if not foreign and self.checkpoints(name):
                foreign = self.add_foreign(name)
            calm = self.kills >= kills or life == MOST_RESTARTS - 1
            codes, intended = self.undisturbed_life(name) if calm else self.disturbed_life(name)
            self.restarts += 1
            if codes is None:
                self.lost.append(f"{name}: hung in life {life}\n{self.tail(name)}")
                return
            if codes == [0, 0]:
                break
            if any(code not in {0, *intended} for code in codes):  # 0: this rank had finished
                self.lost.append(f"{name}: life {life} ended with {codes}\n{self.tail(name)}")
                return
            if not calm:
                self.damage_disk(name)
                self.try_what_is_refused(name)
        else:
            self.lost.append(f"{name}: not done after {MOST_RESTARTS} lives")
            return
        if any(path.name.startswith(".") for path in (self.directory / name).iterdir()):
            self.undisturbed_life(name)  # the last deletion failed: a finished run that starts again only clears up
        self.check_foreign(name, foreign)
        found = self.result(name)
        if different := [key for key in expected if found[key] != expected[key]]:
            self.wrong.append(f"{name}: {', '.join(different)} differ from the undisturbed run's")

    def undisturbed_life(self, name: str) -> tuple[list[int] | None, set[int]]:
        return self.start(name).wait(RUN_S), {0}

    def disturbed_life(self, name: str) -> tuple[list[int] | None, set[int]]:
        """Start, disturb, and wait for the end: exit codes, and those the disturbance explains."""
        draw = self.random
        failing: dict[int, str] = {}
        if draw.random() < 0.25:
            kind = draw.choice(["no_space", "file_limit", "read_only", "rotation"])
            failing = {draw.randrange(2): kind}
        clock = draw.choice([0.0, 0.0, 3600.0])
        self.counts["clock going backwards (a life)"] += clock > 0
        killed = {-signal.SIGKILL, -signal.SIGTERM, 1}
        kind = draw.choices(["any", "save", "all", "stop"], [5, 4, 1, 1])[0]
        if kind == "save":
            moment = (draw.randrange(3), draw.randrange(CALLS_IN_A_SAVE))
            ranks = self.start(name, die_in_save=moment, failing_saves=failing, clock_back_s=clock)
            codes = ranks.wait(RUN_S)
            self.counts["kill -9 in a save"] += codes is not None and codes[0] == -signal.SIGKILL
        else:
            ranks = self.start(name, failing_saves=failing, clock_back_s=clock)
            time.sleep(draw.uniform(0.0, 0.9 * self.run_s))
            if kind == "stop":
                ranks.signal(draw.choice([signal.SIGTERM, signal.SIGUSR1]), draw.choice([None, 0, 1]))
                codes = ranks.wait(RUN_S)
                # Before the handler is there, the signal ends the process.
                killed = {75, -signal.SIGTERM, -signal.SIGUSR1, 1, -signal.SIGKILL}
                self.counts["SIGTERM or SIGUSR1, saved and stopped"] += codes == [75, 75]
            else:
                victims = [0, 1] if kind == "all" else [draw.randrange(2)]
                hit = [ranks.kill(rank) for rank in victims]
                codes = ranks.wait(RUN_S)
                label = "kill -9, all" if kind == "all" else "kill -9, random moment"
                self.counts[label] += any(hit)
        log = Path(f"{self.directory / name}.log.0").read_text(encoding="utf-8", errors="replace")
        messages = {
            "save on a full disk": ("bytes free; a checkpoint takes", "File too large"),
            "save on a disk that became read-only": ("Read-only file system",),
            "disk full while an old checkpoint is deleted": ("an old checkpoint could not be deleted",),
        }
        for kind, texts in messages.items():
            seen = sum(log.count(text) for text in texts)
            self.counts[kind] += seen - self._seen.get((name, kind), 0)
            self._seen[name, kind] = seen
        return codes, killed

    _seen: dict[tuple[str, str], int] = field(default_factory=dict)

    def checkpoints(self, name: str) -> list[Path]:
        """The run's own checkpoints, newest first."""
        from llava_mole.model.checkpoint import list_checkpoints

        return [p for p in list_checkpoints(self.directory / name) if not p.is_symlink() and _step(p) <= STEPS]

    def add_foreign(self, name: str) -> dict[str, str]:
        """Put what others may have left into the run directory. Returns the digest of every file."""
        run_dir, elsewhere = self.directory / name, self.directory / "elsewhere" / name
        for path in (run_dir / "checkpoint-500", run_dir / "checkpoint-1000", elsewhere / "checkpoint-1"):
            path.mkdir(parents=True)
            (path / "model.safetensors").write_bytes(self.random.randbytes(100))
        shutil.copytree(self.checkpoints(name)[0], run_dir / "checkpoint-998")
        (run_dir / "checkpoint-999").symlink_to(elsewhere / "checkpoint-1")
        (run_dir / "checkpoint-notes").write_text("mine", encoding="utf-8")
        (run_dir / ".tmp-checkpoint-7-1").mkdir()
        (run_dir / ".tmp-checkpoint-7-1" / "notes").write_text("mine", encoding="utf-8")
        self.counts["foreign checkpoints, links and files (entries)"] += 6
        return self.foreign_files(name)

    def foreign_files(self, name: str) -> dict[str, str]:
        """Digest of every file of the run directory that the run did not write."""
        from llava_mole.common.files import sha256_of

        roots = [self.directory / "elsewhere" / name]
        roots += [self.directory / name / entry for entry in FOREIGN]
        files = [p for root in roots for p in ([root] if root.is_file() else root.rglob("*")) if p.is_file()]
        return {str(path.relative_to(self.directory)): sha256_of(path) for path in files}

    def check_foreign(self, name: str, foreign: dict[str, str]) -> None:
        """Compare the foreign files with what they were, and remove them."""
        found = self.foreign_files(name) if foreign else {}
        self.touched += [f"{name}: {key}" for key in foreign if found.get(key) != foreign[key]]
        for entry in FOREIGN if foreign else ():
            path = self.directory / name / entry
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def try_what_is_refused(self, name: str) -> None:
        """Start the run as something that it is not, or where it cannot run: refused, and nothing has changed."""
        if not self.checkpoints(name):
            return
        red, base = self.directory / "red" / "red.json", self.directory / "other_base"
        original = red.read_bytes()
        in_the_way = self.directory / name / f"checkpoint-{STEPS}"
        kinds: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
            "edited data": ({}, {}, "data.sources.red has digest"),
            "swapped base model": ({"model.language_model": str(base)}, {}, "model.language_model has digest"),
            "changed setting": ({"adapter.rank": "3"}, {}, "adapter.rank is 2 there and 3 here"),
            "start on a read-only file system": ({}, {"read_only_start": True}, "Read-only file system"),
            "foreign checkpoint in the way": ({}, {}, "which this run did not write and would have to replace"),
            "two runs at once": ({}, {}, "is in use by process"),
        }
        for kind in self.random.sample(sorted(kinds), 4):
            changes, sabotage, message = kinds[kind]
            if kind == "foreign checkpoint in the way" and in_the_way.exists():
                continue
            log = Path(f"{self.directory / name}.log.0")
            first = self.start_and_wait_for_its_lock(name) if kind == "two runs at once" else None
            if kind == "edited data":
                red.write_bytes(original.replace(b"It is red.", b"It is Red."))
            elif kind == "foreign checkpoint in the way":
                in_the_way.mkdir()
            before, said = self.tree(name), len(log.read_text(encoding="utf-8", errors="replace"))
            codes = self.start(name, changes, **sabotage).wait(RUN_S, end_together=True)
            answered = log.read_text(encoding="utf-8", errors="replace")[said:]
            if first is not None:
                ended_first = codes == [0, 0] and "is complete: nothing to do" in answered
                if first.wait(RUN_S) != [0, 0] or (message not in answered and not ended_first):
                    self.wrong.append(f"{name}: {kind}: {codes}\n{answered[-1500:]}")
            elif codes != [2, 2] or message not in answered or self.tree(name) != before:
                self.wrong.append(f"{name}: {kind}: ended with {codes}\n{answered[-1500:]}")
            red.write_bytes(original)
            if kind == "foreign checkpoint in the way":
                in_the_way.rmdir()
            self.counts[f"{kind}, refused"] += 1

    def start_and_wait_for_its_lock(self, name: str) -> Ranks:
        """Start the run; return once it holds the lock, which a killed process may have left behind, or has ended."""
        ranks, lock = self.start(name), self.directory / name / ".lock"
        while ranks.processes[0].is_alive():
            with contextlib.suppress(OSError, ValueError):
                if json.loads(lock.read_text(encoding="utf-8"))["pid"] == ranks.processes[0].pid:
                    break
            time.sleep(0.002)
        return ranks

    def tree(self, name: str) -> dict[str, bytes]:
        """Every file of the run directory except what killed processes left, which each start removes."""
        run_dir = self.directory / name
        entries = [p for p in run_dir.iterdir() if p.name in FOREIGN or not p.name.startswith(".")]
        files = [file for entry in entries for file in (entry, *entry.rglob("*")) if file.is_file()]
        return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}

    def damage_disk(self, name: str) -> None:
        """Now and then cut off or flip a bit of a file of the newest checkpoint, or lose an image for good."""
        draw = self.random
        checkpoints = self.checkpoints(name)
        if len(checkpoints) >= 2 and draw.random() < 0.3:
            file = draw.choice(sorted(p for p in checkpoints[0].rglob("*") if p.is_file() and p.stat().st_size))
            content = bytearray(file.read_bytes())
            if draw.random() < 0.5:
                file.write_bytes(content[: draw.randrange(len(content))])
                self.counts["torn file"] += 1
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                file.write_bytes(content)
                self.counts["bit flip"] += 1
        metrics = self.directory / name / "metrics.jsonl"
        if metrics.exists() and draw.random() < 0.2:
            metrics.write_bytes(metrics.read_bytes() + b'{"step": 9, "lo')
            self.counts["torn line of metrics"] += 1
        # The image that could not be decoded is now gone altogether: the same sample takes its place.
        # A run that has not begun would rightly refuse to.
        begun = (self.directory / name / "config.yaml").exists()
        if begun and self.lost_image.exists() and draw.random() < 0.2:
            self.lost_image.unlink()
            self.counts["missing image at a restart"] += 1

    def tail(self, name: str) -> str:
        logs = [Path(f"{self.directory / name}.log.{rank}") for rank in range(2)]
        return "\n".join(f"{p}:\n{p.read_text(errors='replace')[-2500:]}" for p in logs if p.exists())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 kills, under a minute once the imports are cached")
    parser.add_argument("--kills", type=int, default=None, help="how many kill -9 (default 100; 12 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds of faults")
    parser.add_argument("--distributed", choices=["ddp", "zero2", "zero3", "fsdp2"], default="ddp")
    parser.add_argument("--keep", type=Path, default=None, help="directory for runs and logs (default: temporary)")
    parser.add_argument("--json", type=Path, default=None, help="write the table to this file")
    options = parser.parse_args()
    kills = options.kills if options.kills is not None else 12 if options.quick else 100
    directory = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(Farm(), directory, options.distributed, random.Random(options.seed))
    started = time.monotonic()
    print(f"preparing in {directory} ...", flush=True)
    campaign.prepare()
    expected = campaign.reference()
    if not expected["progress"]["skipped_steps"] or not expected["progress"]["replaced_images"]:
        raise SystemExit("the undisturbed run met neither NaN nor unreadable images: the campaign would prove less")
    print(f"undisturbed: {STEPS} steps in {campaign.run_s:.1f} s, {expected['progress']}", flush=True)
    runs = reported = 0
    while campaign.kills < kills:
        campaign.disturb_until_done(f"run-{runs}", expected, kills)
        runs += 1
        problems = campaign.lost + campaign.wrong + campaign.touched
        for problem in problems[reported:]:
            print(problem, file=sys.stderr, flush=True)
        reported = len(problems)
        print(
            f"run {runs}: {campaign.kills}/{kills} kills, {campaign.restarts} starts, {len(campaign.lost)} lost, "
            f"{len(campaign.wrong)} wrong, {len(campaign.touched)} touched, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    seconds = time.monotonic() - started
    rows: list[dict[str, Any]] = [{"fault": kind, "count": n} for kind, n in sorted(campaign.counts.items()) if n]
    report(f"Faults, 2 ranks, {options.distributed}, float32 on CPU (measured)", rows)
    total = {
        "fault": "all",
        "count": sum(n for kind, n in campaign.counts.items() if "(records)" not in kind and "(entries)" not in kind),
        "kills": campaign.kills,
        "runs": runs,
        "starts": campaign.restarts,
        "lost_runs": len(campaign.lost),
        "wrong_resumes": len(campaign.wrong),
        "foreign_files_touched": len(campaign.touched),
        "total_s": seconds,
        "start_s": seconds / max(1, campaign.restarts),
    }
    report("Result: lost_runs, wrong_resumes and foreign_files_touched must be 0", [total])
    save([*rows, total], options.json)
    failed = bool(campaign.lost or campaign.wrong or campaign.touched)
    if options.keep is None and not failed:
        shutil.rmtree(directory)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
