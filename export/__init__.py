"""Containers: the file formats, each packing the same codes."""
