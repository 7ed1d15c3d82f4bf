"""Quantize a language model once, ship those very codes to every phone."""
