"""A mixture of LoRA experts as a PEFT method: `get_peft_model(any_hf_causal_lm, MoleConfig(...))`.

Importing this package registers the method, which `PeftModel.from_pretrained` needs too.
"""

from llava_mole.mole.access import (
    active_config,
    collect_routing,
    disable_finite_check,
    force_expert,
    leave_balance_loss_to_caller,
    missing_input,
    note_images,
    prompt_decisions,
    set_prompt_decisions,
    set_routing_inputs,
)
from llava_mole.mole.config import MoleConfig
from llava_mole.mole.layer import ExpertLayer, MoleLinear, MoleMlp
from llava_mole.mole.linear import MoleExpertLinear
from llava_mole.mole.loss import balance_loss, mole_after_step, mole_auxiliary_loss, mole_drop_step, z_loss
from llava_mole.mole.model import MoleModel, find_tuner, register_mole
from llava_mole.mole.presets import PRESETS
from llava_mole.mole.routing import Routing, RoutingInputs, RoutingMeter, choice_counts, routing_load

register_mole()

__all__ = [
    "PRESETS",
    "ExpertLayer",
    "MoleConfig",
    "MoleExpertLinear",
    "MoleLinear",
    "MoleMlp",
    "MoleModel",
    "Routing",
    "RoutingInputs",
    "RoutingMeter",
    "active_config",
    "balance_loss",
    "choice_counts",
    "collect_routing",
    "disable_finite_check",
    "find_tuner",
    "force_expert",
    "leave_balance_loss_to_caller",
    "missing_input",
    "mole_after_step",
    "mole_auxiliary_loss",
    "mole_drop_step",
    "note_images",
    "prompt_decisions",
    "register_mole",
    "routing_load",
    "set_prompt_decisions",
    "set_routing_inputs",
    "z_loss",
]
