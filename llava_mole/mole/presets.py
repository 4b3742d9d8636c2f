"""The presets: named options of `MoleConfig`, with the equation that defines each and its source.

The field defaults follow the text of the LLaVA-MoLE paper (Chen et al. 2024, arXiv 2401.16160). docs/related-methods.md
describes the methods of others in full, with the commits of their code, and names what differs here.

In the equations a linear is `y = W x`, expert k adds `B_k A_k x` with s = alpha / R, and p is the softmax of the
router's logits. Sizes, dropout and coefficients are those of the published runs.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {}
"""What each preset changes in the field defaults."""

PRESETS["paper"] = {}
"""`y = W x + s B_k A_k x`, k = argmax of one router per FFN; plain LoRA on attention. arXiv 2401.16160, Eq. 3-8."""

PRESETS["released"] = {"router_bias": True, "dropout": 0.05, "balance_layers": "pooled"}
"""The same as the authors' code computes it. `forwchen/LLaVA-MoLE`."""

PRESETS["coupled"] = {"expert_scale": "straight_through", "balance_scale": "switch", "balance_group": "global_batch"}
"""Ours: the language-model loss trains the router, and load is balanced over the whole batch."""

PRESETS["best"] = {"shared_r": 8}
"""Ours: `y = W x + s (B_k A_k x + B_u A_u x)` with an expert u that every token uses."""

PRESETS["by-image"] = {
    "granularity": "sequence", "sequence_tokens": "image", "expert_scale": "prob_times_k", "balance_scale": "switch",
    "balance_group": "global_batch", "balance_coef": 1e-3,
}  # fmt: skip
"""Ours: `y = W x + s K p_k B_k A_k x`, k = argmax p, p of the mean logits over the sample's image (its prompt without
one): one decision for a sample in each FFN. For vision-language models; docs/conflict.md."""

PRESETS["by-source"] = {**PRESETS["by-image"], "source_coef": 1.0}
"""Ours: `by-image` with the cross-entropy between p and the sample's source added to the loss. It needs the source of
each sample in training, which a run knows from its mixture, and nothing in inference; docs/conflict.md."""

_TOP_2 = {"top_k": 2, "expert_scale": "topk_renorm"}
_DENSE_LINEAR = {"router_scope": "linear", "mode": "dense"}
_SWITCH = {"balance_scale": "switch", "balance_group": "micro_batch"}

PRESETS["hydralora"] = {
    **_DENSE_LINEAR, "shared_a": True, "r": 4, "alpha": 32.0, "num_experts": 4, "dropout": 0.05,
    "attention_modules": [], "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + s sum_k p_k B_k A x`: one A, a router in every linear of the FFN. Tian et al. 2024, arXiv 2404.19245;
`Clin0212/HydraLoRA`."""

PRESETS["asymlora"] = {
    "shared_a": True, "mode": "dense", "router_bias": True, "r": 32, "alpha": 64.0, "num_experts": 3, "dropout": 0.05,
    "balance_coef": 0.05, "balance_layers": "pooled",
}  # fmt: skip
"""`y = W x + s sum_k p_k B_k A x`, p of one router per FFN; loss `0.05 mean_n sum_k f_k P_k`. Wei et al. 2025, arXiv
2502.20035; `Clin0212/HydraLoRA`, `MLLM-HydraLoRA`."""

PRESETS["coin-moelora"] = {
    **_DENSE_LINEAR, "attention_experts": True, "r": 16, "alpha": 32.0, "num_experts": 8, "init_std": 0.01,
    "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + (alpha / (K R)) sum_k p_k B_k A_k x` for the whole alpha 256, so s = alpha / R with alpha 32 here. Chen et
al. 2024, arXiv 2403.08350; `zackschen/CoIN`."""

PRESETS["moelora-task"] = {
    "router_scope": "model", "attention_experts": True, "mode": "dense", "granularity": "task", "task_dim": 64,
    "r": 2, "alpha": 4.0, "num_experts": 8, "init_std": 0.01, "dropout": 0.1, "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + s sum_k w_k B_k A_k x`, `w = softmax(G e_task)` once for the model. It needs `num_tasks`. The whole alpha
32 is divided by the whole rank K R = 16. Liu et al. 2023, arXiv 2310.18339; `liuqidong07/MOELoRA-peft`."""

PRESETS["loramoe"] = {
    **_DENSE_LINEAR, "r": 4, "alpha": 32.0, "num_experts": 8, "dropout": 0.05, "attention_modules": [],
    "balance_kind": "groups", "balance_group": "micro_batch", "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + s sum_k p_k B_k A_k x`; loss `c sum over linears of var(Z) / mean(Z)^2` with `Z[n, k] = (1 +- delta) sum_t
p_k`. As in the published script `balance_coef` (c) and `group_delta` (delta) are 0; set both and give `source`. Dou et
al. 2023, arXiv 2312.09979; `Ablustrund/LoRAMoE`."""

PRESETS["mocle"] = {
    "router_scope": "linear", "attention_experts": True, "attention_modules": ["q_proj", "v_proj"], "ffn_modules": [],
    "granularity": "task", "num_tasks": 64, "task_dim": 384, "router_bias": True, "temperature": 0.05,
    "logit_noise": 0.1, "expert_scale": "prob_squared", "shared_r": 8, "shared_scale": "complement",
    "r": 8, "alpha": 32.0, "num_experts": 4, "dropout": 0.1, "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + s (p_k^2 B_k A_k x + (1 - p_k) B_u A_u x)`, `p = softmax((G e_c + g) / tau)`, c the cluster of a sample's
instruction, given as `task`. Gou et al. 2023, arXiv 2312.12379; `gyhdog99/mocle`, whose code squares p."""

PRESETS["octavius"] = {
    "router_scope": "model", "attention_experts": True, "ffn_modules": [], "granularity": "sequence", **_TOP_2,
    "r": 32, "alpha": 32.0, "num_experts": 4, "dropout": 0.1, "router_init_std": 1.0, "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + sum_k w_k B_k A_k x`, w the two largest of `p = softmax(mean over the prompt of W_g e_t)` over their sum,
e_t the token embeddings; alpha / R is always 1. Chen et al. 2023, arXiv 2311.02684; `OpenGVLab/LAMM`."""

PRESETS["mixlora"] = {
    "mix": "ffn_output", **_TOP_2, "r": 16, "alpha": 32.0, "num_experts": 8, "dropout": 0.05, "router_init_std": 0.02,
    "balance_coef": 2e-3, **_SWITCH, "balance_layers": "pooled",
}  # fmt: skip
"""`y = sum over the two best k of (p_k / sum p) FFN_k(x)`; loss `1e-3 K sum_k f_k P_k` with f that sums to 2, so 2e-3
here, where f sums to 1. Li et al. 2024, arXiv 2404.15159; `TUDB-Labs/MixLoRA`, `TUDB-Labs/MoE-PEFT`."""

PRESETS["mola"] = {
    "router_scope": "linear", "attention_experts": True, **_TOP_2, "experts_by_layer": [2, 4, 6, 8], "r": 8,
    "alpha": 16.0, "dropout": 0.05, "balance_coef": 1e-3, **_SWITCH, "balance_layers": "blocks",
}  # fmt: skip
"""`y = W x + s sum over the two best k of (p_k / sum p) B_k A_k x`, K by layer; loss `1e-3 sum over layers of K sum_k
f_k P_k`, over the seven linears of a layer together. Gao et al. 2024, arXiv 2402.08562; `GCYZSL/MoLA`."""

PRESETS["molora"] = {
    **_DENSE_LINEAR, "attention_experts": True, "r": 4, "alpha": 16.0, "num_experts": 10, "init_std": 0.02,
    "router_init_std": 0.02, "balance_coef": 0.0,
}  # fmt: skip
"""`y = W x + s sum_k p_k B_k A_k x`, a router in every linear. Zadouri et al. 2023, arXiv 2309.05444;
`for-ai/parameter-efficient-moe`."""
