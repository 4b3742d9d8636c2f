"""LLaVA-1.5 with a mixture of experts, inside vLLM. Only vLLM imports this module. Needs a GPU; not run on one yet.

Everything but the experts is vLLM's own LLaVA: tower, projector, image processor, attention, caches. The weights are
those of `llava-mole convert RUN --to vllm`, whose config.json says where experts are and how they are chosen.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_mole.mole.static import StaticExperts
from llava_mole.serve.vllm.layers import StaticMlp, shard
from llava_mole.serve.vllm.weights import Destinations, local_layout


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaMoleForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA whose FFNs carry experts."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._layout = vllm_config.model_config.hf_config.mole_experts
        self._rank, self._size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        for path, layout in self._layout.items():
            parent = self.get_submodule(path.rpartition(".")[0])
            mlp = self.get_submodule(path)
            weight = next(mlp.parameters())
            experts = StaticExperts.of(
                local_layout(layout, self._size), device=weight.device, dtype=vllm_config.model_config.dtype
            )
            reduce = tensor_model_parallel_all_reduce if self._size > 1 else None
            setattr(parent, path.rpartition(".")[2], StaticMlp(mlp, experts, *([reduce] if reduce else [])))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the experts here and the rest as vLLM does. Raises ValueError if a tensor of an expert is missing."""
        experts = Destinations(self._layout)
        loaded = set(super().load_weights(experts.others(weights, self._put)))
        experts.check()
        return loaded | experts.loaded

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        parameter = self.get_parameter(name)
        parameter.data.copy_(shard(name.rpartition(".")[2], tensor, self._rank, self._size))
