"""`llava-mole report`: scored runs compared in one report."""
