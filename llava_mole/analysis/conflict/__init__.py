"""`llava-mole conflict`: do the gradients of a mixture's sources pull the shared weights apart?"""
