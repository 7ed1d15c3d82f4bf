"""What tokenizer.json says: ids, pieces, the pre-tokenizer's kind, chat template."""
