"""The multimodal model: vision tower -> projector -> scatter into the token embeddings -> language model.

Shapes: B samples, L tokens, D hidden size, V vocabulary, N images, P patches of an image, S image side, W tower width.
The data code has already expanded every `<image>` to its placeholder ids, so lengths do not change here. There are P of
them, or as many as `data.anyres` shows of an image in tiles; N then counts tiles.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from llava_mole.common.errors import DataError
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.model import packed_attention
from llava_mole.model.head_loss import head_losses
from llava_mole.model.multimodal_encoder import VisionTower
from llava_mole.model.multimodal_projector import ImageNewline, PixelShuffle, half_grid


class LlavaMole(nn.Module):
    """Composition of the three parts. `language_model` is a causal LM of transformers, or a PEFT model around one."""

    vision_tower: VisionTower
    projector: nn.Sequential
    language_model: Any

    def __init__(self, vision_tower: VisionTower, projector: nn.Sequential, language_model: nn.Module):
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model = language_model
        self.always_runs_tower = False
        """Whether the tower runs on a blank image where a batch has none: every rank has to where its weights are
        spread over them. While the tower trains, this is so in every training pass."""

    @property
    def num_image_tokens(self) -> int:
        """Positions an image takes in the sequence (P); of an image in tiles, those of the whole image."""
        rows, columns = self.image_grid
        return rows * columns + getattr(self.projector[-1], "extra_positions", 0)

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of an image, learned vectors around it excluded."""
        return half_grid(self.vision_tower.grid) if self._shuffles else self.vision_tower.grid

    @property
    def _shuffles(self) -> bool:
        return isinstance(self.projector[0], PixelShuffle)

    @property
    def ends_rows(self) -> bool:
        """Whether it sees images in tiles, whose rows end in a newline vector (`data.image_aspect_ratio: anyres`)."""
        return isinstance(self.projector[-1], ImageNewline)

    @property
    def causal_lm(self) -> Any:
        """The transformers model, without its PEFT wrapper."""
        model = self.language_model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def device(self) -> torch.device:
        return self._first_linear.weight.device

    @property
    def projector_input_width(self) -> int:
        """Width of the features that the projector's first layer takes."""
        return self._first_linear.in_features

    @property
    def _first_linear(self) -> nn.Linear:
        return cast(nn.Linear, self.projector[int(self._shuffles)])

    def encode_images(self, images_NCHW: torch.Tensor, image_grids: torch.Tensor | None = None) -> torch.Tensor:
        """Projected features [N, P, D] of images [N, 3, S, S], uint8 pixels or normalised floats.

        A projector with a newline vector gives P + 1 features, that vector last. With `image_grids` (int64 [N, 2]) the
        pixels are squares of patches, see `data.native`; the features behind those of an image's patches mean nothing.
        """
        return self.projector(self.vision_tower(images_NCHW, image_grids).to(self._first_linear.weight.dtype))

    def embed(
        self,
        ids_BL: torch.Tensor,
        images_NCHW: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        *,
        features: torch.Tensor | None = None,
        feature_index: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Input embeddings [B, L, D]: token embeddings, with image features at the placeholder positions.

        Features fill the placeholders in order: image 0 the first P, image 1 the next P, and so on. With
        `image_index` (int64 [M]) the m-th P placeholders show image `image_index[m]`: an image that several samples
        share is encoded once. With `feature_index` (int64 [n, 2]) the n-th placeholder shows one feature of one image,
        see `data.anyres`; `image_grids` goes to `encode_images`. `features` [N, P, D] are what that gave, instead of
        the images.

        Raises:
            DataError: The number of placeholders does not match the features.
        """
        is_image_BL = ids_BL == IMAGE_TOKEN_INDEX
        if hasattr(self.language_model, "peft_config"):
            from llava_mole.mole import note_images

            note_images(self.language_model, is_image_BL)
        shown = next((given for given in (image_index, images_NCHW, features) if given is not None), None)
        num_images = 0 if shown is None else shown.shape[0]
        num_placeholders = int(is_image_BL.sum())
        if feature_index is not None:
            if num_placeholders != len(feature_index):
                raise DataError(
                    f"a batch has {num_placeholders} image positions, but its images in tiles show "
                    f"{len(feature_index)} features; every <image> needs its own image"
                )
        elif num_placeholders != num_images * self.num_image_tokens:
            raise DataError(
                f"a batch has {num_placeholders} image positions but {num_images} images of "
                f"{self.num_image_tokens} features; every <image> needs its own image"
            )
        elif num_images and self.ends_rows:
            raise DataError("this model sees images in tiles; give their `feature_index` (`ImageProcessor.tiles`)")
        text_BLD = self.causal_lm.get_input_embeddings()(ids_BL.masked_fill(is_image_BL, 0))
        if images_NCHW is not None:
            features = self.encode_images(images_NCHW, image_grids)
        if features is not None:
            features_NPD = features.to(text_BLD.dtype)
            if image_index is not None:
                features_NPD = features_NPD[image_index]
            if feature_index is not None:
                features_NPD = features_NPD[feature_index[:, 0], feature_index[:, 1]]
            return text_BLD.masked_scatter(is_image_BL.unsqueeze(-1), features_NPD)
        in_training = self.training and torch.is_grad_enabled()
        if self.always_runs_tower or (in_training and self.vision_tower.trains):
            side = self.vision_tower.image_size
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=ids_BL.device)
            return text_BLD + 0.0 * self.encode_images(blank).sum().to(text_BLD.dtype)
        if in_training and self._first_linear.weight.requires_grad:
            # Without an image, a rank must still give the projector a (zero) gradient at the same place of the graph as
            # other ranks: gradient buckets are reduced by position, and a missing one would corrupt them or hang.
            zeros = self._first_linear.weight.new_zeros(1, 1, self._first_linear.in_features)
            layers = self.projector[int(self._shuffles) :]  # one token is enough, and no grid to shuffle
            return text_BLD + 0.0 * layers(zeros).sum().to(text_BLD.dtype)
        return text_BLD

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        images: torch.Tensor | None = None,
        *,
        feature_index: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        sample_lengths: Sequence[int] | None = None,
        loss_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token logits, or the losses of chosen positions.

        Args:
            input_ids: int64 [B, L], IMAGE_TOKEN_INDEX at image positions.
            attention_mask: bool [B, L], False at padding.
            images: uint8 or normalised float [N, 3, S, S] in the order of their placeholders, or None.
            feature_index: int64 [n, 2], for images in tiles or of native shape; see `embed`.
            image_grids: int64 [N, 2], for images of native shape; see `encode_images`.
            sample_lengths: for one row (B = 1) that holds several samples, their lengths, which add up to L. Each
                sample sees itself only, at positions that start from 0. `packed_attention.enable_packing` comes first.
            loss_mask: bool [B, L], the positions whose next token is supervised. The head runs there only.
            targets: int64 [n], the tokens that follow the n positions of `loss_mask`, in row-major order.

        Returns:
            Logits [B, L, V]; with `loss_mask` and `targets` the cross-entropies, float32 [n].

        Raises:
            ValueError: `sample_lengths` do not describe the row, or packing is not enabled: samples would leak.
        """
        inputs_BLD = self.embed(input_ids, images, feature_index=feature_index, image_grids=image_grids)
        arguments = self._decoder_arguments(attention_mask, sample_lengths)
        causal_lm = self.causal_lm
        if loss_mask is None or targets is None:
            return causal_lm(inputs_embeds=inputs_BLD, **arguments).logits
        hidden_BLD = causal_lm.get_decoder()(inputs_embeds=inputs_BLD, **arguments).last_hidden_state
        head = causal_lm.get_output_embeddings()
        softcap = getattr(causal_lm.config, "final_logit_softcapping", None)  # Gemma's, applied in its own forward
        return head_losses(
            head, hidden_BLD[loss_mask], targets, vocabulary=causal_lm.config.vocab_size, softcap=softcap
        )

    def _decoder_arguments(
        self, attention_mask_BL: torch.Tensor, sample_lengths: Sequence[int] | None
    ) -> dict[str, Any]:
        if sample_lengths is None:
            # Without padding, no mask: the attention kernels then take their causal fast path.
            mask = None if bool(attention_mask_BL.all()) else attention_mask_BL
            return {"attention_mask": mask, "use_cache": False}
        kernel = self.causal_lm.config._attn_implementation
        if attention_mask_BL.shape[0] != 1 or sum(sample_lengths) != attention_mask_BL.shape[1]:
            raise ValueError(
                f"sample_lengths {list(sample_lengths)} do not describe rows of shape "
                f"{tuple(attention_mask_BL.shape)}; packed samples go into one row and their lengths add up to it"
            )
        if kernel not in (packed_attention.NAME, "flash_attention_2", "flex_attention"):
            raise ValueError(
                f"the attention kernel {kernel!r} would let packed samples see each other; call "
                "packed_attention.enable_packing(model.causal_lm) first"
            )
        return packed_attention.packed_arguments(kernel, sample_lengths, attention_mask_BL.device)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        images: torch.Tensor | None = None,
        *,
        feature_index: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> torch.Tensor:
        """Continue left-padded prompts with a KV cache; greedy unless `do_sample=True` is given.

        Args:
            input_ids, attention_mask, images, feature_index, image_grids: as in `forward`, padded on the left.
            generate_kwargs: passed to transformers' `generate` (max_new_tokens, do_sample, temperature, ...).

        Returns:
            New token ids int64 [B, new], without the prompt.
        """
        if bool((~attention_mask[:, -1]).any()):
            raise DataError("generate() needs prompts padded on the left; a row ends in padding")
        return self.language_model.generate(
            inputs_embeds=self.embed(input_ids, images, feature_index=feature_index, image_grids=image_grids),
            attention_mask=attention_mask,
            **generate_kwargs,
        )
