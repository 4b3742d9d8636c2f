"""`llava-mole plan`: memory, FLOPs and hours of a run before it starts."""
