"""Every benchmark file is valid, says what decides its number, and holds the paper's rows; a wrong one is refused."""

from pathlib import Path

import pytest
import yaml

from llava_mole import cli
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.eval.benchmarks.benchmark import Benchmark, BenchmarkData, Number, load_questions
from llava_mole.eval.benchmarks.registry import REPOSITORY, get_benchmark, list_benchmarks

EXPECTED = {
    *("tiny", "tiny_ehub", "tiny_ehub_sets", "chartqa", "docvqa", "docvqa_val", "infographicsvqa", "tabfact", "wtq"),
    *("deepform", "klc", "pathvqa", "textvqa", "textvqa_ocr", "pope", "scienceqa", "mme", "gqa", "vqav2", "vizwiz"),
    *("mmbench", "mmbench_cn", "seed", "mmvet"),
}


def test_the_list() -> None:
    assert set(list_benchmarks()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_benchmark_is_valid_and_says_where_its_data_lies(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.data.source
    assert benchmark.prompt.max_new_tokens >= 16
    assert benchmark.primary or benchmark.submission
    assert benchmark.data.converter or name == "tiny"


def test_the_papers_rows() -> None:
    """Table 2 is complete, its All is the sum of the five abilities, and ChartQA's values are multiples of 1/2500."""
    ehub = [row for row in get_benchmark("tiny_ehub").published if "Table 2" in row.source]
    assert len(ehub) == 14
    for row in ehub:
        abilities = sum(row.values[name] for name in ("VR", "VP", "VKA", "VC", "OH"))
        # Row 10 is printed as 292.0; its five abilities give 292.6.
        assert row.values["all"] == pytest.approx(abilities, abs=0.7 if row.source.endswith("#10") else 0.25)
    chart = [row for row in get_benchmark("chartqa").published if "Table 2" in row.source]
    assert len(chart) == 13
    for row in chart:
        assert round(row.values["overall"] * 25, 6).is_integer()
    path = {row.model: row.values for row in get_benchmark("pathvqa").published}
    assert path["LLaVA-MoLE K=3 [1,1,1]"] == {"open": 30.97, "closed": 91.56}
    assert path["LLaVA-Med (official)"] == {"closed": 91.65}  # its open number is another quantity
    for values in path.values():
        if "open" in values:  # k/3370, truncated to two decimals
            assert any(int(10000 * k / 3370) / 100 == values["open"] for k in range(3371))


def test_tiny_ehub_sets_are_41() -> None:
    benchmark = get_benchmark("tiny_ehub_sets")
    assert len(benchmark.groups) == len(set(benchmark.groups)) == 41
    sizes = {name: len(benchmark.numbers[name].groups) for name in ("VP", "VKA", "VR", "VC", "OH")}
    assert sizes == {"VP": 8, "VKA": 14, "VR": 11, "VC": 5, "OH": 3}


def test_number_templates() -> None:
    number = Number(value="mme.hit")
    both = Number(sum=["{group} acc", "{group} acc"])
    benchmark = Benchmark(
        name="x",
        title="x",
        data=BenchmarkData(folder="x", questions=["q"]),
        numbers={"{group} acc": number, "{group}": both},
    )
    expanded = benchmark.expand_numbers(["a", "b"])
    assert list(expanded) == ["a acc", "b acc", "a", "b"]
    assert (expanded["b acc"].groups, expanded["b"].sum, expanded["b"].groups) == (["b"], ["b acc", "b acc"], [])


def valid() -> dict:
    return {
        "name": "mine",
        "title": "Mine",
        "data": {"folder": "mine", "questions": ["q.jsonl"], "source": "made here"},
        "groups": ["a", "b"],
        "metrics": {"*": ["plain_exact"]},
        "numbers": {"{group}": {"value": "plain_exact.hit"}, "all": {"mean": ["a", "b"]}},
        "primary": "all",
    }


def written(folder: Path, value: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    assert get_benchmark(written(tmp_path, valid())).primary == "all"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {}}, "unknown key prompts; allowed are name, title, data"),
        ({"prompt": {"sufix": "x"}}, "unknown key prompt.sufix; allowed are suffix"),
        ({"title": 3}, "title must be str; found 3"),
        ({"groups": "a"}, "groups must be a list; found 'a'"),
        ({"numbers": {"all": {"scale": float("nan")}}}, "numbers.all.scale must be a finite number; found nan"),
        (
            {"published": [{"model": "m", "source": "s", "values": {"a": float("inf")}}]},
            "values.a must be a finite number",
        ),
        ({"data": {"folder": "x", "questions": []}}, "data.questions is []; name at least one file"),
        ({"data": {"folder": "x", "questions": ["a=q", "b=r"], "converter": "gqa"}}, "just one, without a group"),
        ({"numbers": []}, "numbers must map names to values"),
        ({"numbers": {"all": {"scale": True}}}, "numbers.all.scale must be float; found True"),
        ({"data": {"folder": "x"}}, "data.questions is missing"),
        ({"name": "other"}, "name is 'other'; it must be the file's, 'mine'"),
        ({"metrics": {"c": ["plain_exact"]}}, "metrics.c: no such group; groups are a, b"),
        ({"metrics": {"*": ["bleu"]}}, "no metric 'bleu'; there are"),
        ({"metrics": {"a": ["mme"], "b": ["plain_exact"]}}, "different units (mme: image, plain_exact: question)"),
        ({"primary": "total"}, "columns or primary name 'total'; the numbers are a, b, all"),
        ({"primary": None}, "neither a primary number nor a submission format"),
        ({"columns": ["x"]}, "columns or primary name 'x'; the numbers are a, b, all"),
        ({"submission": "fax"}, "submission is 'fax'; allowed are vqa_v2"),
        (
            {"published": [{"model": "m", "source": "s", "values": {"c": 1}}]},
            "published 'm' gives 'c', which is not",
        ),
        (
            {"submission": "gqa", "data": {"folder": "x", "questions": ["q"], "converter": "fax"}},
            "data.converter is 'fax'",
        ),
        (
            {"data": {"folder": "x", "questions": ["q"], "train_files": []}, "metrics": {"*": ["word_match"]}},
            "data.train_files: the majority baseline needs the one metric plain_exact; found ['word_match']",
        ),
        ({"numbers": {"all": {}}}, "numbers.all: it needs exactly one of value, sum and mean"),
        ({"numbers": {"all": {"sum": ["x"]}}}, "numbers.all: 'x' is not a number"),
        ({"numbers": {"all": {"sum": ["all"]}}}, "numbers.all: 'all' must stand above it"),
        ({"numbers": {"all": {"value": "wtq.hit"}}}, "does not use a metric 'wtq'"),
        ({"numbers": {"all": {"value": "plain_exact.f1"}}}, "plain_exact has hit and n"),
        ({"numbers": {"all": {"value": "plain_exact.hit", "groups": ["c"]}}}, "no group 'c'; groups are a, b"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = written(tmp_path, valid() | change)
    with pytest.raises(ConfigError) as raised:
        get_benchmark(path)
    assert message in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark 'nothing'; there are chartqa, "):
        get_benchmark("nothing")
    with pytest.raises(ConfigError, match="no such file; known benchmarks are"):
        get_benchmark(str(tmp_path / "absent.yaml"))
    (tmp_path / "mine.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        get_benchmark(str(tmp_path / "mine.yaml"))
    for text, message in (
        ("name: a\nname: b\n", "the key 'name' comes twice"),
        ("title: 2001-99-99", "month must be"),
        ("[" * 5000, "recursion"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"mine\.yaml: cannot be read as YAML: .*{message}"):
            get_benchmark(str(tmp_path / "mine.yaml"))
    with pytest.raises(ConfigError, match="the file must map keys to values"):
        get_benchmark(written(tmp_path, [1]))


def test_prompts(tmp_path: Path) -> None:
    chart = get_benchmark("chartqa")
    assert chart.prompt_suffix("default") == ""
    assert chart.prompt_suffix("lmms-eval") == "\nAnswer the question with a single word."
    with pytest.raises(ConfigError, match="benchmark chartqa has the variants default, lmms-eval"):
        chart.prompt_suffix("short")


def test_missing_questions_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`llava-mole prepare-benchmark gqa --raw DIR` writes it from testdev_bal"):
        load_questions(get_benchmark("gqa"), data_root=tmp_path)
    with pytest.raises(DataError, match=r"no such file; `llava-mole prepare tiny` writes it"):
        load_questions(get_benchmark("tiny"), data_root=tmp_path)


def test_unknown_group_and_damaged_prepared_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "text": "?", "category": "c"}\n')
    benchmark = get_benchmark(written(tmp_path, valid()))
    with pytest.raises(DataError, match=r"q\.jsonl:1: group 'c'; benchmark mine has the groups a, b"):
        load_questions(benchmark, files=[str(path)])
    path.write_text('{"question_id": 1, "text": "?", "category": "a"}\n')
    (tmp_path / "prepared.json").write_text("{}")
    with pytest.raises(DataError, match=r"prepared\.json: cannot be read"):
        load_questions(benchmark, files=[str(path)])


def test_commands_list_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("score", "prepare-benchmark"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert "tiny_ehub" in capsys.readouterr().out
    assert (REPOSITORY / "configs" / "benchmarks").is_dir()


def test_the_documentation_has_a_command_for_every_benchmark() -> None:
    text = (REPOSITORY / "docs" / "benchmark_reference.md").read_text(encoding="utf-8")
    for name in EXPECTED:
        assert f"`--benchmarks {name}`" in text, name
        variants = get_benchmark(name).prompt.variants
        assert all(f"`{variant}`" in text for variant in variants), name
