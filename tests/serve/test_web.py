"""The web page without a browser: conversations side by side, pictures, limits, and what the server gives away."""

import io
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_mole.common.errors import ConfigError, DataError, UserError
from llava_mole.conversation import with_system
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import route_answer
from llava_mole.mole import force_expert
from llava_mole.serve import gradio_app
from llava_mole.serve.api.images import ImagePolicy
from llava_mole.serve.session import Round
from llava_mole.serve.web import pictures
from llava_mole.serve.web.examples import draw_examples, find_examples
from llava_mole.serve.web.page import NO_EXPERTS, PageLimits, Visits, as_shown, as_written, messages, why_no_picture
from llava_mole.serve.web.visit import Settings, Visit, describe

NEW = 6
GREEDY = Settings(Decoding(NEW))


@pytest.fixture(scope="module")
def mix(chat_run: Path) -> Predictor:
    return Predictor.from_pretrained(chat_run, device="cpu")


@pytest.fixture
def visit(predictor: Predictor, mix: Predictor, photo: str) -> Visit:
    """A page with a mixture beside plain LoRA, which may show files of the photo's folder."""
    return Visit({"mole": predictor, "mix": mix}, policy(photo))


def policy(photo: str, pixels: int = 10_000, size: int = 100_000) -> ImagePolicy:
    return ImagePolicy(pixels, size, folder=Path(photo).parents[1])


def ask(visit: Visit, question: str, files: list[str] | None = None, settings: Settings = GREEDY) -> dict[str, str]:
    """The answers of all sides."""
    for _ in visit.ask(question, files or [], settings):
        pass
    return {name: side.session.rounds[-1].answer for name, side in visit.sides.items()}


def test_both_models_answer_as_they_do_alone(visit: Visit, predictor: Predictor, mix: Predictor, photo: str) -> None:
    alone = {n: m.generate(photo, "What?", max_new_tokens=NEW) for n, m in (("mole", predictor), ("mix", mix))}
    assert ask(visit, "What?", [photo]) == alone
    shown = visit.sides["mole"].shown
    assert shown is not None
    expected = route_answer(predictor, photo, "What?", alone["mole"])
    assert torch.equal(shown.routing.experts, expected.experts)
    assert visit.sides["mix"].shown is None
    found, places = messages(visit, "mix")
    assert [(m["role"], m["content"]) for m in found] == [
        ("user", {"path": photo, "alt_text": "image"}),
        ("user", "What?"),
        ("assistant", alone["mix"]),
    ]
    assert places == [0, 0, 0]
    assert re.fullmatch(r"\d+ tokens? in \d+\.\d s", visit.sides["mix"].note)


def test_turns_images_retry_and_edit(visit: Visit, predictor: Predictor, photo: str) -> None:
    other = str(Path(photo).with_name("1.png"))
    first = ask(visit, "What?", [photo])
    ask(visit, "And this?", [other, photo])
    ask(visit, "Why?")
    assert visit.sides["mix"].session.rounds[1].images == [other, photo]
    again = Visit({"mole": predictor}, policy(photo))
    ask(again, "What?", [photo])
    expected = ask(again, "And that?", [other, photo])["mole"]
    for _ in visit.retry("mix", 1, GREEDY, "And that?"):
        pass
    rounds = visit.sides["mole"].session.rounds
    assert [(r.question, r.images) for r in rounds] == [("What?", [photo]), ("And that?", [other, photo])]
    assert rounds[-1].answer == expected
    for _ in visit.retry("mole", 0, GREEDY):
        pass
    assert {n: [r.answer for r in s.session.rounds] for n, s in visit.sides.items()} == {
        n: [text] for n, text in first.items()
    }
    visit.clear()
    assert messages(visit, "mole") == ([], [])
    assert visit.sides["mole"].shown is None
    with pytest.raises(ConfigError, match="no longer part"):
        next(visit.retry("mole", 0, GREEDY))


@pytest.mark.parametrize(
    ("question", "name", "limits", "message"),
    [
        (" ", None, {}, "the question is empty"),
        ("What?", "0.png", {"pixels": 100}, "0.png: the image has 20 x 16 pixels; at most 100 are allowed"),
        ("What?", "0.png", {"size": 50}, "at most 50 B are allowed"),
        ("What?", "text.png", {}, "text.png: the image cannot be read; allowed are the formats"),
        ("What?", "../../../../../../etc/hostname", {}, "is not in the folder that this server allows"),
        ("What?", "9 images", {}, "9 images were added; at most 8"),
        ("one two three " * 400, None, {}, "leave no room"),
        ("see <image> and <image>", None, {}, "2 <image> in the text"),
    ],
)
def test_what_is_refused_leaves_the_conversation_as_it_was(
    question: str,
    name: str | None,
    limits: dict[str, int],
    message: str,
    predictor: Predictor,
    mix: Predictor,
    photo: str,
) -> None:
    visit = Visit({"mole": predictor, "mix": mix}, policy(photo))
    ask(visit, "What?", [photo])
    kept = messages(visit, "mole"), messages(visit, "mix")
    visit._policy = policy(photo, **limits)
    Path(photo).with_name("text.png").write_text("no image")
    files = [photo] * 9 if name == "9 images" else [str(Path(photo).parent / name)] if name else []
    with pytest.raises(UserError, match=re.escape(message)):
        ask(visit, question, files)
    assert (messages(visit, "mole"), messages(visit, "mix")) == kept
    assert [side.running for side in visit.sides.values()] == [None, None]
    assert len(ask(visit, "Again?")) == 2


def test_a_large_image_is_refused_before_it_is_decoded(visit: Visit, photo: str) -> None:
    """60 megapixels in a file of a few kilobytes, whose pixels are cut off: only the header can be read."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 6_000)).save(buffer, "PNG")
    file = Path(photo).with_name("large.png")
    file.write_bytes(buffer.getvalue()[:200])
    with pytest.raises(DataError, match="large.png: the image has 10000 x 6000 pixels; at most 10,000 are allowed"):
        ask(visit, "What?", [str(file)])


def test_stop_keeps_what_there_is(visit: Visit, photo: str) -> None:
    seen = 0
    for _ in visit.ask("What?", [photo], Settings(Decoding(400))):
        seen += any(side.running for side in visit.sides.values())
        if seen == 2:
            visit.stop()
    assert all(side.session.rounds[-1].answer for side in visit.sides.values())
    assert all(side.note.endswith("stopped") for side in visit.sides.values())
    assert visit.sides["mole"].shown is not None
    steps = visit.ask("And?", [], Settings(Decoding(400)))
    next(steps)
    visit.stop()  # before a piece
    for _ in steps:
        pass
    assert [len(side.session.rounds) for side in visit.sides.values()] == [2, 2]
    assert messages(visit, "mix")[0][-1]["content"] == "(no answer)"


def test_forced_experts_and_their_comparison(visit: Visit, predictor: Predictor, photo: str) -> None:
    model = predictor.loaded.model.language_model
    forced = {}
    for expert in (0, 1):
        with force_expert(model, expert):
            forced[expert] = predictor.generate(photo, "What?", max_new_tokens=NEW)
    answers = ask(visit, "What?", [photo], Settings(Decoding(NEW), expert=1))
    assert answers["mole"] == forced[1]
    assert visit.sides["mole"].note.endswith("expert 1 forced")
    shown = visit.sides["mole"].shown
    assert shown is not None
    assert set(shown.routing.of_layer(0)) == {1}
    assert "expert 1 is forced" in pictures.routing_panel(shown, 0)
    visit.clear()
    free = ask(visit, "What?", [photo])["mole"]
    *_, last = visit.compare("mole")
    assert last.answers == {None: free, **forced}
    table = pictures.comparison(last)
    assert [table.count("differs"), table.count("same")] == [
        sum(text != free for text in forced.values()), sum(text == free for text in forced.values())
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="mix has no experts"):
        next(visit.compare("mix"))
    with pytest.raises(ConfigError, match="expert 7 cannot be forced"):
        ask(visit, "What?", [], Settings(Decoding(NEW), expert=7))


def test_the_system_text_is_a_pages_own(visit: Visit, predictor: Predictor) -> None:
    own = Predictor(predictor.loaded)
    own.template = with_system(predictor.template, "Be brief.")
    assert ask(visit, "What?", [], Settings(Decoding(NEW), "Be brief."))["mole"] == own.generate(
        None, "What?", max_new_tokens=NEW
    )
    visit.clear()
    assert ask(visit, "What?")["mole"] == predictor.generate(None, "What?", max_new_tokens=NEW)


def test_pages_do_not_see_each_other(predictor: Predictor, photo: str) -> None:
    visits = Visits({"mole": predictor}, PageLimits(policy(photo), visits=2))
    ask(visits.of("a"), "What?")
    assert not visits.of("b").sides["mole"].session.rounds
    assert len(visits.of("a").sides["mole"].session.rounds) == 1
    visits.of("c")  # b was used least recently
    assert len(visits.of("a").sides["mole"].session.rounds) == 1
    visits.drop("a")
    assert not visits.of("a").sides["mole"].session.rounds


class Parts(HTMLParser):
    """Elements with the text inside them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[int, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text[len(self.found) - 1] = self.text.get(len(self.found) - 1, "") + data

    def of(self, name: str) -> list[tuple[int, dict[str, str | None]]]:
        return [(n, own) for n, (tag, own) in enumerate(self.found) if name in (tag, own.get("class"))]


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_the_panel_shows_what_the_routers_decide(layer: int | None, visit: Visit, photo: str) -> None:
    question = "Is <script>alert(1)</script> & <b>bold</b> 'here'?"
    ask(visit, question, [photo, photo])
    shown = visit.sides["mole"].shown
    assert shown is not None
    html = pictures.routing_panel(shown, layer)
    parts = Parts(html)
    routing = shown.routing
    experts = routing.of_layer(layer)
    patches = [expert for expert, role in zip(experts, routing.roles, strict=True) if role == "image"]
    assert [int(own["data-expert"] or -1) for _, own in parts.of("rect")] == patches
    text = [
        (piece, expert) for role in ("answer", "prompt")
        for piece, expert in zip(routing.part(role).pieces, routing.part(role).of_layer(layer), strict=True) if piece
    ]  # fmt: skip
    drawn = [(parts.text[n].replace("\u21b5", ""), int(own["data-expert"] or -1)) for n, own in parts.of("mole-token")]
    assert drawn == text
    assert question in "".join(piece for piece, _ in drawn)
    tags = {tag for tag, _ in parts.found}
    assert not tags & {"script", "b", "link", "iframe"}
    assert not re.search(r"""(?:href|src)=["'](?!data:)""", html)
    widths = re.findall(r"width:([\d.]+)%", html)
    assert sum(map(float, widths)) == pytest.approx(300, abs=0.1)


def test_an_empty_answer_is_said_where_its_routing_would_be(visit: Visit, photo: str) -> None:
    assert why_no_picture(visit, "mole").startswith("Ask something")
    assert {why_no_picture(visit, name) for name in ("mix", "unknown")} == {NO_EXPERTS}
    visit.sides["mole"].session.rounds.append(Round("What?", [photo], ""))
    assert visit.sides["mole"].shown is None
    assert why_no_picture(visit, "mole").startswith("The last answer is empty")
    with pytest.raises(ConfigError, match="last answer is empty, so it has no tokens"):
        visit.sides["mole"].session.routing()


def test_markup_in_the_chat_is_text_and_comes_back_from_editing() -> None:
    for text in ("<script>alert(1)</script>", "a < b && c > d", "&lt;b&gt; &amp; &", "<!-- x --> <?y?>", "x<y"):
        assert as_written(as_shown(text)) == text
    assert as_shown("<script>x</script> 1 < 2 & 3 &amp;") == "&lt;script>x&lt;/script> 1 < 2 & 3 &amp;amp;"


def test_examples_come_from_question_files_or_are_drawn(asked: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "images").mkdir(parents=True)
        lines = []
        for n in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / name / "images" / f"{n}.png")
            lines.append(json.dumps({"text": f"{name} {n}?", "image": f"{name}/images/{n}.png"}))
        (tmp_path / name / "test_questions.jsonl").write_text("\n".join([json.dumps({"text": "no image?"}), *lines]))
    found = find_examples(tmp_path)
    assert [each.question for each in found] == ["one 0?", "two 0?", "one 1?", "two 1?"]
    assert find_examples(asked) == []
    (tmp_path / "drawn").mkdir()
    assert len({Image.open(each.image).convert("RGB").tobytes() for each in draw_examples(tmp_path / "drawn")}) == 3


def test_mistakes_of_the_command(mole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--examples", str(tmp_path / "no")], "is not a folder"),
        (["--examples", str(tmp_path)], "holds no */test_questions.jsonl"),
        (["--compare", str(mole_run)], "two models are called"),
        (["--temperature", "-1"], "temperature"),
    ):
        assert gradio_app.main(["--model-path", str(mole_run), "--device", "cpu", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(mole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a page of the real server, in threads of this process."""
    folder = tmp_path_factory.mktemp("web")
    before = dict(os.environ)
    args = gradio_app.parse_arguments(
        ["--model-path", f"mole={mole_run}", "--device", "cpu", "--port", "0", "--max-image-mb", "1"]
    )
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder))
    page = gradio_app.build(args, folder)
    page.GRADIO_CACHE = str(folder)
    yield gradio_app.launch(page, args).rstrip("/")
    page.close()
    os.environ.clear()
    os.environ.update(before)


def get(address: str, data: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    body = json.dumps(data).encode() if isinstance(data, dict) else data
    headers = {"Content-Type": "application/json", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=30) as reply:
            return reply.status, reply.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def test_the_server_is_private_and_complete(server: str) -> None:
    assert server.startswith("http://127.0.0.1:")
    status, html = get(server)
    assert status == 200
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']([^"']+)""", html)
    assert loaded
    assert not [url for url in loaded if "://" in url]
    config = json.loads(get(f"{server}/config")[1])
    assert config["analytics_enabled"] is False
    assert not [each for each in config["dependencies"] if each["api_visibility"] != "private"]
    theme = get(f"{server}/theme.css")[1]
    assert not re.search(r"""@import|url\(["']?http""", theme)
    assert get(f"{server}/gradio_api/file=/etc/hostname")[0] == 403


def test_uploads_have_a_size_and_addresses_are_not_opened(server: str) -> None:
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + b"0" * 1_100_000 + f"\r\n--{boundary}--\r\n".encode()
    status, _ = get(f"{server}/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    assert status == 413
    fetched = threading.Event()

    import http.server

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.set()
            self.send_error(404)

    other = http.server.HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    config = json.loads(get(f"{server}/config")[1])
    submit = next(each for each in config["dependencies"] if any(t[1] == "submit" for t in each["targets"]))
    url = f"http://127.0.0.1:{other.server_port}/a.png"
    file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
    values = [{"text": "What?", "files": [file]}, "", 0, 1, 8, "", None, "mole", True, 0]
    joined = {"data": values, "fn_index": submit["id"], "session_hash": "s", "event_data": None, "trigger_id": None}
    assert get(f"{server}/gradio_api/queue/join", joined)[0] == 200
    reply = get(f"{server}/gradio_api/queue/data?session_hash=s")[1]
    assert '"success":false' in reply
    assert "Addresses are not opened" in reply
    assert not fetched.is_set()
    other.shutdown()
    other.server_close()


def test_a_model_is_described(predictor: Predictor, mix: Predictor) -> None:
    assert describe(predictor) == "MoLE, 2 experts · checkpoint-1"
    assert describe(mix) == "plain LoRA · checkpoint-1"
