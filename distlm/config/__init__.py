"""What a run is: `schema` says it, `load` reads it from YAML, `resolve` does the arithmetic that follows from it."""
