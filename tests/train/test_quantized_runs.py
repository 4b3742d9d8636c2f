"""Runs on a language model in 4 and 8 bits: they learn, resume, load as trained or otherwise, also on two ranks."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from worlds.eval_models import make_questions, mute_byte_pieces
from worlds.optimizer_state import assert_same_state, optimizer_state
from worlds.processes import fork_python
from worlds.tiny_models import make_language_model, make_world

from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.config import config_to_dict, load_config, parse_run_config
from llava_mole.eval import model_vqa
from llava_mole.inference.predictor import Predictor
from llava_mole.model.builder import attach_adapter, build_parts, load_pretrained_model
from llava_mole.model.quantization import quantize_linears
from llava_mole.serve import cli as chat
from llava_mole.train.tracker import read_metrics
from llava_mole.train.train import train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra quant) is not installed"
)
STEPS = 6
IDS = torch.tensor([[1, 300, 301, 302]])
MASK = torch.ones_like(IDS, dtype=torch.bool)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, samples=15, text_only_every=5)
    make_language_model(directory / "language_model", hidden_size=64, ffn_size=128)
    mute_byte_pieces(directory / "language_model" / "model.safetensors")
    return directory


def arguments(world: Path, name: str, *more: str) -> list[str]:
    settings = {"output_dir": str(world / name), "max_steps": STEPS, "save_every": STEPS // 2}
    options = [part for key, value in settings.items() for part in (f"--train.{key}", str(value))]
    return [str(world / "config.yaml"), *options, *more]


def run(world: Path, name: str, quantization: str = "4bit", *more: str) -> Path:
    return train(parse_run_config(arguments(world, name, "--model.quantization", quantization, *more)))


def losses(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl")]


def masters(run_dir: Path) -> dict[str, torch.Tensor]:
    state = optimizer_state(run_dir, STEPS)
    return {key.removeprefix("master/"): value for key, value in state.items() if key.startswith("master/")}


@pytest.fixture(scope="module")
def four(world: Path) -> Path:
    """A run in 4 bits, with a validation in the middle."""
    return run(world, "four", "4bit", "--data.validation_samples", "3", "--train.validate_every", "2")


@pytest.fixture(scope="module")
def full(world: Path) -> Path:
    """A run that is not quantised."""
    return run(world, "full", "none")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("method", ["lora", "mole"])
def test_it_learns_and_loads_as_it_was_trained(world: Path, method: str, quantization: str) -> None:
    out = run(world, f"{method}-{quantization}", quantization, "--adapter.method", method)
    values = losses(out)
    assert all(map(math.isfinite, values))
    assert sum(values[-2:]) < 0.8 * sum(values[:2])
    config = load_config(out / "config.yaml")
    torch.manual_seed(config.train.seed)
    model, _, _ = build_parts(config.model)
    quantize_linears(model.causal_lm, config.model.quantization, torch.device("cpu"), torch.float32)
    attach_adapter(model, config.adapter)
    trained, parameters = masters(out), dict(model.named_parameters())
    assert trained.keys() == {name for name, p in parameters.items() if p.requires_grad}
    assert [name for name, value in trained.items() if torch.equal(value, parameters[name])] == []
    assert not model.load_state_dict(trained, strict=False).unexpected_keys
    loaded = load_pretrained_model(out, device="cpu")
    assert loaded.quantization == quantization
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS, MASK), model.eval()(IDS, MASK))


def test_validation_does_not_disturb_training(world: Path, four: Path) -> None:
    silent = run(world, "silent", "4bit", "--data.validation_samples", "3", "--train.validate_every", "1000")
    assert losses(silent) == losses(four)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_recomputation_changes_nothing(world: Path, quantization: str) -> None:
    kept = run(world, f"kept-{quantization}", quantization)
    again = run(world, f"again-{quantization}", quantization, "--train.activation_checkpointing", "all")
    assert losses(again) == pytest.approx(losses(kept), abs=1e-5)


def test_the_checkpoint_says_so_and_goes_on_bit_for_bit(world: Path, four: Path) -> None:
    manifest = json.loads((four / f"checkpoint-{STEPS}" / "manifest.json").read_text())
    assert manifest["quantization"] == "4bit"
    cut = world / "cut"
    shutil.copytree(four, cut)
    shutil.rmtree(cut / f"checkpoint-{STEPS}")
    more = ["--data.validation_samples", "3", "--train.validate_every", "2", "--train.resume", "auto"]
    for other in ("none", "8bit"):
        with pytest.raises(CheckpointError, match=f"model.quantization is '4bit' there and '{other}' here"):
            run(world, "cut", other, *more)
    run(world, "cut", "4bit", *more)
    assert losses(cut) == losses(four)
    expected = masters(four)
    assert all(torch.equal(value, expected[name]) for name, value in masters(cut).items())


def test_either_way_round(four: Path, full: Path) -> None:
    """An adapter's base is the directory; on it, it may be loaded quantised or not, and answers differ a little."""
    for out, trained in ((four, "4bit"), (full, "none")):
        logits = {}
        for quantization in ("none", "8bit", "4bit"):
            loaded = load_pretrained_model(out, device="cpu", quantization=quantization)
            assert loaded.quantization == quantization
            with torch.no_grad():
                logits[quantization] = loaded.model(IDS, MASK)
        as_trained = load_pretrained_model(out, device="cpu")
        with torch.no_grad():
            assert torch.equal(as_trained.model(IDS, MASK), logits[trained])
        distance = {name: (value - logits["none"]).norm() / logits["none"].norm() for name, value in logits.items()}
        assert 0 < distance["8bit"] < distance["4bit"] < 1


def test_task_fine_tuning_may_change_it(world: Path, full: Path) -> None:
    out = run(world, "task", "4bit", "--init_from", str(full), "--train.learning_rate", "1e-3")
    assert losses(out)[0] < 0.9 * losses(full)[0]


def test_an_older_checkpoint_without_the_field_resumes(world: Path, full: Path) -> None:
    from llava_mole.model.checkpoint import MANIFEST, SELF_HASH
    from llava_mole.train.resume import check_same_config

    old = world / "old"
    shutil.copytree(full / f"checkpoint-{STEPS}", old)
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["quantization"], manifest[SELF_HASH]
    (old / MANIFEST).write_text(json.dumps(manifest))
    config = load_config(full / "config.yaml")
    written = yaml.safe_load((old / "config.yaml").read_text())
    del written["model"]["quantization"]
    (old / "config.yaml").write_text(yaml.safe_dump(written))
    check_same_config(old, config_to_dict(config), [])


def test_answers_do_not_depend_on_the_batch(four: Path) -> None:
    predictor = Predictor.from_pretrained(four, device="cpu")
    prompts = ["What color is this?", "Is it blue or green? Is it one of ten?", "Is it red?"]
    together = predictor.generate([None] * 3, prompts, max_new_tokens=6)
    alone = [predictor.generate([None], [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert "".join(predictor.stream(None, prompts[0], max_new_tokens=6)) == alone[0]


def test_commands_load_as_asked(
    four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_questions(tmp_path)
    common = ["--model-path", str(four), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "3"]
    questions = ["--question-file", str(asked), "--image-folder", str(tmp_path)]
    seen = {}
    answer = model_vqa.answer_questions

    def spy(predictor, *args, **kwargs):
        seen.update(model_vqa.describe_run(predictor, *args[:2], args[3]))
        return answer(predictor, *args, **kwargs)

    monkeypatch.setattr(model_vqa, "answer_questions", spy)
    for option, used in (([], "4bit"), (["--load-8bit"], "8bit"), (["--load-full"], "none")):
        assert model_vqa.main([*common, *questions, "--answers-file", str(tmp_path / f"{used}.jsonl"), *option]) == 0
        assert seen["quantization"] == used
    image = str(tmp_path / "images" / "0.png")
    assert chat.main([*common, "--image-file", image, "--prompt", "Is it red?"]) == 0
    assert "   language model in 4bit\n" in capsys.readouterr().out
    assert chat.main([*common, "--image-file", image, "--prompt", "Is it red?", "--load-full"]) == 0
    assert "language model in" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        chat.main([*common, "--image-file", image, "--load-4bit", "--load-8bit"])


def test_loading_without_bitsandbytes_names_the_way_out(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"in 4bit .*pip install 'llava_mole\[quant\]'.*--load-full"):
        load_pretrained_model(four, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "strategy"), [("4bit", "zero2"), ("4bit", "ddp"), ("8bit", "zero2")])
def test_two_ranks_equal_one_process(world: Path, quantization: str, strategy: str) -> None:
    more = ["--train.batching", "padded", "--train.micro_batch_size", "1", "--adapter.preset", "paper"]
    one = world / f"one-{quantization}"
    if not one.exists():
        run(world, one.name, quantization, *more)
    name = f"{strategy}-{quantization}"
    more += ["--model.quantization", quantization, "--train.distributed", strategy]
    worker = Path(__file__).with_name("ranks_worker.py")
    done = fork_python(worker, *arguments(world, name, *more), ranks=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    engines = {json.loads((world / name / f"rank-{rank}.json").read_text())["engine"] for rank in range(2)}
    assert engines == {{"zero2": "DeepSpeedEngine", "ddp": "DistributedDataParallel"}[strategy]}
    assert losses(world / name) == pytest.approx(losses(one), abs=2e-5)
    assert_same_state(optimizer_state(world / name, STEPS), optimizer_state(one, STEPS))


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("method", ["lora", "mole"])
def test_bf16_on_a_gpu_learns_and_loads(world: Path, method: str, quantization: str) -> None:
    more = ["--device", "cuda", "--train.precision", "bf16", "--adapter.method", method]
    out = run(world, f"gpu-{method}-{quantization}", quantization, *more)
    assert losses(out)[-1] < losses(out)[0]
    loaded = load_pretrained_model(out, device="cuda", dtype="bfloat16")
    assert all(p.is_cuda for p in loaded.model.parameters())
    assert torch.isfinite(loaded.model(IDS.cuda(), MASK.cuda())).all()
