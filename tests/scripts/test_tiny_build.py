"""The tiny models: the shipped files load and follow Llama's and open_clip's conventions; a reduced build repeats."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from llava_mole.data.prepare.sources.tiny import general
from llava_mole.data.prepare.sources.tiny.samples import IMAGE_SIZE
from scripts.tiny_world import build, checkpoint, heads, language, probes, text_drills, text_grids, tower

ASSETS = Path(__file__).parents[2] / "playground" / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return build.load_tokenizer(ASSETS)


def test_tokenizer_follows_llamas_conventions(tokenizer):
    hf = tokenizer.hf
    assert hf.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 258]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert hf("red").input_ids[0] == 1
    ids = hf("red", add_special_tokens=False).input_ids
    assert hf.convert_ids_to_tokens(ids) == ["\u2581red"]
    assert hf.convert_ids_to_tokens(hf("47", add_special_tokens=False).input_ids) == ["\u2581", "4", "7"]
    assert hf.convert_ids_to_tokens(hf("\n", add_special_tokens=False).input_ids) == ["\u2581", "<0x0A>"]
    assert 0 not in hf("\u2603 \U0001f600 caf\u00e9 \u4e2d").input_ids


@pytest.mark.parametrize(
    "text", ["A red circle.", "\U0001f600 caf\u00e9 \u4e2d\u6587", "two\nlines", "a  b", "7,5 (x)"]
)
def test_tokenizer_round_trip(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= start <= end <= len(text) for start, end in offsets)


def test_end_token_inside_a_text_is_one_token(tokenizer):
    ids, _ = tokenizer.encode_with_offsets("ASSISTANT: red</s>USER: hi")
    assert ids.count(2) == 1


def test_shipped_language_model_loads_and_reads():
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "language_model", dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    tokenizer = build.load_tokenizer(ASSETS)
    right = total = 0
    rng = Random("held-out text")
    items = [item for item in (text_grids.table_grid(rng) for _ in range(400)) if item.kind == "description"]
    for item in items:
        ids, labels = language.to_tokens(item, tokenizer)
        with torch.no_grad():
            predicted = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
        target = torch.tensor(labels[1:])
        right += int((predicted == target)[target != -100].sum())
        total += int((target != -100).sum())
    assert len(items) > 40
    assert right / total > 0.8


def test_shipped_tower_is_a_valid_open_clip_model():
    import open_clip
    from safetensors.torch import load_file

    config = json.loads((ASSETS / "vision_tower" / "config.json").read_text())
    clip = open_clip.CLIP(**config)
    state = load_file(ASSETS / "vision_tower" / "model.safetensors")
    assert config["quick_gelu"] is True
    assert set(state) == {key for key in clip.state_dict() if key.startswith("visual.")}
    clip.visual.load_state_dict({key.removeprefix("visual."): value.float() for key, value in state.items()})
    assert clip.visual(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).isfinite().all()


def test_assets_are_small_and_as_the_manifest_says():
    manifest = json.loads((ASSETS / "manifest.json").read_text())
    assert set(manifest["sha256"]) == set(build.BUILT_FILES)
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 8_000_000
    assert "--quick" not in manifest["command"]


def test_reduced_build_repeats(tmp_path):
    """The whole chain in a few steps, twice in fresh processes: every file is the same to the byte."""
    command = [sys.executable, "-m", "scripts.tiny_world.build", "--quick", "--threads", "1", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen([*command, str(tmp_path / name)], env=environment, stdout=subprocess.DEVNULL)
        for name in ("one", "two")
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    for name in build.BUILT_FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert set(manifest["measured"]) == set(build.STAGES)


def test_stages_can_run_alone_and_name_what_is_missing(tmp_path, capsys):
    assert build.main(["--out", str(tmp_path), "--stages", "language_model", "--quick"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert build.main(["--out", str(tmp_path), "--stages", "colour"]) == 2
    assert "no stage 'colour'" in capsys.readouterr().err


def test_contrastive_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    truth = torch.tensor([[True, False], [False, True]])
    rows = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(-1.0)))) / 2
    torch.testing.assert_close(tower.contrastive_loss(logits, truth), rows)


def test_pretraining_text_is_true():
    """What a table says about a name stands in the grid's row of that name."""
    rng = Random(3)
    checked = 0
    for _ in range(200):
        item = text_grids.table_grid(rng)
        rows = [item.reading[start : start + 4] for start in range(4, 16, 4)]
        values = {row[0]: next(word for word in row if word.isdigit()) for row in rows}
        for question, answer in item.turns:
            name = question.rstrip("?").split()[-1] if question else ""
            if question.startswith(("How much has", "What number belongs to", "Value of")) or question == f"{name}?":
                expected = values.get(name) or next((n for n, value in values.items() if value == name), None)
                assert answer == expected or question in ("first?", "last?", "highest?", "lowest?", "title?")
                checked += 1
            if question in ("Who has the most?", "Which is highest?", "highest?"):
                assert values[answer] == max(values.values())
                checked += 1
    assert checked > 200


@pytest.mark.parametrize("seed", range(3))
def test_pretraining_items_supervise_exactly_their_answers(tokenizer, seed):
    rng = Random(seed)
    kinds = set()
    for _ in range(60):
        item = language.pretraining_item(rng)
        ids, labels = language.to_tokens(item, tokenizer)
        assert len(ids) == len(labels)
        supervised = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        assert supervised == [label for label in labels if label != -100]
        text = tokenizer.decode(supervised)
        assert "".join(text.split()) == "".join("".join(answer.split()) for _, answer in item.turns)
        kinds.add(item.kind)
    assert kinds == {"description", "drill", "dialogue"}


def read_drill(drill, vocabulary):
    """Questions (ids without marks) and answers (ids) of a drill of bare questions, and its reading."""
    start = next(index for index, label in enumerate(drill.labels) if label != -100)
    spans = language.answer_spans(drill.labels)
    questions, at = [], 0
    for low, high in spans:
        questions.append((drill.ids[at:low], drill.ids[low:high]))
        at = high
    return drill.ids[1:start], questions


@pytest.mark.parametrize("skill", ["columns", "rows"])
def test_drills_over_grids_are_true(tokenizer, skill):
    """Of two words in one line of the grid, one is the answer to the other."""
    vocabulary = text_drills.Vocabulary(tokenizer.hf)
    blank, mark = vocabulary.mark["."], vocabulary.mark["?"]
    names = {number: piece for piece, number in vocabulary.mark.items()}
    rng = Random(skill)
    looked_up = members = 0
    for _ in range(300):
        drill = text_drills.make_drill(vocabulary, rng, level=0.55, skill=skill)
        grid = [drill.ids[1:17][start : start + 4] for start in range(0, 16, 4)]
        lines = [list(column) for column in zip(*grid, strict=True)] if skill == "columns" else grid
        lines = [list(dict.fromkeys(word for word in line if word != blank)) for line in lines]
        _, questions = read_drill(drill, vocabulary)
        for number, (question, answer) in enumerate(questions):
            asked = question[17:-1] if number == 0 else question[:-1]
            assert question[-1] == mark
            asked = [word for word in asked if word != vocabulary.space]
            answer = [word for word in answer if word != vocabulary.space]
            if names.get(asked[-1]) == "▁in":
                there = any(asked[0] in line for line in lines) != ("▁not" in map(names.get, asked))
                assert names[answer[0]] == ("▁yes" if there else "▁no")
                members += 1
            elif len(asked) == 1:
                (line,) = (line for line in lines if asked[0] in line)
                assert line == [asked[0], answer[0]] or line == [answer[0], asked[0]]
                looked_up += 1
    assert looked_up > 300
    assert members > 100


def test_copies_repeat_their_reading(tokenizer):
    vocabulary = text_drills.Vocabulary(tokenizer.hf)
    for seed in range(20):
        drill = text_drills.make_drill(vocabulary, Random(seed), skill="copy")
        ((low, high),) = language.answer_spans(drill.labels)
        assert drill.ids[low : high - 1] == drill.ids[1 : low - 1]
        assert drill.ids[high - 1] == vocabulary.eos


def test_initial_heads_look_back_by_their_distance(tokenizer):
    """Before any training, each head of layer 0 attends to a fixed distance before, whatever the words are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(tokenizer.hf), attn_implementation="eager", **language.ARCHITECTURE)
    model = LlamaForCausalLM(config)
    heads.initialise(model, torch.Generator().manual_seed(0))
    ids = torch.randint(259, len(tokenizer.hf), (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0]
    for head, distance in enumerate(heads.DISTANCES):
        assert attention[:, head].diagonal(offset=-distance, dim1=1, dim2=2)[:, 12:].mean() > 0.8


@pytest.mark.parametrize("stage", ["language_model", "tower"])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(tokenizer, tmp_path, monkeypatch, stage):
    def encode(text):
        return tokenizer.encode_with_offsets(text)[0]

    def train(checkpoint):
        if stage == "tower":
            return tower.train(encode, tower.QUICK, 0, checkpoint)[0]
        return language.train(tokenizer, language.QUICK, 0, checkpoint)[0].state_dict()

    undisturbed = train(None)
    saved = checkpoint.Checkpoint.save

    def save_and_die(self, recipe, step):
        saved(self, recipe, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "state.pt")
    resumed = train(tmp_path / "state.pt")
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


def test_the_tower_can_start_from_another(tokenizer, tmp_path):
    """Then only the refining steps run; a file that is not there is named."""

    def encode(text):
        return tokenizer.encode_with_offsets(text)[0]

    state, _ = tower.train(encode, replace(tower.QUICK, refining_steps=0), 0)
    tower.save(state, tmp_path)
    again, measured = tower.train(
        encode, replace(tower.QUICK, refining_steps=0), 1, start=tmp_path / "model.safetensors"
    )
    assert all(torch.equal(again[name], value.half().float()) for name, value in state.items())
    assert 0 <= measured["probe/shape"] <= 1


def test_a_missing_tower_is_named(tmp_path, capsys):
    assert build.main(["--out", str(tmp_path), "--stages", "tower", "--tower-from", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_probe_reads_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1300, 8, generator=generator)
    labels = ["red" if value > 0 else "blue" for value in features[:, 3].tolist()]
    found = probes.classify(features[:1000], labels[:1000], features[1000:])
    assert probes.share(found, labels[1000:]) > 0.9


def test_drawn_shapes_are_what_their_sentences_say():
    """Smoothing changes a shape's pixels a little; its colour and how much of its box it fills stay recognisable."""
    rng = Random(0)
    names = {rgb: name for name, rgb in general.COLOURS.items()}
    agreed = 0
    for _ in range(200):
        sample = general.draw(rng)
        pixels = np.asarray(sample.image).astype(int)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        distance = np.abs(pixels - ground).sum(-1)
        inside = distance > distance.max() / 2
        middle = np.median(pixels[inside], axis=0)
        colour = names[min(names, key=lambda rgb: np.abs(middle - rgb).sum())]
        rows, columns = np.nonzero(inside)
        filled = inside.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
        shape = "rectangle" if filled > 0.93 else "circle" if filled > 0.65 else "triangle"
        assert sample.facts[0].split()[1] == colour
        agreed += sample.facts[0].split()[2] == shape
    assert agreed >= 180
