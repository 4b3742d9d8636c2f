"""The routing of an answer as HTML: patches over the image, coloured tokens, loads, a legend.

Everything is inline, so that a page needs nothing else; every text of a user or model is escaped.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image

from llava_mole.inference.token_routing import TokenRouting
from llava_mole.serve.overlay.files import NEWLINE, ROLES, color_of, ink_on, strength, view_name
from llava_mole.serve.web.visit import Comparison, Shown

_LEGIBLE = 12
"""Columns of patches up to which each patch shows its expert's number."""
_NAMES = {"image": "image patches", "prompt": "prompt tokens", "answer": "answer tokens"}


def routing_panel(shown: Shown, layer: int | None) -> str:
    """The whole panel for one layer (from 0), or for all of them together."""
    routing = shown.routing
    where = f"{len(routing.layers)} layers together" if layer is None else f"layer {layer}"
    about = f"{len(routing.roles)} tokens · {where}"
    if shown.forced is not None:
        about += f" · expert {shown.forced} is forced"
    parts = [f'<div class="mole-about">{about}</div>', legend(routing.num_experts, layer)]
    views = routing.views()
    left = "".join(
        _figure(overlay(routing.of_view(view), image, layer, view.grid), view_name(view, views))
        for view, image in zip(views, shown.images, strict=True)
    )
    right = (
        f"<h4>Answer</h4>{tokens(routing.part('answer'), layer)}"
        f"<h4>Prompt</h4>{tokens(routing.part('prompt'), layer)}"
        f"<h4>Load per expert</h4>{loads(routing, layer)}"
    )
    columns = f'<div class="mole-images">{left}</div><div class="mole-texts">{right}</div>' if left else right
    parts.append(f'<div class="mole-columns">{columns}</div>')
    return f'<div class="mole-routing">{"".join(parts)}</div>'


def legend(num_experts: int, layer: int | None) -> str:
    """The experts' colours and what strength means."""
    sure = "the share of layers that agree" if layer is None else "the router's probability for the expert (its gate)"
    chips = "".join(f'<span class="mole-chip" style="{_style(n)}">expert {n}</span>' for n in range(num_experts))
    return (
        f'<div class="mole-legend">{chips}<span class="mole-key">The stronger the colour, the higher '
        f"{sure}. Point at a patch or token to read it.</span></div>"
    )


def overlay(patches: TokenRouting, image: Image, layer: int | None, grid: tuple[int, int]) -> str:
    """An SVG of the image with every patch in the colour of its expert."""
    rows, columns = grid
    cell = 100 / columns
    cells = []
    for n, (expert, sure) in enumerate(zip(patches.of_layer(layer), patches.certainty(layer), strict=True)):
        row, column = divmod(n, columns)
        x, y = column * cell, row * cell
        title = f"row {row}, column {column}: expert {expert}, {100 * sure:.0f}%"
        opacity = strength(sure, patches.num_experts)
        cells.append(
            f'<rect x="{x:.3f}" y="{y:.3f}" width="{cell:.3f}" height="{cell:.3f}" fill="{color_of(expert)}" '
            f'fill-opacity="{opacity:.3f}" data-expert="{expert}"><title>{title}</title></rect>'
        )
        if columns <= _LEGIBLE:
            cells.append(f'<text x="{x + cell / 2:.3f}" y="{y + cell / 2:.3f}">{expert}</text>')
    return (
        f'<svg class="mole-overlay" viewBox="0 0 100 {rows * cell:.3f}" role="img" '
        f'aria-label="Experts of {rows} x {columns} patches">'
        f'<image href="{_data_address(image)}" width="100" height="{rows * cell:.3f}" preserveAspectRatio="none"/>'
        f"{''.join(cells)}</svg>"
    )


def tokens(routing: TokenRouting, layer: int | None) -> str:
    """A text, each token on the colour of its expert."""
    spans = []
    for piece, expert, sure in zip(routing.pieces, routing.of_layer(layer), routing.certainty(layer), strict=True):
        if not piece:  # it ends within a character, or begins the text
            continue
        title = f"expert {expert}, {100 * sure:.0f}%"
        share = 100 * strength(sure, routing.num_experts)
        spans.append(
            f'<span class="mole-token" style="{_style(expert)}--s:{share:.0f}%" data-expert="{expert}" '
            f'title="{title}">{escape(piece).replace(chr(10), NEWLINE + chr(10))}</span>'
        )
    return f'<div class="mole-tokens">{"".join(spans)}</div>'


def loads(routing: TokenRouting, layer: int | None) -> str:
    """Bars: each expert's share of the patches, of the prompt's tokens and of the answer's."""
    rows = []
    for role in ROLES:
        part = routing.part(role)
        if not part.roles:
            continue
        bars = "".join(
            f'<span style="{_style(expert)}width:{100 * share:.2f}%" title="expert {expert}: {100 * share:.1f}%">'
            f"{f'{100 * share:.0f}%' if share >= 0.09 else ''}</span>"
            for expert, share in enumerate(part.load(layer))
            if share > 0
        )
        rows.append(
            f'<div class="mole-load"><span class="mole-load-name">{_NAMES[role]}'
            f'<span class="mole-dim"> {len(part.roles)}</span></span><span class="mole-bar">{bars}</span></div>'
        )
    return "".join(rows)


def comparison(found: Comparison) -> str:
    """A table of the answers with every expert alone."""
    free = found.answers.get(None)
    rows = []
    for expert, answer in found.answers.items():
        name = "the router chooses" if expert is None else f"expert {expert} alone"
        chip = f'<span class="mole-chip" style="{_style(expert)}">{name}</span>' if expert is not None else name
        if answer is None:
            text, verdict = '<span class="mole-dim">…</span>', ""
        else:
            text = escape(answer) or '<span class="mole-dim">(empty)</span>'
            verdict = "" if expert is None or free is None else "same" if answer == free else "differs"
        rows.append(f'<tr><td>{chip}</td><td class="mole-answer">{text}</td><td class="mole-dim">{verdict}</td></tr>')
    return (
        f'<div class="mole-routing"><div class="mole-about">{escape(found.question)} · greedy answers</div>'
        f'<table class="mole-compare">{"".join(rows)}</table></div>'
    )


def hint(text: str) -> str:
    """A line in place of a picture that does not exist yet."""
    return f'<div class="mole-hint">{escape(text)}</div>'


def heading(names: Sequence[tuple[str, str]]) -> str:
    """The page's title with the models, `(name, description)`."""
    models = "".join(f'<span class="mole-model"><b>{escape(n)}</b> {escape(about)}</span>' for n, about in names)
    return f'<div class="mole-heading"><h1>LLaVA-MoLE</h1><div class="mole-models">{models}</div></div>'


def _figure(svg: str, name: str) -> str:
    caption = f"<figcaption>{name}</figcaption>" if name else ""
    return f"<figure>{svg}{caption}</figure>"


def _style(expert: int) -> str:
    color = color_of(expert)
    return f"--c:{color};--ink:{ink_on(color)};"


def _data_address(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
