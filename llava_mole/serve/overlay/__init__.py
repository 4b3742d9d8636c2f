"""Which expert got which patch and token, for one prompt: as files, and as the pictures that the web page shows."""
