"""Evaluation of models that route by source: every question goes to the expert of its group's source."""

import json
from pathlib import Path

import pytest
from worlds.eval_models import make_checkpoint, make_questions

from llava_mole.common.errors import ConfigError
from llava_mole.eval.evaluate import main
from llava_mole.eval.source_routing import parse_sources
from llava_mole.inference.predictor import Predictor
from llava_mole.mole import set_routing_inputs

OPTIONS = {"router": "oracle", "expert_scale": "none", "balance_coef": 0.0, "balance_group": "sample"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("oracle"), "mole", OPTIONS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_questions(tmp_path_factory.mktemp("asked"))


def arguments(run: Path, questions: Path, answers: Path, *more: str) -> list[str]:
    own = ["--questions", str(questions), "--image-folder", str(questions.parent), "--answers-file", str(answers)]
    return [str(run), *own, "--device", "cpu", "--max-new-tokens", "4", *more]


def test_questions_are_answered_by_their_sources_expert(run: Path, questions: Path, tmp_path: Path) -> None:
    import torch

    answers = tmp_path / "a.jsonl"
    assert main(arguments(run, questions, answers, "--source-of", "one=blue", "two=red", "--batch-size", "3")) == 0
    given = {line["question_id"]: line["text"] for line in map(json.loads, answers.read_text().splitlines())}
    predictor = Predictor.from_pretrained(run, device="cpu")
    differ = 0
    for line in map(json.loads, questions.read_text().splitlines()):
        image = questions.parent / line["image"] if "image" in line else None
        expected = []
        for source in (0, 1):  # blue, red: the order of the configuration
            set_routing_inputs(predictor.loaded.model.language_model, source=torch.tensor([source]))
            expected += predictor.generate([image], [line["text"]], max_new_tokens=4)
        assert given[line["question_id"]] == expected[0 if line["category"] == "one" else 1]
        differ += expected[0] != expected[1]
    assert differ > 3  # the experts are not the same
    routing = json.loads((tmp_path / "a.routing.json").read_text())["groups"]
    assert routing["one"]["all"]["share"][0] == [1, 0]
    assert routing["two"]["all"]["share"][0] == [0, 1]
    # The same answers with other sources are another run.
    assert main(arguments(run, questions, answers, "--source-of", "one=red", "two=red")) == 2


def test_an_unknown_source_is_named(
    run: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(run, questions, tmp_path / "a.jsonl")) == 2
    error = capsys.readouterr().err
    assert "group 'one' of the questions has source 'one', which is not one of its own (blue, red)" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["one"], ["=red"], ["one="], ["one=red", "one=blue"]])
def test_malformed_sources_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="give NAME=SOURCE"):
        parse_sources(given)
