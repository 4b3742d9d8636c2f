"""`llava-mole report`: scored runs compared in one table."""
