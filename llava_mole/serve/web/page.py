"""The page in Gradio: its parts, and what happens when one of them is used.

Gradio is imported inside `build_page`: it takes seconds, and it is an extra.
"""

import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

from llava_mole.common.errors import UserError
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor
from llava_mole.serve.api.images import ImagePolicy
from llava_mole.serve.web import pictures
from llava_mole.serve.web.examples import Example
from llava_mole.serve.web.visit import Settings, Side, Visit, count_experts, describe

STYLE = Path(__file__).with_name("page.css")
ROUTER = "the router chooses"
NO_ANSWER = "Ask something. Every patch of the image and every token then takes the colour of its expert."
EMPTY_ANSWER = "The last answer is empty, so it has no tokens to colour. Ask something else."
NO_EXPERTS = "This model has no experts: all tokens use the same weights. Open a LLaVA-MoLE run to see routing."
NOTHING_COMPARED = "The last question is answered again: once as the router chooses, and once by every expert alone."
RESTARTED = "The server was started again since this page was opened. The conversation begins anew."


@dataclass(frozen=True)
class PageLimits:
    """What the page allows."""

    policy: ImagePolicy
    """Which images; its `folder` is where Gradio puts uploads."""
    max_images: int = 8
    """Images of a question."""
    max_new_tokens: int = 1024
    waiting: int = 32
    """Questions that wait while another one is answered; more are refused."""
    visits: int = 200
    """Pages whose conversations are kept; the one unused for longest is forgotten."""


class Visits:
    """The open pages by their session hash."""

    def __init__(self, models: Mapping[str, Predictor], limits: PageLimits) -> None:
        self._models, self._limits = models, limits
        self._known: OrderedDict[str, Visit] = OrderedDict()

    def of(self, session: str | None) -> Visit:
        """The conversation of a page; a new one if it is not known."""
        key = session or ""
        if key not in self._known:
            self._known[key] = Visit(self._models, self._limits.policy, self._limits.max_images)
            while len(self._known) > self._limits.visits:
                self._known.popitem(last=False)[1].stop()
        self._known.move_to_end(key)
        return self._known[key]

    def drop(self, session: str | None) -> None:
        """Forget a page that was closed, and stop its answers."""
        if (visit := self._known.pop(session or "", None)) is not None:
            visit.stop()

    def __len__(self) -> int:
        return len(self._known)


_MARKUP = re.compile(r"<(?=[a-zA-Z/!?])|&(?=#?\w+;)")
_ESCAPED = re.compile("&lt;|&amp;")


def as_shown(text: str) -> str:
    """A text for Gradio's chat, which takes tags and entities as HTML: they become text, all else stays as it is."""
    return _MARKUP.sub(lambda found: escape(found.group()), text)


def as_written(text: str) -> str:
    """What `as_shown` was made of."""
    return _ESCAPED.sub(lambda found: unescape(found.group()), text)


def messages(visit: Visit, name: str) -> tuple[list[dict[str, Any]], list[int]]:
    """A side's conversation as Gradio's messages, and the number of the round that each belongs to."""
    side = visit.sides[name]
    rounds = [(each.question, each.images, each.answer or "(no answer)") for each in side.session.rounds]
    if visit.asked is not None and side.running is not None:
        rounds.append((visit.asked.question, visit.asked.images, side.running or "…"))
    found: list[dict[str, Any]] = []
    places: list[int] = []
    for n, (question, images, answer) in enumerate(rounds):
        content: list[Any] = [{"path": image, "alt_text": "image"} for image in images]
        for part in (*content, as_shown(question)):
            found.append({"role": "user", "content": part})
            places.append(n)
        found.append({"role": "assistant", "content": as_shown(answer)})
        places.append(n)
    return found, places


def why_no_picture(visit: Visit, name: str) -> str:
    """What to say where a side's routing would be shown."""
    side = visit.sides.get(name)
    if side is None or not side.num_experts:
        return NO_EXPERTS
    is_empty = visit.asked is None and side.session.rounds and not side.session.rounds[-1].answer.strip()
    return EMPTY_ANSWER if is_empty else NO_ANSWER


def build_page(
    models: Mapping[str, Predictor], limits: PageLimits, examples: Sequence[Example], start: Decoding
) -> Any:
    """A `gradio.Blocks` for these models; `start` is what the controls show first."""
    import gradio as gr

    visits = Visits(models, limits)
    boot = secrets.token_hex(8)
    with_experts = [name for name, model in models.items() if count_experts(model)]
    experts = min((count_experts(models[name]) for name in with_experts), default=0)

    with gr.Blocks(title="LLaVA-MoLE", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        page_boot = gr.Textbox(boot, visible=False)
        with gr.Row(elem_id="top"):
            gr.HTML(pictures.heading([(name, describe(model)) for name, model in models.items()]))
            theme = gr.Button("Light / dark", size="sm", elem_id="theme", variant="secondary")
        chats: dict[str, Any] = {}
        notes: dict[str, Any] = {}
        with gr.Row():
            for name in models:
                with gr.Column(min_width=300):
                    chats[name] = gr.Chatbot(
                        label=name,
                        height=360,
                        render_markdown=False,
                        latex_delimiters=[],
                        editable="user",
                        layout="bubble",
                        buttons=["copy"],
                        feedback_options=None,
                        placeholder="Add an image and ask about it, or take an example below.",
                        elem_classes="chat",
                    )
                    notes[name] = gr.HTML("", elem_classes="mole-note")
        box: Any = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask about the image …",
            show_label=False,
            label="Question",
            lines=1,
            max_lines=8,
            stop_btn=False,
            elem_id="box",
        )
        move_upload = box.async_move_resource_to_block_cache

        async def only_uploads(path: Any) -> str | None:
            """Gradio would fetch an address that a client sends in place of a file."""
            if "://" in str(path):
                raise gr.Error("Addresses are not opened; upload the image itself.", print_exception=False)
            return await move_upload(path)

        # Set on the object: for a subclass of a component Gradio writes a stub file beside this one.
        box.async_move_resource_to_block_cache = only_uploads
        with gr.Row(elem_id="examples"):
            shown_examples = [gr.Button(each.question, icon=each.image, size="sm") for each in examples]
        with gr.Accordion("Parameters", open=False):
            with gr.Row():
                temperature = gr.Slider(
                    0, 2, start.temperature, step=0.05, label="Temperature (0: greedy)", min_width=200
                )
                top_p = gr.Slider(0.05, 1, start.top_p or 1.0, step=0.05, label="Top p", min_width=200)
                new_tokens = gr.Slider(
                    1,
                    limits.max_new_tokens,
                    min(start.max_new_tokens, limits.max_new_tokens),
                    step=1,
                    label="Longest answer in tokens",
                    min_width=200,
                )
            system = gr.Textbox(
                "", label="System text (empty: the template's own)", lines=1, max_lines=4, max_length=4000
            )
            choices = [ROUTER, *(f"expert {n}" for n in range(experts))]
            expert = gr.Radio(choices, value=ROUTER, label="Expert of all tokens", visible=experts > 0)
        with gr.Column(elem_classes="mole-section"):
            gr.HTML('<h3 class="mole-title">Which expert computes what</h3>')
            with gr.Row(visible=bool(with_experts)):
                model = gr.Radio(
                    with_experts, value=with_experts[0] if with_experts else None, label="Model", min_width=200,
                    visible=len(with_experts) > 1,
                )  # fmt: skip
                together = gr.Checkbox(True, label="All layers together", min_width=160, scale=1, elem_id="together")
                last = _last_layer(models[with_experts[0]]) if with_experts else 1
                layer = gr.Slider(0, last, 0, step=1, label="Layer", min_width=200, scale=3, elem_id="layer")
            panel = gr.HTML(pictures.hint(NO_ANSWER if with_experts else NO_EXPERTS), elem_id="panel")
            with gr.Row(visible=bool(with_experts)):
                compare = gr.Button("Answer with every expert", size="sm", elem_id="compare")
                stop_compare = gr.Button("Stop", size="sm", variant="stop", visible=False, elem_id="stop_compare")
            compared = gr.HTML(pictures.hint(NOTHING_COMPARED), visible=bool(with_experts), elem_id="compared")

        controls = [temperature, top_p, new_tokens, system, expert]
        view = [model, together, layer]

        def settings(temperature: float, top_p: float, new_tokens: float, system: str, expert: str | None) -> Settings:
            decoding = Decoding(
                int(min(new_tokens, limits.max_new_tokens)),
                float(temperature),
                None if top_p >= 1 else float(top_p),
            )
            forced = None if expert in (None, ROUTER) else int(str(expert).removeprefix("expert "))
            return Settings(decoding, (system or "").strip()[:4000], forced)

        def picture(visit: Visit, model: str | None, together: bool, layer: float) -> str:
            side = visit.sides.get(model or "")
            if side is None or side.shown is None:
                return pictures.hint(why_no_picture(visit, model or ""))
            number = None if together else max(0, min(int(layer), len(side.shown.routing.layers) - 1))
            return pictures.routing_panel(side.shown, number)

        def show(visit: Visit) -> dict[Any, Any]:
            return {
                **{chat: messages(visit, name)[0] for name, chat in chats.items()},
                **{notes[name]: note_of(visit.sides[name]) for name in notes},
            }

        def run(visit: Visit, steps: Iterator[None], view: Sequence[Any], undo: dict[str, Any] | None) -> Iterator[Any]:
            """Show each step; at a mistake say it, and give the question back to its box (`undo`)."""
            yield {box: gr.update(value=None, submit_btn=False, stop_btn=True), compare: gr.update(interactive=False)}
            refused = None
            try:
                for _ in steps:
                    yield show(visit)
            except UserError as error:
                refused = getattr(error, "problem", None) or str(error)
                gr.Warning(escape(refused), title="Not asked")
            ready: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
            if refused is not None and undo is not None:
                ready["value"] = undo
            yield {
                **show(visit),
                box: gr.update(**ready),
                compare: gr.update(interactive=True),
                panel: picture(visit, *view),
                compared: pictures.hint(NOTHING_COMPARED),
            }

        def visit_of(request: gr.Request, opened: str) -> Visit:
            if opened != boot:
                gr.Info(RESTARTED, title="Server restarted")
            return visits.of(request.session_hash)

        def on_submit(request: gr.Request, box: dict[str, Any], opened: str, *rest: Any) -> Iterator[Any]:
            visit = visit_of(request, opened)
            files = [str(file) for file in box.get("files") or []]
            steps = asked(lambda: visit.ask(box.get("text") or "", files, settings(*rest[:5])))
            yield {**next(run_ := run(visit, steps, rest[5:], box)), page_boot: boot}
            yield from run_

        def on_retry(data: gr.RetryData, request: gr.Request, opened: str, *rest: Any) -> Iterator[Any]:
            visit = visit_of(request, opened)
            name, number = place(visit, data)
            yield from run(visit, asked(lambda: visit.retry(name, number, settings(*rest[:5]))), rest[5:], None)

        def on_edit(data: gr.EditData, request: gr.Request, opened: str, *rest: Any) -> Iterator[Any]:
            visit = visit_of(request, opened)
            name, number = place(visit, data)
            text = as_written(str(data.value))
            yield from run(visit, asked(lambda: visit.retry(name, number, settings(*rest[:5]), text)), rest[5:], None)

        def place(visit: Visit, data: Any) -> tuple[str, int]:
            name = next((name for name, chat in chats.items() if chat is data.target), next(iter(chats)))
            index = data.index[0] if isinstance(data.index, (list, tuple)) else data.index
            places = messages(visit, name)[1]
            return name, places[index] if 0 <= index < len(places) else -1

        def on_clear(request: gr.Request) -> dict[Any, Any]:
            visit = visits.of(request.session_hash)
            visit.clear()
            blank = pictures.hint(NO_ANSWER if with_experts else NO_EXPERTS)
            return {**show(visit), panel: blank, compared: pictures.hint(NOTHING_COMPARED)}

        def on_stop(request: gr.Request) -> None:
            visits.of(request.session_hash).stop()

        def on_view(request: gr.Request, model: str | None, together: bool, layer: float) -> str:
            return picture(visits.of(request.session_hash), model, together, layer)

        def on_model(request: gr.Request, name: str, together: bool) -> tuple[Any, str]:
            visit = visits.of(request.session_hash)
            return gr.update(maximum=_last_layer(models[name]), value=0), picture(visit, name, together, 0)

        def on_compare(request: gr.Request, model: str) -> Iterator[Any]:
            visit = visits.of(request.session_hash)
            yield {compare: gr.update(interactive=False), stop_compare: gr.update(visible=True)}
            try:
                for found in visit.compare(model):
                    yield {compared: pictures.comparison(found)}
            except UserError as error:
                gr.Warning(escape(getattr(error, "problem", None) or str(error)), title="Nothing to compare")
            yield {compare: gr.update(interactive=True), stop_compare: gr.update(visible=False)}

        def on_close(request: gr.Request) -> None:
            visits.drop(request.session_hash)

        def take(example: Example) -> Any:
            return lambda: {"text": example.question, "files": [str(example.image)]}

        everything = [*chats.values(), *notes.values(), box, compare, panel, compared, page_boot]
        own: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # One question at a time, over all pages: the models hold one state.
        computing = {**own, "concurrency_id": "models", "concurrency_limit": 1}
        light = {**own, "queue": False}
        inputs = [page_boot, *controls, *view]
        box.submit(on_submit, [box, *inputs], everything, **computing)
        box.stop(on_stop, None, None, **light)
        for chat in chats.values():
            chat.retry(on_retry, inputs, everything, **computing)
            chat.edit(on_edit, inputs, everything, **computing)
            chat.clear(on_clear, None, everything, **light)
        for button, example in zip(shown_examples, examples, strict=True):
            button.click(take(example), None, box, **light)
        layer.input(lambda: False, None, together, **light)
        layer.change(on_view, view, panel, trigger_mode="always_last", **light)
        together.change(on_view, view, panel, trigger_mode="always_last", **light)
        model.change(on_model, [model, together], [layer, panel], **light)
        compare.click(on_compare, model, [compare, stop_compare, compared], **computing)
        stop_compare.click(on_stop, None, None, **light)
        theme.click(None, None, None, js="() => { document.body.classList.toggle('dark'); }")
        page.unload(on_close)
    page.queue(max_size=limits.waiting, default_concurrency_limit=8, status_update_rate=1)
    page.visits = visits
    return page


def asked(steps: Any) -> Iterator[None]:
    """The steps, begun only when the first one is taken, so that mistakes of the settings are raised there too."""
    yield from steps()


def note_of(side: Side) -> str:
    """What stands under a conversation."""
    return escape(side.note)


def _last_layer(predictor: Predictor) -> int:
    from llava_mole.mole import ExpertLayer

    return max(1, sum(isinstance(m, ExpertLayer) for m in predictor.loaded.model.language_model.modules()) - 1)
