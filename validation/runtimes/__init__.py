"""What executes a container: one module per runtime, each filling validation.runtime.Runtime."""
