"""Registration of the method in PEFT under the string "MOLE"."""

from llava_mole.mole.config import PEFT_TYPE, MoleConfig
from llava_mole.mole.model import MoleModel

_TABLES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": MoleConfig,
    "PEFT_TYPE_TO_TUNER_MAPPING": MoleModel,
    "PEFT_TYPE_TO_PREFIX_MAPPING": MoleModel.prefix,
}


def register_mole() -> None:
    """Enter MoLE in PEFT's tables; calling it again changes nothing.

    PEFT's own `register_peft_method` accepts only names in its `PeftType` enumeration. That is a string enumeration,
    so its tables look a plain string up just as well.

    Raises:
        ImportError: PEFT keeps no such tables any more.
    """
    import peft.mapping

    for table, value in _TABLES.items():
        mapping = getattr(peft.mapping, table, None)
        if not isinstance(mapping, dict):
            raise ImportError(
                f"peft {peft.__version__} has no table peft.mapping.{table}, where MoLE registers itself; "
                "install a version of peft that this package names in its dependencies"
            )
        mapping[PEFT_TYPE] = value
