"""What tokenizer.json or tokenizer.model says: ids, pieces, pre-tokenizer, chat template."""
