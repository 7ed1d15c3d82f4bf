"""LoRA adapters: read, resolved against a base, merged."""
