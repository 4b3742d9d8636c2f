"""Every data row of the paper's Tables 2 to 5 has its mixture, with the right frequencies and counts."""

from pathlib import Path

import pytest

from llava_mole.config import load_config, parse_run_config
from llava_mole.data.mixture import mixture_counts

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "configs" / "mixtures"
# Records of each set as published; UReader as the paper counts it.
SIZES = {"m3it": 1_592_320, "sharegpt4v-instruct": 665_000, "ureader": 1_100_000, "pathvqa": 19_755}
DOMAINS = {"m3it": "G", "sharegpt4v-instruct": "G", "ureader": "D", "pathvqa": "M"}
# (lambda_G, lambda_D, lambda_M) of the table rows -> file, samples an epoch.
ROWS = {
    (1, 0, 0): ("general", 2_257_320),
    (0, 1, 0): ("document", 1_100_000),
    (0, 0, 1): ("biomedicine", 19_755),
    (1, 1, 0): ("general-document", 3_357_320),
    (1, 0, 1): ("general-biomedicine", 2_277_075),
    (1, 1, 1): ("general-document-biomedicine", 3_377_075),
    (1, 2, 0): ("general-document2", 4_457_320),
    (1, 2, 1): ("general-document2-biomedicine", 4_477_075),
    (2, 2, 2): ("general2-document2-biomedicine2", 6_754_150),
}


@pytest.mark.parametrize("lambdas", ROWS, ids=str)
def test_mixtures_of_the_paper(lambdas: tuple[int, int, int]) -> None:
    name, samples = ROWS[lambdas]
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# The paper's mixture [{', '.join(map(str, lambdas))}]")
    minimal = ["--stage", "finetune", "--train.output_dir", "x", "--data.sources.a.annotations", "a.json"]
    data = parse_run_config([*minimal, "--data", str(FOLDER / f"{name}.yaml")]).data
    assert (data.template, data.image_aspect_ratio, data.max_length) == ("vicuna_v1", "pad", 4096)
    wanted = dict(zip("GDM", lambdas, strict=True))
    assert data.mixture == {source: wanted[d] for source, d in DOMAINS.items() if wanted[d]}
    assert set(data.sources) == set(data.mixture)
    for source, described in data.sources.items():
        assert described.annotations == f"playground/data/{source}/train"
        assert described.image_folder == f"playground/data/{source}/images"
    counts = mixture_counts({source: SIZES[source] for source in data.sources}, data.mixture)
    assert sum(counts.values()) == samples


def test_no_mixture_of_the_paper_is_untested() -> None:
    found = {p.stem for p in FOLDER.glob("*.yaml") if "The paper's mixture" in p.read_text(encoding="utf-8")}
    assert found == {name for name, _ in ROWS.values()}


def test_the_shipped_runs_take_prepared_sets() -> None:
    for name in ("pretrain", "finetune_mole", "finetune_lora"):
        data = load_config(ROOT / "configs" / f"{name}.yaml").data
        for source, described in data.sources.items():
            assert described.annotations == f"playground/data/{source}/train", name
    assert load_config(ROOT / "configs/pretrain.yaml").data.template == "plain"


def test_the_readings_of_ambiguous_counts_are_said() -> None:
    text = (FOLDER / "general-document-biomedicine.yaml").read_text(encoding="utf-8")
    for number in ("1,592,320", "665K", "1.1M", "654,840"):
        assert number in text
