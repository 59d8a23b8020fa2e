"""What a trained run is used for: `distlm predict` and `distlm evaluate`."""
