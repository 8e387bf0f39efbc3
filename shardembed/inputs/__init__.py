"""What users pass as ids, and how raw values become ids."""
