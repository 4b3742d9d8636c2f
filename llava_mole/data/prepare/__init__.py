"""Published data sets and anyone's own data, as they lie on disk, turned into prepared sets: one module a source."""
