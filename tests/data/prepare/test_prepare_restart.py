"""`prepare` is all or nothing: killed at any moment it leaves no output, and the next call ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worlds import published_sets, raw_sets

from llava_mole.cli import main
from llava_mole.common.locks import locked
from llava_mole.data.prepare import image_pool
from llava_mole.data.prepare.images import ImageInfo
from llava_mole.data.store import verify_shards

ROOT = Path(__file__).parents[3]


def arguments(tmp_path: Path, out: str, *more: str) -> list[str]:
    return ["prepare", "m3it", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / out), "--workers", "1", *more]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; the manifest without its time."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in files.items() if not name.endswith("manifest.json")}


def write_many(raw: Path, files: int = 6, rows: int = 40) -> None:
    for number in range(files):
        lines = [
            {
                "instruction": "D.",
                "inputs": f"{number}/{row}",
                "image": raw_sets.base64_image(number * rows + row, kind="PNG"),
                "outputs": "x",
            }
            for row in range(rows)
        ]
        raw_sets.write_lines(raw / f"data/vqa/set{number}/train.jsonl", lines)


@pytest.mark.slow
def test_killed_and_called_again(tmp_path: Path) -> None:
    write_many(tmp_path / "raw")
    assert main(arguments(tmp_path, "whole")) == 0
    slow = (
        "import sys, time\n"
        "from llava_mole.data.prepare import image_pool\n"
        "whole = image_pool.run_tasks\n"
        "def run_tasks(*given):\n"
        "    time.sleep(0.3)\n"
        "    return whole(*given)\n"
        "image_pool.run_tasks = run_tasks\n"
        "from llava_mole.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments(tmp_path, "killed")], env=environment, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / ".killed.partial"
    deadline = time.monotonic() + 60
    while len(list((partial / "images").rglob("*.png"))) < 64 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    written = {path: path.stat().st_mtime_ns for path in (partial / "images").rglob("*.png")}
    assert 64 <= len(written) < 240

    assert main(arguments(tmp_path, "killed")) == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    verify_shards(tmp_path / "killed" / "train")
    assert not partial.exists()
    for path, changed in written.items():
        final = tmp_path / "killed" / path.relative_to(partial)
        assert final.stat().st_mtime_ns == changed, "an image that was there is not written again"


def test_checked_files_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_sets.write_sharegpt4v_instruct(tmp_path / "raw")
    given = [
        "prepare",
        "sharegpt4v-instruct",
        "--raw",
        str(tmp_path / "raw"),
        "--workers",
        "1",
        "--check-images",
        "decode",
    ]
    assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    from llava_mole.data.prepare import pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*given, "--out", str(tmp_path / "out")]) == 130
    seen: list[str] = []
    real = image_pool.run_task
    monkeypatch.setattr(image_pool, "run_task", lambda task, *more: seen.append(task.name) or real(task, *more))
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert seen == ["textvqa/train_images/4.jpg"], "only what was damaged, which may have been replaced"
    once, again = raw_sets.Prepared(tmp_path / "whole"), raw_sets.Prepared(tmp_path / "out")
    assert again.report == once.report
    assert again.rows == once.rows
    assert sorted(again.listed) == sorted(once.listed)


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    facts = [ImageInfo(f"{n}.jpg", (20, 10 + n), None) for n in range(3)]
    path = tmp_path / "checked.jsonl"
    for number, fact in enumerate(facts):
        journal = image_pool.Journal(path)
        assert [journal.get(known.path) for known in facts[:number]] == facts[:number]
        journal.add(fact)
        journal.close()
        with path.open("a") as file:  # killed while it wrote the next line
            file.write('["half.jpg", [20, 1')
    journal = image_pool.Journal(path)
    assert [journal.get(known.path) for known in facts] == facts
    journal.close()


def test_a_partial_output_of_other_arguments_is_thrown_away(tmp_path: Path) -> None:
    write_many(tmp_path / "raw", 1, 3)
    partial = tmp_path / ".out.partial"
    (partial / "images" / "set0").mkdir(parents=True)
    (partial / "images" / "set0" / "stray.png").write_bytes(b"x")
    (partial / "request.json").write_text(json.dumps({"seed": 5}))
    done = raw_sets.prepare("m3it", tmp_path / "raw", tmp_path / "out")
    assert not (done.out / "images/set0/stray.png").exists()
    assert len(done.rows) == 3


def test_an_output_is_replaced_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_many(tmp_path / "raw", 1, 3)
    assert main(arguments(tmp_path, "out")) == 0
    assert main(arguments(tmp_path, "out")) == 2
    assert "exists; give --overwrite to replace it" in capsys.readouterr().err
    write_many(tmp_path / "raw", 1, 4)
    assert main(arguments(tmp_path, "out", "--overwrite")) == 0
    assert len(raw_sets.Prepared(tmp_path / "out").rows) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


@pytest.mark.parametrize("there", [None, "empty", "prepared"])
def test_an_output_that_is_a_link_is_followed(tmp_path: Path, there: str | None) -> None:
    write_many(tmp_path / "raw", 1, 3)
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "set")
    if there == "empty":
        (disk / "set").mkdir()
    if there == "prepared":
        assert main(arguments(tmp_path, "disk/set")) == 0
    for more in ((), ("--overwrite",)):
        assert main(arguments(tmp_path, "out", *more)) == (2 if there == "prepared" and not more else 0)
    assert len(raw_sets.Prepared(disk / "set").rows) == 3
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (*tmp_path.iterdir(), *disk.iterdir())) == ["disk", "out", "raw", "set"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_many(tmp_path / "raw", 1, 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert main(arguments(tmp_path, "out", "--overwrite")) == 2
    assert "`prepare` did not write it" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").is_file()


def test_a_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    write_many(tmp_path / "raw", 1, 3)
    assert main(arguments(tmp_path, "out")) == 0
    before = tree(tmp_path / "out")
    raw_sets.write_lines(tmp_path / "raw/data/vqa/set1/train.jsonl", [{"new_key": 1}])
    assert main(arguments(tmp_path, "out", "--overwrite")) == 2
    assert tree(tmp_path / "out") == before


def test_two_at_a_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_many(tmp_path / "raw", 1, 3)
    with locked(tmp_path / ".out.lock", "it"):
        assert main(arguments(tmp_path, "out")) == 2
    assert f"--out {tmp_path / 'out'} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert main(arguments(tmp_path, "out")) == 0
    assert not (tmp_path / ".out.lock").exists()


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    write_many(tmp_path / "raw", 1, 3)
    assert main(arguments(tmp_path, "real")) == 0
    (tmp_path / "out").symlink_to("real")
    before = (tmp_path / "real").stat().st_ino
    assert main(arguments(tmp_path, "out", "--overwrite")) == 0
    assert os.readlink(tmp_path / "out") == "real"
    assert (tmp_path / "real").stat().st_ino != before  # its target was


def test_a_folder_of_the_partial_name_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_many(tmp_path / "raw", 1, 3)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "notes.txt").write_text("mine")
    assert main(arguments(tmp_path, "out")) == 2
    assert "holds no request.json, so `prepare` did not write it" in capsys.readouterr().err
    assert (tmp_path / ".out.partial" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(tmp_path: Path) -> None:
    write_many(tmp_path / "raw", 3, 70)
    assert main(arguments(tmp_path, "one")) == 0
    assert main([*arguments(tmp_path, "two"), "--workers", "2"]) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from llava_mole.common.processes import open_pool\n"
        "if __name__ == '__main__':\n"
        "    pool = open_pool(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{worker}").exists() and _state(worker) != "Z":
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists() or _state(worker) == "Z"


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_what_was_unpacked_outlives_an_interrupted_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path / "raw", 1, 3)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", interrupt)
        assert main(arguments(tmp_path, "out")) == 130
    images = tmp_path / ".out.partial" / "images"
    written = {path.relative_to(images): path.stat().st_mtime_ns for path in images.rglob("*.png")}
    assert len(written) == 3
    (images / "set0" / ".0123.77").write_bytes(b"half an im")
    assert main(arguments(tmp_path, "out")) == 0
    images = tmp_path / "out" / "images"
    assert {
        path.relative_to(images): path.stat().st_mtime_ns for path in images.rglob("*") if path.is_file()
    } == written
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "defects.jsonl", "images", "report.json", "train"
    ]  # fmt: skip


@pytest.mark.parametrize("again", [(), ("--overwrite",)])
def test_an_output_moved_aside_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: tuple[str, ...]
) -> None:
    write_many(tmp_path / "raw", 1, 3)
    assert main(arguments(tmp_path, "out")) == 0
    before = tree(tmp_path / "out")
    write_many(tmp_path / "raw", 1, 4)
    replace = os.replace

    def stop_at_the_second(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_second)
        assert main(arguments(tmp_path, "out", "--overwrite")) == 130
    assert not (tmp_path / "out").exists()
    assert main(arguments(tmp_path, "out", *again)) == (0 if again else 2)
    if again:
        assert len(raw_sets.Prepared(tmp_path / "out").rows) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    else:
        assert tree(tmp_path / "out") == before


def test_unpacked_images_of_dropped_rows_only(tmp_path: Path) -> None:
    raw_sets.write_image(tmp_path / "raw/a.jpg", 1)
    picture = f"data:image/jpeg;base64,{raw_sets.base64_image(2)}"
    rows = [
        {"images": [picture, "data:image/jpeg;base64,@@@@"], "question": "Same?", "answer": "no"},
        {"image": "a.jpg", "question": "Red?", "answer": "no"},
    ]
    raw_sets.write_lines(tmp_path / "raw/rows.jsonl", rows)
    done = raw_sets.prepare("messages", tmp_path / "raw", tmp_path / "out")
    assert [row.images for row in done.rows] == [("a.jpg",)]
    assert (done.out / "images").is_symlink()
