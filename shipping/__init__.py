"""From a recipe to a bundle: source, texts, forecast, and one target of an export at a time."""
