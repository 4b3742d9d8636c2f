"""What a directory or weight file holds."""
