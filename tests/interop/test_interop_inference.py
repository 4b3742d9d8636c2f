"""Checkpoints for inference only, and checkpoints whose language model or tower has moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from worlds.eval_models import make_checkpoint
from worlds.foreign_models import make_clip, make_llava
from worlds.interop_tools import convert, load, our_logits, refused
from worlds.tiny_models import make_language_model, make_vision_tower

from llava_mole import cli
from llava_mole.common.errors import CheckpointError
from llava_mole.config import parse_run_config
from llava_mole.model.checkpoint import read_manifest, verify_checkpoint
from llava_mole.train.train import train

METHODS = ("mole", "lora", "none")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A world with a run for each adapter method, and an imported run, whose parts lie beside the checkpoint."""
    made = {method: tmp_path_factory.mktemp(method) for method in METHODS}
    for method, world in made.items():
        make_checkpoint(world, method, std=0.1)
    made["imported"] = tmp_path_factory.mktemp("imported")
    make_llava(made["imported"] / "llava", tower=make_clip(made["imported"] / "clip"))
    options = ("--to", "checkpoint", "--vision-tower", made["imported"] / "clip")
    assert convert(made["imported"] / "llava", *options, "--out", made["imported"] / "run") == 0
    return made


@pytest.mark.parametrize("kind", [*METHODS, "imported"])
def test_a_checkpoint_for_inference_answers_alike_and_is_never_resumed(
    kind: str, worlds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, slim = worlds[kind] / "run", tmp_path / "slim"
    assert convert(run, "--to", "inference", "--out", slim) == 0
    assert "no run can resume from it" in capsys.readouterr().out
    for ours, whole in zip(our_logits(load(slim)), our_logits(load(run)), strict=True):
        assert torch.equal(ours, whole)
    names = {path.name for path in slim.iterdir()}
    assert names >= {"manifest.json", "config.yaml", "tokenizer", "mm_projector.safetensors"}
    assert not {"trainer", "run.json"} & names
    (checkpoint,) = run.glob("checkpoint-*")
    before, after = read_manifest(checkpoint), read_manifest(slim)
    assert "run" not in after
    assert after["fingerprints"] == before["fingerprints"]
    assert all(Path(path).is_absolute() for path in after["paths"].values())
    assert cli.main(["inspect", str(slim)]) == 0
    assert "no run can resume from it" in capsys.readouterr().out
    refused(capsys, "exists; give another --out", run, "--to", "inference", "--out", slim)
    assert convert(slim, "--to", "inference", "--out", slim.with_name("again")) == 0
    assert convert(run, "--to", "inference", "--out", slim, "--overwrite") == 0


@pytest.mark.parametrize("how", ["convert", "remove"])
def test_training_says_that_it_cannot_resume_but_starts_from_the_weights(
    how: str, worlds: dict[str, Path], tmp_path: Path
) -> None:
    world, slim = worlds["mole"], tmp_path / "run" / "checkpoint-1"
    if how == "convert":
        assert convert(world / "run", "--to", "inference", "--out", slim) == 0
    else:
        shutil.copytree(world / "run" / "checkpoint-1", slim)
        shutil.rmtree(slim / "trainer")
    torch.testing.assert_close(our_logits(load(slim)), our_logits(load(world / "run")))
    out = ["--train.output_dir", str(tmp_path / "new")]
    arguments = [str(world / "config.yaml"), "--train.warmup_steps", "0", "--train.global_batch_size", "2"]
    with pytest.raises(CheckpointError, match="it is for inference only, and no run can resume from it"):
        train(parse_run_config([str(world / "config.yaml"), *out, "--train.resume", str(slim)]))
    if how == "convert":
        run = train(parse_run_config([*arguments, *out, "--init-from", str(slim)]))
        assert (run / "checkpoint-1" / "trainer").is_dir()


@pytest.mark.parametrize("lost", ["trainer/state.json", "trainer/optimizer.safetensors", "config.yaml", "tokenizer"])
def test_anything_else_that_is_missing_is_damage(lost: str, worlds: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(worlds["mole"] / "run" / "checkpoint-1", copy)
    if (copy / lost).is_dir():
        shutil.rmtree(copy / lost)
    else:
        (copy / lost).unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete: {lost}.* is missing"):
        verify_checkpoint(copy)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of plain LoRA whose language model and tower lie in `there/`, a picture and a question file."""
    world = tmp_path_factory.mktemp("moved")
    make_checkpoint(world, "lora", std=0.1)
    (world / "there").mkdir()
    for name in ("language_model", "vision_tower"):
        shutil.move(world / name, world / "there" / name)
    make_language_model(world / "other" / "language_model", seed=5)
    make_vision_tower(world / "other" / "vision_tower", seed=5)
    make_clip(world / "clip")
    Image.new("RGB", (20, 20), (250, 10, 10)).save(world / "photo.png")
    line = {"question_id": "1", "text": "Is it blue?", "image": "photo.png", "answer": "no", "category": "one"}
    (world / "q.jsonl").write_text(json.dumps(line) + "\n")
    return world


def commands(world: Path, out: Path) -> dict[str, list[str]]:
    run, short = str(world / "run"), ["--device", "cpu", "--max-new-tokens", "2"]
    asked = ["--question-file", str(world / "q.jsonl"), "--image-folder", str(world)]
    return {
        "chat": ["chat", "--model-path", run, "--image-file", str(world / "photo.png"), "--prompt", "Hi", *short],
        "vqa": ["eval-vqa", "--model-path", run, *asked, "--answers-file", str(out / "a.jsonl"), *short],
        "llava": ["convert", run, "--to", "llava", "--out", str(out / "llava")],
        "llava-hf": ["convert", run, "--to", "llava-hf", "--out", str(out / "hf")],
        "hf-clip": ["convert", run, "--to", "hf-clip", "--out", str(out / "clip")],
    }


@pytest.mark.parametrize("name", ["chat", "vqa", "llava", "llava-hf", "hf-clip"])
def test_every_command_finds_moved_parts_and_says_how(
    name: str, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = commands(moved, tmp_path)[name]
    base = ["--model-base", str(moved / "there" / "language_model")]

    def fails(message: str, *options: object) -> None:
        capsys.readouterr()
        assert run(*command, *map(str, options)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line
        assert "model.vision_tower" not in line
        assert not list(tmp_path.iterdir())

    fails("language_model; name it with --model-base DIR")
    fails("model.safetensors; name it with --vision-tower DIR", *base)
    tower = moved / "there" / "vision_tower"
    fails(
        "was trained on another language model",
        "--model-base",
        moved / "other" / "language_model",
        "--vision-tower",
        tower,
    )
    fails("name the original one with --vision-tower DIR", *base, "--vision-tower", moved / "other" / "vision_tower")
    fails(
        f"convert it with `llava-mole convert {moved / 'clip'} --to open-clip", *base, "--vision-tower", moved / "clip"
    )
    fails("--vision-tower nowhere does not exist", *base, "--vision-tower", "nowhere")
    assert run(*command, *base, "--vision-tower", str(tower)) == 0
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(*command, *base, "--vision-tower", str(tower / "model.safetensors")) == 0


def run(*command: str) -> int:
    """Exit code of `llava-mole COMMAND`; `eval-vqa` stands for LLaVA's module."""
    from llava_mole.eval import model_vqa

    return model_vqa.main(list(command[1:])) if command[0] == "eval-vqa" else cli.main(list(command))


UNUSED = [
    ("--to", "inference", "--model-base", "x"),
    ("--to", "inference", "--dtype", "float16"),
    ("--to", "peft", "--dtype", "float16"),
    ("--to", "llava", "--template", "v1"),
    ("--to", "llava-hf", "--mm-vision-tower", "x"),
    ("--to", "llava-hf", "--tower-in-shards"),
    ("--to", "projector", "--expert", "0"),
    ("--to", "hf-clip", "--usage", "x"),
    ("--to", "llava", "--alpha", "3"),
    ("--to", "peft", "--vision-tower-name", "x"),
]


@pytest.mark.parametrize("options", UNUSED, ids=" ".join)
def test_options_that_a_format_does_not_read_are_refused(
    options: tuple[str, ...], worlds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, f"{options[2]} is for --to ", worlds["lora"] / "run", *options, "--out", tmp_path / "out.bin")
    assert not list(tmp_path.iterdir())


def test_options_that_a_source_does_not_read_are_refused(
    worlds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    for option in (("--alpha", 3), ("--mode", "sparse")):
        message = "--alpha and --mode are for the MoE authors' .pt"
        refused(capsys, message, worlds["imported"] / "llava", "--to", "checkpoint", *option, *out)
    for expert in ((), ("--expert", 0)):
        message = "--usage x is for --expert usage"
        refused(capsys, message, worlds["mole"] / "run", "--to", "peft", "--usage", "x", *expert, *out)
