"""Miniature vision towers of every layout with random weights, and what each is compared with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from worlds.foreign_models import randomize

SIZE, PATCH, WIDTH, BLOCKS = 24, 8, 16, 3
HALF = (0.5, 0.5, 0.5)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
Hidden = Callable[[torch.Tensor, int], torch.Tensor]
"""(normalised images [N, 3, S, S], block from 0) -> output of that block with all tokens [N, T, W]."""


@dataclass(frozen=True)
class TowerCase:
    """One row of the table in docs/models.md."""

    name: str
    make: Callable[[Path], Hidden]
    """Writes a directory that `model.vision_tower.name` takes, and returns what the original computes."""
    activation: str
    prefix: int
    tower: str
    """The table's words for the tower."""
    files: str
    features: str
    """What the features are compared with."""
    pixels: str
    """What the pixels are compared with; empty: CLIP's are compared elsewhere."""


def _hooked(model: torch.nn.Module, blocks: Any, run: Callable[[torch.Tensor], Any]) -> Hidden:
    """The output of a block of a complete model, caught as it passes."""

    def hidden(images: torch.Tensor, block: int) -> torch.Tensor:
        caught: list[Any] = []
        handle = blocks[block].register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        with torch.no_grad():
            run(images)
        handle.remove()
        return caught[0][0] if isinstance(caught[0], tuple) else caught[0]

    return hidden


def _transformers(model: Any, prefix: int = 0) -> Hidden:
    """`hidden_states` of a complete model; block n gives number n + 1, because number 0 is the embeddings."""

    def hidden(images: torch.Tensor, block: int) -> torch.Tensor:
        with torch.no_grad():
            return model(images, output_hidden_states=True).hidden_states[block + 1]

    return hidden


def _sizes(**more: Any) -> dict[str, Any]:
    heads = {"num_hidden_layers": BLOCKS, "num_attention_heads": 2, "hidden_size": WIDTH}
    return {**heads, "image_size": SIZE, "patch_size": PATCH, "intermediate_size": 40, **more}


def _save(model: Any, directory: Path, processor: Any) -> Any:
    randomize(model)
    model.double().eval()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def clip(directory: Path) -> Hidden:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    model = CLIPVisionModel(CLIPVisionConfig(**_sizes(), hidden_act="quick_gelu"))
    square = {"height": SIZE, "width": SIZE}
    return _transformers(_save(model, directory, CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)))


def siglip(directory: Path) -> Hidden:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(2)
    model = SiglipVisionModel(SiglipVisionConfig(**_sizes()))
    return _transformers(_save(model, directory, SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})))


def siglip_whole(directory: Path) -> Hidden:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(3)
    text = _sizes(vocab_size=32, max_position_embeddings=8)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_sizes()))
    # As the published SigLIP2 directories of fixed resolution: bilinear.
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=2)
    return _transformers(_save(model, directory, processor).vision_model)


def siglip2(directory: Path) -> Hidden:
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(4)
    sizes = {key: value for key, value in _sizes().items() if key != "image_size"}
    model = Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=(SIZE // PATCH) ** 2))
    processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=(SIZE // PATCH) ** 2)
    _save(model, directory, processor)
    side = SIZE // PATCH

    def hidden(images: torch.Tensor, block: int) -> torch.Tensor:
        patches = torch.stack(
            [  # patch by patch, pixel by pixel, colour by colour
                torch.stack(
                    [
                        image[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].permute(1, 2, 0).flatten()
                        for r in range(side)
                        for c in range(side)
                    ]
                )
                for image in images
            ]
        )
        mask = torch.ones(patches.shape[:2], dtype=torch.int64)
        shapes = torch.tensor([[side, side]] * len(images))
        with torch.no_grad():
            out: Any = model(patches, mask, shapes, output_hidden_states=True)
        return out.hidden_states[block + 1]

    return hidden


def _dinov2(directory: Path, kind: str, **more: Any) -> Hidden:
    import transformers

    torch.manual_seed(5)
    sizes = {key: value for key, value in _sizes(**more).items() if key != "intermediate_size"}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    square = {"height": SIZE, "width": SIZE}
    processor = transformers.BitImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square, **IMAGENET)
    return _transformers(_save(model, directory, processor))


def dinov2(directory: Path) -> Hidden:
    # Trained at 40 pixels, used at 24: position embeddings are interpolated.
    return _dinov2(directory, "Dinov2", image_size=40)


def dinov2_registers(directory: Path) -> Hidden:
    return _dinov2(directory, "Dinov2WithRegisters", num_register_tokens=4, use_swiglu_ffn=True)


def _timm(directory: Path, name: str, build: Callable[..., Any]) -> Hidden:
    """An open_clip directory of the hub with a timm trunk, which timm first has to know."""
    from timm.models import is_model, register_model

    if not is_model(name):
        build.__name__, build.__module__ = name, __name__
        register_model(build)
    from open_clip.timm_model import TimmModel

    torch.manual_seed(6)
    model = TimmModel(name, embed_dim=WIDTH, image_size=SIZE, pool="", proj="none")
    randomize(model)
    model.double().eval()
    directory.mkdir(parents=True)
    vision = {"image_size": SIZE, "timm_model_name": name, "timm_pool": "", "timm_proj": "none"}
    pixels = {"size": [SIZE, SIZE], "mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": pixels}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    state = {f"visual.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file({**state, "logit_scale": torch.ones(1)}, directory / "open_clip_model.safetensors")
    return _hooked(model, model.trunk.blocks, model.trunk.forward_features)


def timm_siglip(directory: Path) -> Hidden:
    def build(pretrained: bool = False, **options: Any) -> Any:
        from timm.models.vision_transformer import VisionTransformer

        return _with_cfg(
            VisionTransformer(
                img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, class_token=False,
                **{**_known(options), "global_pool": "map", "num_classes": 0},
            )
        )  # fmt: skip

    return _timm(directory, "vit_miniature_siglip", build)


def timm_eva(directory: Path) -> Hidden:
    def build(pretrained: bool = False, **options: Any) -> Any:
        from timm.models.eva import Eva

        return _with_cfg(
            Eva(
                img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, qkv_fused=False,
                swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(3, 3), num_reg_tokens=2,
                **{**_known(options), "global_pool": "token", "num_classes": 0},
            )
        )  # fmt: skip

    return _timm(directory, "eva02_miniature", build)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("drop_rate",)}


def _with_cfg(model: Any) -> Any:
    model.default_cfg = {"mean": HALF, "std": HALF, "interpolation": "bicubic"}
    return model


TOWERS = [
    TowerCase(
        "timm-siglip", timm_siglip, "gelu", 0, "SigLIP, SigLIP2 of open_clip (timm trunk)", "open_clip",
        "output of timm's block in the complete trunk", "open_clip's preprocessing",
    ),
    TowerCase(
        "timm-eva", timm_eva, "swiglu", 3, "EVA02, PE and other ViTs of timm in open_clip", "open_clip",
        "output of timm's block in the complete trunk, class and register tokens dropped", "open_clip's preprocessing",
    ),
    TowerCase(
        "clip", clip, "quick_gelu", 1, "`CLIPVisionModel`, `CLIPModel`", "Hugging Face",
        "`hidden_states` of `CLIPVisionModel`, class token dropped", "`CLIPImageProcessor`",
    ),
    TowerCase(
        "siglip", siglip, "gelu_pytorch_tanh", 0, "`SiglipVisionModel`", "Hugging Face",
        "`hidden_states` of `SiglipVisionModel`", "`SiglipImageProcessor`",
    ),
    TowerCase(
        "siglip-whole", siglip_whole, "gelu_pytorch_tanh", 0, "`SiglipModel` (SigLIP2 at a fixed resolution too)",
        "Hugging Face", "`hidden_states` of its vision model", "`SiglipImageProcessor`, bilinear",
    ),
    TowerCase(
        "siglip2", siglip2, "gelu_pytorch_tanh", 0, "`Siglip2VisionModel` (NaFlex) at its square", "Hugging Face",
        "`hidden_states` of `Siglip2VisionModel` on a full grid of patches", "`Siglip2ImageProcessor`",
    ),
    TowerCase(
        "dinov2", dinov2, "gelu", 1, "`Dinov2Model`, position embeddings interpolated", "Hugging Face",
        "`hidden_states` of `Dinov2Model`, class token dropped", "`BitImageProcessor` without its margin (256 to 224)",
    ),
    TowerCase(
        "dinov2-registers", dinov2_registers, "swiglu", 5, "`Dinov2WithRegistersModel`, SwiGLU", "Hugging Face",
        "`hidden_states` of `Dinov2WithRegistersModel`, class and register tokens dropped",
        "`BitImageProcessor` without its margin",
    ),
]  # fmt: skip
OWN_ROWS = [
    (
        "CLIP of open_clip (its own ViT)", "open_clip",
        "`hidden_states` of `CLIPVisionModel` with the same weights, class token dropped",
        "LLaVA-1.5 with `CLIPImageProcessor`",
    ),
]  # fmt: skip
"""Rows whose tests stand in test_multimodal_encoder.py and in tests/golden."""


def table() -> str:
    """The table of docs/models.md."""
    rows = [*OWN_ROWS, *((case.tower, case.files, case.features, case.pixels) for case in TOWERS)]
    lines = ["| tower | layout | features equal | pixels equal |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
