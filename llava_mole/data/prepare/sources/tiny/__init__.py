"""The tiny world: small real data and small models, so that everything runs on a laptop without a network."""
