"""A conversation as token ids and labels, by the tokenizer's own chat template."""
