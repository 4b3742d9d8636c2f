"""One conversation of the chat: its rounds with their images, and what is sent to the model."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_mole.common.errors import ConfigError, ContextError, DataError, value_errors_as
from llava_mole.common.files import refuse_existing, write_json
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Turn, with_system
from llava_mole.data.images import open_image
from llava_mole.inference.batching import check_room, encode_prompt, image_tokens
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.inputs import ImagesLike
from llava_mole.inference.predictor import Predictor
from llava_mole.inference.token_routing import TokenRouting, route_answer
from llava_mole.mole import force_expert

ROOM_FOR_ANSWER = 8
"""The part of the context (an eighth) that is kept free for an answer, unless `max_new_tokens` is less."""


@dataclass
class Round:
    """A question with the images that come with it, and its answer."""

    question: str
    images: list[str] = field(default_factory=list)
    answer: str = ""


class Session:
    """A conversation with a model.

    Args:
        images: Files that belong to the first question, and to the first one after `reset`.
    """

    def __init__(self, predictor: Predictor, images: Sequence[str], decoding: Decoding) -> None:
        self.predictor, self.decoding = predictor, decoding
        self.expert: int | None = None
        """The expert that every token uses; None: those that the router chooses."""
        self.system: str | None = None
        """The system text; None: the template's own."""
        self._own_template = predictor.template
        self._first_images = list(images)
        self.rounds: list[Round] = []
        self.pending = list(images)
        """Images of the next question."""

    def ask(self, question: str) -> Generator[str, None, None]:
        """The pieces of the answer, after which the round is part of the conversation.

        Close the iterator to stop the answer. What there is of it counts; a round without any is forgotten.

        Raises:
            DataError: as `Predictor.stream`; the conversation is then as before.
        """
        new = Round(question, list(self.pending))
        images, turns = _prompt([*self.rounds, new])
        pieces = self.predictor.stream(
            images,
            turns,
            max_new_tokens=self.decoding.max_new_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
        )
        return self._record(new, pieces)

    def _record(self, new: Round, pieces: Iterator[str]) -> Generator[str, None, None]:
        ended = False
        with force_expert(self.predictor.loaded.model.language_model, self.expert):
            try:
                for piece in pieces:
                    new.answer += piece
                    yield piece
                ended = True
            except DataError:
                new.answer = ""
                raise
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()  # waits until the model has stopped, which still uses the expert
                if ended or new.answer:
                    self.rounds.append(new)
                    self.pending = []

    def make_room(self, question: str) -> int:
        """Drop the oldest rounds until the question fits into the context. Returns how many were dropped.

        Their images move to the oldest round that stays.

        Raises:
            PromptError: it does not fit alone, or cannot be asked at all.
        """
        wanted = min(self.decoding.max_new_tokens, self.predictor.loaded.context_length // ROOM_FOR_ANSWER)
        rounds = [*self.rounds, Round(question, list(self.pending))]
        for dropped in range(len(rounds)):
            left = [Round(r.question, list(r.images), r.answer) for r in rounds[dropped:]]
            left[0].images = [image for r in rounds[: dropped + 1] for image in r.images]
            images, turns = _prompt(left)
            alone = len(left) == 1
            try:
                shown = image_tokens(self.predictor.loaded, images, 0)
                ids = encode_prompt(self.predictor.loaded, self.predictor.template, turns, shown, 0)
                check_room(self.predictor.loaded, len(ids) + (0 if alone else wanted - 1), 0)
            except ContextError:
                if alone:
                    raise
                continue
            self.rounds, self.pending = left[:-1], left[-1].images
            return dropped
        raise AssertionError("the last round either fits or raises")

    def add_image(self, name: str) -> None:
        """Show this image with the next question. Raises DataError if it is not an image file."""
        check_image(name)
        self.pending.append(name)

    def reset(self) -> None:
        """Forget the conversation. The images of the start come with the next question again."""
        self.rounds, self.pending = [], list(self._first_images)

    def take_back(self) -> str:
        """Remove the last round and return its question. Raises ConfigError if there is none."""
        if not self.rounds:
            raise ConfigError("nothing has been asked yet")
        last = self.rounds.pop()
        self.pending = [*last.images, *self.pending]
        return last.question

    def set_system(self, text: str | None) -> None:
        """Replace the system text; None: the template's own. Raises ConfigError if there is no place for one."""
        self.predictor.template = self._own_template if text is None else with_system(self._own_template, text)
        self.system = text

    def set_expert(self, expert: int | None) -> None:
        """Let all tokens use one expert; None frees the router. Raises ConfigError if there is no such expert."""
        with value_errors_as(ConfigError), force_expert(self.predictor.loaded.model.language_model, expert):
            self.expert = expert

    def routing(self) -> TokenRouting:
        """The experts of the last question and answer. Raises ConfigError or PromptError if there are none."""
        if not self.rounds:
            raise ConfigError("there is no answer yet whose routing could be shown")
        if not self.rounds[-1].answer:
            raise ConfigError("the last answer is empty, so it has no tokens whose routing could be shown")
        images, turns = self.last_prompt()
        with force_expert(self.predictor.loaded.model.language_model, self.expert):
            return route_answer(self.predictor, images, turns, self.rounds[-1].answer)

    def last_prompt(self) -> tuple[ImagesLike, list[Turn]]:
        """What the last question was to the model: images, and the turns up to it. Raises ConfigError without one."""
        if not self.rounds:
            raise ConfigError("nothing has been asked yet")
        return _prompt(self.rounds)

    def save(self, path: Path) -> None:
        """Write the conversation as a record of LLaVA's form. Raises ConfigError if the file exists already."""
        if not self.rounds:
            raise ConfigError("nothing has been asked yet, so there is nothing to save")
        refuse_existing(path, overwrite=False)
        images = [image for each in self.rounds for image in each.images]
        conversations = []
        for each in self.rounds:
            text = each.question
            if DEFAULT_IMAGE_TOKEN not in text:
                text = f"{DEFAULT_IMAGE_TOKEN}\n" * len(each.images) + text
            conversations += [{"from": "human", "value": text}, {"from": "gpt", "value": each.answer}]
        record = {
            "id": path.stem,
            **({"image": images[0] if len(images) == 1 else images} if images else {}),
            "conversations": conversations,
            "model": str(self.predictor.loaded.path),
            "template": self.predictor.template.name,
            "system": self.system,
            "expert": self.expert,
        }
        write_json(path, [record])


def check_image(name: str) -> None:
    """Raise DataError for a URL or a file that is not an image."""
    if "://" in name:
        raise DataError(f"--image-file {name}: addresses are not opened; download the image and give its path")
    open_image(name)


def _prompt(rounds: Sequence[Round]) -> tuple[ImagesLike, list[Turn]]:
    """The images and turns of a conversation whose last question is to be answered, or has been."""
    images = [image for each in rounds for image in each.images]
    later = any(each.images for each in rounds[1:])
    turns: list[Turn] = []
    for n, each in enumerate(rounds):
        text = each.question
        # The images of a first question get their places from the predictor.
        if later and DEFAULT_IMAGE_TOKEN not in text:
            text = f"{DEFAULT_IMAGE_TOKEN}\n" * len(each.images) + text
        turns.append(Turn("user", text))
        if n + 1 < len(rounds):
            turns.append(Turn("assistant", each.answer))
    return (images[0] if len(images) == 1 else images or None), turns
