"""The shipped file, judged in its real runtime."""
