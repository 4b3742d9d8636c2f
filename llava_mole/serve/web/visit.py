"""One open page: the same conversation with every model, step by step, and the routing of its last answer.

Nothing here knows Gradio. Computations run one at a time, over all pages (`page.py` queues them); only `stop`
may be called meanwhile.
"""

import contextlib
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from llava_mole.common.errors import ConfigError, DataError, UserError
from llava_mole.common.text import count_of, shorten
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.inputs import as_images
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import TokenRouting
from llava_mole.mole import active_config, force_expert
from llava_mole.serve.api.errors import ApiError
from llava_mole.serve.api.images import ImagePolicy, open_image
from llava_mole.serve.overlay.files import shown_images
from llava_mole.serve.session import Round, Session

FRAME_SECONDS = 0.06
"""At least this long between two pictures of an answer that grows."""


@dataclass(frozen=True)
class Settings:
    """What the page's controls say."""

    decoding: Decoding
    system: str = ""
    """Empty: the template's own."""
    expert: int | None = None
    """The expert that every token uses; None: the router chooses."""


@dataclass(frozen=True)
class Shown:
    """The routing of the last answer, and the images that it is drawn over."""

    routing: TokenRouting
    images: tuple[Image, ...]
    forced: int | None


@dataclass
class Side:
    """One model's half of the conversation."""

    session: Session
    num_experts: int
    """0 without a mixture."""
    running: str | None = None
    """The answer so far, until it is part of the session."""
    note: str = ""
    """What is to be said about the last answer."""
    shown: Shown | None = None


@dataclass
class Comparison:
    """The last question answered once for every expert; None as an answer: not yet."""

    question: str
    answers: dict[int | None, str | None] = field(default_factory=dict)


class Visit:
    """Conversations with the models that keep the same questions.

    Args:
        models: By name.
        policy: Which images are allowed; its `folder` holds the uploaded files.
        max_images: Images of a question.
    """

    def __init__(self, models: Mapping[str, Predictor], policy: ImagePolicy, max_images: int = 8) -> None:
        self._policy, self._max_images = policy, max_images
        self._stopped = threading.Event()
        self.asked: Round | None = None
        """The question that is being answered."""
        self.sides: dict[str, Side] = {}
        for name, model in models.items():
            # A template of its own, because a system text changes it.
            own = Predictor(model.loaded, template=None)
            own.template = model.template
            self.sides[name] = Side(Session(own, [], Decoding()), count_experts(model))

    def stop(self) -> None:
        """End the answers that are being written; what there is of them stays."""
        self._stopped.set()

    def ask(self, question: str, files: Sequence[str], settings: Settings) -> Iterator[None]:
        """Answer a question on every side, and route the answers. Yields whenever there is something new to show.

        Raises:
            UserError: the question, an image or a setting is refused; the conversation is then as before.
        """
        question = question.strip()
        if not question:
            raise ConfigError("the question is empty; write one")
        if len(files) > self._max_images:
            raise ConfigError(f"{count_of(len(files), 'image')} were added; at most {self._max_images} are allowed")
        for file in files:
            self._check_image(file)
        self._apply(settings)
        before = [(side.session, list(side.session.rounds), list(side.session.pending)) for side in self.sides.values()]
        try:
            yield from self._answer(question, files)
        except UserError:
            for session, rounds, pending in before:
                session.rounds, session.pending = rounds, pending
            raise
        finally:
            self.asked = None
            for side in self.sides.values():
                side.running = None
                side.session.pending = []

    def retry(self, name: str, number: int, settings: Settings, question: str | None = None) -> Iterator[None]:
        """Answer question `number` of a side again, in other words if `question` is given; later ones are forgotten.

        Raises:
            UserError: as `ask`.
        """
        rounds = self.sides[name].session.rounds
        if not 0 <= number < len(rounds):
            raise ConfigError("this question is no longer part of the conversation")
        back = len(rounds) - number
        text = rounds[number].question if question is None else question
        files = list(rounds[number].images)
        kept = {key: list(side.session.rounds) for key, side in self.sides.items()}
        for side in self.sides.values():
            side.session.rounds = side.session.rounds[: max(0, len(side.session.rounds) - back)]
        try:
            yield from self.ask(text, files, settings)
        except UserError:
            for key, side in self.sides.items():
                side.session.rounds = kept[key]
            raise

    def clear(self) -> None:
        """Forget the conversation."""
        self.stop()
        for side in self.sides.values():
            side.session.reset()
            side.running, side.note, side.shown = None, "", None

    def compare(self, name: str) -> Iterator[Comparison]:
        """The last question of a side, answered by the router's choice and by every expert alone, greedily.

        Raises:
            ConfigError: nothing has been asked, or the model has no experts.
        """
        side = self.sides[name]
        if not side.num_experts:
            raise ConfigError(f"{name} has no experts to compare")
        images, turns = side.session.last_prompt()
        predictor = side.session.predictor
        found = Comparison(side.session.rounds[-1].question, dict.fromkeys([None, *range(side.num_experts)]))
        self._stopped.clear()
        yield found
        for expert in found.answers:
            with force_expert(predictor.loaded.model.language_model, expert):
                stream = predictor.stream(images, turns, max_new_tokens=side.session.decoding.max_new_tokens)
                with contextlib.closing(stream) as pieces:  # type: ignore[type-var]  # a generator
                    answer = ""
                    for piece in pieces:
                        answer += piece
                        if self._stopped.is_set():
                            break
            found.answers[expert] = answer
            yield found
            if self._stopped.is_set():
                return

    def _answer(self, question: str, files: Sequence[str]) -> Iterator[None]:
        self._stopped.clear()
        self.asked = Round(question, list(files))
        for side in self.sides.values():
            side.session.pending = list(files)
            dropped = side.session.make_room(question)
            side.note = f"the context is full: the oldest {count_of(dropped, 'question')} left" if dropped else ""
            side.running, side.shown = "", None
        yield
        counts = {name: len(side.session.rounds) for name, side in self.sides.items()}
        with contextlib.ExitStack() as opened:
            streams: dict[str, Generator[str, None, None]] = {}
            for name, side in self.sides.items():
                streams[name] = opened.enter_context(contextlib.closing(side.session.ask(question)))
            yield from self._stream(streams)
        for name, side in self.sides.items():
            if len(side.session.rounds) == counts[name]:  # stopped: the session keeps no answer that has not begun
                side.session.rounds.append(Round(question, list(side.session.pending)))
        self.asked = None
        for side in self.sides.values():
            side.session.pending = []
            self._route(side)
        yield

    def _stream(self, streams: dict[str, Generator[str, None, None]]) -> Iterator[None]:
        """Take pieces of all answers in turn."""
        started = last = time.monotonic()
        open_streams = dict(streams)
        while open_streams and not self._stopped.is_set():
            for name, pieces in list(open_streams.items()):
                side = self.sides[name]
                try:
                    side.running = (side.running or "") + next(pieces)
                except StopIteration:
                    del open_streams[name]
                    self._note_end(side, time.monotonic() - started, "")
            now = time.monotonic()
            if open_streams and now - last >= FRAME_SECONDS:
                last = now
                yield
        for name, pieces in open_streams.items():
            pieces.close()
            self._note_end(self.sides[name], time.monotonic() - started, ", stopped")

    def _note_end(self, side: Side, seconds: float, how: str) -> None:
        ids, _ = side.session.predictor.loaded.tokenizer.encode_with_offsets(side.running or "")
        parts = [f"{count_of(len(ids), 'token')} in {seconds:.1f} s{how}"]
        if side.session.expert is not None:
            parts.append(f"expert {side.session.expert} forced")
        side.note = " · ".join([*parts, *([side.note] if side.note else [])])
        side.running = None

    def _route(self, side: Side) -> None:
        last = side.session.rounds[-1]
        if not side.num_experts or not last.answer.strip():
            return
        images, _ = side.session.last_prompt()
        processor = side.session.predictor.loaded.image_processor
        try:
            side.shown = Shown(
                side.session.routing(),
                tuple(picture for image in as_images(images) for picture in shown_images(processor, image)),
                side.session.expert,
            )
        except UserError as error:  # such as a context that answer and prompt fill
            side.note += f" · no routing: {getattr(error, 'problem', None) or error}"

    def _apply(self, settings: Settings) -> None:
        """Give the settings to all sessions; if one refuses them, none has changed."""
        before = [(side.session, side.session.system, side.session.expert) for side in self.sides.values()]
        try:
            for side in self.sides.values():
                side.session.set_system(settings.system or None)
                side.session.set_expert(settings.expert if side.num_experts else None)
        except UserError:
            for session, system, expert in before:
                session.set_system(system)
                session.set_expert(expert)
            raise
        for side in self.sides.values():
            side.session.decoding = settings.decoding

    def _check_image(self, file: str) -> None:
        name = Path(file).name
        try:
            image = open_image(Path(file).absolute().as_uri(), self._policy, "image")
        except ApiError as error:
            raise DataError(f"{name}: {error.message}") from None
        image.close()


def count_experts(predictor: Predictor) -> int:
    """The experts that every layer has; 0 without a mixture."""
    config = active_config(predictor.loaded.model.language_model)
    return 0 if config is None else min(config.experts_by_layer or [config.num_experts])


def describe(predictor: Predictor) -> str:
    """A model in a few words."""
    loaded = predictor.loaded
    config = active_config(loaded.model.language_model)
    what = "no adapter" if loaded.adapter == "none" else "plain LoRA"
    if config is not None:
        what = f"MoLE, {shorten([count_of(config.num_experts, 'expert')])}"
    return f"{what} · {loaded.path.name}"
