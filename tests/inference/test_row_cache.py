"""The cache of rows that join and leave: its columns against plain lists, and decoding with it against `generate`."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from llava_mole.inference.row_cache import RowCache, check_cache

HEADS, SIZE, LAYERS = 2, 3, 2
SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 6},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**SMALL, "max_position_embeddings": 64},
    "opt": {
        "vocab_size": 60, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
}  # fmt: skip


def prefilled(rows: list[list[float]], longest: int) -> DynamicCache:
    """A cache padded on the left with NaN; the states of a token are copies of its number."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        states = torch.full((len(rows), HEADS, longest, SIZE), float("nan"))
        for n, row in enumerate(rows):
            states[n, :, longest - len(row) :] = torch.tensor(row)[None, :, None] + layer
        cache.update(states, -states, layer)
    return cache


def test_it_holds_what_plain_lists_hold() -> None:
    rng, cache, rows = random.Random(0), RowCache(), []
    for step in range(400):
        if rng.random() < 0.3 and len(rows) < 6:
            new = [[float(step * 1000 + n * 100 + i) for i in range(rng.randrange(1, 90))] for n in range(2)]
            cache.add(prefilled(new, max(map(len, new)) + rng.randrange(3)), [len(row) for row in new])
            rows += new
        if rng.random() < 0.15 and rows:
            n = rng.randrange(len(rows))
            cache.remove(n)
            rows[n] = rows[-1]
            rows.pop()
        if not rows:
            continue
        column = torch.arange(len(rows)).float()[:, None, None, None].expand(-1, HEADS, 1, SIZE) + step
        for layer in range(LAYERS):
            cache.update(column - 7 + layer, column - 7, layer)  # a pass that failed
            keys, values = cache.update(column + layer, -column - layer, layer)
        mask = cache.mask(torch.device("cpu"))
        rows = [[*row, float(step + n)] for n, row in enumerate(rows)]
        assert cache.width + 1 == max(map(len, rows)) == keys.shape[2]
        assert (mask is None) == (len({len(row) for row in rows}) == 1)
        for n, row in enumerate(rows):
            expected = torch.tensor(row)[None, :, None].expand(HEADS, -1, SIZE) + LAYERS - 1
            assert torch.equal(keys[n, :, -len(row) :], expected)
            assert torch.equal(values[n, :, -len(row) :], -expected)
            assert bool(keys[n].isfinite().all())  # padding never shows what was there before
            assert mask is None or mask[n].tolist() == [False] * (keys.shape[2] - len(row)) + [True] * len(row)
        cache.advance()
        assert cache.lengths == [len(row) for row in rows]
        n = rng.randrange(len(rows))
        assert torch.equal(cache.row(n).layers[0].keys[0, 0, :, 0], torch.tensor(rows[n]))
    assert cache.nbytes < 400_000


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_are_decoded_like_single_ones(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], pad_token_id=0, bos_token_id=1, eos_token_id=None)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = [torch.randint(3, 60, (1, length)) for length in (3, 11, 7, 2, 15)]
    lengths = [12, 5, 9, 14, 6]
    with torch.inference_mode():
        expected = [
            model.generate(p, max_new_tokens=n, do_sample=False)[0, p.shape[1] :].tolist()
            for p, n in zip(prompts, lengths, strict=True)
        ]
        found: list[list[int]] = [[] for _ in prompts]
        cache, running = RowCache(), []
        for step in range(40):
            if step % 2 == 0 and step // 2 < len(prompts):
                new = step // 2
                own = DynamicCache()
                logits = model(prompts[new], past_key_values=own, use_cache=True).logits
                cache.add(own, [prompts[new].shape[1]])
                found[new].append(int(logits[0, -1].argmax()))
                running.append(new)
            if not running:
                break
            logits = model(
                torch.tensor([[found[n][-1]] for n in running]),
                attention_mask=cache.mask(torch.device("cpu")),
                position_ids=torch.tensor(cache.lengths)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits
            cache.advance()
            for n, token in zip(running, logits[:, -1].argmax(dim=-1).tolist(), strict=True):
                found[n].append(token)
            for place in reversed(range(len(running))):
                if len(found[running[place]]) >= lengths[running[place]]:
                    cache.remove(place)
                    running[place] = running[-1]
                    running.pop()
    assert found == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


def test_other_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps DynamicSlidingWindowLayer between the steps of decoding"):
        check_cache(_sliding())


def _sliding() -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    return cache
