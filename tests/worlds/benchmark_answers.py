"""Three ChartQA questions with answers, and the command that scores them."""

import json
from pathlib import Path


def write_chart(folder: Path) -> Path:
    """Questions `q.jsonl` and answers `a.jsonl`, two of three right."""
    lines = [{"question_id": n, "text": f"Q{n}?", "category": "human", "answer": str(n)} for n in range(1, 4)]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_answers(folder, *("1", "2", "9"))
    return folder


def write_answers(folder: Path, *texts: str, suffix: str = "", first: int = 1) -> None:
    lines = [
        {"question_id": n, "prompt": f"Q{n}?{suffix}", "text": text, "model_id": "m"}
        for n, text in enumerate(texts, first)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(folder: Path, *more: str, benchmark: str = "chartqa") -> list[str]:
    return ["score", str(folder / "a.jsonl"), "--benchmark", benchmark, "--questions", str(folder / "q.jsonl"), *more]
