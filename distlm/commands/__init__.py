"""What the verbs of `distlm` do, one subject a file; `distlm.cli` parses their options."""
