"""What is worked out about runs: plans before them, pictures after them."""
