"""A run from start to end in one process: it learns, saves, resumes bit for bit, and refuses what it cannot do."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds.tiny_models import make_data, make_language_model, make_world

from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.config import load_config, parse_run_config
from llava_mole.model.builder import attach_adapter, build_parts, load_pretrained_model
from llava_mole.train.tracker import over_layers, read_metrics
from llava_mole.train.train import main, train

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_world(directory, text_only_every=5)
    return directory


def run(world: Path, name: str, *overrides: str) -> Path:
    """Train `name` below the world's directory and return its run directory."""
    out = world / name
    arguments = [str(world / "config.yaml"), "--train.output_dir", str(out), "--train.max_steps", str(STEPS)]
    return train(parse_run_config([*arguments, *overrides]))


def losses(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl")]


def weights(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoint-{step}" / "trainer" / "optimizer.safetensors")


@pytest.fixture(scope="module")
def reference(world: Path) -> Path:
    """The undisturbed run, with a checkpoint half-way."""
    return run(world, "reference", "--train.save_every", str(STEPS // 2))


def test_loss_falls_and_every_trainable_part_moves(world: Path, reference: Path) -> None:
    values = losses(reference)
    assert len(values) == STEPS
    assert sum(values[-2:]) < 0.8 * sum(values[:2])
    config = load_config(reference / "config.yaml")
    torch.manual_seed(config.train.seed)
    model, _, _ = build_parts(config.model)
    attach_adapter(model, config.adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    after = {k.removeprefix("master/"): v for k, v in weights(reference).items() if k.startswith("master/")}
    assert before.keys() == after.keys()
    for name, value in before.items():
        experts = value.shape[0] if value.ndim == 3 else 1
        for old, new in zip(value.reshape(experts, -1), after[name].reshape(experts, -1), strict=True):
            assert not torch.equal(old, new), name
    for part in ("projector.", ".mole_router", "self_attn"):
        assert any(part in name for name in before), part
    assert any(value.ndim == 3 for value in before.values()), "stacked experts"


def test_frozen_parts_have_no_gradient_state(reference: Path) -> None:
    assert not [name for name in weights(reference) if "vision_tower" in name or "embed_tokens" in name]


def test_checkpoint_is_complete(reference: Path) -> None:
    files = {p.relative_to(reference).as_posix() for p in reference.rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.jsonl", "environment.json", "summary.json"}
    for step in (STEPS // 2, STEPS):
        expected |= {
            f"checkpoint-{step}/{name}"
            for name in (
                "manifest.json", "config.yaml", "mm_projector.safetensors", "adapter/adapter_config.json",
                "adapter/adapter_model.safetensors", "tokenizer/tokenizer.json", "trainer/optimizer.safetensors",
                "trainer/state.json",
            )
        }  # fmt: skip
    assert expected <= files
    manifest = json.loads((reference / f"checkpoint-{STEPS}" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["step"], manifest["template"]) == ("finetune", STEPS, "vicuna_v1")


def test_metrics_say_what_happened(reference: Path) -> None:
    entry = read_metrics(reference / "metrics.jsonl")[-1]
    assert entry["samples"] == 4
    assert set(entry["source_loss"]) <= {"red", "blue"}
    assert sum(entry["expert_load"]) == pytest.approx(1)
    assert len(entry["expert_load_by_layer"]) == 2
    for share in entry["expert_load_by_modality"].values():
        assert sum(share) == pytest.approx(1)
    assert set(entry["expert_load_by_modality"]) == {"text", "image"}
    for layer in range(2):
        assert 0 < entry["router_entropy_by_layer"][layer] <= math.log(2) + 1e-6
        assert 0 <= entry["router_margin_by_layer"][layer] <= 1
    assert entry["grad_norm"] > 0
    assert set(entry["learning_rate"]) == {"adapter", "projector", "router"}
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["samples_consumed"] == 4 * STEPS
    assert sum(summary["consumed_by_source"].values()) == 4 * STEPS


def test_resume_continues_bit_for_bit(world: Path, reference: Path) -> None:
    cut = world / "cut"
    shutil.copytree(reference, cut)
    shutil.rmtree(cut / f"checkpoint-{STEPS}")  # as if the run had died between the two saves
    run(world, "cut", "--train.save_every", str(STEPS // 2), "--train.resume", "auto")
    assert losses(cut) == losses(reference)
    expected = weights(reference)
    for name, value in weights(cut).items():
        assert torch.equal(value, expected[name]), name
    progress = [json.loads((d / f"checkpoint-{STEPS}/trainer/state.json").read_text()) for d in (cut, reference)]
    assert progress[0] == progress[1]


def test_resume_passes_over_a_truncated_checkpoint(world: Path, reference: Path) -> None:
    torn = world / "torn"
    shutil.copytree(reference, torn)
    file = torn / f"checkpoint-{STEPS}" / "mm_projector.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"mm_projector\.safetensors has 100 bytes"):
        run(world, "torn", "--train.resume", str(torn / f"checkpoint-{STEPS}"))
    run(world, "torn", "--train.save_every", str(STEPS // 2), "--train.resume", "auto")
    assert losses(torn) == losses(reference)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
def test_micro_batches_do_not_change_the_result(world: Path, micro: int, reduction: str) -> None:
    options = ["--train.batching", "padded", "--train.loss_reduction", reduction, "--adapter.preset", "paper"]
    options += ["--train.max_steps", "3"]
    name = f"micro-{micro}-{reduction}"
    other = run(world, name, *options, "--train.micro_batch_size", str(micro))
    two = world / f"micro-2-{reduction}"
    if not two.exists():
        run(world, two.name, *options)
    assert losses(other) == pytest.approx(losses(two), abs=2e-5)
    auxiliary = [[e["auxiliary_loss"] for e in read_metrics(d / "metrics.jsonl")] for d in (other, two)]
    assert auxiliary[0] == pytest.approx(auxiliary[1], abs=1e-6)


@pytest.mark.parametrize("policy", ["every_n", "all"])
def test_recomputation_changes_nothing(world: Path, reference: Path, policy: str) -> None:
    options = ["--train.activation_checkpointing", policy, "--train.max_steps", str(STEPS)]
    recomputed = run(world, f"recomputed-{policy}", *options)
    assert losses(recomputed) == pytest.approx(losses(reference), abs=1e-5)


def test_stage_1_trains_the_projector_only_and_stage_2_starts_from_it(world: Path) -> None:
    folder = world / "captions"
    sources = {"red": {"annotations": str(make_data(folder, "red", 24)), "image_folder": str(folder)}}
    stage1 = run(
        world, "stage1", "--stage", "pretrain", "--adapter", "{method: none}", "--data.template", "plain",
        "--data.image_aspect_ratio", "square", "--data.sources", json.dumps(sources), "--data.mixture", "{red: 2}",
    )  # fmt: skip
    assert {k.split("/")[1].split(".")[0] for k in weights(stage1)} == {"projector"}
    assert losses(stage1)[-1] < losses(stage1)[0]
    stage2 = run(world, "stage2", "--projector_weights", str(stage1), "--train.max_steps", "1",
                 "--train.learning_rate", "0", "--train.min_learning_rate", "0")  # fmt: skip
    start = load_file(stage1 / f"checkpoint-{STEPS}" / "mm_projector.safetensors")
    for name, value in load_file(stage2 / "checkpoint-1" / "mm_projector.safetensors").items():
        assert torch.equal(value, start[name])


def test_lora_baseline_trains(world: Path) -> None:
    lora = run(world, "lora", "--adapter", "{method: lora, rank: 2}")
    assert losses(lora)[-1] < losses(lora)[0]
    names = [k for k in weights(lora) if k.startswith("master/language_model")]
    assert any("mlp.down_proj.lora_A" in name for name in names)
    assert any("self_attn.q_proj.lora_B" in name for name in names)


GATES = {
    "sequence": {"granularity": "sequence"},
    "given": {"granularity": "given", "expert_scale": "none"},
    "oracle": {"router": "oracle", "expert_scale": "none"},
    "dense": {"mode": "dense", "expert_scale": "none"},
}


@pytest.mark.parametrize("gate", GATES)
def test_other_gates_train(world: Path, gate: str) -> None:
    out = run(world, gate, "--adapter.options", json.dumps(GATES[gate]), "--train.max_steps", "2")
    load = read_metrics(out / "metrics.jsonl")[-1]["expert_load_by_source"]
    if gate in ("given", "oracle"):  # the sample's source decides its expert
        assert all(max(shares) == 1 for shares in load.values())
        assert len({shares.index(1) for shares in load.values()}) == len(load)
    else:
        assert all(sum(shares) == pytest.approx(1) for shares in load.values())


def test_loaded_checkpoint_gives_the_trained_models_logits(world: Path, reference: Path) -> None:
    loaded = load_pretrained_model(reference, device="cpu")
    assert loaded.template == "vicuna_v1"
    assert loaded.path == reference / f"checkpoint-{STEPS}"
    config = load_config(reference / "config.yaml")
    model, _, _ = build_parts(config.model)
    attach_adapter(model, config.adapter)
    masters = {k.removeprefix("master/"): v for k, v in weights(reference).items() if k.startswith("master/")}
    unexpected = model.load_state_dict(masters, strict=False).unexpected_keys
    assert not unexpected
    ids = torch.tensor([[1, 300, 301, 302]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids, mask), model.eval()(ids, mask))


def test_another_base_model_is_refused(world: Path, reference: Path, tmp_path: Path) -> None:
    make_language_model(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match="trained on another language model"):
        load_pretrained_model(reference, model_base=str(tmp_path / "other"), device="cpu")


def test_a_finished_run_is_not_overwritten(world: Path, reference: Path) -> None:
    with pytest.raises(CheckpointError, match="already has 2 checkpoint"):
        run(world, "reference")


def test_changed_data_cannot_resume(world: Path, reference: Path) -> None:
    changed = world / "changed"
    shutil.copytree(reference, changed)
    with pytest.raises(CheckpointError, match=r"another experiment: data\.mixture\.red is 1\.0 there and 0\.5 here"):
        run(world, "changed", "--train.resume", "auto", "--data.mixture.red", "0.5")
    accepted = ["--train.accept_changed", "[data.mixture.red]"]
    with pytest.raises(CheckpointError, match="another sample order"):
        run(world, "changed", "--train.resume", "auto", "--data.mixture.red", "0.5", *accepted)
    with pytest.raises(CheckpointError, match=r"adapter\.method is 'mole' there and 'lora' here"):
        run(world, "changed", "--train.resume", "auto", "--adapter", "{method: lora, rank: 2}")


MISTAKES = {
    "missing weights": (["--model.language_model", "nowhere"], "model.language_model = nowhere"),
    "missing annotations": (
        ["--data.sources.red.annotations", "none.json"],
        "data.sources.red.annotations = none.json",
    ),
    "unknown template": (["--data.template", "vicuna"], "vicuna_v1"),
    "batch": (
        ["--train.batching", "padded", "--train.global_batch_size", "3"],
        "3 is not a multiple of train.micro_batch_size 2 x 1 rank =",
    ),
    "too few samples": (["--train.global_batch_size", "4000"], "larger than the"),
    "bf16 on a CPU": (["--train.precision", "bf16"], "use --train.precision fp32"),
    "unknown preset": (["--adapter.preset", "good"], "paper"),
    "unknown option": (["--adapter.options.top_q", "1"], "top_q"),
    "option for lora": (["--adapter", "{method: lora, options: {top_k: 2}}"], "need adapter.method 'mole'"),
    "projector of another kind": (["--projector_weights", "WORLD/vision_tower/model.safetensors"], "does not fit"),
    "ZeRO settings": (["--train.resume", "WORLD/none"], "does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(
    world: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, message = MISTAKES[name]
    overrides = [value.replace("WORLD", str(world)) for value in overrides]
    code = main([str(world / "config.yaml"), "--train.output_dir", str(tmp_path / "run"), *overrides])
    captured = capsys.readouterr().err
    errors = [line for line in captured.splitlines() if line.startswith("llava-mole: error:")]
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in captured
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--adapter.options.top_q=1", "top_q"),
        ("--adapter.options.balance_coef=-1", "balance_coef is -1; it must be a number that is not negative"),
        ("--adapter.options.temperature=0", "temperature is 0; it must be"),
        ("--adapter.options={r: 4}", "set adapter.rank"),
        ("--adapter={method: lora, options: {top_k: 2}}", "need adapter.method 'mole'"),
    ],
)
def test_a_wrong_adapter_is_found_before_any_weight_is_read(
    world: Path, override: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "lm").mkdir()  # there, but not a language model: reading it fails otherwise
    given = ["--model.language_model", str(tmp_path / "lm"), "--train.output_dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=message):
        train(parse_run_config([str(world / "config.yaml"), *given, *override.split("=", 1)]))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_batch(world: Path, reference: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.global_batch_size is \d+ there and 8 here"):
        run(world, reference.name, "--train.global_batch_size", "8", "--train.resume", "auto")
    accepted = ["--train.accept_changed", "[train.global_batch_size]"]
    with pytest.raises(CheckpointError, match=r"samples in \d+ steps, but train.global_batch_size is 8"):
        run(world, reference.name, "--train.global_batch_size", "8", "--train.resume", "auto", *accepted)


def test_layers_become_histograms() -> None:
    entry = {"expert_load_by_layer": [[0.1, 0.9], [0.4, 0.6]], "router_entropy_by_layer": [0.3, 0.2], "loss": 1.0}
    assert over_layers(entry) == {
        "over_layers/expert_load/0": [0.1, 0.4],
        "over_layers/expert_load/1": [0.9, 0.6],
        "over_layers/router_entropy": [0.3, 0.2],
    }
    assert over_layers({"loss": 1.0}) == {}


def test_wandb_offline_needs_no_account(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked = run(world, "tracked", "--tracker.wandb_project", "test", "--tracker.wandb_mode", "offline",
                  "--train.max_steps", "2")  # fmt: skip
    assert list((tracked / "wandb").glob("offline-run-*"))
    assert len(losses(tracked)) == 2


def test_a_tracker_that_fails_does_not_stop_the_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", broken)
    kept = run(world, "kept", "--tracker.wandb_project", "test", "--train.max_steps", "2")
    assert len(losses(kept)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "mole"])
def test_bf16_on_a_gpu_learns_and_loads(world: Path, method: str) -> None:
    out = run(
        world, f"gpu-{method}", "--device", "cuda", "--train.precision", "bf16", "--adapter.method", method,
        "--train.activation_checkpointing", "all",
    )  # fmt: skip
    assert losses(out)[-1] < losses(out)[0]
    assert all(value.dtype == torch.float32 for value in weights(out).values())
    loaded = load_pretrained_model(out, device="cuda", dtype="bfloat16")
    ids = torch.tensor([[1, 300, 301]], device="cuda")
    assert torch.isfinite(loaded.model(ids, torch.ones_like(ids, dtype=torch.bool))).all()
