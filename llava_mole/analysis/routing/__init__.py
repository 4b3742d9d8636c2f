"""`llava-mole routing`: what the routers of a mixture of experts do, and what their decisions are worth."""
