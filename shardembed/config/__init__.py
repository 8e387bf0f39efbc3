"""What users write and read beside tensors: YAML and JSON with positions, numbers, paths, texts, and extras that may be absent."""
