"""Weights become codes and scales here, exactly once."""
