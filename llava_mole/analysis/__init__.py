"""What can be said about a run before it starts: its cost, and the defects of its data."""
