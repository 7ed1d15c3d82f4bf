"""Core ML for the Neural Engine."""
